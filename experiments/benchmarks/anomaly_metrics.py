"""Memory and error of the anomaly metrics on the pixels of a test set like Lost & Found's.

    python experiments/benchmarks/anomaly_metrics.py            # 275 images of 1024 x 2048, some
    minutes python experiments/benchmarks/anomaly_metrics.py --images 5

Scores are drawn as GMMSeg's and softmax's lie: log-densities around -80 nats and 1 - p close to 0;
0.3 % of the pixels are anomalous. The exact values are scikit-learn's, on the first images only
(`--exact`), since it sorts every pixel and holds several copies.
"""

import argparse
import time
from pathlib import Path

import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from lightning_genseg.metrics import AnomalyMetrics

HEIGHT, WIDTH = 1024, 2048


def draw(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(HEIGHT, WIDTH, generator=generator) < 0.003).long()
    noise = torch.randn(HEIGHT, WIDTH, generator=generator) + 2 * labels
    return (5 * noise - 80 if kind == "log-density" else torch.sigmoid(4 * noise - 8)), labels


def peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def exact(kind: str, images: int) -> dict[str, float]:
    pairs = [draw(kind, seed) for seed in range(images)]
    scores, labels = (torch.cat([p[i].flatten() for p in pairs]).numpy() for i in (0, 1))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {
        "AUROC": roc_auc_score(labels, scores),
        "AP": average_precision_score(labels, scores),
        "FPR95": false[(true >= 0.95).argmax()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and error of the anomaly metrics.")
    parser.add_argument("--images", type=int, default=275)
    parser.add_argument("--exact", type=int, default=5, help="images for scikit-learn")
    args = parser.parse_args()
    print("| scores | images | million pixels | s per image | added memory, MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    few: dict[str, dict[str, float]] = {}
    for kind in ("log-density", "one minus p"):
        draw(kind, 0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes the present
        before, seconds = peak_resident(), 0.0
        metrics = AnomalyMetrics()
        for image in range(args.images):
            scores, labels = draw(kind, image)
            start = time.perf_counter()
            metrics.update(scores, labels)
            seconds += time.perf_counter() - start
            if image + 1 == args.exact:
                few[kind] = {name: value.item() for name, value in metrics.compute().items()}
        metrics.compute()
        added = (peak_resident() - before) / 2**20
        pixels = args.images * HEIGHT * WIDTH / 1e6
        print(
            f"| {kind} | {args.images} | {pixels:.0f} | {seconds / args.images:.2f} | {added:.0f} |"
        )
    print(f"\n| scores, {args.exact} images | metric | ours | scikit-learn | difference |")
    print("| --- | --- | ---: | ---: | ---: |")
    for kind, measured in few.items():
        for name, value in exact(kind, args.exact).items():
            difference = measured[name] - value
            print(f"| {kind} | {name} | {measured[name]:.6f} | {value:.6f} | {difference:+.1e} |")


if __name__ == "__main__":
    main()
