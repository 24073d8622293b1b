"""How the jobs of a command ended, in whatever process: a ledger in one file.

A line is an exit code, the run's directory and the sweep's. In place of the code ``-`` says that
the job is yet to be done, ``+`` that a process has begun it: if there is no code and the run's lock
is free, that process has died. A line that is whole ends in a semicolon, and a run's last code
counts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rnngrad.runs import SUMMARY, read_summary

DONE, FAILED, BAD_INPUT, DIVERGED, IN_USE = 0, 1, 2, 3, 4
"""Exit codes; a signal's is 128 and its number."""
FINISHED_CODES = {"completed": DONE, "diverged": DIVERGED}
"""Of a run that is not to be trained any more, by its status."""
OUTCOMES = "RNNGRAD_OUTCOMES"
"""Names the file, in this process and in those that it starts."""
_UNWRITTEN: list[str] = []
"""Lines for which there was no room."""


class Outcome(NamedTuple):
    """Of one job; ``code`` is ``None`` as long as it is not done."""

    code: int | None
    directory: Path
    sweep: str


def note(outcomes: Iterable[Outcome]) -> None:
    """Writes them down, or keeps them in mind if there is no room."""
    lines = [
        f"{'-' if code is None else code}\t{directory}\t{sweep}\t;"
        for code, directory, sweep in outcomes
    ]
    try:
        _append(lines)
    except OSError:  # the temporary directory is full, which is no fault of the run's
        _UNWRITTEN.extend(lines)


def note_begun(directory: Path, sweep: str) -> None:
    """Writes down that this process is about to train a run, if there is room."""
    with suppress(OSError):
        _append([f"+\t{directory}\t{sweep}\t;"])


def _append(lines: Sequence[str]) -> None:
    with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
        file.write("".join(f"\n{line}" for line in lines) + "\n")


def finished_code(directory: Path, otherwise: int) -> int:
    """The exit code of the run in a directory, as its summary says."""
    try:
        status = read_summary(directory / SUMMARY)["status"]
    except (OSError, ValueError):
        return otherwise
    return FINISHED_CODES.get(status, otherwise)


def forget() -> None:
    """Begins anew: what could not be written was of another command."""
    _UNWRITTEN.clear()


class Ledger:
    """Reads what has been noted, as far as it has.

    Args:
        path: Of the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0
        self._outcomes: dict[Path, Outcome] = {}
        self._begun: Counter[Path] = Counter()

    def outcomes(self) -> list[Outcome]:
        """One of each job, in the order of the sweep."""
        self._read_on()
        return [*self._outcomes.values()]

    def is_done(self, directory: Path) -> bool:
        """Whether the job in a directory has ended."""
        self._read_on()
        outcome = self._outcomes.get(directory)
        return outcome is not None and outcome.code is not None

    def begun(self, directory: Path) -> int:
        """How many processes have begun the job in a directory."""
        self._read_on()
        return self._begun[directory]

    def _read_on(self) -> None:
        lines: list[str] = []
        if self._path.exists():
            with open(self._path, "rb") as file:
                file.seek(self._read)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            lines = whole.decode().split("\n")
        for line in [*lines, *_UNWRITTEN]:
            code, *rest = line.split("\t")
            if not line.endswith(";") or len(rest) != 3:
                continue
            directory, sweep = Path(rest[0]), rest[1]
            if code == "+":
                self._begun[directory] += 1
            elif code == "-":
                self._outcomes.setdefault(directory, Outcome(None, directory, sweep))
            else:
                self._outcomes[directory] = Outcome(int(code), directory, sweep)
