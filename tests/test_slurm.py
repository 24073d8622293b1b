"""Sweeps on a real Slurm of one node: make test-slurm."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rnngrad.runs import LOG, METRICS, Run, find_runs

from .slurm_cluster import cluster, missing
from .test_command import TINY, whole
from .test_engines import ROOT, until
from .test_sweeps_killed import finished

pytestmark = pytest.mark.slurm
RUN = [*TINY, "cell=rnn", "measure=none", "trainer.log_every=100", "trainer.checkpoint_every=100"]
ARRAY = [
    *("engine=slurm", "seed=range(6)", "optim.lr=1e-3,1e-2", "clip.max_norm=0.1,1"),
    "hydra.sweep.dir=runs/array",
]
"""24 runs."""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """In which Slurm's commands find the cluster."""
    if lacking := missing():
        pytest.skip(f"no {', '.join(lacking)}: apt-get install slurm-wlm munge")
    pytest.importorskip("submitit", reason="needs pip install 'rnngrad[slurm]'")
    with cluster() as found:
        yield found | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Sweep:
    """A sweep that has been started in a folder."""

    def __init__(self, folder: Path, environment: dict[str, str], *words: str) -> None:
        self.folder, self.environment, self.said = folder, environment, folder / "said"
        with open(self.said, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rnngrad", "-m", *RUN, *words],
                cwd=folder,
                env=environment,
                stdout=file,
                stderr=file,
            )

    def array(self) -> str:
        """The number that Slurm has given it."""
        until(lambda: "submitted" in self.said.read_text())
        found = re.search(r"tasks as (\d+)", self.said.read_text())
        assert found
        return found[1]

    def under_way(self, count: int) -> None:
        """Waits until so many runs train."""

        def training() -> bool:
            assert self.process.poll() is None, self.said.read_text()
            runs = find_runs(self.folder)
            return sum((path / "metrics.csv").exists() for path in runs) >= count

        until(training)

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands says."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=True
        ).stdout


def test_24_runs_of_an_array_are_whole_though_a_task_was_cancelled(
    environment: dict[str, str], tmp_path: Path
) -> None:
    steps = "trainer.steps=2000"
    sweep = Sweep(tmp_path, environment, *ARRAY, steps)
    array = sweep.array()
    sweep.under_way(20)
    sweep.ask("scancel", f"{array}_1")
    code = sweep.process.wait(400)
    assert code in (0, 1), sweep.said.read_text()  # the other task may have done the rest
    done = finished(tmp_path)
    again = Sweep(tmp_path, environment, *ARRAY, steps)
    assert again.process.wait(400) == 0, again.said.read_text()
    assert finished(tmp_path).items() >= done.items()  # not touched again
    runs = {path.name: path for path in find_runs(tmp_path)}
    assert len(runs) == 24 and all(map(whole, runs.values()))
    assert any("goes on after step" in (path / LOG).read_text() for path in runs.values())
    print(f"{len(done)} of 24 runs were done when the array with a cancelled task had ended")
    # and no bit is another than without any of this
    alone = ["seed=0,1", "optim.lr=1e-2", "clip.max_norm=1", "hydra.sweep.dir=alone"]
    assert Sweep(tmp_path, environment, *alone, steps).process.wait(400) == 0
    for path in find_runs(tmp_path / "alone"):
        assert (path / METRICS).read_bytes() == (runs[path.name] / METRICS).read_bytes()


def test_a_command_that_is_interrupted_ends_its_array_and_is_gone_on_with(
    environment: dict[str, str], tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, environment, *ARRAY, "trainer.steps=20000")
    sweep.under_way(20)
    sweep.process.send_signal(signal.SIGINT)
    assert sweep.process.wait(100) == 130, sweep.said.read_text()
    assert not sweep.ask("squeue", "-h")
    statuses = {Run(path).summary["status"] for path in find_runs(tmp_path)}
    assert statuses <= {"interrupted", "completed"} and "interrupted" in statuses
    again = Sweep(tmp_path, environment, *ARRAY, "trainer.steps=20000")
    again.under_way(24)
    time.sleep(1)
    again.ask("scancel", again.array())  # by somebody else, all of it
    assert again.process.wait(100) == 1
    assert "the same command goes on" in again.said.read_text()
