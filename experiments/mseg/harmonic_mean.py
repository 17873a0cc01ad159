"""Harmonic mean of the mIoU of several test sets, n / sum(1 / mIoU): MSeg, GSS (Table 6).

    python experiments/mseg/harmonic_mean.py RUN/voc RUN/camvid RUN/kitti ...

with folders in which `genseg test` has left a metrics.json, or these files.
"""

import argparse
import json
from pathlib import Path
from statistics import harmonic_mean


def read_score(path: Path) -> float:
    """The mIoU of a metrics.json; ValueError if there is none."""
    path = path / "metrics.json" if path.suffix != ".json" else path
    if not path.is_file():
        raise ValueError(f"'{path}' does not exist: give a folder that genseg test has written.")
    score = json.loads(path.read_text(encoding="utf-8")).get("mIoU")
    if score is None:
        raise ValueError(f"'{path}' holds no mIoU: test the model first.")
    return float(score)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Harmonic mean of the mIoU of several tests.")
    parser.add_argument("tests", nargs="+", type=Path, help="folders with a metrics.json, or these")
    paths = parser.parse_args().tests
    try:
        scores = [read_score(path) for path in paths]
    except ValueError as error:
        parser.error(str(error))
    for score, path in zip(scores, paths, strict=True):
        print(f"{score:.4f}  {path}")
    print(f"{harmonic_mean(scores):.4f}  harmonic mean of {len(scores)}")
