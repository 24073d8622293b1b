"""How far a sweep is: a line for who waits for it."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from tqdm import tqdm

from rnngrad.outcomes import DIVERGED, DONE, IN_USE, OUTCOMES, Ledger, Outcome
from rnngrad.runs import SUMMARY, read_summary

EVERY = 60.0
"""Seconds at most from one line to the next, where nobody is at the terminal."""
AHEAD = 64
"""So many jobs in a row that have not begun end the search for those that are going on."""


class Progress:
    """Inside ``with``, a thread says how far a sweep is.

    At a terminal it is a bar at the bottom, or a line after each job where the jobs run in this
    process and have bars of their own; elsewhere a line every 10 % and every minute.

    Args:
        total: Jobs, ``None`` if nobody knows.
        bar: Whether there may be a bar.

    Attributes:
        total: May be told later, by a sweeper that chooses the jobs.
        current: Of the sweep that is going on.
    """

    current: ClassVar[Progress | None] = None

    def __init__(self, total: int | None, *, bar: bool) -> None:
        self.total, self._begun = total, time.monotonic()
        self._ledger = Ledger(Path(os.environ[OUTCOMES]))
        self._before = sum(o.code is not None for o in self._ledger.outcomes())
        self._terminal = sys.stderr.isatty()
        self._bar = bar and self._terminal
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        Progress.current = self
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        Progress.current = None
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        said, at = self._before, self._begun
        bar = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True) if self._bar else None
        while not self._ended.wait(1.0 if self._bar or not self._terminal else 0.2):
            try:
                outcomes = self._ledger.outcomes()
                done = sum(o.code is not None for o in outcomes)
                now = time.monotonic()
                if bar is not None:
                    bar.set_description_str(self.line(outcomes))
                elif self._is_due(done, said, now - at):
                    said, at = done, now
                    tqdm.write(f"rnngrad: {self.line(outcomes)}", file=sys.stderr)
            except OSError:  # nobody is at the terminal any more
                break
        if bar is not None:
            bar.close()

    def _is_due(self, done: int, said: int, seconds: float) -> bool:
        if self._terminal:
            return done > said
        tenth = max(1.0, (self.total or 100) / 10)
        return done // tenth > said // tenth or seconds >= EVERY

    def line(self, outcomes: Sequence[Outcome]) -> str:
        """How many are done, how many run, what went wrong, and when it will be over."""
        ended = [o.code for o in outcomes if o.code is not None]
        codes = [code for code in ended if code < 128]  # beyond are signals
        running = going_on(outcomes)
        counts = {
            "running": len(running),
            "interrupted": len(ended) - len(codes),
            "diverged": codes.count(DIVERGED),
            "failed": sum(code not in (DONE, DIVERGED, IN_USE) for code in codes),
        }
        of = "" if self.total is None else f" of {self.total}"
        parts = [f"{len(codes)}{of} runs done", *(f"{n} {what}" for what, n in counts.items() if n)]
        new = len(codes) - self._before + sum(running)
        left = 0.0 if self.total is None else self.total - self._before - new
        if new > 0 and left > 0:
            parts.append(f"about {in_words((time.monotonic() - self._begun) / new * left)} left")
        return "sweep: " + ", ".join(parts)


def going_on(outcomes: Sequence[Outcome]) -> list[float]:
    """Of each run that is going on, the fraction of it that is done."""
    fractions, idle = [], 0
    for outcome in outcomes:
        if outcome.code is not None:
            continue
        try:
            summary = read_summary(outcome.directory / SUMMARY)
        except (OSError, ValueError):
            summary = {}
        idle += 1
        if summary.get("status") == "running":
            planned = summary.get("planned_steps")
            steps = summary["steps"] or 0
            fractions.append(min(1.0, steps / planned) if isinstance(planned, int) else 0.0)
            idle = 0
        if idle >= AHEAD:
            break
    return fractions


def in_words(seconds: float) -> str:
    """A time, rounded as one would say it."""
    if not math.isfinite(seconds):
        return "a long time"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"
