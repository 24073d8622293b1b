"""Figures of the experiments that are run again, from what ``rnngrad.reproduce`` says of them."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.report.style import COLOURS, DASHES, FIELDS, STYLE, grid, legend_below
from rnngrad.reproduce.drawing import Drawing, Line, Panel

LEVELS = (":", "-.", (0, (1, 5)))
"""Dashes of a panel's levels."""


def published_figure(drawing: Drawing) -> Figure:
    """All panels, with one legend below them."""
    with matplotlib.rc_context(STYLE):
        figure, axes = grid(len(drawing.panels), across=drawing.across, height=3.2)
        labels = dict.fromkeys(line.label for panel in drawing.panels for line in panel.lines)
        looks: dict[str, dict[str, Any]] = {
            label: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            for i, label in enumerate(labels)
        }
        for axis, panel in zip(axes, drawing.panels, strict=True):
            _draw(figure, axis, panel, looks)
        legend_below(figure, axes)
    return figure


def _draw(figure: Figure, axis: Axes, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    if "x" in panel.logarithmic:
        axis.set_xscale("log")
    else:
        axis.locator_params(axis="x", nbins=5)  # more would run into each other
    if "y" in panel.logarithmic:
        axis.set_yscale("log")
    if (behind := panel.behind) is not None:
        drawn = axis.pcolormesh(
            behind.x, behind.y, behind.value, cmap=FIELDS, shading="nearest", rasterized=True
        )
        figure.colorbar(drawn, ax=axis, label=behind.label)
    for line in panel.lines:
        _draw_line(axis, line, looks[line.label])
    for i, (label, level) in enumerate(panel.levels.items()):
        axis.axhline(level, color="0.4", linewidth=0.9, linestyle=LEVELS[i % 3], label=label)
    for i, (label, points) in enumerate(panel.published.items()):
        x, y = zip(*points, strict=True)
        axis.plot(x, y, "*+xD"[i % 4], color="black", markersize=9, zorder=5, label=label)
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axis.set(xlim=panel.x_limits, ylim=panel.limits)
    if panel.ticks:
        many: Any = {"rotation": 40, "ha": "right"} if len(panel.ticks) > 5 else {}
        axis.set_xticks(range(len(panel.ticks)), panel.ticks, **many)
        axis.set_xlim(-0.5, len(panel.ticks) - 0.5)
    axis.grid(alpha=0.3)


def _draw_line(axis: Axes, line: Line, look: dict[str, Any]) -> None:
    x, y = (np.array(values, np.float64) for values in (line.x, line.y))
    label = None if line.label in axis.get_legend_handles_labels()[1] else line.label
    ends = None if line.band is None else np.array(line.band, np.float64)
    if line.points:
        axis.plot(x, y, "o", color=look["color"], markersize=4, alpha=0.7, label=label)
        if ends is not None:
            axis.vlines(x, *ends, color=look["color"], linewidth=1)
    else:
        axis.plot(x, y, label=label, **look)
        if ends is not None:
            axis.fill_between(x, *ends, color=look["color"], alpha=0.15, linewidth=0)
