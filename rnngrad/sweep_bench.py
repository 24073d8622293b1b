"""``python -m rnngrad.sweep_bench``: whole sweeps under each launcher, start-up included.

The same command line with another launcher, each in an empty folder and a process of its own, one
after the other. What is compared is what somebody waits for.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rnngrad.runs import METRICS, Run, find_runs

LAUNCHERS = {
    "basic": [],
    "joblib": ["engine=joblib"],
    "stacked": ["engine=stacked"],
}
COMPARED = 100
"""Up to this step, runs have to be the same under every launcher, but for rounding."""


@dataclass(frozen=True)
class Sweep:
    """A sweep to be timed.

    Args:
        title: What it is.
        overrides: Of its command line.
        updates: Of all runs together.
        launchers: That it is run with.
    """

    title: str
    overrides: Sequence[str]
    updates: int
    launchers: Sequence[str]


def sweeps(quick: bool, seeds: int = 16) -> Iterator[Sweep]:
    """Those that are timed; ``quick`` ones take seconds and show only that it works."""
    steps, seeds = (20, 2) if quick else (2000, seeds)
    adding = ["task=adding", "cell=rnn", "trainer.batch_size=20"]
    yield Sweep(
        f"{4 * seeds} runs: RNN, adding, T = 50, H = 32, B = 20, {steps:,} updates",
        [*adding, "task.length=50", "cell.hidden_size=32", f"trainer.steps={steps}"]
        + ["clip.max_norm=0.1,0.5,1,5", f"seed=range({seeds})"],
        4 * seeds * steps,
        ["basic", "joblib", "stacked"],
    )
    steps = 20 if quick else 1000
    yield Sweep(
        f"{seeds} runs: RNN, adding, T = 100, H = 128, B = 20, {steps:,} updates",
        [*adding, "task.length=100", "cell.hidden_size=128", f"trainer.steps={steps}"]
        + [f"seed=range({seeds})"],
        seeds * steps,
        ["joblib", "stacked"],
    )


def seconds(sweep: Sweep, launcher: str, folder: Path) -> float:
    """From the command to its end.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    command = [sys.executable, "-m", "rnngrad", "-m", *sweep.overrides, *LAUNCHERS[launcher]]
    path = os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))
    began = time.perf_counter()
    subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def largest_difference(folder: Path, other: Path) -> float:
    """Of losses and norms of the same runs up to step ``COMPARED``, relative."""
    largest = 0.0
    for path in find_runs(folder):
        rows = [_rows(root / path.relative_to(folder)) for root in (folder, other)]
        for one, two in zip(*rows, strict=True):
            for key in ("loss", "grad_norm_pre", "grad_norm_post"):
                a, b = float(one[key]), float(two[key])
                largest = max(abs(a - b) / max(abs(a), abs(b), 1e-300), largest)  # NaN too
    return largest


def _rows(directory: Path) -> list[dict[str, str]]:
    with (directory / METRICS).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= COMPARED]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the times, and how many times longer each takes than stacks."""
    parser = argparse.ArgumentParser(prog="python -m rnngrad.sweep_bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="sweeps that take seconds")
    parser.add_argument("--seeds", type=int, default=16, help="of each set-up; default 16")
    parser.add_argument(
        "--launchers", nargs="+", choices=LAUNCHERS, default=[*LAUNCHERS], help="default: all"
    )
    given = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; wall time of the whole command")
    for sweep in sweeps(given.quick, given.seeds):
        print(f"\n{sweep.title}")
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as temporary:
            for launcher in sweep.launchers:
                if launcher not in given.launchers:
                    continue
                if launcher == "joblib" and not importlib.util.find_spec(
                    "hydra_plugins.hydra_joblib_launcher"
                ):
                    print("  joblib    not installed: pip install 'rnngrad[joblib]'")
                    continue
                folder = Path(temporary, launcher)
                folder.mkdir()
                found[launcher] = seconds(sweep, launcher, folder)
                done = [Run(path).summary["status"] for path in find_runs(folder)]
                assert set(done) == {"completed"}, done
                rate = sweep.updates / found[launcher]
                print(
                    f"  {launcher:8}{found[launcher]:8.1f} s {rate:9,.0f} run-updates/s", flush=True
                )
            for launcher, spent in found.items():
                if launcher != "stacked" and "stacked" in found:
                    folders = [Path(temporary, name) for name in (launcher, "stacked")]
                    print(
                        f"  stacked is {spent / found['stacked']:.2f} x faster than {launcher}; "
                        f"to step {COMPARED} they differ by {largest_difference(*folders):.1e}"
                    )


if __name__ == "__main__":
    main()
