"""A sweep at a glance: ``_summary`` beside its runs, on which TensorBoard opens usefully.

It has a curve a setting, its median over seeds. TensorBoard's first page shows it above the runs;
the other tabs tick no run by themselves where there are more than 40, until ``_summary`` is typed
into their filter of runs. ``tensorboard --logdir DIR/_summary`` shows it alone.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars, text

from rnngrad.runs import Floats, Run, differences, table
from rnngrad.tracking.board import image
from rnngrad.tracking.events import EventFile
from rnngrad.tracking.heatmap import picture
from rnngrad.tracking.hparams import Value, flatten, group_name
from rnngrad.tracking.text import markdown_table, verbatim

SUMMARY_RUN = "_summary"

CURVES = 36
"""Settings that get curves: together with ``_summary`` itself under TensorBoard's 40 runs."""

LINES = 1000
"""Of a table at most; TensorBoard's page has to show them."""

QUANTITIES = {
    "eval_loss": "evaluation loss",
    "grad_norm_pre_clip_log10": "log10 of the gradient's norm before clipping",
    "first_over_last_log10": "log10 of |dL/dh_1| / |dL/dh_T| in the last layer",
}
QUANTILES = {"q25": 0.25, "median": 0.5, "q75": 0.75}

Steps = npt.NDArray[np.int64]


def summarize(directory: str | Path, runs: Iterable[Run]) -> Path:
    """Writes a sweep's ``_summary``, in place of an earlier one.

    For each set of runs that are equal but for the seed: evaluation loss, norm of the gradient
    before clipping, and how much of it reaches the first time step, against the training step, as
    median and quartiles over seeds. A run that was completed early keeps its last values; one that
    diverged or failed has from there on ten times chance in a curve, and an infinite loss in tables
    and pictures. The best ``CURVES`` settings have curves, the rest has all of them.

    Args:
        directory: Of the sweep; files go into its ``_summary``, which is no run.
        runs: Those to summarise. One without a stored configuration is a set of its own.

    Returns:
        What to open: ``tensorboard --logdir DIRECTORY/_summary``.
    """
    target = Path(directory) / SUMMARY_RUN
    _remove_events(target)
    traces = [Trace(run) for run in runs]
    groups = group_seeds(traces)
    writer = EventFile(target)
    writer.add_summary(custom_scalars(_layout()))
    for name, said in _texts(traces, groups):
        writer.add_summary(text(name, said), 0)
    for name, drawn in _pictures(groups):
        writer.add_summary(Summary(value=[image(name, drawn)]), 0)
    writer.close()
    for group in groups[:CURVES]:
        _write_curves(target / group.name, group)
    return target


_KEPT = ("status", "steps", "eval_loss", "chance_loss", "solved_at", "reason")


class Trace:
    """What the summary needs of one run, read once.

    Args:
        run: Finished or not.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        summary = run.summary
        self.summary = {key: summary[key] for key in _KEPT}
        run = Run(run.path)  # it keeps its configuration, and so is not kept
        try:
            self.settings: dict[str, Value] = {
                intern(key): value for key, value in flatten(run.config).items()
            }
            self.group = group_name(run.config)
        except OSError:
            self.settings, self.group = {}, run.path.name
        self.settings.pop("seed", None)
        metrics = run.metrics
        step = metrics["step"]
        with np.errstate(divide="ignore", invalid="ignore"):
            norm = np.log10(metrics["grad_norm_pre"])
        self.curves = {
            "eval_loss": _present(step, metrics["eval_loss"]),
            "grad_norm_pre_clip_log10": _present(step, norm),
            "first_over_last_log10": _first_over_last(run),
        }

    @property
    def went_wrong(self) -> bool:
        """Whether it diverged or failed."""
        return self.summary["status"] in ("diverged", "failed")

    @property
    def final_loss(self) -> float:
        """Of the last evaluation; infinite if it went wrong, NaN if there was none."""
        if self.went_wrong:
            return math.inf
        return math.nan if self.summary["eval_loss"] is None else self.summary["eval_loss"]

    @property
    def final_ratio(self) -> float:
        """``log10`` of what reaches the first time step, beside the last, at the end."""
        values = self.curves["first_over_last_log10"][1]
        return float(values[-1]) if len(values) else math.nan

    def at(self, quantity: str, grid: Steps) -> Floats:
        """Its values at training steps ``grid``: each the last one that was logged."""
        steps, values = self.curves[quantity]
        if not len(steps):
            return np.full(len(grid), np.nan)
        index = np.searchsorted(steps, grid, side="right") - 1
        carried: Floats = np.where(index < 0, np.nan, values[index])
        if self.summary["status"] != "completed":
            wrong = self.went_wrong and quantity == "eval_loss"
            end = max(self.summary["steps"], steps[-1])
            carried[grid > end] = math.inf if wrong else math.nan
        return carried


class Seeds:
    """Runs that differ in nothing but the seed.

    Args:
        name: What tells them from others, as TensorBoard's name of a run.
        traces: The runs.
    """

    def __init__(self, name: str, traces: Sequence[Trace]) -> None:
        self.name = name
        self.traces = traces
        self.chance_loss: float = traces[0].summary["chance_loss"]
        self.final = quantiles(np.array([[trace.final_loss] for trace in traces]))[:, 0]

    def curve(self, quantity: str) -> tuple[Steps, Floats]:
        """Training steps ``[S]`` and ``QUANTILES`` over seeds ``[3, S]``."""
        grids = [trace.curves[quantity][0] for trace in self.traces]
        grid = np.unique(np.concatenate(grids))
        return grid, quantiles(np.stack([trace.at(quantity, grid) for trace in self.traces]))


def group_seeds(traces: Sequence[Trace]) -> list[Seeds]:
    """The runs by setting, that with the lowest median loss first."""
    members: dict[str, list[Trace]] = defaultdict(list)
    for trace in traces:
        members[trace.group].append(trace)
    names: dict[str, str] = {}
    for key, name in zip(members, _names([mine[0] for mine in members.values()]), strict=True):
        names[key] = f"{name},{key[-8:]}" if name in names.values() else name
    groups = [Seeds(names[key], mine) for key, mine in members.items()]
    return sorted(groups, key=lambda group: (*_rank(group.final[1]), group.name))


def _names(traces: Sequence[Trace]) -> Iterator[str]:
    """What tells each from the others as it would be typed, fit for the name of a directory."""
    groups = ("task", "cell", "clip")
    parts = [[trace.settings.get(f"{group}.name") for group in groups] for trace in traces]
    kinds = [set(column) for column in zip(*parts, strict=True)]
    others = differences([trace.run for trace in traces])
    for trace, mine, different in zip(traces, parts, others, strict=True):
        words = [
            f"{group}={name}"
            for group, name, all_of_them in zip(groups, mine, kinds, strict=True)
            if len(all_of_them) > 1
        ]
        name = ",".join([*words, *different.split()]) or "_".join(str(part) for part in mine)
        yield re.sub(r"[^\w.=+,-]+", "-", name if trace.settings else trace.group)[:100]


def quantiles(values: Floats) -> Floats:
    """``QUANTILES`` ``[3, S]`` over the runs of ``values [R, S]``; NaN are left out.

    An infinite value is one larger than all others, and makes those quantiles infinite that it
    has a part in.

    >>> quantiles(np.array([[1.0], [2.0], [math.inf], [math.nan]]))[:, 0]
    array([1.5, 2. , inf])
    """
    huge = 1e300
    there = ~np.isnan(values).all(0)
    found = np.full((len(QUANTILES), values.shape[1]), np.nan)
    bounded = np.clip(values[:, there], -huge, huge)
    found[:, there] = np.nanquantile(bounded, [*QUANTILES.values()], axis=0)
    infinite = np.abs(found) > huge / 1e9
    found[infinite] = np.copysign(math.inf, found[infinite])
    return found


def _rank(loss: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(loss) else (False, loss)


def _present(step: Steps, values: Floats) -> tuple[Steps, Floats]:
    there = ~np.isnan(values)
    return step[there], values[there]


def _first_over_last(run: Run) -> tuple[Steps, Floats]:
    """``log10`` of ``‖∂L/∂h_1‖ / ‖∂L/∂h_T‖`` of the last layer, by logged step."""
    histories = run.bptt
    forward = [layer for layer in histories if not layer.endswith("_reverse")]
    if not forward:
        return np.empty(0, np.int64), np.empty(0)
    history = histories[forward[-1]]
    hidden = history.hidden
    # a shorter sequence has NaN beyond its end
    last = hidden.shape[1] - 1 - np.argmax(~np.isnan(hidden[:, ::-1]), axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return _present(history.step, hidden[:, 0] - hidden[np.arange(len(hidden)), last])


def _write_curves(directory: Path, group: Seeds) -> None:
    values: dict[int, list[Summary.Value]] = defaultdict(list)
    for quantity in QUANTITIES:
        steps, curves = group.curve(quantity)
        if quantity == "eval_loss":
            curves[np.isposinf(curves)] = 10 * group.chance_loss
        for step, column in zip(steps.tolist(), curves.T.tolist(), strict=True):
            if all(map(math.isfinite, column)):  # a chart with a band needs all three
                values[step] += [
                    Summary.Value(tag=f"_summary/{quantity}_{name}", simple_value=value)
                    for name, value in zip(QUANTILES, column, strict=True)
                ]
    writer = EventFile(directory)
    for step in sorted(values):
        writer.add_summary(Summary(value=values[step]), step)
    writer.close()


def _layout() -> dict[str, Any]:
    """Charts with the median as a line and the quartiles as a band around it."""
    return {
        "Over seeds: median and quartiles": {
            title: ["Margin", [f"_summary/{quantity}_{q}" for q in ("median", "q25", "q75")]]
            for quantity, title in QUANTITIES.items()
        }
    }


def _pictures(groups: Sequence[Seeds]) -> Iterator[tuple[str, Any]]:
    """All settings over training, the best at the top."""
    steps = [group.curve("eval_loss")[0] for group in groups]
    if not sum(map(len, steps)):
        return
    grid = np.unique(np.concatenate(steps))
    names = [name if len(name) <= 32 else name[:29] + "..." for name in (g.name for g in groups)]
    options: dict[str, Any] = {"up": "setting", "rows": names[::-1], "absent": True}
    losses = []
    for group in groups:
        with np.errstate(divide="ignore"):
            losses.append(np.log10(_median(group, "eval_loss", grid) / group.chance_loss))
    title = "log10 of evaluation loss / chance, median (red: diverged)"
    drawn = picture(grid, np.stack(losses[::-1], 1), title, low=-4, high=1, **options)
    yield "_summary/eval_loss_over_chance", drawn
    ratios = [_median(group, "first_over_last_log10", grid) for group in groups]
    title = "log10 of |dL/dh_1| / |dL/dh_T|, last layer, median"
    drawn = picture(grid, np.stack(ratios[::-1], 1), title, **options)
    yield "_summary/first_over_last", drawn


def _median(group: Seeds, quantity: str, grid: Steps) -> Floats:
    median: Floats = quantiles(np.stack([trace.at(quantity, grid) for trace in group.traces]))[1]
    return median


def _texts(traces: Sequence[Trace], groups: Sequence[Seeds]) -> Iterator[tuple[str, str]]:
    yield "_summary/overview", _overview(traces, groups)
    yield "_summary/by_setting", _by_setting(traces)
    first = table([trace.run for trace in traces[:LINES]]) if traces else "no runs"
    yield "_summary/runs", verbatim(first + _more(len(traces), "runs"))


def _overview(traces: Sequence[Trace], groups: Sequence[Seeds]) -> str:
    """How many runs ended how, all settings with the best first, and what went wrong."""
    counts: dict[str, int] = defaultdict(int)
    for trace in traces:
        counts[trace.summary["status"]] += 1
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    solved = sum(trace.summary["solved_at"] is not None for trace in traces)
    lines = [
        f"{len(traces)} runs of {len(groups)} settings: {said}; {solved} solved the task.",
        "",
        markdown_table(("setting", *_HEAD), [(g.name, *_row(g.traces)) for g in groups[:LINES]])
        + _more(len(groups), "settings"),
    ]
    if len(groups) > CURVES:
        lines += ["", f"The first {CURVES} have curves."]
    wrong = [f"- {t.run.path.name}: {t.summary['reason']}" for t in traces if t.went_wrong]
    if wrong:
        lines += ["", "Diverged or failed:", "", *wrong[:50]]
    if len(wrong) > 50:
        lines.append(f"- and {len(wrong) - 50} more")
    return "\n".join(lines)


def _by_setting(traces: Sequence[Trace]) -> str:
    """What each swept key does, all others taken together."""
    members: dict[str, dict[str, list[Trace]]] = defaultdict(lambda: defaultdict(list))
    order: dict[str, Any] = {}
    for trace in traces:
        for key, value in trace.settings.items():
            members[key][str(value)].append(trace)
            order[str(value)] = value
    rows = []
    for key, values in members.items():
        if len(values) > LINES:  # every run has one of its own: nothing to be taken together
            rows.append((f"{key}: {len(values)} values", *_row(traces)))
        elif len(values) > 1:
            for value in sorted(values, key=lambda name: _sortable(order[name])):
                rows.append((f"{key}={value}", *_row(values[value])))
    return markdown_table(("key", *_HEAD), rows) if rows else "All runs have the same settings."


_HEAD = (
    "runs",
    "solved",
    "diverged or failed",
    "median evaluation loss",
    "median log10 first/last gradient",
)


def _row(traces: Sequence[Trace]) -> tuple[str, ...]:
    solved = sum(trace.summary["solved_at"] is not None for trace in traces)
    wrong = sum(trace.went_wrong for trace in traces)
    loss = quantiles(np.array([[trace.final_loss] for trace in traces]))[1, 0]
    ratio = quantiles(np.array([[trace.final_ratio] for trace in traces]))[1, 0]
    return str(len(traces)), str(solved), str(wrong), _number(loss), _number(ratio)


def _more(count: int, what: str) -> str:
    """What to say of those beyond ``LINES``."""
    return f"\n\nand {count - LINES} more {what}: see rnngrad-report" if count > LINES else ""


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _sortable(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _remove_events(target: Path) -> None:
    """Those of an earlier summary, and the folders that are empty then."""
    for path in target.rglob("events.out.tfevents.*"):
        path.unlink()
    for folder in sorted((p for p in target.rglob("*") if p.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
