"""Long runs and long sweeps take no more memory, files and threads at their end than before."""

import gc
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rnngrad.checkpoint import load
from rnngrad.tracking import Tracker
from tests.processes import SMALL, Processes, processes

__all__ = ["processes"]

MEGABYTE = 2**20


def sample(name: str) -> None:
    """Before each call of a method of Tracker: resident bytes, open files, threads, objects."""
    file = open("samples", "w", buffering=1)
    page = os.sysconf("SC_PAGE_SIZE")
    real = getattr(Tracker, name)

    def call(self: Tracker, *args: object) -> None:
        if name == "__exit__":
            gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        status = Path("/proc/self/status").read_text()
        threads = int(status.partition("Threads:")[2].split()[0])
        opened = len(os.listdir("/proc/self/fd"))
        file.write(f"{resident} {opened} {threads} {len(gc.get_objects())}\n")
        real(self, *args)

    setattr(Tracker, name, call)


def growth(folder: Path) -> tuple[int, npt.NDArray[np.float64]]:
    """The number of samples, and by how much the mean of their last quarter is over that of the
    second: in the first all is still being done for the first time."""
    samples = np.loadtxt(folder / "samples")
    n = len(samples)
    return n, samples[3 * n // 4 :].mean(0) - samples[n // 4 : n // 2].mean(0)


@pytest.mark.slow
def test_50_000_steps_take_no_more_memory_than_25_000(processes: Processes, tmp_path: Path) -> None:
    line = [*SMALL, "trainer.steps=50000", "trainer.eval_every=1000", "trainer.log_every=100"]
    line += ["trainer.checkpoint_every=500", "clip=zclip", "hydra.run.dir=run"]
    started = processes.start(tmp_path, *line, arrange=sample, using=("log",))
    assert started.wait(timeout=900) == 0, started.said
    assert load(tmp_path / "run" / "checkpoint").step == 50_000
    n, (resident, opened, threads, objects) = growth(tmp_path)
    print(f"50,000 steps: {resident / MEGABYTE:+.2f} MB, {opened:+.2f} files, ", end="")
    print(f"{threads:+.2f} threads, {objects:+.0f} objects")
    assert n == 501 and resident < 4 * MEGABYTE  # 160 bytes a step
    assert abs(opened) < 1 and abs(threads) < 1 and objects < 5_000


@pytest.mark.slow
def test_the_last_of_100_runs_in_one_process_takes_no_more_memory_than_the_50th(
    processes: Processes, tmp_path: Path
) -> None:
    line = ["-m", *SMALL, "seed=range(0,100)"]
    started = processes.start(tmp_path, *line, arrange=sample, using=("__exit__",))
    assert started.wait(timeout=900) == 0, started.said
    n, (resident, opened, threads, objects) = growth(tmp_path)
    print(f"100 runs: {resident / MEGABYTE:+.2f} MB, {opened:+.2f} files, ", end="")
    print(f"{threads:+.2f} threads, {objects:+.0f} objects")
    assert n == 100 and resident < 5 * MEGABYTE  # 100 kB a run, where a state has 2
    assert abs(opened) < 1 and abs(threads) < 1 and objects < 5_000
