"""Draw figures as SVG, with text as text.

matplotlib is imported where something is drawn: most commands draw nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from app.evaluation.learning_curve import Fitted

SHOWN_CLASSES = 10  # lines that can be told apart


def curves(rows: Sequence[Mapping[str, float]], series: Mapping[str, str], label: str) -> str:
    """Draw lines over the epochs; `series`: column of metrics.csv → its name in the legend."""

    return svg(lambda axes: draw_curves(axes, rows, series, label))


def draw_curves(
    axes: Axes, rows: Sequence[Mapping[str, float]], series: Mapping[str, str], label: str
) -> None:
    """Draw the lines of `curves` on given axes."""
    from matplotlib.ticker import MaxNLocator

    for key, name in series.items():
        points = [(row["epoch"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="epoch", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(axes)


def precision_recall(precision: Mapping[str, NDArray[np.float64]]) -> str:
    """Draw precision (101,) at recall 0, 0.01, … 1, a line a class; of many, the first ones."""

    def draw(axes: Axes) -> None:
        for name, values in list(precision.items())[:SHOWN_CLASSES]:
            # matplotlib leaves labels that start with _ out of the legend
            axes.plot(np.linspace(0, 1, 101), values, label=f" {name[:40]}")
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        _legend(axes)

    return svg(draw)


def learning_curve(
    images: Sequence[int], values: Sequence[float], fitted: Fitted, most: int, label: str
) -> str:
    """Draw a figure over numbers of images: each run a point, the fitted curve and its band."""

    def draw(axes: Axes) -> None:
        x = np.geomspace(min(images), most, 100)
        low, high = fitted.bounds(x)
        axes.fill_between(x, low, high, alpha=0.2)
        axes.plot(x, fitted.law(x), label="fitted")
        axes.plot(images, values, "o", markersize=4, label="runs")
        axes.set(xlabel="training images", ylabel=label, xscale="log", ylim=(0, 1))
        _legend(axes)

    return svg(draw)


def reliability(scores: NDArray[np.float64], hits: NDArray[np.bool_], threshold: float) -> str:
    """Draw the share of right detections by their score; calibrated scores lie on the diagonal."""

    def draw(axes: Axes) -> None:
        bins = np.clip((scores * 10).astype(int), 0, 9)
        counts = np.bincount(bins, minlength=10)
        right = np.bincount(bins, weights=hits, minlength=10)
        shown = counts > 0
        middles = np.arange(10) / 10 + 0.05
        axes.bar(middles[shown], right[shown] / counts[shown], width=0.09, color="#4a7ebb")
        for middle, share, count in zip(
            middles[shown], right[shown] / counts[shown], counts[shown], strict=True
        ):
            axes.annotate(str(count), (middle, share), ha="center", va="bottom", fontsize=8)
        axes.plot([0, 1], [0, 1], color="#999", linewidth=1)
        axes.axvline(threshold, color="#b00020", linewidth=1, linestyle="--")
        axes.set(xlabel="score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.08))

    return svg(draw)


# Of the axes in a figure: left, bottom, width, height; above them stands a power of ten.
PLACE = (0.13, 0.15, 0.84, 0.77)


def _legend(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def svg(draw: Callable[[Axes], None]) -> str:
    """Return what `draw` draws on axes of their own."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",  # the same ids, and so the same page, each time
        "text.parse_math": False,  # names come from outside: a $ in one must not start a formula
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5, 3.2))
        draw(figure.add_axes(PLACE))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()
