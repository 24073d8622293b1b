"""Many runs beside each other: curves over seeds, and when the task was solved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rnngrad.report.curves import (
    chance_lines,
    draw_losses,
    draw_profiles,
    layout,
    losses,
    profiles,
)
from rnngrad.report.exhibit import Exhibit
from rnngrad.report.groups import (
    WENT_WRONG,
    Digest,
    Group,
    looks,
)
from rnngrad.report.overview import names
from rnngrad.report.reading import Reading
from rnngrad.report.statistics import Survival, kaplan_meier, mean_band
from rnngrad.report.style import (
    HIDDEN,
    STEP,
    TIME,
    colour_range,
    field,
    grid,
    legend_below,
    logarithmic,
    not_scaled_by,
    plain,
    series,
)

BAND = (
    "95 % confidence band over seeds (Student's t; none with a single seed), which may leave the"
    " picture"
)
FIELDS = 9
"""Runs whose fields are shown side by side at most."""
IN_CSV = 200
"""Set-ups whose curves are in a figure's CSV at most."""


def loss_curves(groups: Sequence[Group]) -> Exhibit:
    """Mean evaluation loss of each set-up against the training step."""
    found, others = layout(groups)
    figure, axes = grid(len(found), across=3, height=3.0)
    styles = looks(found)
    for axis, panel in zip(axes, found, strict=True):
        draw_losses(axis, panel, others, styles)
        chance_lines(axis, [d for group in panel.groups.values() for d in group.digests])
        axis.set(xlabel=STEP, title=plain(panel.title))
        axis.grid(alpha=0.3)
    share(axes, "evaluation loss", across=True)
    legend_below(figure, axes, columns=3)
    text = (
        f"Geometric mean (mean of log10, as the axis is) and {BAND}. A run that stopped because it"
        " had solved its task keeps its last loss; one that diverged counts until then."
    )
    data = _curve_data(groups[:IN_CSV], "log10_loss")
    return Exhibit("loss", "Loss", text + _of_csv(groups), figure, data=data)


def _curve_data(groups: Sequence[Group], what: str) -> dict[str, list[Any]]:
    data: dict[str, list[Any]] = {
        name: [] for name in ("group", "step", "runs", f"mean_{what}", "low", "high")
    }
    for group in groups:
        steps, rows = losses(group)
        if not len(steps):
            continue
        columns = (steps.astype(int), np.isfinite(rows).sum(0), *mean_band(rows))
        append_rows(data, ((group.name, *row) for row in zip(*columns, strict=True)))
    return data


def append_rows(data: Mapping[str, list[Any]], rows: Iterable[Sequence[Any]]) -> None:
    """To columns of one length."""
    for row in rows:
        for column, value in zip(data.values(), row, strict=True):
            column.append(value)


def share(axes: Sequence[Axes], label: str, *, across: bool = False) -> None:
    """One vertical range for all panels, and its label on the first of each row.

    Args:
        axes: Up to three in a row.
        label: Of what goes up.
        across: Whether what goes from left to right has one range as well.
    """
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    left = min(axis.get_xlim()[0] for axis in axes)
    right = max(axis.get_xlim()[1] for axis in axes)
    for place, axis in enumerate(axes):
        axis.set_ylim(low, high)
        if across:
            axis.set_xlim(left, right)
        if axis.get_yscale() == "log":
            logarithmic(axis)
        if place % 3 == 0:
            axis.set_ylabel(label)


def last_profiles(groups: Sequence[Group]) -> Exhibit | None:
    """The gradient through time at the end of training, by set-up."""
    if not any(len(digest.last) for group in groups for digest in group.digests):
        return None
    return _profiles(
        groups, "last", "through_time", "Gradient through time, last logged step", TIME, HIDDEN,
        "The last layer's ‖∂L/∂h_t‖, root mean square over the batch, at the last logged step:"
        " mean of"
        f" log10 and {BAND}. An exact 0 has no logarithm and is left out.",
    )  # fmt: skip


def lags(groups: Sequence[Group]) -> Exhibit | None:
    """The lag-resolved curve at the end of training, by set-up."""
    if not any(len(digest.lag) for group in groups for digest in group.digests):
        return None
    return _profiles(
        groups, "lag", "lag", "How far the gradient reaches: the lag-resolved curve",
        "lag $k$ (time steps back from the error)",
        r"$\log_{10}\,\|\delta_{\tau-k}\|\,/\,\|\delta_\tau\|$",
        "What is left of an error k time steps back from where it was put in, last layer, last"
        f" measured step: mean of log10 and {BAND}.",
    )  # fmt: skip


def _profiles(
    groups: Sequence[Group], kind: str, name: str, title: str, across: str, up: str, text: str
) -> Exhibit:
    found, others = layout(groups)
    figure, axes = grid(len(found), across=3, height=3.0)
    styles = looks(found)
    for axis, panel in zip(axes, found, strict=True):
        draw_profiles(axis, panel, others, kind, styles)
        axis.set(xlabel=across, title=plain(panel.title))
        axis.grid(alpha=0.3)
    share(axes, up, across=True)
    legend_below(figure, axes, columns=3)
    data: dict[str, list[Any]] = {
        "group": [],
        "lag" if kind == "lag" else "t": [],
        "mean": [],
        "low": [],
        "high": [],
    }
    for group in groups[:IN_CSV]:
        rows = profiles(group, kind)
        band = zip(*mean_band(rows), strict=True)
        append_rows(data, ((group.name, place, *values) for place, values in enumerate(band)))
    return Exhibit(name, title, text + _of_csv(groups), figure, data=data)


def _of_csv(groups: Sequence[Group]) -> str:
    return f" The CSV has the first {IN_CSV} set-ups." if len(groups) > IN_CSV else ""


def survival(group: Group) -> Survival:
    """When the runs of a group solve their task; see ``solving``."""
    times, solved = [], []
    for digest in group.digests:
        summary = digest.summary
        if digest.solved_at is not None:
            times.append(float(digest.solved_at))
        elif summary["status"] in WENT_WRONG:
            times.append(float(group.budget))
        else:
            times.append(float(summary["steps"]))
        solved.append(digest.solved_at is not None)
    return kaplan_meier(times, solved)


def solving(groups: Sequence[Group]) -> Exhibit | None:
    """Which fraction of the runs has solved its task, against the training step."""
    if not any(group.solved for group in groups):
        return None
    found, others = layout(groups)
    figure, axes = grid(len(found), across=3, height=2.8)
    styles = looks(found)
    for axis, panel in zip(axes, found, strict=True):
        for place, group in enumerate(others):
            x, y = _staircase(group)
            axis.plot(x, y, color="0.8", linewidth=0.6, zorder=0, drawstyle="steps-post",
                      label="other set-ups" if place == 0 else None)  # fmt: skip
        for name, group in panel.groups.items():
            x, y = _staircase(group)
            axis.plot(
                x, y, drawstyle="steps-post", label=plain(name), **series(styles[name], len(x))
            )
        axis.set(xlabel=STEP, title=plain(panel.title), ylim=(-3, 103))
        axis.grid(alpha=0.3)
    share(axes, "runs that have solved it (%)", across=True)
    legend_below(figure, axes, columns=3)
    text = (
        "Kaplan-Meier: a run that was not solved when it ended is censored there, it is not"
        " counted as never solving and not left out. A run that diverged or failed counts as"
        " unsolved to the end of the budget, since it would not have gone on. A line ends where the"
        " last run of its set-up did, unless all have solved it. A run is solved"
        " from the first evaluation that meets its task's rule; medians are in the table of"
        " set-ups."
    )
    data: dict[str, list[Any]] = {"group": [], "step": [], "solved_percent": []}
    for group in groups[:IN_CSV]:
        steps, solved = _staircase(group)
        append_rows(data, zip([group.name] * len(steps), steps, solved, strict=True))
    text += _of_csv(groups)
    return Exhibit("solved", "When the task was solved", text, figure, data=data)


def _staircase(group: Group) -> tuple[Any, Any]:
    estimate = survival(group)
    all_solved = len(estimate.fraction) > 0 and estimate.fraction[-1] == 0
    end = max(float(group.budget), estimate.end) if all_solved else estimate.end
    x = np.concatenate([[0.0], estimate.time, [end]])
    left = np.concatenate([[1.0], estimate.fraction])
    return x, 100 * (1 - np.append(left, left[-1]))


def heatmaps(digests: Sequence[Digest]) -> Exhibit | None:
    """The field [training step x t] of the last layer, a run a panel, on one colour range."""
    if len(digests) > FIELDS:
        return None
    panels = []
    for digest, name in zip(digests, names([d.run for d in digests]), strict=True):
        bptt = Reading(digest.run.path).bptt
        forward = [layer for layer in bptt if not layer.endswith("_reverse")]
        if forward:
            history = bptt[forward[-1]]
            panels.append((name, history.step, history.hidden))
    if not panels:
        return None
    low, high = colour_range([values for _, _, values in panels])
    figure, axes = grid(len(panels), across=min(3, len(panels)), height=2.9)
    for axis, (title, step, values) in zip(axes, panels, strict=True):
        drawn = field(axis, step, values, low, high)
        axis.set(title=plain(title), xlabel=STEP, ylabel=TIME)
    under = any((values[np.isfinite(values)] < low).any() for _, _, values in panels)
    figure.colorbar(drawn, ax=axes, label=HIDDEN, pad=0.02, extend="min" if under else "neither")
    text = (
        "The last layer of each run, root mean square over the batch, on one colour range. Black"
        " is a norm of exactly 0."
    )
    return Exhibit("heatmaps", "Gradient through time, over the whole training", text, figure)


def at_other_lengths(groups: Sequence[Group]) -> Exhibit | None:
    """The loss at lengths the runs were not trained on."""
    if not any(digest.summary.get("eval_at") for g in groups for digest in g.digests):
        return None
    found, _ = layout([g for g in groups if any(d.summary.get("eval_at") for d in g.digests)])
    figure, axes = grid(len(found), across=3, height=2.9)
    data: dict[str, list[Any]] = {
        name: [] for name in ("group", "length", "runs", "mean_log10_loss", "low", "high")
    }
    styles = looks(found)
    for axis, panel in zip(axes, found, strict=True):
        for name, group in panel.groups.items():
            tables = [digest.summary.get("eval_at") or {} for digest in group.digests]
            lengths = sorted({int(length) for table in tables for length in table})
            rows = np.array([
                [np.nan if (v := t.get(str(n), {}).get("loss")) is None else v for n in lengths]
                for t in tables
            ])  # fmt: skip
            logs = np.log10(np.where(rows > 0, rows, np.nan))
            band = mean_band(logs)
            mean, low, high = (10.0**end for end in band)
            count = np.isfinite(logs).sum(0)
            columns = (lengths, count, *band)
            append_rows(data, ((group.name, *row) for row in zip(*columns, strict=True)))
            like = series(styles[name], 1) | {"markersize": 5}
            axis.plot(lengths, mean, label=plain(name or "all runs"), **like)
            with not_scaled_by(axis):
                axis.vlines(lengths, low, high, color=like["color"], linewidth=1)
        axis.set(xlabel="evaluated length (time steps)", yscale="log", title=plain(panel.title))
        axis.grid(alpha=0.3)
    share(axes, "evaluation loss")
    legend_below(figure, axes, columns=3)
    text = f"The last evaluation at each of `trainer.eval_lengths`: geometric mean and {BAND}."
    return Exhibit("eval_lengths", "Other lengths", text, figure, data=data)
