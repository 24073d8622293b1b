"""Many runs in little memory: what a comparison needs of each, and which differ in seed alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rnngrad.dynamics import Decay, decay, horizon
from rnngrad.report.reading import Reading
from rnngrad.report.style import Floats
from rnngrad.runs import SUMMARY, Run, differing, typed
from rnngrad.stored import Unreadable

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError)
"""What reading a run's files raises when they are broken."""

HORIZON = 1e-3
"""The fraction of the gradient down to which a lag counts as within the horizon."""

LONGEST = 60
"""Letters of a name that a legend has room for."""

OBVIOUS = ("task", "cell", "clip")
"""Parts that need not be named beside their value."""

WENT_WRONG = ("diverged", "failed")


@dataclass(frozen=True)
class Digest:
    """What is kept of a run for a comparison; arrays over time are of the last layer, forward.

    Args:
        run: Where it is from.
        label: Its path below the folder that all runs share.
        settings: Its configuration, flat.
        summary: summary.json.
        chance: The loss of a guess without memory; NaN where none is known.
        eval_step: Evaluated steps ``[E]``.
        eval_loss: ``[E]``.
        last: ``log10 ‖∂L/∂h_t‖ [T]`` at the last logged step; empty without a record.
        lag: The lag-resolved curve at the last measured step ``[T]``; empty where not measured.
    """

    run: Run
    label: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    chance: float
    eval_step: Floats
    eval_loss: Floats
    last: Floats
    lag: Floats

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    @property
    def solved_at(self) -> int | None:
        found: int | None = self.summary.get("solved_at")
        return found

    @property
    def loss(self) -> float:
        """The last evaluation's; NaN without one, and for a run that went wrong."""
        value = self.summary.get("eval_loss")
        wrong = self.summary["status"] in WENT_WRONG
        return math.nan if value is None or wrong else float(value)

    @cached_property
    def decay(self) -> Decay | None:
        """The line through the lag-resolved curve, where there are points for one."""
        fitted = decay(self.lag)
        return fitted if fitted.points > 1 else None

    @cached_property
    def horizon(self) -> float:
        """Steps back at which a thousandth of the gradient is left; NaN where not measured."""
        return float(horizon(self.lag, HORIZON)) if np.isfinite(self.lag).any() else math.nan


def chance(summary: Mapping[str, Any]) -> float:
    """The loss of a guess without memory; NaN where none is known."""
    value = summary.get("chance_loss")
    return math.nan if value is None else float(value)


def digest(run: Run, label: str) -> Digest:
    """Reads a run's files once.

    Raises:
        OSError, ValueError, KeyError, TypeError: They are broken; see ``UNREADABLE``.
    """
    reading = Reading(run.path)  # not kept, and with it all that is not needed
    summary = _short(reading.summary)
    for key in ("status", "steps"):
        if summary[key] is None:  # a file of something else would be found out much later
            raise Unreadable(run.path / SUMMARY, f"has no {key}")
    metrics, bptt, measures = reading.metrics, reading.bptt, reading.measures
    evaluated = np.isfinite(metrics["eval_loss"])
    forward = [layer for layer in bptt if not layer.endswith("_reverse")]
    hidden = bptt[forward[-1]].hidden if forward else np.empty((0, 0))
    lags = [n for n in measures if n.endswith("/lag") and not n.split("/")[0].endswith("_reverse")]
    lag = np.atleast_2d(measures[lags[-1]].T).T if lags else np.empty((0, 0))
    lag = lag[np.isfinite(lag).any(1)] if lag.size else lag
    return Digest(
        run=run,
        label=label,
        settings=reading.settings,
        summary=summary,
        chance=chance(summary),
        eval_step=metrics["step"][evaluated].astype(np.float64),
        eval_loss=metrics["eval_loss"][evaluated],
        last=hidden[-1].copy() if len(hidden) else np.empty(0),
        lag=lag[-1].copy() if len(lag) else np.empty(0),
    )


def _short(summary: dict[str, Any]) -> dict[str, Any]:
    """summary.json without what a diagnosis says in words, which is most of it."""
    findings = (summary.get("diagnosis") or {}).get("findings") or ()
    levels = [{"symptom": f.get("symptom"), "level": f.get("level")} for f in findings]
    return summary | {"diagnosis": {"findings": levels}}


def read(runs: Sequence[Run]) -> tuple[list[Digest], dict[str, str]]:
    """Digests of the runs that can be read, and what is wrong with the others, by label."""
    digests, unreadable = [], {}
    for run, label in zip(runs, labels([run.path for run in runs]), strict=True):
        try:
            digests.append(digest(run, label))
        except UNREADABLE as error:
            unreadable[label] = " ".join(str(error).split()) or type(error).__name__
    return digests, unreadable


def labels(paths: Sequence[Path]) -> list[str]:
    """The paths below the folder that they share: the same wherever that folder lies."""
    if not paths:
        return []
    whole = [path.resolve() for path in paths]
    common = Path(os.path.commonpath([path.parent for path in whole]))
    return [path.relative_to(common).as_posix() for path in whole]


@dataclass
class Group:
    """Runs of one set-up, which differ in their seed alone.

    Args:
        differs: The keys in which the groups differ, with this one's values; without the seed.
        digests: Its runs.
    """

    differs: dict[str, Any]
    digests: list[Digest] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What differs; where that is a long list, the directory of the first run."""
        name = named(self.differs)
        if len(name) <= LONGEST or not self.digests:
            return name
        more = len(self.digests) - 1
        return self.digests[0].label + (f" and {more} more" if more else "")

    @property
    def solved(self) -> int:
        return sum(digest.solved_at is not None for digest in self.digests)

    @property
    def losses(self) -> Floats:
        return np.array([digest.loss for digest in self.digests])

    @property
    def budget(self) -> int:
        """Updates that a run of this set-up has at most."""
        planned = [digest.settings.get("trainer.steps") or 0 for digest in self.digests]
        done = [digest.summary["steps"] for digest in self.digests]
        return int(max(planned + done))


def named(differs: Mapping[str, Any]) -> str:
    """Settings in few words: parts by their name, keys without their part where that is clear.

    >>> named({"cell.name": "lstm", "optim.lr": 0.01, "clip.max_norm": None})
    'lstm lr=0.01 max_norm=null'
    >>> named({"clip.name": "norm", "bptt_clip.name": "norm", "clip.max_norm": 1})
    'norm bptt_clip=norm max_norm=1'
    """
    ends = [key.rpartition(".")[2] for key in differs]
    words = []
    for key, value in differs.items():
        part, _, end = key.rpartition(".")
        if end == "name":
            words.append(typed(value) if part in OBVIOUS else f"{part}={typed(value)}")
        else:
            words.append(f"{end if ends.count(end) == 1 else key}={typed(value)}")
    return " ".join(words)


def grouped(digests: Sequence[Digest]) -> list[Group]:
    """The runs by set-up, sorted by the values of the keys in which these differ."""
    apart = differing([digest.settings for digest in digests])
    groups: dict[str, Group] = {}
    for mine, differs in zip(digests, apart, strict=True):
        without = {key: value for key, value in mine.settings.items() if key != "seed"}
        # a run without a configuration is no seed of another one
        key = repr(sorted(without.items(), key=str)) if mine.settings else mine.label
        differs = {k: v for k, v in differs.items() if k != "seed"}
        if not mine.settings:
            differs = {"run": mine.label}
        groups.setdefault(key, Group(differs)).digests.append(mine)
    _tell_apart(list(groups.values()))
    places = {
        key: {hashed(value): place for place, value in enumerate(values)}
        for key, values in swept(list(groups.values())).items()
    }
    return sorted(
        groups.values(),
        key=lambda group: [
            place[hashed(group.differs[key])] if key in group.differs else -1
            for key, place in places.items()
        ],
    )


def _tell_apart(groups: Sequence[Group]) -> None:
    """Numbers those of one name: they differ in a key that only some of them have."""
    counts: dict[str, int] = {}
    for group in groups:
        name = group.name
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            group.differs["variant"] = counts[name]


def swept(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The keys in which groups differ, with the values found, numbers in order."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for key, value in group.differs.items():
            found.setdefault(key, {}).setdefault(hashed(value), value)
    return {key: ordered([*values.values()]) for key, values in found.items() if len(values) > 1}


def hashed(value: Any) -> Any:
    """What stands for a value in a table of values, lists too."""
    return repr(value) if isinstance(value, list | dict) else value


def ordered(values: Sequence[Any]) -> list[Any]:
    """Numbers by size, before everything else in its order."""
    numeric = sorted(v for v in values if is_number(v))
    return [*numeric, *(v for v in values if not is_number(v))]


def is_number(value: Any) -> bool:
    """Whether a value has its place on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Panel:
    """Groups that share a panel; in all panels the same rest of the name has the same look.

    Args:
        title: The setting that they share.
        groups: By their name without it.
    """

    title: str
    groups: dict[str, Group]


IN_ONE_PANEL = 5
IN_A_PANEL = 8
PANELS = (2, 6)


def panels(groups: Sequence[Group]) -> list[Panel] | None:
    """The groups in one panel, or in a panel a value of one key, or ``None`` if they are too many.

    The key is the cell if possible, or else the one that leaves the fewest in a panel.
    """
    if len(groups) <= IN_ONE_PANEL:
        return [Panel("", {group.name: group for group in groups})]
    possible = []
    for place, (key, values) in enumerate(swept(groups).items()):
        if not PANELS[0] <= len(values) <= PANELS[1]:
            continue
        parts = [
            Panel(named({key: value}), {
                named({k: v for k, v in group.differs.items() if k != key}): group
                for group in groups if group.differs.get(key) == value
            })
            for value in values
        ]  # fmt: skip
        if not all(key in group.differs for group in groups):
            continue
        most = max(len(panel.groups) for panel in parts)
        if most <= IN_A_PANEL and all(len(name) <= LONGEST for p in parts for name in p.groups):
            possible.append((key != "cell.name", most, place, parts))
    if possible:
        return min(possible, key=lambda found: found[:3])[3]
    if len(groups) <= IN_A_PANEL:
        return [Panel("", {group.name: group for group in groups})]
    return None


def looks(found: Sequence[Panel]) -> dict[str, int]:
    """A number of a line's look for each name in the panels."""
    names = list(dict.fromkeys(name for panel in found for name in panel.groups))
    return {name: number for number, name in enumerate(names)}
