"""SIGKILL at any moment of a whole run: what is left goes on to the same bytes."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rnngrad.checkpoint import load
from rnngrad.resume import has_checkpoints
from tests.processes import PATIENCE, SMALL, Processes, differing, processes

__all__ = ["processes"]

LONGER = [
    *(*SMALL, "trainer.steps=120", "trainer.eval_every=10", "trainer.eval_size=2000"),
    "trainer.checkpoint_every=7",
]
RUN = "hydra.run.dir=run"


def note_phases() -> None:
    """Has the file ``phase`` say at every moment what the process is doing, and ``updates`` have a
    byte for each update that it has made."""
    from rnngrad import __main__, training
    from rnngrad.tracking import Tracker

    file = os.open("phase", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    updates = os.open("updates", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    update = Tracker.updated

    def updated(self: Tracker, *args: float) -> None:
        update(self, *args)
        os.write(updates, b".")

    def note(phase: str) -> None:
        os.pwrite(file, phase.ljust(20).encode(), 0)

    def noted(real: Any, during: str, after: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            note(during)
            result = real(*args, **kwargs)
            note(after)
            return result

        return call

    note("starting")
    Tracker.updated = updated  # type: ignore[assignment, method-assign]
    training.evaluate = noted(training.evaluate, "evaluating", "training")
    real = training.Training.works

    def works(*args: Any, **kwargs: Any) -> Any:
        note("training")
        result = yield from real(*args, **kwargs)
        note("ending")
        return result

    training.Training.works = works  # type: ignore[assignment, method-assign]
    __main__._conclude = noted(__main__._conclude, "ending", "ending")  # there was none to train
    # the same to a process that is killed, and does not depend on the disk
    setattr(os, "fsync", lambda file: time.sleep(0.001))  # noqa: B010


def phase_of(folder: Path) -> str:
    """What a process is doing, or was when it was killed."""
    phase = folder / "phase"
    return phase.read_text().strip() if phase.exists() else ""


def wait_for(folder: Path, *phases: str, updates: int = 0) -> None:
    """Until the process is in one of these phases and has made so many updates, or ends."""
    deadline = time.monotonic() + PATIENCE
    while (phase := phase_of(folder)) != "ending":
        if phase in phases and (folder / "updates").stat().st_size >= updates:
            return
        assert time.monotonic() < deadline, f"{phase or 'nothing'} for ever"
        time.sleep(0.001)


def seconds_of_training(processes: Processes, folder: Path) -> float:
    """Of a run that nothing happens to."""
    started = processes.start(folder, *LONGER, RUN, arrange=note_phases)
    wait_for(folder, "training")
    began = time.monotonic()
    wait_for(folder, "ending")
    seconds = time.monotonic() - began
    assert started.wait() == 0
    return seconds


def kill_until_done(
    processes: Processes,
    folder: Path,
    random_: random.Random,
    training: float,
    kills: Counter[str],
    enough: Callable[[], bool],
) -> None:
    """Starts a run, kills it, has it go on, and so forth until it ends by itself.

    When to kill it goes by how far it has come, as well as by the clock: however much slower a busy
    machine has become, it gets on from one time to the next.

    Args:
        processes: Starts it.
        folder: To start it in.
        random_: Says when to kill it.
        training: How many seconds of it are training.
        kills: Is told how often it was killed in each phase.
        enough: Whether to kill no more.
    """
    first, run, code = True, folder / "run", -signal.SIGKILL
    folder.mkdir()
    while code:
        there = has_checkpoints(run)
        anew = not there or random_.random() < 0.1
        (folder / "phase").unlink(missing_ok=True)
        started = processes.start(
            folder, *([*LONGER, RUN] if anew else ["resume=run"]), arrange=note_phases
        )
        if enough():
            assert started.wait() == 0, started.said
            return
        if first:  # before there is anything: how long Hydra takes differs between machines
            wait_for(folder, "starting", "training", "evaluating")
        elif random_.random() < 0.15:  # before it trains; Hydra takes the longer part of it
            time.sleep(random_.uniform(0, 0.5 if anew else 0.1))
        else:
            wait_for(folder, "training", "evaluating", updates=random_.randrange(20))
            time.sleep(random_.uniform(0, training / 40))
        first = False
        started.kill()
        code = started.wait()
        assert code in (0, -signal.SIGKILL), started.said
        phase = phase_of(folder)
        if there or has_checkpoints(run):
            assert load(run / "checkpoint").skipped == []
            names = os.listdir(run / "checkpoint")
            phase = "saving" if any(name.startswith(".") for name in names) else phase
        else:
            phase = "before the first checkpoint"
        if code:
            kills[phase] += 1


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bytes(
    count: int, processes: Processes, tmp_path: Path
) -> None:
    training = seconds_of_training(processes, tmp_path / "whole")
    random_, kills, runs = random.Random(count), Counter[str](), 0
    needed = {"before the first checkpoint", "training", "evaluating", "saving"}

    def enough() -> bool:
        return kills.total() >= count and needed <= kills.keys()

    while not enough() and runs < count:
        folder = tmp_path / f"killed {runs}"
        kill_until_done(processes, folder, random_, training, kills, enough)
        assert differing(folder / "run", tmp_path / "whole" / "run") == []
        runs += 1
    print(f"{kills.total()} kills in {runs} runs: {dict(kills)}")
    assert needed <= kills.keys()
