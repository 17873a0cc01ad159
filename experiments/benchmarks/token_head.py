"""What GSS' token head costs, at once and in parts, against a softmax classifier.

    python experiments/benchmarks/token_head.py                        # the CPU, a map of 64 x 64
    python experiments/benchmarks/token_head.py --size 128 --device cuda

A training step is forward, loss and backward of the head alone, on features of 512 channels at
stride 4: 2 048 channels before 8 192 tokens as in GSS' code, with the logits all at once or 2^26,
2^24 and 2^22 at a time; for softmax a 1x1 convolution and the cross-entropy of logits at the size
of the image. Every case has a process of its own; peak memory is the rise above what was there
before the step, on the CPU of the resident set.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lightning_genseg import TokenDecoderOptions
from lightning_genseg.methods.gss.head import TokenHead
from lightning_genseg.networks.losses import pixel_cross_entropy

FEATURES = 512


def measure(case: str, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a step, the median, and its peak memory in MB."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = (args.batch, args.size, args.size)
    features = torch.randn(shape[0], FEATURES, *shape[1:], device=args.device, requires_grad=True)
    tokens = torch.randint(args.tokens, shape, device=args.device)
    labelled = torch.rand(shape, device=args.device) > args.ignored
    if case == "softmax":
        classifier = nn.Conv2d(FEATURES, args.classes, 1).to(args.device)
        mask = (tokens % args.classes).masked_fill(~labelled, 255)
        mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)

        def step() -> None:
            scores = F.interpolate(classifier(features), mask.shape[1:], mode="bilinear")
            pixel_cross_entropy(scores, mask).backward()
    else:
        options = TokenDecoderOptions(fused_channels=FEATURES, logits_at_once=int(case))
        head = TokenHead(args.tokens, options).to(args.device)

        def step() -> None:
            head.cross_entropy(features, tokens, labelled).backward()

    cuda = args.device != "cpu"
    times, peaks = [], []
    for _ in range(args.repeats + 1):  # the first only warms up
        features.grad = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            before = resident()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        peaks.append((torch.cuda.max_memory_allocated() if cuda else resident()) - before)
    return statistics.median(times[1:]), peaks[0] / 2**20


def resident() -> int:
    """Highest resident set since it was last reset, in bytes (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of GSS' token head.")
    parser.add_argument("--size", type=int, default=64, help="side of the map of features")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=150, help="of softmax")
    parser.add_argument("--ignored", type=float, default=0.1, help="share of cells without labels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"{args.threads} CPU threads"
    print(
        f"{name}, torch {torch.__version__}; batch {args.batch}, map {args.size} x {args.size}, "
        f"{args.tokens} tokens, {args.classes} classes, {args.ignored:.0%} ignored"
    )
    print("| head | logits at once | step s | peak MB |\n| --- | ---: | ---: | ---: |")
    for case in ("softmax", str(2**40), str(2**26), str(2**24), str(2**22)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, peak = pool.submit(measure, case, args).result()
        label = (
            ""
            if case == "softmax"
            else "all"
            if case == str(2**40)
            else f"2^{int(case).bit_length() - 1}"
        )
        print(
            f"| {'softmax' if not label else 'tokens'} | {label} | {seconds:.2f} | {peak:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
