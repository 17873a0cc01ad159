"""What GMMSeg costs a whole network at inference, against softmax on the same network: one ratio.

    python experiments/benchmarks/inference.py

The two models take turns on the same image, so that whatever else the machine does falls on both;
the ratio is that of the medians. Weights are random, which changes no time. Paper: 5.6 %
(ResNet-101 DeepLabV3+, one RTX 3090, batch 1).
"""

import argparse
import statistics
import time

import torch

from lightning_genseg import EMOptions, GMMSeg, SoftmaxSegmenter


def seconds(model: torch.nn.Module, image: torch.Tensor) -> float:
    start = time.perf_counter()
    model(image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--decoder", default="deeplabv3plus")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    image = torch.rand(1, 3, args.size, args.size, device=args.device)
    network = {"encoder": args.encoder, "decoder": args.decoder}
    models = {
        "softmax": SoftmaxSegmenter(args.classes, **network),
        "GMMSeg": GMMSeg(args.classes, em=EMOptions(memory_size=1), **network),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model.eval().to(args.device)
            seconds(model, image)  # the first pass allocates
        for _ in range(args.repeats):
            for name, model in models.items():
                times[name].append(seconds(model, image))
    medians = {name: statistics.median(values) for name, values in times.items()}
    overhead = 100 * (medians["GMMSeg"] / medians["softmax"] - 1)
    print(
        f"{args.encoder} {args.decoder}, {args.classes} classes, {args.size} x {args.size}, "
        f"{args.device}: softmax {1000 * medians['softmax']:.0f} ms, "
        f"GMMSeg {1000 * medians['GMMSeg']:.0f} ms, {overhead:+.1f} %"
    )


if __name__ == "__main__":
    main()
