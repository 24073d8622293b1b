"""What a published experiment is here: runs, what is kept of them, criteria, a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rnngrad.stored import flat

if TYPE_CHECKING:
    from rnngrad.reproduce.drawing import Drawing
    from rnngrad.runs import Run

Row = Mapping[str, Any]
"""What is kept of a run: numbers, texts, and curves as lists of numbers."""


class Rows(list[Row]):
    """Rows of several runs."""

    def where(self, **values: Any) -> Rows:
        """Those in which every key has this value, or one of these."""
        return Rows(
            row
            for row in self
            if all(
                row[key] in value if isinstance(value, tuple) else row[key] == value
                for key, value in values.items()
            )
        )

    def of(self, key: str) -> npt.NDArray[np.float64]:
        """A number of each row ``[n]``; NaN where it has none."""
        return np.array([np.nan if row[key] is None else row[key] for row in self], np.float64)

    def values(self, key: str) -> list[Any]:
        """What stands there in these rows, each once, in order."""
        found = {row[key] for row in self}
        return sorted(found, key=lambda value: (isinstance(value, str), value is None, value or 0))

    def sets(self, key: str) -> dict[Any, Rows]:
        """The rows by what stands there."""
        return {value: self.where(**{key: value}) for value in self.values(key)}


class Published(NamedTuple):
    """A published figure, and how it is known.

    Args:
        figure: The number or the claim, as published.
        source: Where: a paper's section, or code or a log at a named commit.
        known: Read in the paper, in the authors' code, in a log of their code, derived from
            formulas of the paper; or published by nobody.
    """

    figure: str
    source: str
    known: Literal["paper", "code", "log", "derived", "nobody"]


class Seen(NamedTuple):
    """What came out, and whether it is what was to be seen."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Criterion:
    """What must be seen for a claim to be called reproduced.

    Args:
        statement: With its numbers, which are fixed before the runs that are judged.
        judge: Judges an experiment's rows.
        published: What it is compared with.
    """

    statement: str
    judge: Callable[[Rows], Seen]
    published: Published


@dataclass(frozen=True)
class Quick:
    """The form of an experiment that takes less than a minute.

    Args:
        criteria: Its own: what can honestly be expected of so little.
        sweeps: As an experiment's.
    """

    criteria: Sequence[Criterion]
    sweeps: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment:
    """A published experiment.

    Args:
        name: On the command line.
        title: In a few words.
        paper: Authors, year, where the experiment stands in it.
        claim: That is put to the test, in a sentence.
        minutes: About, on 2 cores.
        sweeps: What follows ``rnngrad -m``: a set-up in conf/experiment/, which has the values it
            sweeps over, and overrides.
        keys: Of the configuration that tell its runs apart, by the name that rows have for them;
            of several, whichever a run has.
        digest: What else is kept of a run.
        criteria: All of them have to hold.
        quick: Its short form.
        draw: Its figure, in the style of the paper's.
        settings: As run, and where they differ from the paper's.
        calibrated: On what the windows of the criteria were fixed; never on runs that are judged.
        found: What was seen where it is not what was claimed, and the experiment that tells why.
        computed: Rows that do not come from runs, for given seeds.
        finding: Whether it answers a question that nobody has published an answer to: it has no
            verdict, and its criteria are what was expected.
    """

    name: str
    title: str
    paper: str
    claim: str
    minutes: float
    criteria: Sequence[Criterion]
    quick: Quick
    draw: Callable[[Rows], Drawing]
    settings: str
    calibrated: str
    sweeps: Sequence[str] = ()
    keys: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    digest: Callable[[Run], Row] = lambda run: {}
    found: str = ""
    computed: Callable[[Sequence[int]], Iterable[Row]] | None = None
    computed_seeds: Sequence[int] = ()
    finding: bool = False

    def name_of(self, row: Row) -> tuple[str, ...]:
        """What tells a row from others: its settings and its seed."""
        return tuple(str(row.get(key)) for key in (*self.keys, "seed"))

    def verdict(self, seen: Iterable[Seen]) -> str:
        """Reproduced if all criteria hold, partly if some do, not reproduced if none does."""
        held = [one.holds for one in seen]
        if self.finding:
            return "a finding"
        return "reproduced" if all(held) else "partly" if any(held) else "not reproduced"

    def row(self, run: Run) -> Row:
        """What is kept of a run."""
        config, summary = flat(run.config), run.summary
        outcome = ("status", "steps", "eval_loss", "eval_accuracy", "solved_at", "clip_fraction")
        settings = {
            name: next(
                (config[k] for k in ([key] if isinstance(key, str) else key) if k in config), None
            )
            for name, key in self.keys.items()
        }
        return (
            {"seed": config["seed"]}
            | settings
            | {key: summary[key] for key in outcome}
            | dict(self.digest(run))
        )


def thinned(
    step: npt.NDArray[Any], value: npt.NDArray[Any], points: int = 60
) -> list[tuple[int, float | None]]:
    """A curve as pairs, at most ``points`` of them; ``None`` where it is not finite."""
    there = ~np.isnan(value)
    step, value = step[there], value[there]
    kept = np.unique(np.linspace(0, len(step) - 1, min(points, len(step))).round().astype(int))
    return [(int(step[i]), float(value[i]) if np.isfinite(value[i]) else None) for i in kept]


def first_below(run: Run, loss: float) -> int | None:
    """Updates done at the first evaluation whose loss is below a number."""
    metrics = run.metrics
    below = metrics["eval_loss"] < loss
    return int(metrics["step"][below][0]) if below.any() else None


def extremes(values: npt.NDArray[np.float64], form: str, absent: str = "none") -> str:
    """The least and the greatest of several numbers, and how many are NaN.

    >>> extremes(np.array([0.5, 0.25]), ".2f")
    '0.25 to 0.50'
    >>> extremes(np.array([1800, 2400, np.nan]), ",.0f", "never")
    '1,800 to 2,400, 1 never'
    """
    there = values[~np.isnan(values)]
    parts = [f"{there.min():{form}} to {there.max():{form}}"] if len(there) else []
    if missing := len(values) - len(there):
        parts.append(f"{missing} {absent}")
    return ", ".join(parts)
