"""Curves over steps as SVG text, drawn with matplotlib (imported only when a curve is drawn).

Place in the flow: `run_curves` turns `metrics.jsonl` into `Panel`s. Knows nothing of what the numbers mean. A curve of
many points is thinned to what a page can show: the envelope of each stretch stays, so that a single spike does.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS: Final = 1200
"""Of one curve; more would not show at this width."""
INK: Final = "#1c2430"
SOFT: Final = "#8a93a0"
COLOURS: Final = ("#2458b8", "#d0701f", "#2f8f63", "#a0458f", "#7a6a1d", "#4a90a4")
_RC: Final[Any] = {
    "font.size": 9.5,
    "axes.edgecolor": "#b4bac3",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e7eaee",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#5c6675",
    "ytick.color": "#5c6675",
    "legend.frameon": False,
    "svg.hashsalt": "qwenimg_dist",  # the same numbers give the same file
}


Steps = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """Non-finite values are drawn as gaps."""
    colour: str | None = None
    """`None` takes the next of the palette."""
    dashed: bool = False
    strong: bool = False
    smooth: float = 0.0
    """Half-life in points of an exponential mean, the raw values faint behind it. 0 draws the values."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes."""

    title: str
    lines: tuple[Line, ...]
    log: bool = False
    """Logarithmic axis of values; ignored if a value is not positive."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line at a step: a change of phase."""

    step: int
    label: str


def draw(panels: Sequence[Panel], marks: Sequence[Mark] = (), *, columns: int = 1, height_in: float = 3.4) -> str:
    """Panels in rows of `columns` -> one SVG, 10 inches wide."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(10, height_in * rows), layout="constrained")
        all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(all_axes, panels):
            _draw_panel(axes, panel, marks)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def smoothed(values: npt.NDArray[np.float64], half_life: float) -> npt.NDArray[np.float64]:
    """Exponential mean with bias correction, over finite values; the others keep the mean so far."""
    keep = 0.5 ** (1.0 / half_life)
    mean = weight = 0.0
    result = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            mean = keep * mean + (1 - keep) * float(value)
            weight = keep * weight + (1 - keep)
        if weight > 0:
            result[i] = mean / weight
    return result


def thinned(steps: Steps, values: Values) -> tuple[Steps, Values]:
    """At most `MAX_POINTS` points: least and greatest of each stretch, in the order they came; the last as it is."""
    if len(values) <= MAX_POINTS:
        return steps, values
    least, greatest = _reduced(np.fmin, values), _reduced(np.fmax, values)
    starts = _starts(len(values))
    bins = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))
    first_least = np.full(len(starts), len(values))
    first_greatest = first_least.copy()
    for place, extreme in ((first_least, least), (first_greatest, greatest)):
        hits = np.flatnonzero(values == extreme[bins])
        np.minimum.at(place, bins[hits], hits)
    gaps = np.isnan(least)
    kept = np.concatenate([first_least[~gaps], first_greatest[~gaps], starts[gaps], [len(values) - 1]])
    kept = np.unique(kept)
    return steps[kept], values[kept]


def averaged(steps: Steps, values: Values) -> tuple[Steps, Values]:
    """At most `MAX_POINTS` points: means over stretches of equal length, each at its last step; NaN where all are."""
    if len(values) <= MAX_POINTS:
        return steps, values
    starts, finite = _starts(len(values)), np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return steps[np.append(starts[1:], len(values)) - 1], means


def _starts(num: int) -> npt.NDArray[np.int64]:
    """Where each of `MAX_POINTS // 2` stretches begins."""
    return np.linspace(0, num, MAX_POINTS // 2, endpoint=False).astype(np.int64)


def _reduced(function: np.ufunc, values: Values) -> Values:
    reduced: Values = function.reduceat(values, _starts(len(values)))
    return reduced


def _draw_panel(axes: Axes, panel: Panel, marks: Sequence[Mark]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    palette = iter(COLOURS * (1 + len(panel.lines) // len(COLOURS)))
    for line in panel.lines:
        _draw_line(axes, line, line.colour or next(palette), marks)
    positive = all(np.all(line.values[np.isfinite(line.values)] > 0) for line in panel.lines)
    if panel.log and positive:
        _log_axis(axes)
    axes.margins(x=0.01, y=0.16 if marks else 0.05)  # room for the names of the phases
    axes.set_xlabel("step")
    _draw_marks(axes, marks)
    if len(panel.lines) > 1:
        # Beside the title if it is short, else under the axes: nowhere does it hide a curve.
        style: dict[str, Any] = {"ncols": 10, "fontsize": 8.5, "borderaxespad": 0.0}
        if len(panel.lines) < 4:
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), **style)
        else:
            axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.17), **style)


def _draw_line(axes: Axes, line: Line, colour: str, marks: Sequence[Mark]) -> None:
    style: dict[str, Any] = {"color": colour, "linestyle": (0, (5, 3)) if line.dashed else "-"}
    width = 2.0 if line.strong else 1.3
    marker = "o" if len(line.steps) < 25 and not line.smooth and not line.dashed else None
    steps, values = thinned(line.steps, line.values)
    if line.smooth:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        steps, values = averaged(line.steps, line.values)
        half_life = line.smooth * len(values) / len(line.values)
        # The mean begins anew with a phase: it would drag the old level into the new one.
        cuts = np.searchsorted(steps, [mark.step for mark in marks])
        values = np.concatenate([smoothed(part, half_life) for part in np.split(values, cuts)])
    axes.plot(steps, values, label=line.label, linewidth=width, marker=marker, markersize=3.2, **style)


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if high / low < 100:  # few decades: powers of ten alone would leave one tick or none
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def _draw_marks(axes: Axes, marks: Sequence[Mark]) -> None:
    for mark in marks:
        axes.axvline(mark.step, color=SOFT, linewidth=1, linestyle=(0, (2, 2)), zorder=0.5)
        axes.annotate(
            mark.label,
            (mark.step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="#5c6675",
        )
