"""SIGKILL at any moment of a whole run: what is left goes on to the same bytes."""

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rnngrad.checkpoint import load
from rnngrad.resume import has_checkpoints
from tests.processes import SMALL, Processes, differing, processes

__all__ = ["processes"]

LONGER = [*SMALL, "trainer.steps=120", "trainer.eval_every=10", "trainer.checkpoint_every=7"]
RUN = "hydra.run.dir=run"


def note_phases() -> None:
    """Has the file ``phase`` say at every moment what the process is doing."""
    from rnngrad import training

    file = os.open("phase", os.O_RDWR | os.O_CREAT | os.O_TRUNC)

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
    training.evaluate = noted(training.evaluate, "evaluating", "training")
    run = training.Training.run
    training.Training.run = noted(run, "training", "ending")  # type: ignore[method-assign]
    # the same to a process that is killed, and does not depend on the disk
    setattr(os, "fsync", lambda file: time.sleep(0.001))  # noqa: B010


def phase_of(folder: Path) -> str:
    """What a process that was killed was doing."""
    checkpoints = folder / "run" / "checkpoint"
    if any(name.startswith(".") for name in os.listdir(checkpoints) if checkpoints.is_dir()):
        return "saving"
    return (folder / "phase").read_text().strip() or "starting"


def kill_until_done(
    processes: Processes, folder: Path, random_: random.Random, kills: Counter[str]
) -> None:
    """Starts a run, kills it, has it go on, and so forth until it ends by itself."""
    code = -9
    while code:
        there = has_checkpoints(folder / "run")
        anew = not there or random_.random() < 0.2
        line = [*LONGER, RUN] if anew else ["resume=run"]
        started = processes.start(folder, *line, arrange=note_phases)
        time.sleep(random_.uniform(0, 1.0 if anew else 0.5))
        started.kill()
        code = started.wait()
        assert code in (0, -9), started.said
        if code == -9:
            kills["before the first checkpoint" if not there else phase_of(folder)] += 1
        if there or has_checkpoints(folder / "run"):
            assert load(folder / "run" / "checkpoint").skipped == []


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_bytes(
    count: int, processes: Processes, tmp_path: Path
) -> None:
    assert processes.run(tmp_path / "whole", *LONGER, RUN, arrange=note_phases) == (0, "")
    random_, kills = random.Random(count), Counter[str]()
    runs = 0
    while kills.total() < count:
        folder = tmp_path / f"killed {runs}"
        kill_until_done(processes, folder, random_, kills)
        assert differing(folder / "run", tmp_path / "whole" / "run") == []
        runs += 1
    print(f"{kills.total()} kills in {runs} runs: {dict(kills)}")
    assert set(kills) >= {
        *("before the first checkpoint", "starting", "training", "evaluating", "saving")
    }
