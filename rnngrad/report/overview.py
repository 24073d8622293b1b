"""The figure that says it all at a glance: loss, and the gradient through time of each run."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.report.curves import chance_lines, draw_losses, draw_profiles, layout
from rnngrad.report.groups import LONGEST, Digest, Group, digest, grouped, labels
from rnngrad.report.reading import Reading
from rnngrad.report.style import (
    HIDDEN,
    STEP,
    STYLE,
    TIME,
    grid,
    legend_below,
    logarithmic,
    moments,
    plain,
    profile,
    series,
    shades,
    wrapped,
)
from rnngrad.runs import Run, differences

PANELS = 5
"""Runs that get a panel of their own; more share one."""
BANDS = 4
"""Set-ups in one panel whose bands can be told apart."""


def figure(runs: Sequence[Run]) -> Figure:
    """Loss against training step, and the gradient through time of the last layer.

    Up to ``PANELS`` runs get a panel each, with the profile ``log10 ‖∂L/∂h_t‖`` against ``t`` at
    several training steps; more share one panel, with the last profile of each set-up.
    """
    found = labels([run.path for run in runs])
    with matplotlib.rc_context(STYLE):
        digests = [digest(run, label) for run, label in zip(runs, found, strict=True)]
        return overview(digests, grouped(digests))


def overview(digests: Sequence[Digest], groups: Sequence[Group]) -> Figure:
    """The same, of runs that have been read."""
    if len(digests) > PANELS:
        return _of_many(digests, groups)
    runs = [Reading(digest.run.path) for digest in digests]
    count = 1 + len(runs)
    drawn, axes = grid(count, width=3.6 * min(count, 3), height=3.1)
    _draw_losses(axes[0], runs)
    chance_lines(axes[0], digests)
    axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for axis, run, name in zip(axes[1:], runs, names(runs), strict=True):
        _draw_moments(axis, run, name)
    share_range(axes[1:])
    drawn.suptitle(
        f"Gradient through time of the last layer: RMS over the batch, {when(runs)}", fontsize=9
    )
    return drawn


def _of_many(digests: Sequence[Digest], groups: Sequence[Group]) -> Figure:
    panels, others = layout(groups, apart=False)
    bands = len(panels[0].groups) <= BANDS
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    draw_losses(left, panels[0], others, bands=bands)
    chance_lines(left, digests)
    draw_profiles(right, panels[0], others, "last", bands=bands)
    left.set(xlabel=STEP, ylabel="evaluation loss", title="Loss")
    logarithmic(left)
    right.set(xlabel=TIME, ylabel=HIDDEN, title="Gradient through time, last logged step")
    legend_below(drawn, [left], columns=3)
    drawn.suptitle(
        f"{len(digests)} runs of {len(groups)} set-ups: means over seeds"
        + (", 95 % confidence bands" if bands else "")
        + "; gradient of the last layer, RMS over the batch",
        fontsize=9,
    )
    return drawn


def _draw_losses(axis: Axes, runs: Sequence[Reading]) -> None:
    for number, (run, name) in enumerate(zip(runs, names(runs), strict=True)):
        metrics = run.metrics
        there = ~np.isnan(metrics["eval_loss"])
        count = int(there.sum())
        axis.plot(metrics["step"][there], metrics["eval_loss"][there], label=plain(wrapped(name)),
                  **series(number, count))  # fmt: skip
    axis.set(xlabel=STEP, ylabel="evaluation loss", title="Loss")
    logarithmic(axis)


def _draw_moments(axis: Axes, run: Reading, name: str) -> None:
    layers = [layer for layer in run.bptt if not layer.endswith("_reverse")]
    if layers:
        history = run.bptt[layers[-1]]
        chosen = moments(len(history.step))
        for shade, moment in zip(shades(len(chosen)), chosen, strict=True):
            values = history.hidden[moment]
            label = f"step {history.step[moment]}"
            profile(axis, np.arange(len(values)), values, color=shade, label=label)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3,
                    columnspacing=1, handlelength=1.2)  # fmt: skip
    axis.set(xlabel=TIME, ylabel=HIDDEN, title=plain(wrapped(name)))


def share_range(axes: Sequence[Axes]) -> None:
    """Gives panels the same vertical range."""
    limits = [axis.get_ylim() for axis in axes if axis.lines]
    for axis in axes if limits else ():
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def when(runs: Sequence[Reading]) -> str:
    """What the norms are of: with ``bptt_clip``, of the error as it was clipped on its way."""
    within = [run.norms_are != "before clipping" for run in runs]
    if not any(within):
        return "before clipping"
    return "as clipped at every t" + ("" if all(within) else " (runs with bptt_clip)")


def names(runs: Sequence[Run]) -> list[str]:
    """Short names that tell the runs apart; where much differs, those of their directories."""
    found = []
    for run, different in zip(runs, differences(runs), strict=True):
        directory = run.path.resolve().name
        short = directory.rpartition("-")[0] or directory
        name = f"{short} {different}".strip()
        found.append(name if len(name) <= LONGEST else directory)
    return found
