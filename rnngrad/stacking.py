"""A list of runs, trained as stacks by processes that share it.

Each process goes through the whole list, from a place of its own, and takes what nobody else has: a
run is taken by its directory's lock. So several processes, two sweeps at once or the tasks of a
cluster can work on the same runs, and when one of them dies another one goes on with its runs: by
itself each, and last, as one of them may be what it has died of.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnngrad.job import ended, logging_to, say, works
from rnngrad.launcher import InUse
from rnngrad.outcomes import FAILED, OUTCOMES, Ledger, Outcome, note, note_begun
from rnngrad.runs import LOG
from rnngrad.signals import Signals
from rnngrad.sweeps import Job

if TYPE_CHECKING:
    from rnngrad.config import Experiment
    from rnngrad.stack import Works

POLL = 0.3
"""Seconds until a run that somebody else has is asked for again."""
ATTEMPTS = 2
"""Processes of a sweep that may die while they train a run; then it is left to the next sweep."""


@dataclass(frozen=True)
class Share:
    """What one of several processes begins with, and how much it takes on at a time.

    Args:
        index: Which one it is.
        of: How many there are.
        most: Runs at a time.
        memory: Bytes that the states and gates of these may take.
    """

    index: int
    of: int
    most: int
    memory: float

    def first(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs in an order in which each process begins with others."""
        return [job for i in range(self.of) for job in jobs[(self.index + i) % self.of :: self.of]]

    def room(self, group: Group) -> int:
        """How many of a group to train at a time, so that the others get some as well."""
        if group.alone:
            return 1
        fitting = int(self.memory // group.bytes)
        return max(1, min(self.most, fitting, -(-len(group.jobs) // self.of)))


@dataclass(frozen=True)
class Group:
    """Runs that are trained as one program, or one by one.

    Args:
        jobs: In their order.
        alone: Why they are trained one by one; empty if they are not.
        bytes: About what each takes.
    """

    jobs: Sequence[Job]
    alone: str
    bytes: int


def grouped(jobs: Sequence[Job]) -> list[Group]:
    """The jobs by what their kernels' calls need to have in common."""
    from rnngrad.config import experiment

    found: dict[Hashable, list[Job]] = defaultdict(list)
    for job in jobs:
        found[_shape(job.values)].append(job)
    specs = [experiment(alike[0].values) for alike in found.values()]
    return [
        Group(alike, _why_alone(spec, alike[0].values), _bytes(spec))
        for spec, alike in zip(specs, found.values(), strict=True)
    ]


def said(groups: Sequence[Group]) -> Iterator[str]:
    """Of what is trained one by one, how much and why, in a line each."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group.alone] += len(group.jobs) if group.alone else 0
    for why, count in counts.items():
        if why:
            yield f"{count} of the runs {'are' if count > 1 else 'is'} not stacked: {why}"


def _shape(values: Mapping[str, Any]) -> Hashable:
    """What runs have in common that can share a kernel's calls, and what keeps them from it."""
    from rnngrad.regularization import REGULARIZERS

    cell, trainer, penalty = values["cell"], values["trainer"], values["regularizer"]
    same = {
        "task": values["task"],
        "cell": [cell.get(key) for key in ("name", "hidden_size", "num_layers", "nonlinearity")],
        "forget_gate": cell.get("forget_gate"),
        "trainer": [
            trainer.get(key) for key in ("batch_size", "tbptt_k1", "tbptt_k2", "recompute_segments")
        ],
        "parts": [values.get(key) for key in ("bptt_clip", "device", "plugins")],
        "penalty": penalty if REGULARIZERS.load()[penalty["name"]].needs_gradients else None,
    }
    return json.dumps(same, sort_keys=True)


def _why_alone(spec: Experiment, values: Mapping[str, Any]) -> str:
    """What keeps runs like this one from sharing calls, if anything does; see ``stack._kind``."""
    trainer, names = spec.trainer, spec.names
    if values.get("plugins"):
        return "plugins may draw from the random streams of the whole process"
    if not spec.cell.recomputes:
        return f"cell={names['cell']} is run step by step by autograd"
    if spec.general.device != "cpu":
        return f"device={spec.general.device}"
    if trainer.tbptt is not None and trainer.tbptt[1] < spec.task.time_steps:
        return "trainer.tbptt_k2 is set"
    if trainer.recompute_segments > 1:
        return "trainer.recompute_segments is set"
    if spec.regularizer.needs_gradients:
        return f"regularizer={names['regularizer']} looks at every step's gradient"
    return ""


def _bytes(spec: Experiment) -> int:
    """About what the states, gates and gradients of one run take during a step."""
    rows = spec.task.time_steps * spec.trainer.batch_size
    return 4 * rows * (spec.task.input_size + 9 * spec.cell.hidden_size * spec.cell.num_layers)


class Claims:
    """The runs that a process may take, and what becomes of those it took.

    Args:
        signals: Once it says so, no run is begun.
        sweep: The directory of the sweep.
        plugins: Modules with parts of the user's own.

    Attributes:
        begun: Runs passed over, which a process of this sweep has begun and not ended.
    """

    def __init__(self, signals: Signals, sweep: str, plugins: Sequence[str]) -> None:
        self._signals, self._sweep, self._plugins = signals, sweep, plugins
        self._ledger = Ledger(Path(os.environ[OUTCOMES]))
        self._queue: list[Job] = []
        self._together = self._again = False
        self.begun: list[Job] = []

    def offer(self, jobs: Iterable[Job], *, together: bool, again: bool = False) -> None:
        """Jobs to be taken, the first one first.

        Args:
            jobs: To be taken.
            together: Whether several train at a time.
            again: Whether they may have been begun by somebody who has died.
        """
        self._queue, self._together, self._again = [*reversed([*jobs])], together, again

    def take(self) -> tuple[Job, Works] | None:
        """The next run that has no outcome yet."""
        while self._queue and not self._signals():
            job = self._queue.pop()
            if self._ledger.is_done(job.directory):
                continue
            if self._ledger.begun(job.directory) and not self._again:
                self.begun.append(job)
                continue
            return job, self._logged(job)
        return None

    def undone(self, groups: Iterable[Group]) -> list[Group]:
        """What has no outcome yet of each group that has any of it."""
        is_done = self._ledger.is_done
        left = [[job for job in group.jobs if not is_done(job.directory)] for group in groups]
        return [replace(g, jobs=jobs) for g, jobs in zip(groups, left, strict=True) if jobs]

    def ended(self, job: Any, result: tuple[int, float] | None, error: Any) -> None:
        """Notes how a run has ended."""
        if isinstance(error, InUse):  # to be asked for again
            return
        if result is None:
            try:
                with logging_to(job.directory / LOG):
                    result = ended(error, job.directory, self._plugins)
            except OSError:  # not even a log can be written
                say(f"failed: {error}")
                result = FAILED, math.inf
        note([Outcome(result[0], job.directory, self._sweep)])

    def _logged(self, job: Job) -> Works:
        """A run with a log of its own, while others train in the same process."""
        from rnngrad.stack import ADVANCING

        job.directory.mkdir(parents=True, exist_ok=True)
        with logging_to(job.directory / LOG, only=lambda: ADVANCING.get() is job):
            return (
                yield from works(
                    dict(job.values),
                    job.directory,
                    self._signals,
                    texts=job.texts,
                    stacked=True,
                    shares_streams=self._together,
                    held=self._held(job),
                )
            )

    @contextmanager
    def _held(self, job: Job) -> Iterator[None]:
        """Notes that the run is begun, and a failure before another process can try it again."""
        if self._ledger.is_done(job.directory):
            raise InUse(f"{job.directory}: has just been trained elsewhere")
        begun = self._ledger.begun(job.directory)
        note_begun(job.directory, self._sweep)
        try:
            if begun >= ATTEMPTS:
                raise RuntimeError(f"{begun} processes have died while they trained this run")
            yield
        except (Exception, SystemExit):
            note([Outcome(FAILED, job.directory, self._sweep)])
            raise


def work(
    jobs: Sequence[Job], share: Share, sweep: str, plugins: Sequence[str], signals: Signals
) -> None:
    """Trains what nobody else does of ``jobs``, until each has an outcome.

    Args:
        jobs: The whole list.
        share: Which part of it to begin with.
        sweep: The directory of the sweep.
        plugins: Modules with parts of the user's own.
        signals: Says when to save what is being trained, and leave.
    """
    from rnngrad.stack import Stack

    claims, groups = Claims(signals, sweep, plugins), grouped(jobs)
    while groups and not signals():
        for group in groups:
            claims.offer(share.first(group.jobs), together=not group.alone)
            Stack(claims.take, claims.ended, share.room(group)).run()
        claims.offer(claims.begun, together=False, again=True)
        claims.begun = []
        Stack(claims.take, claims.ended, 1).run()
        groups = claims.undone(groups)
        if groups and not signals():
            time.sleep(POLL)
