"""What a command would do: which runs, which of them are there already, and for how long."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnngrad.progress import in_words
from rnngrad.runs import FINISHED, SUMMARY, read_summary
from rnngrad.sweeps import Job

if TYPE_CHECKING:
    from rnngrad.stacking import Share
    from rnngrad.training import Training

LINES = 20
"""Runs that are listed of each status."""
SECONDS = 8.0
"""For all timing together, beside what the compiler takes."""


@dataclass
class _Shape:
    """Runs whose updates take the same time.

    Args:
        like: Their settings, or of the first of them.
        room: Of them are trained at a time.
        steps: Which are left of them all.
    """

    like: list[Mapping[str, Any]]
    room: int = 1
    steps: int = 0


@dataclass
class DryRun:
    """Collects a command's runs, then tells about them; writes nothing.

    Args:
        share: Of so many runs that of each process, if they are trained as stacks.
    """

    share: Callable[[int], Share] | None = None
    _names: dict[str, list[str]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _left: dict[Path, int] = field(default_factory=dict)
    _jobs: list[Job] = field(default_factory=list)

    def add(self, job: Job, status: str) -> None:
        """One more run.

        Args:
            job: The run, checked.
            status: As ``launcher.check_directory`` says, or ``running``.
        """
        self._counts[status] += 1
        names = self._names.setdefault(status, [])
        if len(names) < LINES:
            names.append(job.directory.name)
        if status in (*FINISHED, "running"):
            return
        self._jobs.append(job)
        self._left[job.directory] = steps_left(job)

    def text(self) -> str:
        """The runs by status, and how long those take that are to be trained."""
        lines = []
        for status, names in sorted(self._names.items(), key=lambda item: item[0] in FINISHED):
            count = self._counts[status]
            lines += [f"{count} {_WORDS.get(status, status)}", *(f"  {name}" for name in names)]
            if count > len(names):
                lines.append(f"  ... and {count - len(names)} more")
        return "\n".join([*lines, self._time()])

    def _time(self) -> str:
        if not self._jobs:
            return "there is nothing to train"
        share = None if self.share is None else self.share(len(self._jobs))
        shapes = self._one_by_one() if share is None else self._stacked(share)
        timed = shapes[:MOST_TIMED]
        budget = min(2.0, SECONDS / len(timed))
        threads = None if share is None else 1
        seconds = [seconds_per_update(s.like[: s.room], budget, threads) for s in timed]
        taken = dict(zip(map(id, timed), seconds, strict=True))
        mean = sum(seconds) / len(seconds)
        total = sum(shape.steps * taken.get(id(shape), mean) for shape in shapes)
        how = "one after the other"
        if share is not None:
            total /= share.of
            how = f"as stacks in {share.of} process{'es' * (share.of > 1)}"
        slowest, fastest = (f"{1e3 * t:.3g}" for t in (max(seconds), min(seconds)))
        each = fastest if fastest == slowest else f"{fastest} to {slowest}"
        runs = len(self._jobs)
        return (
            f"about {in_words(total)} for {runs} run{'s' * (runs > 1)} {how}, from "
            f"{each} ms an update, timed for {budget:.2g} s each on {len(timed)} of {len(shapes)} "
            f"shape{'s' * (len(shapes) > 1)}; start-up and compilation are not counted"
        )

    def _one_by_one(self) -> list[_Shape]:
        shapes: dict[str, _Shape] = {}
        for job in self._jobs:
            groups = {k: value for k, value in job.values.items() if isinstance(value, Mapping)}
            trainer = {k: v for k, v in groups["trainer"].items() if k in _TIMED}
            alike = groups | {"optim": groups["optim"]["name"], "trainer": trainer}
            alike["clip"] = groups["clip"]["name"]
            shape = shapes.setdefault(json.dumps(alike, default=str), _Shape([job.values]))
            shape.steps += self._left[job.directory]
        return [*shapes.values()]

    def _stacked(self, share: Share) -> list[_Shape]:
        from rnngrad.stacking import grouped

        return [
            _Shape(
                [job.values for job in group.jobs],
                share.room(group),
                sum(self._left[job.directory] for job in group.jobs),
            )
            for group in grouped(self._jobs)
        ]


MOST_TIMED = 16
"""Shapes; of the others the mean is taken."""
_TIMED = ("batch_size", "tbptt_k1", "tbptt_k2", "recompute_segments", "clip_audit", "log_every")
"""Of the trainer's keys, what an update's time depends on."""
_WORDS = {
    "new": "to begin",
    "interrupted": "to go on",
    "failed": "failed, to be tried again",
    "running": "going on elsewhere",
    "completed": "completed, to stay as they are",
    "diverged": "diverged, to stay as they are",
}


def steps_left(job: Job) -> int:
    """Updates that a run has yet to make, as its summary says."""
    steps: int = job.values["trainer"]["steps"]
    try:
        summary = read_summary(job.directory / SUMMARY)
    except (OSError, ValueError):
        return steps
    return max(0, (summary["planned_steps"] or steps) - (summary["steps"] or 0))


def seconds_per_update(
    together: Sequence[Mapping[str, Any]], budget: float, threads: int | None = None
) -> float:
    """Seconds that an update of each run takes, with what is logged and measured on the way.

    Args:
        together: The configurations of runs that are trained as a stack, in a temporary directory.
        budget: Seconds to train for, after three updates in which all is compiled and warm.
        threads: To train on; all that there are, if it is not said.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _timed(together, budget, Path(folder)) / len(together)
    finally:
        torch.set_num_threads(before)


def _timed(together: Sequence[Mapping[str, Any]], budget: float, folder: Path) -> float:
    """Seconds that a step of them all takes."""
    from rnngrad.config import experiment
    from rnngrad.stack import Stack, Works
    from rnngrad.tracking import Tracker

    trainings: list[Training] = []
    marks: list[tuple[int, float]] = []
    results: list[Any] = []

    def enough() -> bool:
        """By the first of them, which the others keep pace with."""
        now, step = time.perf_counter(), trainings[0].progress.step
        if step >= 3 and (not marks or marks[-1][0] < step):
            marks.append((step, now))
        return bool(marks) and now - marks[0][1] >= budget

    def ended(name: Any, result: Any, error: BaseException | None) -> None:
        if error is not None:
            raise error
        results.append(result)

    with ExitStack() as opened:
        for number, values in enumerate(together):
            spec = experiment(values)
            steps = max(spec.trainer.steps, 100)  # the first ones take longer
            trainer = replace(spec.trainer, steps=steps, nonfinite="skip", nonfinite_patience=None)
            spec = replace(spec, trainer=trainer)
            directory = folder / str(number)
            directory.mkdir()
            tracker = Tracker(directory, spec.task.chance_loss, spec.task.time_steps, spec.columns)
            trainings.append(spec.training(opened.enter_context(tracker), should_stop=enough))
        waiting: Iterator[tuple[int, Works]] = iter(
            [(number, training.works(bar=False)) for number, training in enumerate(trainings)]
        )
        begun = time.perf_counter()
        Stack(lambda: next(waiting, None), ended, len(together)).run()
        seconds = time.perf_counter() - begun
    if len(marks) < 2:  # they have solved the task, say
        return seconds / max(1, *(int(result.steps) for result in results))
    (first, start), (last, end) = marks[0], marks[-1]
    return (end - start) / (last - first)
