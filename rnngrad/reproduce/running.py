"""Runs an experiment: its sweeps as commands, and rows from what they leave."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from rnngrad import __version__
from rnngrad.outcomes import DIVERGED, DONE
from rnngrad.reproduce.experiment import Experiment, Row, Rows
from rnngrad.reproduce.store import Results, rounded
from rnngrad.runs import FINISHED, Run, find_runs


class Failed(Exception):
    """A sweep came to no end, or some of its runs did not."""


def commands(
    experiment: Experiment, runs: Path, seeds: Sequence[int], *, quick: bool
) -> Iterator[list[str]]:
    """The command lines of its sweeps, from ``rnngrad`` on.

    Args:
        experiment: To be run.
        runs: Where to.
        seeds: In place of the set-up's own; empty for these.
        quick: Its short form.
    """
    for sweep in experiment.quick.sweeps if quick else experiment.sweeps:
        words = sweep.split()
        if seeds:
            words = [word for word in words if not word.startswith("seed=")]
            words.append(f"seed={','.join(map(str, seeds))}")
        yield ["rnngrad", "-m", *words, "engine=stacked", f"hydra.sweep.dir={runs}"]


def run(experiment: Experiment, runs: Path, seeds: Sequence[int], *, quick: bool) -> Results:
    """Trains what is not there yet of an experiment; what is, it reads. ``computed`` is always run.

    Raises:
        Failed: Some runs have not come to an end.
    """
    began = time.monotonic()
    for command in commands(experiment, runs, seeds, quick=quick):
        code = subprocess.run(
            [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, check=False
        ).returncode
        if code not in (DONE, DIVERGED):  # to diverge may be what is to be seen
            raise Failed(f"{' '.join(command)} ended with {code}; the same again goes on")
    there = [Run(path) for path in find_runs(runs)]
    ended = [run for run in there if run.summary["status"] in FINISHED]
    rows: list[Row] = [
        row for row in map(experiment.row, ended) if not seeds or row["seed"] in seeds
    ]
    if experiment.computed is not None:
        rows += experiment.computed(seeds or experiment.computed_seeds)
    if len({experiment.name_of(row) for row in rows}) < len(rows):
        raise Failed(f"{runs} has runs of other settings too; remove it")
    return Results(Rows(map(rounded, rows)), (_made(rows, time.monotonic() - began),))


def _made(rows: Sequence[Row], seconds: float) -> Row:
    import torch

    return {
        "rnngrad": __version__,
        "torch": torch.__version__,
        "day": date.today().isoformat(),
        "seeds": sorted({row["seed"] for row in rows}),
        "runs": len(rows),
        "minutes": round(seconds / 60, 1),
    }
