"""One run of a command: fresh or gone on with, from its configuration to its exit code."""

from __future__ import annotations

import logging
import math
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rnngrad.explain import blame
from rnngrad.launcher import InUse, lock_directory, refuse_other_run, short, store_texts
from rnngrad.outcomes import BAD_INPUT, DIVERGED, DONE, FAILED, FINISHED_CODES, IN_USE
from rnngrad.parts import InputError, NothingUsable
from rnngrad.resume import checkpoint_of, has_checkpoints, more_steps, planned_steps
from rnngrad.runs import CHECKPOINTS, CONFIG, LOG, Run
from rnngrad.signals import Interrupted, Signals
from rnngrad.stored import Unreadable, one_line

if TYPE_CHECKING:
    from rnngrad.checkpoint import Loaded
    from rnngrad.config import Experiment
    from rnngrad.tracking import Result
    from rnngrad.training import Training, Work

log = logging.getLogger("rnngrad")


def attempt(
    body: Callable[[], tuple[int, float]], directory: Path, plugins: Iterable[str]
) -> tuple[int, float]:
    """Exit code and objective of a run that may end in any way."""
    try:
        return body()
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a plugin's exit(0) is no success
        return ended(error, directory, plugins)


def ended(error: BaseException, directory: Path, plugins: Iterable[str]) -> tuple[int, float]:
    """Exit code and objective of a run that ended in an error, of which is said what there is."""
    if isinstance(error, InUse):
        say(str(error))
        return IN_USE, math.inf
    if isinstance(error, InputError | NothingUsable | Unreadable):
        say(str(error))
        return BAD_INPUT, math.inf
    if isinstance(error, Interrupted):
        say(f"{short(directory)} interrupted before its first update: nothing is lost")
        return 128 + error.number, math.inf
    if isinstance(error, KeyboardInterrupt):  # no signal, which `Signals` would have noticed
        say(f"{short(directory)} interrupted by {blame(error, plugins)}")
        return 128 + signal.SIGINT, math.inf
    log.error("".join(traceback.format_exception(error)))
    say(f"failed: {blame(error, plugins)} (traceback in {directory / LOG})")
    return FAILED, math.inf


def train(
    values: dict[str, Any],
    directory: Path,
    *,
    texts: Mapping[str, str] = MappingProxyType({}),
    again: bool = False,
    steps: int | None = None,
) -> tuple[int, float]:
    """Exit code and objective of a run whose configuration and directory were checked.

    It goes on from its newest checkpoint, if it has any.

    Args:
        values: The configuration.
        directory: Of the run.
        texts: Files that say how it was started; those of its first start stay.
        again: There must be a checkpoint.
        steps: What ``trainer.steps`` is to be raised to.
    """
    from rnngrad.training import alone

    with Signals() as signals:
        return alone(
            works(values, directory, signals, texts=lambda: texts, again=again, steps=steps)
        )


def works(
    values: dict[str, Any],
    directory: Path,
    signals: Signals,
    *,
    texts: Callable[[], Mapping[str, str]] = dict,
    again: bool = False,
    steps: int | None = None,
    stacked: bool = False,
    shares_streams: bool = False,
    held: AbstractContextManager[None] | None = None,
) -> Generator[Work, None, tuple[int, float]]:
    """As ``train``, but asks its caller for the work, as ``Training.works`` does.

    Args:
        values: As of ``train``, and so are the others.
        directory: Of the run.
        signals: Says when the run is to stop.
        texts: What ``train`` is given, made when it is needed.
        again: There must be a checkpoint.
        steps: What ``trainer.steps`` is to be raised to.
        stacked: It is one of many in this process, which say no more of themselves than they must.
        shares_streams: Other runs train in this process at the same time.
        held: Is entered and left while the run's lock is held.
    """
    from rnngrad.config import experiment
    from rnngrad.diagnosis import diagnose_run

    with lock_directory(directory, 0 if stacked else 0.3), held or nullcontext():
        spec = experiment(values)  # now: who waits for a run asks for its lock again and again
        if not again:  # a sweep's directories were looked at before its first run began
            refuse_other_run(directory, values, "hydra.run.dir")
        if not (directory / CONFIG).exists():
            store_texts(directory, texts())
        before = _summary(directory)
        planned = planned_steps(directory, before, spec.trainer.steps)
        wanted = planned if steps is None else steps
        more_steps(wanted, planned, spec.optim.learning_rate)
        if wanted == planned and (code := FINISHED_CODES.get(before.get("status", ""))) is not None:
            if code == DONE or not again:
                if not stacked:
                    say(f"{short(directory)} {_finished(code, again)}")
                return code, objective_of(directory)
        spec = replace(spec, trainer=replace(spec.trainer, steps=wanted))
        told = _Told()
        loaded = _loaded(spec, directory, told, strict=values["strict"], again=again)
        with ExitStack() as opened:
            training = _training(spec, values, directory, signals, loaded, opened, shares_streams)
            if loaded is not None:
                told.log()
                _note(f"{short(directory)} goes on after step {loaded.step}")
            result = yield from training.works(bar=not stacked)
            training.tracker.finish(result)
            training.tracker.diagnosed(diagnose_run(Run(directory)).as_dict())
    return _outcome(training, result, directory, signals), objective_of(directory)


def _finished(code: int, again: bool) -> str:
    """What to say of a run that is finished, and what to type to have it trained after all."""
    if code == DIVERGED:
        return "has already diverged; remove it to train again"
    hint = "trainer.steps=N goes on" if again else "remove it to train again"
    return f"is already completed; {hint}"


def _loaded(
    spec: Experiment, directory: Path, told: Callable[[str], None], *, strict: bool, again: bool
) -> Loaded | None:
    """The checkpoint that a run goes on from; there must be one to go on ``again``."""
    if has_checkpoints(directory):
        return checkpoint_of(directory, spec.settings, spec.general.device, strict=strict, say=told)
    if again:
        allowed = "has no checkpoint yet; the command that it was started with begins it anew"
        raise InputError("resume", short(directory), allowed)
    return None


def objective_of(directory: Path) -> float:
    """What a sweeper minimises: the last evaluation's loss, ten times chance if it diverged."""
    summary = _summary(directory)
    if summary.get("status") == "completed" and summary["eval_loss"] is not None:
        return float(summary["eval_loss"])
    return 10 * float(summary.get("chance_loss", math.inf))


def _training(
    spec: Experiment,
    values: dict[str, Any],
    directory: Path,
    signals: Signals,
    loaded: Loaded | None,
    opened: ExitStack,
    shares_streams: bool,
) -> Training:
    """A run's training, from the beginning or from a checkpoint; its tracker is opened."""
    from rnngrad.checkpoint import rewind
    from rnngrad.saving import Saver
    from rnngrad.snapshot import restore, seed_streams
    from rnngrad.tracking import Tracker

    tracker = Tracker(
        directory,
        spec.task.chance_loss,
        spec.task.time_steps,
        spec.columns,
        values,
        None if loaded is None else loaded.values.get("tracker", {}),
    )
    if loaded is None:
        opened.enter_context(tracker)
    folder, trainer = directory / CHECKPOINTS, spec.trainer
    seed = partial(seed_streams, spec.general.seed)
    seed()
    saver = Saver(
        folder,
        every_steps=trainer.checkpoint_steps,
        every_seconds=trainer.checkpoint_seconds,
        keep=trainer.checkpoint_keep,
        settings=spec.settings,
        # nothing of ours draws from the global streams: where several runs share them, each saves
        # them as they are if it is alone
        before=seed if shares_streams else None,
    )
    training = spec.training(tracker, saver=saver, should_stop=signals)
    if loaded is not None:
        restore(training, loaded)
        tracker.finish(training.result())  # from here on it is a run that goes on, and how far
        rewind(folder, loaded.step)  # before the files are cut: these would reach beyond them
        opened.enter_context(tracker)
    return training


def _outcome(training: Training, result: Result, directory: Path, signals: Signals) -> int:
    """Says what there is to say of a run's end; its exit code."""
    name = short(directory)
    if result.reason:
        _note(f"{name} {result.status}: {result.reason}")
    failure = None if training.saver is None else training.saver.failure
    if result.status == "interrupted":
        if failure is not None:
            _note(f"{name} interrupted after step {result.steps}, and NOT saved: {failure}")
            return FAILED
        saved = result.steps if training.saver is None else training.saver.saved
        how = "and saved"
        if saved != result.steps:
            how = f"whose state is not finite; saved is that of step {saved}"
        _note(f"{name} interrupted after step {result.steps} {how}: rnngrad resume={name} goes on")
    if signals.number is not None:  # also if the run was at its end: the sweep is not
        return 128 + signals.number
    return DIVERGED if result.status == "diverged" else DONE


def _summary(directory: Path) -> dict[str, Any]:
    """What an earlier attempt left, if it can be read."""
    try:
        return Run(directory).summary
    except (OSError, ValueError):
        return {}


def say(line: str) -> None:
    """One line for the person at the terminal, if there still is one."""
    with suppress(OSError):  # the terminal is gone, or a full disk's file: no reason to fail
        print(f"rnngrad: {one_line(line)}", file=sys.stderr)


def _note(line: str) -> None:
    """Says a line that the run's log is to have as well."""
    say(line)
    log.info(line)


@contextmanager
def logging_to(path: Path, only: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Inside, a run's own log is kept, where Hydra does not.

    Args:
        path: Of the log.
        only: Whether what is logged now is this run's.
    """
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    handler.addFilter(lambda record: only())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        with suppress(OSError):  # of what could not be written
            handler.close()


class _Told:
    """Says lines at once, and has them in the log of a run that then goes on."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __call__(self, line: str) -> None:
        self._lines.append(line)
        say(line)

    def log(self) -> None:
        """A run that is refused is left as it was, its log too."""
        for line in self._lines:
            log.warning(line)
