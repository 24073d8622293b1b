"""How every figure of the project looks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Floats = npt.NDArray[np.float64]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's colours, which the colour-blind can tell apart."""

DASHES = ("-", "--", "-.", ":")
"""Tell lines apart where colours run out, or are printed in grey."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
"""Likewise."""

FIELDS = "viridis"
"""Colours of fields: even in brightness, also in grey."""

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    # a tick's label may stand half outside its panel, which the layout does not always foresee
    "figure.constrained_layout.w_pad": 0.14,
    "svg.hashsalt": "rnngrad",  # or its ids, and so the file, would be new every time
}
"""For ``matplotlib.rc_context``."""

HIDDEN = r"$\log_{10}\,\|\partial L/\partial h_t\|$"
CELL = r"$\log_{10}\,\|\partial L/\partial c_t\|$"
TIME = "time step $t$"
STEP = "training step (updates)"

EXACT_ZERO = "a norm of exactly 0"

PIXELS = (600, 400)
"""Columns and rows of a field at most; more cannot be seen, and takes long to draw."""
POINTS = 1500
"""Points of a line at most."""


def series(number: int, points: int = 0) -> dict[str, Any]:
    """Colour, dashes and marker of the line ``number``, told apart also without the colour.

    Args:
        number: From 0.
        points: Of the line; some eight of them get the marker. 0 for no markers.
    """
    looks: dict[str, Any] = {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[(number + number // len(COLOURS)) % len(DASHES)],
    }
    if points:
        # not all at the same place, so that markers of lines on top of each other can be seen
        every = max(1, points // 8)
        looks |= {
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 4,
            "markevery": (number * every // 5 % every, every),
        }
    return looks


def shades(count: int) -> list[Any]:
    """Light to dark: the first training step to the last."""
    return list(matplotlib.colormaps[FIELDS](np.linspace(0.85, 0, max(count, 1))))


def moments(count: int, at_most: int = 6) -> npt.NDArray[np.int64]:
    """Indices of ``count`` records to show: the first, the last, more of the early ones."""
    if count == 0:
        return np.empty(0, np.int64)
    return np.unique(np.geomspace(1, count, at_most).round().astype(np.int64) - 1)


def spread(count: int, at_most: int) -> list[int]:
    """Indices of at most ``at_most`` of ``count`` things, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, at_most))})


def grid(
    count: int, *, width: float = 9.6, height: float = 2.9, across: int = 3
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels in rows of at most ``across``, and these panels.

    Args:
        count: Of panels; the last row may have fewer.
        width: Of the figure, in inches, also with fewer panels.
        height: Of a row.
        across: Panels in a row at most.
    """
    columns = min(count, across)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def profile(axis: Axes, x: Any, values: Floats, **looks: Any) -> None:
    """A line through what is finite; where a norm is exactly 0 (``-inf``), ticks at the bottom."""
    x, values = np.asarray(x), np.asarray(values, dtype=np.float64)
    if len(x) > POINTS:
        kept = spread(len(x), POINTS)
        x, values = x[kept], values[kept]
    finite = np.isfinite(values)
    # a value between two gaps is a line of one point, which only a marker shows
    alone = finite & ~np.r_[False, finite[:-1]] & ~np.r_[finite[1:], False]
    if alone.any() and "marker" not in looks:
        axis.plot(x[alone], values[alone], "o", markersize=3, color=looks.get("color"))
    axis.plot(x, np.where(finite, values, np.nan), **looks)
    if (zero := np.isneginf(values)).any():
        named = EXACT_ZERO in axis.get_legend_handles_labels()[1]
        axis.plot(
            x[zero], np.full(int(zero.sum()), 0.02), "|", color=looks.get("color"), markersize=5,
            transform=axis.get_xaxis_transform(), clip_on=False,
            label=None if named else EXACT_ZERO,
        )  # fmt: skip


def field(
    axis: Axes, step: Any, values: Floats, low: float, high: float, *, colours: str = FIELDS
) -> QuadMesh:
    """A field ``[S, n]`` from left to right and from bottom to top, where ``step [S]`` says.

    Grey is beyond the end of a sequence that is shorter than others, black an exact 0 (``-inf``).
    """
    step = np.asarray(step, dtype=np.float64)
    columns = spread(len(step), PIXELS[0])
    rows = spread(values.shape[1], PIXELS[1])
    shown = values[columns][:, rows].T
    edges_x, edges_y = _edges(step[columns]), _edges(np.array(rows, dtype=np.float64))
    axis.set_facecolor("0.85")
    drawn = axis.pcolormesh(
        edges_x, edges_y, np.ma.masked_invalid(shown), cmap=colours, vmin=low, vmax=high,
        rasterized=True,
    )  # fmt: skip
    if (zero := np.isneginf(shown)).any():
        axis.pcolormesh(
            edges_x, edges_y, np.ma.masked_array(np.zeros(shown.shape), ~zero), cmap="gray",
            vmin=0, vmax=1, rasterized=True,
        )  # fmt: skip
    return drawn


def colour_range(fields: Sequence[Floats], decades: float = 24) -> tuple[float, float]:
    """What the darkest and the brightest colour stand for: whole numbers, the same for all."""
    finite = np.concatenate([values[np.isfinite(values)].ravel() for values in fields])
    if len(finite) == 0:
        return -1.0, 0.0
    high = float(np.ceil(finite.max()))
    return max(float(np.floor(finite.min())), high - decades), high


def legend_below(figure: Figure, axes: Sequence[Axes], columns: int = 4) -> None:
    """One legend for all panels, under them, where it covers nothing."""
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        longest = max(map(len, named))
        room = max(1, int(figure.get_figwidth() * 13 / (longest + 7)))  # some 13 letters an inch
        figure.legend(
            list(named.values()), list(named), loc="outside lower center",
            ncols=min(columns, room, len(named)),
        )  # fmt: skip


def logarithmic(axis: Axes) -> None:
    """A logarithmic scale whose ticks can be read also where it is less than a decade or two."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if low > 0 and high / low < 2:
        middle = math.sqrt(low * high)
        axis.set_ylim(middle / 1.45, middle * 1.45)
    plain_ticks(axis)


def plain_ticks(axis: Axes) -> None:
    """Numbers instead of powers at the ticks of a short logarithmic axis."""
    low, high = axis.get_ylim()
    if low > 0 and high / low < 50:
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if high / low > 5 else range(1, 10)))
        axis.yaxis.set_minor_formatter("{x:.3g}")


@contextmanager
def not_scaled_by(axis: Axes) -> Iterator[None]:
    """What is drawn inside does not change the panel's limits."""
    before = axis.dataLim.frozen()
    yield
    axis.dataLim.set(before)
    axis.autoscale_view()


def wrapped(text: str, width: int = 46) -> str:
    """A long name in lines."""
    return "\n".join(textwrap.wrap(text, width)) or text


def plain(text: str) -> str:
    r"""A name that somebody chose, as it is: ``$`` is no formula, ``_`` hides it from no legend.

    >>> plain("cost_$5_$^"), plain("_old") == "_old"
    ('cost_\\$5_\\$^', False)
    """
    escaped = text.replace("$", r"\$")
    # matplotlib leaves labels that start with an underscore out of legends
    return "\u200b" + escaped if escaped.startswith("_") else escaped


def legend_beside(axis: Axes, **options: Any) -> None:
    """A legend to the right of a panel."""
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, **options)


def binned(x: Any, values: Floats, bins: int = 500) -> tuple[Floats, Floats, Floats, Floats]:
    """Median, least and largest of long series by bins of one size, so that they can be drawn.

    Up to twice as many values as ``bins`` are left as they are.

    Returns:
        Centres, medians, least and largest of what is finite.
    """
    x = np.asarray(x, dtype=np.float64)
    kept = np.isfinite(values)
    x, values = x[kept], values[kept]
    if len(x) <= 2 * bins:
        return x, values, values, values
    size = -(-len(x) // bins)
    parts = [slice(start, start + size) for start in range(0, len(x), size)]
    return (
        np.array([x[part].mean() for part in parts]),
        np.array([np.median(values[part]) for part in parts]),
        np.array([values[part].min() for part in parts]),
        np.array([values[part].max() for part in parts]),
    )


def _edges(places: Floats) -> Floats:
    """Halfway between neighbours."""
    if len(places) == 1:
        return np.array([places[0] - 0.5, places[0] + 0.5])
    middle = (places[1:] + places[:-1]) / 2
    return np.concatenate(
        [[places[0] - (middle[0] - places[0])], middle, [2 * places[-1] - middle[-1]]]
    )
