"""Diagrams of calibration and anomaly scores."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from lightning_genseg.errors import GenSegError

_KNOWN_BLUE, _GAP_RED, _ANOMALY_ORANGE = "#3b6ea5", "#c8442f", "#e8870e"


def reliability_diagram(
    table: NDArray[np.floating[Any]], title: str = "Reliability"
) -> Image.Image:
    """Draw how often a model is right against how sure it is: on the diagonal it is calibrated.

    Args:
        table: of `metrics.CalibrationError.reliability`: for each of the equally wide bins of
            confidence its mean confidence, accuracy (NaN if empty) and share of the pixels.
        title: drawn above.

    Raises:
        GenSegError: all bins are empty.
    """
    confidence, accuracy, share = np.asarray(table, dtype=np.float64).T
    some = np.isfinite(accuracy) & (share > 0)
    if not some.any():
        raise GenSegError(
            "all bins of the reliability table are empty: update the metric with labelled pixels "
            "first."
        )
    figure, (upper, lower) = _figure((5, 6), rows=(3.2, 1))
    width = 1 / len(share)
    centers = (np.arange(len(share)) + 0.5) * width
    bars: dict[str, Any] = {"width": width, "edgecolor": "white", "linewidth": 0.8}
    upper.bar(centers[some], accuracy[some], color="#9dbfe0", label="accuracy", **bars)
    # Hatched: seen on white, where the model is too sure, and on blue, where not sure enough.
    upper.bar(
        centers[some],
        (confidence - accuracy)[some],
        width,
        accuracy[some],
        facecolor="none",
        edgecolor=_GAP_RED,
        hatch="////",
        linewidth=0.8,
        label="gap to confidence",
    )
    upper.plot([0, 1], [0, 1], "--", color="#404040", linewidth=1, label="calibrated")
    error = float(np.sum(share[some] * np.abs(accuracy - confidence)[some]))
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=title)
    upper.legend(loc="upper left", title=f"ECE {error:.2%}", edgecolor="none")
    upper.tick_params(labelbottom=False)
    lower.bar(centers, share, color="#8a8f99", **bars)
    lower.set(xlim=(0, 1), xlabel="confidence", ylabel="share of pixels")
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _render(figure)


def anomaly_histogram(
    scores: NDArray[np.floating[Any]],
    known: NDArray[np.integer[Any]],
    anomalous: NDArray[np.integer[Any]],
    threshold: float | None = None,
    name: str = "anomaly score",
    title: str = "Scores of known and anomalous pixels",
) -> Image.Image:
    """Draw how the anomaly scores of known and of anomalous pixels spread, as shares of each.

    The axis goes from the 0.1st to the 99.9th percentile of either; what lies beyond counts to the
    outermost bars. The shares are on a logarithmic axis where a single bar would dwarf all others.

    Args:
        scores: K scores.
        known: how many known pixels have each of them.
        anomalous: likewise anomalous pixels.
        threshold: drawn as a line, with the shares above it, if it is finite.
        name: of the score, for the axis.
        title: drawn above.

    Raises:
        GenSegError: there is no known or no anomalous pixel with a finite score.
    """
    scores = np.asarray(scores, dtype=np.float64)
    finite = np.isfinite(scores)
    groups = {"known": np.asarray(known), "anomalous": np.asarray(anomalous)}
    for kind, counts in groups.items():
        if not counts[finite].any():
            raise GenSegError(
                f"no {kind} pixel has a finite score: there are no two histograms to compare."
            )
    ranges = [_percentiles(scores[finite], counts[finite]) for counts in groups.values()]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    if threshold is not None and not np.isfinite(threshold):
        threshold = None
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 81)
    figure, (axes,) = _figure((6.4, 4.4))
    colors = (_KNOWN_BLUE, _ANOMALY_ORANGE)
    highest = 0.0
    for (kind, counts), color in zip(groups.items(), colors, strict=True):
        total = counts.sum()
        heights, _ = np.histogram(np.clip(scores, low, high), edges, weights=counts / total)
        highest = max(highest, float(heights.max()))
        label = f"{kind} ({_count(int(total))} pixels)"
        axes.stairs(heights, edges, fill=True, color=color, alpha=0.4)
        axes.stairs(heights, edges, color=color, linewidth=1.3, label=label)
    if highest > 0.3:
        axes.set_yscale("log")
        axes.set_ylim(1e-5, 1)
    else:
        axes.set_ylim(0, 1.08 * highest)
    if threshold is not None:
        above = (f"{_share_above(scores, c, threshold):.1%}" for c in groups.values())
        label = "threshold, above it\n{} of known\n{} of anomalous".format(*above)
        axes.axvline(threshold, color="#202020", linestyle="--", linewidth=1.4, label=label)
    axes.set(xlim=(low, high), xlabel=name, ylabel="share of pixels", title=title)
    if highest <= 0.3:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(fontsize=9, edgecolor="none")
    return _render(figure)


def _share_above(
    scores: NDArray[np.floating[Any]], counts: NDArray[np.integer[Any]], threshold: float
) -> float:
    return float(counts[scores > threshold].sum() / counts.sum())


def _percentiles(
    scores: NDArray[np.floating[Any]], counts: NDArray[np.integer[Any]]
) -> tuple[float, float]:
    """0.1st and 99.9th percentile of scores that occur `counts` times."""
    order = np.argsort(scores)
    share = np.cumsum(counts[order]) / counts.sum()
    low, high = np.searchsorted(share, [0.001, 0.999])
    return float(scores[order[low]]), float(scores[order[min(high, len(order) - 1)]])


def _count(number: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def _figure(size: tuple[float, float], rows: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """Figure apart from pyplot, whose state belongs to the user."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=size, dpi=100, layout=layout, facecolor="white")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=list(rows))[:, 0].tolist()
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
        part.set_axisbelow(True)
        part.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    return figure, axes


def _render(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")
