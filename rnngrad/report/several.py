"""What the report says of several runs: which figures and tables, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rnngrad.report import many
from rnngrad.report.exhibit import Exhibit, Table, number, percent
from rnngrad.report.groups import WENT_WRONG, Digest, Group, swept
from rnngrad.report.one import STANDARD
from rnngrad.runs import typed

ROWS = 300
"""Rows of a table in the page at most; the CSV has them all."""


def exhibits(
    groups: Sequence[Group], unreadable: Mapping[str, str], commands: str
) -> Iterator[Exhibit]:
    """The sections of a comparison."""
    digests = [digest for group in groups for digest in group.digests]
    yield Exhibit("setups", "Set-ups", SETUPS, tables=[_cut(many.setups(groups))])
    yield wrong(digests, unreadable)
    yield verdicts(digests)
    yield many.loss_curves(groups)
    left_out = []
    for draw, name, why in (
        (many.solving, "when the task was solved", "no run has solved it"),
        (many.success, "success against length", "`task.length` does not differ"),
        (many.sweeps, "loss against what was swept", "the runs differ in their seeds alone"),
        (many.last_profiles, "gradient through time", "no step was recorded"),
        (many.lags, "the lag-resolved curve", STANDARD),
        (many.horizons, "gradient horizon against loss", STANDARD),
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


def _cut(table: Table) -> Table:
    if len(table.rows) <= ROWS:
        return table
    rest = f"{len(table.rows) - ROWS} more: see runs.csv"
    empty = [""] * (len(table.head) - 1)
    return Table(table.head, [*table.rows[:ROWS], (rest, *empty)])


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
    table = _cut(Table(("run", "status", "updates", "reason"), rows))
    return Exhibit("wrong", "Failed, diverged and unfinished", text, tables=[table])


def verdicts(digests: Sequence[Digest]) -> Exhibit:
    """How many runs have which verdict."""
    counts = many.verdicts(digests)
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
    rows = [(f"`{key}`", ", ".join(typed(v) for v in values[:40])) for key, values in keys.items()]
    rows += [("`seed`", f"{len(seeds)} values")] if len(seeds) > 1 else []
    if not rows:
        return Exhibit("configurations", "What differs", "The configurations are the same.")
    text = "Keys of a part are compared among the runs that have it."
    return Exhibit("configurations", "What differs", text, tables=[Table(("key", "values"), rows)])


def runs(groups: Sequence[Group], commands: str) -> Exhibit:
    """A line a run."""
    head = ("run", "set-up", "seed", "status", "updates", "last loss", "chance", "solved at",
            "clipped", "horizon", "verdict")  # fmt: skip
    rows = []
    for group in groups:
        for d in group.digests:
            s = d.summary
            rows.append(
                (d.label, group.name or "-", "-" if d.seed is None else str(d.seed), s["status"],
                 str(s["steps"]), number(s.get("eval_loss"), 4), number(s["chance_loss"], 4),
                 "never" if d.solved_at is None else str(d.solved_at),
                 percent(s.get("clip_fraction")), number(d.horizon, 6), s.get("verdict") or "-")
            )  # fmt: skip
    text = f"Everything about one run, with all its figures: {commands}"
    return Exhibit("runs", "Runs", text, tables=[_cut(Table(head, rows))])
