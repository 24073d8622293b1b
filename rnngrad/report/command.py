"""The command ``rnngrad-report``."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import matplotlib
import numpy as np

from rnngrad.report.writing import write
from rnngrad.runs import Run, find_runs, table
from rnngrad.stored import printable

LINES = 100
"""Runs printed at most."""


def main() -> None:
    """Writes the report of the runs in the given directories and prints their table."""
    parser = argparse.ArgumentParser(prog="rnngrad-report", description=main.__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a run, or a folder of runs")
    parser.add_argument("--out", help="default: DIR/report, or ./report for several")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    runs: dict[Path, Run] = {}
    for directory in arguments.directories:
        found = {path.resolve(): Run(path) for path in find_runs(directory)} if directory else {}
        if not found:
            _refuse(f"{directory!r}: no run in this directory")
        runs |= found
    single = len(arguments.directories) == 1
    out = Path(arguments.out or (Path(arguments.directories[0], "report") if single else "report"))
    if out.is_symlink() and not arguments.out:
        _refuse(f"{out}: is a symbolic link; say where to write with --out")
    try:
        with np.errstate(all="ignore"):  # of numbers that no run has written
            written = write(list(runs.values()), out)
    except OSError as error:
        _refuse(f"--out={out}: cannot be written ({error.strerror})")
    except ValueError as error:
        _refuse(f"{', '.join(arguments.directories)}: a run's files cannot be read ({error})")
    for label, why in written.unreadable.items():
        line = printable(f"{label}: left out, its files cannot be read ({why})")
        print(f"rnngrad-report: {line}", file=sys.stderr)
    print(table(written.runs[:LINES]))
    if len(written.runs) > LINES:
        print(f"... and {len(written.runs) - LINES} more: {out / 'runs.csv'}")
    print(f"\nfigure       {written.figure}\nreport       {written.page}")
    print(f"TensorBoard  {' '.join(arguments.directories)}")
    print(f"  open it with: {_tensorboard()} --logdir {arguments.directories[0]}")


def _refuse(line: str) -> NoReturn:
    print(f"rnngrad-report: {printable(line)}", file=sys.stderr)
    sys.exit(2)


def _tensorboard() -> str:
    """The command as it can be typed here: by its path, if its folder is not on PATH."""
    beside = Path(sys.executable).parent / "tensorboard"
    if shutil.which("tensorboard") or not beside.exists():
        return "tensorboard"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
