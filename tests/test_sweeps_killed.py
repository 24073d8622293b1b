"""SIGKILL while a sweep of 200 runs goes on: typed again, it ends with 200 whole runs."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rnngrad.checkpoint import load
from rnngrad.runs import CHECKPOINTS, METRICS, SUMMARY, Run, find_runs
from tests.processes import ROOT
from tests.test_command import TINY

RUNS, KILLS = 200, 5
SWEEP = [
    *("-m", *TINY, "cell=rnn", "measure=none", "trainer.steps=40", "trainer.log_every=20"),
    *("trainer.checkpoint_every=10", f"seed=range({RUNS})"),
]
LAUNCHERS = {
    "basic": [],
    "joblib": ["engine=joblib"],
    "stacked": ["engine=stacked", "hydra.launcher.max_stack=16"],
    "submitit": [
        *("engine=slurm", "hydra.launcher.cluster=local", "hydra.launcher.max_stack=16"),
        "hydra.launcher.tasks=2",
    ],
}


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The command, in a group of its own, saying what it says to ``folder/said``."""
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "rnngrad", *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def descendants(pid: int) -> Iterator[int]:
    """Of a process, itself last."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == pid:
            yield from descendants(int(path.parent.name))
    yield pid


def finished(folder: Path) -> dict[Path, list[int]]:
    """The runs that are done, and when their files were last written."""
    return {
        path: [(path / name).stat().st_mtime_ns for name in (METRICS, SUMMARY)]
        for path in find_runs(folder / "runs")
        if (path / SUMMARY).exists() and Run(path).summary["status"] == "completed"
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_killed_five_times_ends_whole_and_trains_no_run_twice(
    launcher: str, tmp_path: Path
) -> None:
    if launcher in ("joblib", "submitit") and importlib.util.find_spec(launcher) is None:
        pytest.skip(f"{launcher} is not installed: make test-engines")
    sweep, random_ = [*SWEEP, *LAUNCHERS[launcher]], random.Random(launcher)
    done: dict[Path, list[int]] = {}
    killed_at: list[int] = []

    def look() -> int:
        """How many runs are done; none of them has been touched since it was."""
        now = finished(tmp_path)
        assert now.items() >= done.items()
        done.update(now)
        return len(done)

    with ExitStack() as started:
        for kill in range(KILLS):
            process = start(tmp_path, *sweep)
            started.callback(process.kill)
            enough, deadline = look() + random_.randint(5, 25), time.monotonic() + 300
            while look() < enough:
                assert process.poll() is None, (tmp_path / "said").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(random_.uniform(0.05, 0.5))
            # itself alone, or all that it has started as well
            for pid in [process.pid] if kill % 2 else descendants(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            killed_at.append(look())
        process = start(tmp_path, *sweep)
        started.callback(process.kill)
        deadline = time.monotonic() + 600
        while process.poll() is None:
            look()
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert process.returncode == 0, (tmp_path / "said").read_text()[-2000:]
    assert look() == len(list(find_runs(tmp_path / "runs"))) == RUNS
    for path in done:
        assert Run(path).summary["steps"] == 40 and len(Run(path).metrics["step"]) == 3
        assert load(path / CHECKPOINTS).step == 40
    print(f"{launcher}: killed when {', '.join(map(str, killed_at))} of {RUNS} runs were done")
