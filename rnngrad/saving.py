"""When a training saves itself, and what becomes of it if that cannot be done."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rnngrad.checkpoint import AsyncCheckpointer
from rnngrad.resume import plain_settings
from rnngrad.snapshot import snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from rnngrad.training import Training

log = logging.getLogger(__name__)


class Saver:
    """Saves a training by steps or by the clock, and whenever it is asked to.

    A checkpoint that cannot be written is told once and tried again at the next occasion, as long
    as the run's directory is there at all. A state that is not finite is never saved: the last
    finite one stays.

    Args:
        directory: Of the checkpoints; the run's own is where it lies.
        every_steps: Save after so many updates.
        every_seconds: Save when so much time has passed.
        keep: So many of the last checkpoints stay, and the best; 0 is all.
        settings: What defines the run, as plain values: a checkpoint says which run it is of.
        before: Called before a state is taken.

    Attributes:
        failure: Why an attempt failed; ``None`` if none has, or the one at the end did not.
        saved: Of which step the last state is that was saved, or being saved.

    Neither ``every_steps`` nor ``every_seconds``: only the start and the end, or where the run is
    interrupted.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep: int = 2,
        settings: Mapping[str, Any] = MappingProxyType({}),
        before: Callable[[], None] | None = None,
    ) -> None:
        self._checkpointer = AsyncCheckpointer(directory, keep=keep)
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._settings = plain_settings(settings)
        self._before = before
        self._saved_at = time.monotonic()
        self._saved_step: int | None = None
        self._best = False
        self.failure: OSError | None = None
        self.saved: int | None = None
        self._was_finite = True

    def begin(self, training: Training) -> None:
        """Saves a run that has just begun, so that there is always something to go on from."""
        progress = training.progress
        self.saved = progress.step
        if progress.step == 0:
            self.save(training)
        # with its evaluation owed, a step is saved once more when that is there
        self._saved_step = progress.step if progress.row is None else None

    def after_update(self, training: Training, *, best: bool, now: bool) -> None:
        """Saves if it is time to, or this is the best state so far.

        Args:
            training: Between two updates.
            best: The evaluation has just been the best so far.
            now: Saves in any case.
        """
        if not now and self._every_steps is None and self._every_seconds is None:
            return
        by_step = self._every_steps and training.progress.step % self._every_steps == 0
        waited = time.monotonic() - self._saved_at
        by_clock = self._every_seconds is not None and waited >= self._every_seconds
        if by_step or by_clock or best or now:
            self.save(training, best=best)

    def save(self, training: Training, *, best: bool = False) -> None:
        """Copies the state and begins to write it."""
        self._saved_at = time.monotonic()
        if not _finite(training):
            if self._was_finite:
                log.warning("not saved from step %d on, as not finite", training.progress.step)
            self._was_finite = False
            return
        self._was_finite, self.saved = True, training.progress.step
        training.tracker.finish(training.result())
        if self._before is not None:
            self._before()
        tensors, values = snapshot(training)
        values["settings"] = self._settings
        self._saved_step = training.progress.step
        self._best = best
        self._wait()
        self._checkpointer.save(
            training.progress.step, tensors, values, best=best, after=training.tracker.sync
        )

    def end(self, training: Training) -> None:
        """Saves once more if the last checkpoint is of an earlier step; waits until it is safe.

        What could not be written is tried a second time: there is no next occasion.
        """
        if self._saved_step != training.progress.step:
            self.save(training)
        if not self._wait():
            self.save(training, best=self._best)
            if not self._wait():
                return
        self.failure = None

    def __enter__(self) -> Saver:
        self._checkpointer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._checkpointer.__exit__(kind, error, traceback)

    def _wait(self) -> bool:
        """Until the last checkpoint is written; whether it could be."""
        try:
            self._checkpointer.wait()
        except OSError as error:
            if not self._checkpointer.directory.parent.is_dir():
                raise
            line = f"checkpoint not written ({error}); the older ones are as they were"
            log.warning(line)
            if self.failure is None:
                with suppress(OSError):  # standard error may lie on the same disk
                    tqdm.write(f"rnngrad: {line}", file=sys.stderr)
            self.failure = error
            return False
        return True


def _finite(training: Training) -> bool:
    tensors = (*training.model.parameters(), *training.model.buffers())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
