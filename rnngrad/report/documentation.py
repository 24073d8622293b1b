"""Figures of the documentation, from tables that other modules have measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.report.style import COLOURS, DASHES, STYLE


def initial_figure(profiles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """``log10 ‖∂L/∂h_{T-k}‖`` against the lag, a panel an activation, a line an initialisation.

    Args:
        profiles: By activation and scheme, as from ``rnngrad.initial.lag_profile``.
    """
    with matplotlib.rc_context(STYLE):
        rows = -(-len(profiles) // 4)
        drawn, axes = plt.subplots(
            rows, 4, figsize=(13, 3.2 * rows), layout="constrained", sharex=True, squeeze=False
        )
        for axis, (activation, lines) in zip(axes.flat, profiles.items(), strict=False):
            for number, (scheme, profile) in enumerate(lines.items()):
                style = DASHES[number // len(COLOURS)]
                colour = COLOURS[number % len(COLOURS)]
                axis.plot(np.where(np.isfinite(profile), profile, np.nan), style,
                          color=colour, label=scheme)  # fmt: skip
            axis.set_title(activation)
            axis.set_ylim(-40, 10)
            axis.grid(alpha=0.3)
        for axis in axes[-1]:
            axis.set_xlabel("lag $k$ (steps back from the loss)")
        for axis in axes[:, 0]:
            axis.set_ylabel(r"$\log_{10}\,\|\partial L/\partial h_{T-k}\|$")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawn


def bench_figure(tables: Sequence[Any], conditions: Mapping[str, str]) -> Figure:
    """How many times faster than each rival, by layer and shape; tables of ``rnngrad.bench``."""
    chosen = [table for table in tables if "JAX (ms)" in table.columns]
    with matplotlib.rc_context(STYLE):
        drawn, axes = plt.subplots(
            1, len(chosen), figsize=(6.4 * len(chosen), 4.2), layout="constrained", squeeze=False
        )
        for axis, table in zip(axes[0], chosen, strict=True):
            _draw_speeds(axis, table)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
        drawn.suptitle("; ".join(f"{k}: {v}" for k, v in conditions.items()), fontsize=7)
    return drawn


def _draw_speeds(axis: Axes, table: Any) -> None:
    names = [f"{row[0]} {row[1]}, {row[2]}, {row[3]}" for row in table.rows]
    places = np.arange(len(names))
    for rival, column in enumerate((7, 9, 11)):
        ratios = [np.nan if row[column] is None else row[column] for row in table.rows]
        label = table.columns[column - 1].removesuffix(" (ms)")
        label = {"cells": "a loop of cells, retain_grad", "JAX": "jitted JAX scan"}.get(
            label, label
        )
        axis.plot(ratios, places, "osD"[rival], color=COLOURS[rival], label=label, markersize=5)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("times faster, with recording on (right of 1: rnngrad)")
    axis.set_ylabel("layer T, B, H")
    axis.set_title(table.title, fontsize=9)
