"""What everything costs, as ratios of one run: all benchmarks, and the table of README.md.

    python experiments/benchmarks/run.py                 # under fifteen minutes on two cores
    python experiments/benchmarks/run.py --device cuda
    python experiments/benchmarks/run.py --only agmm episodic_em   # replaces their rows

Two things that are compared take turns, and the least processor time of each counts, so that other
programs disturb little; on a GPU the least wall time. The numbers mean something as ratios only.
"""

import argparse
import datetime
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import data
import episodes
import growth
import heads
import networks
import prediction
import torch
from measure import Row

README = Path(__file__).with_name("README.md")
MARKERS = tuple(f"<!-- {word} of the table that run.py writes -->" for word in ("begin", "end"))


def benchmarks(device: str, repeats: int, crop: int) -> dict[str, Callable[[], Iterable[Row]]]:
    """All of them by name; those without a device are the CPU's."""
    return {
        "gmmseg": lambda: networks.gmmseg(device, repeats, crop),
        "agmm": lambda: networks.agmm(device, repeats),
        "gss": lambda: networks.gss(device, repeats),
        "gaussian_head": lambda: heads.gaussian_head(device, repeats),
        "token_head": lambda: heads.token_head(device, repeats),
        "mixture_memory": heads.mixture_memory,
        "episodic_em": lambda: episodes.episodic_em(repeats),
        "episode_share": lambda: episodes.episode_share(repeats, device),
        "predict": lambda: prediction.predict(device, repeats),
        "start": lambda: data.start(repeats),
        "cache": lambda: data.cache(repeats),
        "anomaly": data.anomaly,
        "growth": lambda: growth.growth(device, repeats),
    }


def machine(device: str) -> str:
    """What this ran on, and when."""
    threads = f"{torch.get_num_threads()} threads of {platform.machine()}"
    name = torch.cuda.get_device_name() if device != "cpu" else threads
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    return f"{name}, torch {torch.__version__}, commit {commit}, {datetime.date.today()}"


def line(row: Row) -> str:
    """As Markdown."""
    digits = 2 if abs(row.ratio) < 10 else 0
    value = f"{row.ratio:.{digits}f}" if abs(row.ratio) >= 0.1 else f"{row.ratio:.2g}"
    obstacle = "" if row.is_met else row.obstacle
    return f"| {row.what} | {row.goal} | {value} | {row.detail} | {obstacle} |"


def write(rows: Iterable[Row], note: str, whole: bool) -> None:
    """Put the table into README.md: a new one, or rows in the place of those of the same name."""
    before, rest = README.read_text().split(MARKERS[0])
    old, after = rest.split(MARKERS[1])
    lines = {} if whole else {x.split("|")[1].strip(): x for x in old.splitlines() if "|" in x}
    titles = "| what | goal | measured | | what stands in the way |"
    head = {"what": titles, "---": "| --- | ---: | ---: | --- | --- |"}
    lines = {**head, **lines, **{row.what: line(row) for row in rows}}
    text = "\n".join(lines.values())
    README.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{note}\n\n{MARKERS[1]}{after}")


def main() -> None:
    """Run them and write the table."""
    parser = argparse.ArgumentParser(description="All benchmarks, as ratios of one run.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each comparison")
    parser.add_argument("--crop", type=int, default=512, help="side of GMMSeg's crops")
    parser.add_argument("--only", nargs="+", choices=sorted(benchmarks("cpu", 1, 1)), default=None)
    parser.add_argument("--keep", action="store_true", help="leave the table of README.md alone")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    began, rows = time.perf_counter(), []
    chosen = benchmarks(arguments.device, arguments.repeats, arguments.crop)
    for name, benchmark in chosen.items():
        if arguments.only is None or name in arguments.only:
            for row in benchmark():
                print(f"{row.what}: {row.ratio:.3g} (goal {row.goal}; {row.detail})", flush=True)
                rows.append(row)
    minutes = (time.perf_counter() - began) / 60
    which = "All rows" if arguments.only is None else f"Last {', '.join(arguments.only)}"
    note = f"{which}: {machine(arguments.device)}, in {minutes:.0f} minutes."
    print(note)
    if not arguments.keep:
        write(rows, note, arguments.only is None)


if __name__ == "__main__":
    main()
