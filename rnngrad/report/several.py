"""What the report says of several runs: which figures and tables, in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rnngrad.report import many, sweeps
from rnngrad.report.exhibit import Exhibit, Table, code, number, percent
from rnngrad.report.groups import WENT_WRONG, Digest, Group, swept
from rnngrad.report.one import STANDARD
from rnngrad.report.statistics import wilson
from rnngrad.runs import typed

ROWS = 300
"""Rows of a table in the page at most; a CSV has them all."""


def exhibits(
    groups: Sequence[Group], unreadable: Mapping[str, str], commands: str
) -> Iterator[Exhibit]:
    """The sections of a comparison."""
    digests = [digest for group in groups for digest in group.digests]
    yield Exhibit("setups", "Set-ups", SETUPS, tables=[setups(groups)], data=statistics(groups))
    yield wrong(digests, unreadable)
    yield verdicts(digests)
    yield many.loss_curves(groups)
    left_out = []
    for draw, name, why in (
        (many.solving, "when the task was solved", "no run has solved it"),
        (sweeps.success, "success against length", "`task.length` does not differ"),
        (sweeps.sweeps, "loss against what was swept", "the runs differ in their seeds alone"),
        (many.last_profiles, "gradient through time", "no step was recorded"),
        (many.lags, "the lag-resolved curve", STANDARD),
        (sweeps.horizons, "gradient horizon against loss", STANDARD),
        (many.at_other_lengths, "", ""),
    ):
        found = draw(groups)
        if found is not None:
            yield found
        elif name:
            left_out.append(f"{name} ({why})")
    if (fields := many.heatmaps(digests)) is not None:
        yield fields
    yield configurations(groups)
    yield runs(groups, commands)
    if left_out:
        yield Exhibit("left_out", "Not shown", "For want of data: " + "; ".join(left_out) + ".")


SETUPS = (
    "Runs that differ in their seed alone are one set-up. Solved: the share and Wilson's 95 %"
    " interval of it; the median time is Kaplan and Meier's, in which a run that was not solved"
    " counts as far as it went, and is not reached where fewer than half were solved. The mean"
    " loss leaves out runs that went wrong."
)


def _cut(head: Sequence[str], rows: Iterable[Sequence[str]], count: int, file: str) -> Table:
    """The first ``ROWS`` of so many rows, and where to find the others."""
    shown = [*itertools.islice(rows, ROWS)]
    if count > ROWS:
        shown.append((f"{count - ROWS} more: see {file}", *[""] * (len(head) - 1)))
    return Table(head, shown)


def wrong(digests: Sequence[Digest], unreadable: Mapping[str, str]) -> Exhibit:
    """What did not end as planned, with its reason."""
    ended = [d for d in digests if d.summary["status"] != "completed"]
    ended.sort(key=lambda d: (d.summary["status"] not in WENT_WRONG, d.summary["status"], d.label))
    rows = [
        (d.label, d.summary["status"], str(d.summary["steps"]), d.summary.get("reason") or "-")
        for d in ended
    ]
    rows += [(label, "unreadable", "-", why) for label, why in unreadable.items()]
    if not rows:
        return Exhibit("wrong", "Failed and diverged", "None: all runs were completed.")
    text = (
        f"{sum(d.summary['status'] in WENT_WRONG for d in digests)} of {len(digests)} runs failed"
        " or diverged"
        + (f"; {len(unreadable)} more cannot be read and are left out" if unreadable else "")
        + "."
    )
    table = _cut(("run", "status", "updates", "reason"), rows, len(rows), "runs.csv")
    return Exhibit("wrong", "Failed, diverged and unfinished", text, tables=[table])


def verdicts(digests: Sequence[Digest]) -> Exhibit:
    """How many runs have which verdict."""
    counts = counted(digests)
    if list(counts) == ["none"]:
        return Exhibit("verdicts", "Verdicts", "None: these runs have not been diagnosed.")
    rows = [
        (name, str(count), percent(count / len(digests)),
         next(d.label for d in digests if (d.summary.get("verdict") or "none") == name))
        for name, count in counts.items()
    ]  # fmt: skip
    table = Table(("verdict", "runs", "share", "for example"), rows)
    return Exhibit("verdicts", "Verdicts", "", tables=[table])


def configurations(groups: Sequence[Group]) -> Exhibit:
    """The keys in which the configurations differ, with their values."""
    keys = swept(groups)
    seeds = {digest.seed for group in groups for digest in group.digests} - {None}
    rows = [(code(key), ", ".join(typed(v) for v in values[:40])) for key, values in keys.items()]
    rows += [("`seed`", f"{len(seeds)} values")] if len(seeds) > 1 else []
    if not rows:
        return Exhibit("configurations", "What differs", "The configurations are the same.")
    text = "Keys of a part are compared among the runs that have it."
    return Exhibit("configurations", "What differs", text, tables=[Table(("key", "values"), rows)])


def runs(groups: Sequence[Group], commands: str) -> Exhibit:
    """A line a run."""
    head = ("run", "set-up", "seed", "status", "updates", "last loss", "chance", "solved at",
            "clipped", "horizon", "verdict")  # fmt: skip

    def rows() -> Iterator[Sequence[str]]:
        for group in groups:
            for d in group.digests:
                s = d.summary
                yield (
                    d.label, group.name or "-", "-" if d.seed is None else str(d.seed), s["status"],
                    str(s["steps"]), number(s.get("eval_loss"), 4), number(s["chance_loss"], 4),
                    "never" if d.solved_at is None else str(d.solved_at),
                    percent(s.get("clip_fraction")), number(d.horizon, 6), s.get("verdict") or "-",
                )  # fmt: skip

    text = f"Everything about one run, with all its figures: {commands}"
    count = sum(len(group.digests) for group in groups)
    return Exhibit("runs", "Runs", text, tables=[_cut(head, rows(), count, "runs.csv")])


def setups(groups: Sequence[Group]) -> Table:
    """A row a set-up."""
    head = ("set-up", "runs", "went wrong", "solved (95 % interval)", "solved at (median)",
            "last loss (mean)", "clipped", "horizon (median)", "verdicts")  # fmt: skip
    return _cut(head, map(_setup, groups), len(groups), "setups.csv")


def statistics(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The same as numbers, of every set-up, with the settings that tell it from others."""
    rows = [
        {"setup": group.name or "all runs"} | group.differs | _numbers(group) for group in groups
    ]
    columns = dict.fromkeys(column for row in rows for column in row)
    return {column: [_cell(row.get(column)) for row in rows] for column in columns}


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else typed(value)


def _numbers(group: Group) -> dict[str, Any]:
    digests, losses = group.digests, group.losses
    low, high = wilson(group.solved, len(digests))
    good = losses[np.isfinite(losses) & (losses > 0)]
    clipped = [f for d in digests if (f := d.summary.get("clip_fraction")) is not None]
    reach = [digest.horizon for digest in digests if np.isfinite(digest.horizon)]
    median = many.survival(group).median
    ends = np.array([there[[0, -1]] for d in digests if len(there := d.last[~np.isnan(d.last)])])
    first, last = np.median(ends, axis=0) if len(ends) else (None, None)
    return {
        "runs": len(digests),
        "went_wrong": sum(digest.summary["status"] in WENT_WRONG for digest in digests),
        "solved": group.solved,
        "solved_low": low,
        "solved_high": high,
        "solved_at_median": None if np.isinf(median) else median,
        "mean_log10_loss": float(np.mean(np.log10(good))) if len(good) else None,
        "median_loss": float(np.median(good)) if len(good) else None,
        "clip_fraction": float(np.mean(clipped)) if clipped else None,
        "horizon_median": float(np.median(reach)) if reach else None,
        "log10_hidden_grad_first_t_median": first,
        "log10_hidden_grad_last_t_median": last,
        "verdict_most": next(iter(counted(digests))),
    }


def _setup(group: Group) -> tuple[str, ...]:
    digests = group.digests
    wrong = sum(digest.summary["status"] in WENT_WRONG for digest in digests)
    low, high = wilson(group.solved, len(digests))
    times = many.survival(group)
    good = group.losses[np.isfinite(group.losses) & (group.losses > 0)]
    clipped = [d.summary.get("clip_fraction") for d in digests]
    fractions = [value for value in clipped if value is not None]
    reach = [digest.horizon for digest in digests if np.isfinite(digest.horizon)]
    return (
        group.name or "all runs",
        str(len(digests)),
        str(wrong),
        f"{group.solved} of {len(digests)} ({100 * low:.0f} to {100 * high:.0f} %)",
        f"over {times.end:.0f}" if np.isinf(times.median) else f"{times.median:.0f}",
        number(float(10 ** np.mean(np.log10(good)))) if len(good) else "-",
        percent(float(np.mean(fractions))) if fractions else "-",
        number(float(np.median(reach)), 6) if reach else "-",
        ", ".join(f"{name} {count}" for name, count in counted(digests).items()),
    )


def counted(digests: Sequence[Digest]) -> dict[str, int]:
    """How many runs have which verdict, the most frequent first."""
    counts: dict[str, int] = {}
    for digest in digests:
        name = digest.summary.get("verdict") or "none"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda found: (-found[1], found[0])))
