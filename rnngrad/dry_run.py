"""What a command would do: which runs, which of them are there already, and for how long."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rnngrad.progress import in_words
from rnngrad.runs import FINISHED

LINES = 20
"""Runs that are listed of each status."""
SECONDS = 8.0
"""For all timing together, beside what the compiler takes."""


@dataclass
class _Shape:
    """Runs whose updates take the same time."""

    values: Mapping[str, Any]
    runs: int = 0
    steps: int = 0


@dataclass
class DryRun:
    """Collects a command's runs, then tells about them; writes nothing."""

    _names: dict[str, list[str]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _shapes: dict[str, _Shape] = field(default_factory=dict)

    def add(self, directory: Path, values: Mapping[str, Any], status: str) -> None:
        """One more run.

        Args:
            directory: Its own.
            values: The configuration, checked.
            status: As ``launcher.check_directory`` says, or ``running``.
        """
        self._counts[status] += 1
        names = self._names.setdefault(status, [])
        if len(names) < LINES:
            names.append(directory.name)
        if status in (*FINISHED, "running"):
            return
        groups = {key: value for key, value in values.items() if isinstance(value, Mapping)}
        trainer = {k: v for k, v in groups["trainer"].items() if k in _TIMED}
        alike = groups | {"optim": groups["optim"]["name"], "trainer": trainer}
        alike["clip"] = groups["clip"]["name"]
        shape = self._shapes.setdefault(json.dumps(alike, default=str), _Shape(values))
        shape.runs += 1
        shape.steps += groups["trainer"]["steps"]

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
        shapes = [*self._shapes.values()]
        if not shapes:
            return "there is nothing to train"
        timed = shapes[:MOST_TIMED]
        budget = min(2.0, SECONDS / len(timed))
        seconds = [seconds_per_update(shape.values, budget) for shape in timed]
        taken = dict(zip(map(id, timed), seconds, strict=True))
        mean = sum(seconds) / len(seconds)
        total = sum(shape.steps * taken.get(id(shape), mean) for shape in shapes)
        runs = sum(shape.runs for shape in shapes)
        slowest, fastest = (f"{1e3 * t:.3g}" for t in (max(seconds), min(seconds)))
        each = fastest if fastest == slowest else f"{fastest} to {slowest}"
        return (
            f"about {in_words(total)} for {runs} run{'s' * (runs > 1)} one after the other, from "
            f"{each} ms an update, timed for {budget:.2g} s each on {len(timed)} of {len(shapes)} "
            f"shape{'s' * (len(shapes) > 1)}; start-up and compilation are not counted"
        )


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


def seconds_per_update(values: Mapping[str, Any], budget: float) -> float:
    """Seconds that an update takes, with what is logged and measured on the way.

    Args:
        values: The configuration of a run, which is trained in a temporary directory.
        budget: Seconds to train for, after three updates in which all is compiled and warm.
    """
    from rnngrad.config import experiment
    from rnngrad.tracking import Tracker

    spec = experiment(values)
    steps = max(spec.trainer.steps, 100)  # the first ones take longer
    trainer = replace(spec.trainer, steps=steps, nonfinite="skip", nonfinite_patience=None)
    spec = replace(spec, trainer=trainer)
    marks: list[tuple[int, float]] = []

    def enough() -> bool:
        step = training.progress.step
        if step >= 3 and (not marks or marks[-1][0] < step):
            marks.append((step, time.perf_counter()))
        return len(marks) > 1 and marks[-1][1] - marks[0][1] >= budget

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "timing")
        directory.mkdir()
        with Tracker(directory, spec.task.chance_loss, spec.task.time_steps, spec.columns) as to:
            begun = time.perf_counter()
            training = spec.training(to, should_stop=enough)
            result = training.run()
            seconds = time.perf_counter() - begun
    if len(marks) < 2:  # it has solved the task, say
        return seconds / max(1, result.steps)
    (first, start), (last, end) = marks[0], marks[-1]
    return (end - start) / (last - first)
