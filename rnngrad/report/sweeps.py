"""What came out against what was swept: success by length, loss by key, loss by horizon."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rnngrad.report.curves import chance_lines
from rnngrad.report.exhibit import Exhibit
from rnngrad.report.groups import (
    HORIZON,
    IN_A_PANEL,
    Group,
    Panel,
    hashed,
    is_number,
    looks,
    named,
    panels,
    swept,
)
from rnngrad.report.many import append_rows, share
from rnngrad.report.statistics import mean_band, wilson
from rnngrad.report.style import (
    COLOURS,
    Floats,
    grid,
    legend_below,
    logarithmic,
    not_scaled_by,
    plain,
    series,
    spread,
    wrapped,
)
from rnngrad.runs import typed

LENGTH = "task.length"
KEYS = 9
"""Swept keys that get a panel at most."""
POINTS = 300
"""Runs of a value that are drawn one by one at most."""
BINS = 40
"""Values of a number that have a mean each; of more, so many means of as many neighbours."""


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
        axis.set(xlabel="length of the task (time steps)", title=plain(panel.title), ylim=(-4, 104))
        if lengths[0] > 0 and lengths[-1] / lengths[0] >= 4:
            axis.set_xscale("log")
            axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
            axis.minorticks_off()
        axis.grid(alpha=0.3)
    for name, group in merged.items():
        counts = by_length(group)
        append_rows(data, ((name, n, of, done, *wilson(done, of)) for n, done, of in counts))
    share(axes, "runs that solved it (%)")
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
    shares = np.array([100 * done / of for _, done, of in rows])
    ends = np.array([[100 * end for end in wilson(done, of)] for _, done, of in rows])
    like = series(style, 1) | {"markersize": 5}
    axis.errorbar(length, shares, [shares - ends[:, 0], ends[:, 1] - shares], capsize=2,
                  label=plain(name), elinewidth=0.9, **like)  # fmt: skip


def sweeps(groups: Sequence[Group]) -> Exhibit | None:
    """The last loss against every key that was swept."""
    keys = swept(groups)
    shown = list(keys)[:KEYS]
    losses_ = np.concatenate([[], *(group.losses for group in groups)])
    if not shown or not np.isfinite(losses_).any():
        return None
    figure, axes = grid(len(shown), across=3, height=2.9)
    data: dict[str, list[Any]] = {
        name: [] for name in ("key", "value", "by", "runs", "mean_log10_loss", "low", "high")
    }
    for axis, key in zip(axes, shown, strict=True):
        others = [other for other in keys if other != key]
        by = others[0] if len(others) == 1 and others[0] in _of_all(groups, keys) else None
        rows = _draw_sweep(axis, groups, key, keys[key], by, keys.get(by or "", [None]))
        append_rows(data, rows)
    share(axes, "last evaluation loss")
    legend_below(figure, axes, columns=4)
    text = (
        "Each small point is a run; the symbols are geometric means of the runs with that value,"
        " with their 95 % confidence interval (Student's t) over the seeds and over all else that"
        " was swept and is not told apart in the panel; an interval may leave the picture. A cross"
        " at the top marks runs that went wrong and have no loss."
        + (
            f" Where a number has more than {BINS} values, neighbours are taken together, at the"
            " place of the middle one."
            if any(len(keys[key]) > BINS for key in shown)
            else ""
        )
        + (f" Of {len(keys)} keys the first {KEYS} are shown." if len(keys) > KEYS else "")
    )
    return Exhibit("sweep", "Loss against what was swept", text, figure, data=data)


def _draw_sweep(
    axis: Axes,
    groups: Sequence[Group],
    key: str,
    values: Sequence[Any],
    by: str | None,
    kinds: Sequence[Any],
) -> list[tuple[Any, ...]]:
    """Returns key, value, what is told apart, how many runs have a loss, their mean and ends."""
    table: list[tuple[Any, ...]] = []
    numeric = all(is_number(value) for value in values)
    across = numeric and values[0] > 0 and values[-1] / values[0] >= 8
    axis.set(xlabel=plain(_with_unit(key)), yscale="log", xscale="log" if across else "linear")
    for style, kind in enumerate(kinds):
        mine = [g for g in groups if key in g.differs and (by is None or g.differs.get(by) == kind)]
        aside = 0.0 if numeric else 0.6 * ((style + 0.5) / len(kinds) - 0.5)
        label = _labelled(by, kind)
        rows = []
        found = _losses_by_value(mine, key)
        for number_, bin_ in enumerate(_binned(values) if numeric else [[v] for v in values]):
            place = float(bin_[len(bin_) // 2]) if numeric else number_ + aside
            losses = np.concatenate([[], *(found.get(hashed(value), []) for value in bin_)])
            good = np.log10(losses[np.isfinite(losses) & (losses > 0)])
            kept = good[spread(len(good), POINTS)]
            axis.plot(np.full(len(kept), place), 10.0**kept, "o", color=COLOURS[style % 7],
                      alpha=0.45, markersize=3, rasterized=len(kept) > 50)  # fmt: skip
            if len(good) < len(losses):
                axis.plot(place, 0.99, "x", color="black", markersize=5, clip_on=False,
                          transform=axis.get_xaxis_transform())  # fmt: skip
            if len(good):
                band = [float(end[0]) for end in mean_band(good[:, None])]
                rows.append((place, *band))
                told = " to ".join(dict.fromkeys([typed(bin_[0]), typed(bin_[-1])]))
                table.append(
                    (key, told, None if by is None else _named(by, kind), len(good), *band)
                )
        _draw_means(axis, rows, style, label, joined=numeric)
    if across or (numeric and len(values) <= 6):
        shown = _apart(values, axis)
        axis.set_xticks(shown, [f"{value:g}" for value in shown])
        axis.minorticks_off() if across else None
    if not numeric:
        axis.set_xticks(range(len(values)), [plain(wrapped(typed(v), 12)) for v in values])
        axis.margins(x=0.15)
    axis.grid(alpha=0.3)
    return table


def _losses_by_value(groups: Sequence[Group], key: str) -> dict[Any, Floats]:
    found: dict[Any, list[Floats]] = {}
    for group in groups:
        found.setdefault(hashed(group.differs[key]), []).append(group.losses)
    return {value: np.concatenate(losses) for value, losses in found.items()}


def _binned(values: Sequence[Any]) -> list[list[Any]]:
    """Numbers in order as ``BINS`` neighbourhoods at most, of as many values each."""
    ends = np.linspace(0, len(values), min(len(values), BINS) + 1).round().astype(int)
    return [list(values[low:high]) for low, high in itertools.pairwise(ends)]


def _apart(values: Sequence[float], axis: Axes) -> list[float]:
    """Those whose labels do not run into each other, the first and the last among them."""
    places = np.log(values) if axis.get_xscale() == "log" else np.array(values, dtype=np.float64)
    figure, cells = axis.get_figure(), axis.get_gridspec()
    assert isinstance(figure, Figure) and cells is not None
    width = 0.75 * figure.get_figwidth() / cells.ncols * 72  # points, without what is beside it
    letters = max(len(f"{value:g}") for value in values) + 1
    least = letters * 0.64 * matplotlib.rcParams["font.size"] / width * np.ptp(places)
    kept: list[int] = []
    for i in range(len(values)):
        if not kept or places[i] - places[kept[-1]] >= least:
            kept.append(i)
    if kept[-1] != len(values) - 1:  # the last one was too near to the one before it
        kept = [*(kept[:-1] if len(kept) > 1 else kept), len(values) - 1]
    return [values[i] for i in kept]


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
    return None if key is None else plain(_named(key, value))


def _named(key: str, value: Any) -> str:
    return f"{key.removesuffix('.name')}={typed(value)}"


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
        chance_lines(axis, digests)
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
