"""Curves of groups of runs: means over seeds with their confidence bands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from rnngrad.report.groups import IN_A_PANEL, Digest, Group, Panel, looks, panels
from rnngrad.report.statistics import mean_band
from rnngrad.report.style import Floats, not_scaled_by, plain, series, spread

OTHERS = 400
"""Set-ups drawn in grey at most."""


def layout(groups: Sequence[Group], *, apart: bool = True) -> tuple[list[Panel], list[Group]]:
    """Which groups are drawn where, and which only in grey.

    Args:
        groups: All of them.
        apart: Whether there may be several panels.
    """
    found = panels(groups) if apart or len(groups) <= IN_A_PANEL else None
    if found is not None and (apart or len(found) == 1):
        return found, []
    if found is not None:
        return [Panel("", {group.name: group for group in groups})], []
    ranked = sorted(groups, key=_rank)
    best = {group.name: group for group in ranked[:IN_A_PANEL]}
    rest = ranked[IN_A_PANEL:]
    return [Panel(f"lowest loss: {len(best)} of {len(groups)} set-ups", best)], [
        rest[i] for i in spread(len(rest), OTHERS)
    ]


def _rank(group: Group) -> tuple[float, str]:
    """By the median loss; what went wrong last."""
    finite = np.where(np.isfinite(group.losses), group.losses, np.inf)
    return float(np.median(finite)), group.name


def losses(group: Group) -> tuple[Floats, Floats]:
    """Evaluated steps ``[S]`` and ``log10`` of the loss there, a row a run ``[n, S]``.

    A run that ended because it had solved its task keeps its last loss; what diverged has none.
    """
    digests = [digest for digest in group.digests if len(digest.eval_step)]
    if not digests:
        return np.empty(0), np.empty((0, 0))
    grid = np.unique(np.concatenate([digest.eval_step for digest in digests]))
    rows = np.full((len(digests), len(grid)), np.nan)
    for row, digest in zip(rows, digests, strict=True):
        places = np.searchsorted(grid, digest.eval_step)
        row[places] = digest.eval_loss
        if digest.summary["status"] == "completed":
            row[places[-1] :] = digest.eval_loss[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return grid, np.log10(np.where(rows > 0, rows, np.nan))


def profiles(group: Group, kind: str) -> Floats:
    """``first``, ``last`` or ``lag`` of each run ``[n, T]``; NaN for exact zeros, too."""
    found = [np.atleast_1d(getattr(digest, kind)) for digest in group.digests]
    width = max(map(len, found))
    rows = np.full((len(found), width), np.nan)
    for row, values in zip(rows, found, strict=True):
        row[: len(values)] = np.where(np.isfinite(values), values, np.nan)
    return rows


def draw_losses(
    axis: Axes,
    panel: Panel,
    others: Sequence[Group],
    styles: Mapping[str, int] | None = None,
    *,
    bands: bool = True,
) -> None:
    """The geometric mean of the loss of each group, with its band."""
    axis.set_yscale("log")
    drawn = {name: losses(group) for name, group in panel.groups.items()}
    lines = [losses(group) for group in others]
    _draw(axis, drawn, lines, styles or looks([panel]), power=True, bands=bands)


def draw_profiles(
    axis: Axes,
    panel: Panel,
    others: Sequence[Group],
    kind: str,
    styles: Mapping[str, int] | None = None,
    *,
    bands: bool = True,
) -> None:
    """The mean over seeds of ``log10`` of the gradient's norm, against time or lag."""

    def rows(group: Group) -> tuple[Floats, Floats]:
        values = profiles(group, kind)
        return np.arange(values.shape[1], dtype=np.float64), values

    drawn = {name: rows(group) for name, group in panel.groups.items()}
    lines = [rows(group) for group in others]
    _draw(axis, drawn, lines, styles or looks([panel]), power=False, bands=bands)


def _draw(
    axis: Axes,
    drawn: Mapping[str, tuple[Floats, Floats]],
    others: Sequence[tuple[Floats, Floats]],
    styles: Mapping[str, int],
    *,
    power: bool,
    bands: bool,
) -> None:
    def shown(values: Floats) -> Floats:
        raised: Floats = 10.0**values if power else values
        return raised

    lines = []
    for x, rows in others:
        if len(x):
            mean, _, _ = mean_band(rows)
            kept = spread(len(x), 200)
            lines.append(np.column_stack([x, shown(mean)])[kept])
    if lines:
        axis.add_collection(
            LineCollection(
                lines,
                colors="0.8",
                linewidths=0.6,
                zorder=0,
                rasterized=True,
                label="other set-ups",
            )  # fmt: skip
        )
        axis.autoscale_view()
    for name, (x, rows) in drawn.items():
        if not len(x):
            continue
        mean, low, high = mean_band(rows)
        looks_like = series(styles[name], len(x))
        axis.plot(x, shown(mean), label=plain(name), **looks_like)
        # the runs themselves set the limits: the band of three that differ can be decades wide
        for row in rows:
            there = np.isfinite(row)
            axis.update_datalim(np.column_stack([x[there], shown(row[there])]))
        if bands and np.isfinite(low).any():
            with not_scaled_by(axis):
                axis.fill_between(x, shown(low), shown(high), color=looks_like["color"],
                                  alpha=0.15, linewidth=0)  # fmt: skip
    axis.autoscale_view()


def chance_lines(axis: Axes, digests: Iterable[Digest]) -> None:
    """A dotted line a chance loss, if there are few."""
    levels = sorted({digest.chance for digest in digests if math.isfinite(digest.chance)})
    if len(levels) <= 4:
        label = f"chance: {', '.join(f'{level:.4g}' for level in levels)}"
        for level in levels:
            axis.axhline(level, color="0.3", linewidth=1, linestyle=":",
                         label=label if level == levels[0] else None)  # fmt: skip
