"""Many runs beside each other: curves over seeds, solving times, and the loss by what was swept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from rnngrad.report.exhibit import Exhibit, Table, number, percent
from rnngrad.report.groups import (
    HORIZON,
    IN_A_PANEL,
    WENT_WRONG,
    Digest,
    Group,
    Panel,
    is_number,
    looks,
    named,
    panels,
    swept,
)
from rnngrad.report.overview import names
from rnngrad.report.reading import Reading
from rnngrad.report.statistics import Survival, kaplan_meier, mean_band, wilson
from rnngrad.report.style import (
    COLOURS,
    HIDDEN,
    STEP,
    TIME,
    colour_range,
    field,
    grid,
    legend_below,
    logarithmic,
    not_scaled_by,
    series,
    spread,
    wrapped,
)
from rnngrad.runs import typed

BAND = (
    "95 % confidence band over seeds (Student's t; none with a single seed), which may leave the"
    " picture"
)
LENGTH = "task.length"
FIELDS = 9
"""Runs whose fields are shown side by side at most."""
KEYS = 9
"""Swept keys that get a panel at most."""
POINTS = 300
"""Runs of a panel that are drawn one by one at most."""


def loss_curves(groups: Sequence[Group]) -> Exhibit:
    """Mean evaluation loss of each set-up against the training step."""
    found, others = layout(groups)
    figure, axes = grid(len(found), across=3, height=3.0)
    styles = looks(found)
    for axis, panel in zip(axes, found, strict=True):
        draw_losses(axis, panel, others, styles)
        chance_lines(axis, [*panel.groups.values()])
        axis.set(xlabel=STEP, title=panel.title)
        axis.grid(alpha=0.3)
    _share(axes, "evaluation loss", across=True)
    legend_below(figure, axes, columns=3)
    text = (
        f"Geometric mean (mean of log10, as the axis is) and {BAND}. A run that stopped because it"
        " had solved its task keeps its last loss; one that diverged counts until then."
    )
    return Exhibit("loss", "Loss", text, figure, data=_curve_data(groups, "log10_loss"))


def _curve_data(groups: Sequence[Group], what: str) -> dict[str, list[Any]]:
    data: dict[str, list[Any]] = {
        name: [] for name in ("group", "step", "runs", f"mean_{what}", "low", "high")
    }
    for group in groups:
        steps, rows = losses(group)
        if not len(steps):
            continue
        for step, count, *values in zip(
            steps, np.isfinite(rows).sum(0), *mean_band(rows), strict=True
        ):
            for column, value in zip(data.values(), (group.name, int(step), count, *values),
                                     strict=True):  # fmt: skip
                column.append(value)
    return data


def _share(axes: Sequence[Axes], label: str, *, across: bool = False) -> None:
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
        axis.set(xlabel=across, title=panel.title)
        axis.grid(alpha=0.3)
    _share(axes, up, across=True)
    legend_below(figure, axes, columns=3)
    data: dict[str, list[Any]] = {
        "group": [],
        "lag" if kind == "lag" else "t": [],
        "mean": [],
        "low": [],
        "high": [],
    }
    for group in groups[:100]:
        rows = profiles(group, kind)
        for place, values in enumerate(zip(*mean_band(rows), strict=True)):
            for column, value in zip(data.values(), (group.name, place, *values), strict=True):
                column.append(value)
    return Exhibit(name, title, text, figure, data=data)


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
            axis.plot(x, y, drawstyle="steps-post", label=name, **series(styles[name], len(x)))
        axis.set(xlabel=STEP, title=panel.title, ylim=(-3, 103))
        axis.grid(alpha=0.3)
    _share(axes, "runs that have solved it (%)", across=True)
    legend_below(figure, axes, columns=3)
    text = (
        "Kaplan-Meier: a run that was not solved when it ended is censored there, it is not"
        " counted as never solving and not left out. A run that diverged or failed counts as"
        " unsolved to the end of the budget, since it would not have gone on. A run is solved"
        " from the first evaluation that meets its task's rule; medians are in the table of"
        " set-ups."
    )
    return Exhibit("solved", "When the task was solved", text, figure)


def _staircase(group: Group) -> tuple[Any, Any]:
    estimate = survival(group)
    end = max([group.budget, *estimate.time])
    x = np.concatenate([[0.0], estimate.time, [end]])
    left = np.concatenate([[1.0], estimate.fraction])
    return x, 100 * (1 - np.append(left, left[-1]))


def success(groups: Sequence[Group]) -> Exhibit | None:
    """Which fraction of the runs solved the task, against its length."""
    lengths = [value for value in swept(groups).get(LENGTH, []) if is_number(value)]
    if len(lengths) < 2:
        return None
    merged = _merged(groups, [key for key in swept(groups) if key != LENGTH])
    found, pooled = panels(list(merged.values())), ""
    if found is None:  # too many to tell apart: by one key, over all the others
        by = [key for key in _of_all(groups, swept(groups)) if key != LENGTH]
        by = ["cell.name"] if "cell.name" in by else by[:1]
        merged = _merged(groups, by)
        found = [Panel("", {name or "all runs": group for name, group in merged.items()})]
        pooled = " Here the runs of all other settings are counted together."
    styles = looks(found)
    figure, axes = grid(len(found), across=3, height=3.0)
    data: dict[str, list[Any]] = {
        k: [] for k in ("group", "length", "runs", "solved", "low", "high")
    }
    count = max(len(panel.groups) for panel in found)
    for axis, panel in zip(axes, found, strict=True):
        for place, (name, group) in enumerate(panel.groups.items()):
            _draw_success(axis, group, name or "all runs", styles[name],
                          (place - (count - 1) / 2) * 0.012)  # fmt: skip
        axis.set(xlabel="length of the task (time steps)", title=panel.title, ylim=(-4, 104))
        if lengths[0] > 0 and lengths[-1] / lengths[0] >= 4:
            axis.set_xscale("log")
            axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    for name, group in merged.items():
        for length, done, of in by_length(group):
            row = (name, length, of, done, *wilson(done, of))
            for column, value in zip(data.values(), row, strict=True):
                column.append(value)
    _share(axes, "runs that solved it (%)")
    legend_below(figure, axes, columns=3)
    text = (
        "Share of the runs that met the task's rule within their budget, with Wilson's 95 %"
        " interval. Runs that diverged or failed count as not solved. Symbols are moved sideways"
        f" a little, so that intervals can be told apart.{pooled}"
    )
    return Exhibit("success", "Success against length", text, figure, data=data)


def _merged(groups: Sequence[Group], keys: Sequence[str]) -> dict[str, Group]:
    """Groups that share their values of some keys as one, by name."""
    merged: dict[str, Group] = {}
    for group in groups:
        kept = {key: value for key, value in group.differs.items() if key in keys}
        merged.setdefault(named(kept), Group(kept)).digests.extend(group.digests)
    return merged


def by_length(group: Group) -> list[tuple[float, int, int]]:
    """Length, how many solved it, of how many."""
    found: dict[float, list[bool]] = {}
    for digest in group.digests:
        length = digest.settings.get(LENGTH)
        if length is not None and is_number(length):
            found.setdefault(length, []).append(digest.solved_at is not None)
    return [(length, sum(done), len(done)) for length, done in sorted(found.items())]


def _draw_success(axis: Axes, group: Group, name: str, style: int, shift: float) -> None:
    rows = by_length(group)
    if not rows:
        return
    length = np.array([row[0] for row in rows]) * (1 + shift)
    share = np.array([100 * done / of for _, done, of in rows])
    ends = np.array([[100 * end for end in wilson(done, of)] for _, done, of in rows])
    like = series(style, 1) | {"markersize": 5}
    axis.errorbar(length, share, [share - ends[:, 0], ends[:, 1] - share], label=name, capsize=2,
                  elinewidth=0.9, **like)  # fmt: skip


def sweeps(groups: Sequence[Group]) -> Exhibit | None:
    """The last loss against every key that was swept."""
    keys = swept(groups)
    shown = list(keys)[:KEYS]
    losses_ = np.concatenate([[], *(group.losses for group in groups)])
    if not shown or not np.isfinite(losses_).any():
        return None
    figure, axes = grid(len(shown), across=3, height=2.9)
    for axis, key in zip(axes, shown, strict=True):
        others = [other for other in keys if other != key]
        by = others[0] if len(others) == 1 and others[0] in _of_all(groups, keys) else None
        _draw_sweep(axis, groups, key, keys[key], by, keys.get(by or "", [None]))
    _share(axes, "last evaluation loss")
    legend_below(figure, axes, columns=4)
    text = (
        "Each small point is a run; the symbols are geometric means of the runs with that value,"
        " with their 95 % confidence interval (Student's t) over the seeds and over all else that"
        " was swept and is not told apart in the panel; an interval may leave the picture. A cross"
        " at the top marks runs that went wrong and have no loss."
        + (f" Of {len(keys)} keys the first {KEYS} are shown." if len(keys) > KEYS else "")
    )
    return Exhibit("sweep", "Loss against what was swept", text, figure)


def _draw_sweep(
    axis: Axes,
    groups: Sequence[Group],
    key: str,
    values: Sequence[Any],
    by: str | None,
    kinds: Sequence[Any],
) -> None:
    numeric = all(is_number(value) for value in values)
    across = numeric and values[0] > 0 and values[-1] / values[0] >= 8
    axis.set(xlabel=_with_unit(key), yscale="log", xscale="log" if across else "linear")
    for style, kind in enumerate(kinds):
        mine = [g for g in groups if key in g.differs and (by is None or g.differs.get(by) == kind)]
        aside = 0.0 if numeric else 0.6 * ((style + 0.5) / len(kinds) - 0.5)
        label = _labelled(by, kind)
        rows = []
        for number_, value in enumerate(values):
            place = float(value) if numeric else number_ + aside
            found = np.concatenate([[], *(g.losses for g in mine if g.differs[key] == value)])
            good = np.log10(found[np.isfinite(found) & (found > 0)])
            kept = good[:POINTS]
            axis.plot(np.full(len(kept), place), 10.0**kept, "o", color=COLOURS[style % 7],
                      alpha=0.45, markersize=3, rasterized=len(kept) > 50)  # fmt: skip
            if len(good) < len(found):
                axis.plot(place, 0.99, "x", color="black", markersize=5, clip_on=False,
                          transform=axis.get_xaxis_transform())  # fmt: skip
            if len(good):
                rows.append((place, *(float(end[0]) for end in mean_band(good[:, None]))))
        _draw_means(axis, rows, style, label, joined=numeric)
    if across or (numeric and len(values) <= 6):
        shown = [values[i] for i in spread(len(values), 7)]
        axis.set_xticks(shown, [f"{value:g}" for value in shown])
        axis.minorticks_off() if across else None
    if not numeric:
        axis.set_xticks(range(len(values)), [wrapped(typed(v), 12) for v in values])
        axis.margins(x=0.15)
    axis.grid(alpha=0.3)


def _draw_means(
    axis: Axes, rows: Sequence[tuple[float, ...]], style: int, label: str | None, *, joined: bool
) -> None:
    """Geometric means with their intervals, which do not widen the panel."""
    if not rows:
        return
    x, mean, low, high = (np.array(column) for column in zip(*rows, strict=True))
    like = series(style, 1) | {"markersize": 5.5}
    axis.plot(x, 10.0**mean, label=label, **(like if joined else like | {"linestyle": "none"}))
    with not_scaled_by(axis):
        axis.vlines(x, 10.0**low, 10.0**high, color=like["color"], linewidth=1)


def _labelled(key: str | None, value: Any) -> str | None:
    return None if key is None else f"{key.removesuffix('.name')}={typed(value)}"


def _of_all(groups: Sequence[Group], keys: Mapping[str, Sequence[Any]]) -> list[str]:
    """Keys that every group has, with few enough values to have a look each."""
    return [
        key
        for key, values in keys.items()
        if len(values) <= IN_A_PANEL and all(key in group.differs for group in groups)
    ]


def _with_unit(key: str) -> str:
    units = {
        LENGTH: "time steps", "task.delay": "time steps", "cell.hidden_size": "units",
        "trainer.steps": "updates", "trainer.batch_size": "sequences",
    }  # fmt: skip
    return f"{key} ({units[key]})" if key in units else key.removesuffix(".name")


def horizons(groups: Sequence[Group]) -> Exhibit | None:
    """How far the gradient reaches against the loss that came out, a point a run."""
    digests = [digest for group in groups for digest in group.digests]
    if not any(np.isfinite(digest.horizon) for digest in digests):
        return None
    keys = swept(groups)
    possible = _of_all(groups, keys)
    by = "cell.name" if "cell.name" in possible else next(iter(possible), None)
    figure, (left, right) = grid(2, across=2, height=3.2)
    kinds = keys[by] if by else [None]
    for style, kind in enumerate(kinds):
        mine = [
            digest for group in groups for digest in group.digests
            if by is None or group.differs.get(by) == kind
        ]  # fmt: skip
        like = {"linestyle": "none", "color": COLOURS[style % 7], "markersize": 5, "alpha": 0.75,
                "marker": series(style, 1)["marker"], "rasterized": len(mine) > 200,
                "label": _labelled(by, kind)}  # fmt: skip
        loss = [digest.loss for digest in mine]
        slopes = [np.nan if d.decay is None else d.decay.slope for d in mine]
        left.plot([digest.horizon for digest in mine], loss, **like)
        right.plot(slopes, loss, **like)
    left.set(xlabel=f"gradient horizon (time steps with a ratio over {HORIZON:g})",
             ylabel="last evaluation loss")  # fmt: skip
    right.set(xlabel="slope of the lag-resolved curve (decades a time step)",
              ylabel="last evaluation loss")  # fmt: skip
    for axis in (left, right):
        chance_lines(axis, groups)
        logarithmic(axis)
        axis.grid(alpha=0.3)
    legend_below(figure, [left], columns=4)
    text = (
        "A point a run, both from its end: how many time steps back a thousandth of an error is"
        " left, and by how many decades it shrinks a step, of the last layer. The horizon ends at"
        " the longest lag that was measured. A short horizon with a loss at chance is what"
        " vanishing looks like; it is no proof of the cause."
    )
    data: dict[str, Sequence[Any]] = {
        "run": [d.label for d in digests],
        "horizon": [d.horizon for d in digests],
        "slope": [None if d.decay is None else d.decay.slope for d in digests],
        "eval_loss": [d.loss for d in digests],
    }
    return Exhibit("horizon", "Gradient horizon against loss", text, figure, data=data)


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
        axis.set(title=title, xlabel=STEP, ylabel=TIME)
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
    styles = looks(found)
    for axis, panel in zip(axes, found, strict=True):
        for name, group in panel.groups.items():
            tables = [digest.summary.get("eval_at") or {} for digest in group.digests]
            lengths = sorted({int(length) for table in tables for length in table})
            rows = np.array([
                [np.nan if (v := t.get(str(n), {}).get("loss")) is None else v for n in lengths]
                for t in tables
            ])  # fmt: skip
            mean, low, high = (10.0**end for end in mean_band(np.log10(rows)))
            axis.errorbar(lengths, mean, np.nan_to_num([mean - low, high - mean]), capsize=2,
                          label=name or "all runs",
                          **(series(styles[name], 1) | {"markersize": 5}))  # fmt: skip
        axis.set(xlabel="evaluated length (time steps)", yscale="log", title=panel.title)
        axis.grid(alpha=0.3)
    _share(axes, "evaluation loss")
    legend_below(figure, axes, columns=3)
    text = f"The last evaluation at each of `trainer.eval_lengths`: geometric mean and {BAND}."
    return Exhibit("eval_lengths", "Other lengths", text, figure)


def setups(groups: Sequence[Group]) -> Table:
    """A row a set-up."""
    head = ("set-up", "runs", "went wrong", "solved (95 % interval)", "solved at (median)",
            "last loss (mean)", "clipped", "horizon (median)", "verdicts")  # fmt: skip
    return Table(head, [_setup(group) for group in groups])


def _setup(group: Group) -> tuple[str, ...]:
    digests = group.digests
    wrong = sum(digest.summary["status"] in WENT_WRONG for digest in digests)
    low, high = wilson(group.solved, len(digests))
    middle = survival(group).median
    good = group.losses[np.isfinite(group.losses) & (group.losses > 0)]
    clipped = [d.summary.get("clip_fraction") for d in digests]
    fractions = [value for value in clipped if value is not None]
    reach = [digest.horizon for digest in digests if np.isfinite(digest.horizon)]
    return (
        group.name or "all runs",
        str(len(digests)),
        str(wrong),
        f"{group.solved} of {len(digests)} ({100 * low:.0f} to {100 * high:.0f} %)",
        f"over {group.budget}" if np.isinf(middle) else f"{middle:.0f}",
        number(float(10 ** np.mean(np.log10(good)))) if len(good) else "-",
        percent(float(np.mean(fractions))) if fractions else "-",
        number(float(np.median(reach)), 6) if reach else "-",
        ", ".join(f"{name} {count}" for name, count in verdicts(digests).items()),
    )


def verdicts(digests: Sequence[Digest]) -> dict[str, int]:
    """How many runs have which verdict, the most frequent first."""
    counts: dict[str, int] = {}
    for digest in digests:
        name = digest.summary.get("verdict") or "none"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda found: (-found[1], found[0])))
