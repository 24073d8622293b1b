"""Processes that another package's launcher has started for us: what they hear of signals.

Such a launcher ends its processes at once when it is interrupted, and leaves them alone when it is
killed. Here a process that trains has a mark, a file named by its number; who is interrupted tells
all that have one, and leaves when there is none any more.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rnngrad.signals import WATCHED, say_in_handler


@dataclass(frozen=True)
class Child:
    """A function in a process of its own, the same for one call after the other.

    Once one of them has left by an exit code, which a signal is the cause of, the next ones leave
    with it at once.

    Args:
        body: The function.
        marks: The folder that its process is marked in.
        parent: The process that has it called.
    """

    body: Callable[[Any], Any]
    marks: Path
    parent: int

    def __call__(self, argument: Any) -> Any:
        if _left:
            raise SystemExit(_left[0])
        if os.getpid() != self.parent and threading.current_thread() is threading.main_thread():
            _settle(self.parent)
        mark = self.marks / str(os.getpid())
        with suppress(OSError):  # the parent is gone, or the disk is full
            mark.touch()
        _training.set()
        try:
            return self.body(argument)
        except SystemExit as exit:
            _left.append(exit.code)
            raise
        finally:
            mark.unlink(missing_ok=True)
            _training.clear()


_left: list[Any] = []
"""The exit code that this process has been left with, if it has."""
_training = threading.Event()
"""Whether a function is at work in this process."""
_settled: list[int] = []
"""The parent of this process, once it has been settled."""


def _settle(parent: int) -> None:
    """Has this process hear of signals from its parent alone, and of its parent's end."""
    if not _settled:
        _settled.append(parent)
        os.setpgid(0, 0)  # Ctrl-C comes to the parent, which passes it on
        threading.Thread(target=_watch, args=[parent], daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    while _training.is_set():
        time.sleep(0.1)
    os._exit(128 + signal.SIGTERM)  # it would wait for ever to be given more to do


class Children:
    """Inside ``with``, a signal to this process is one to all that train for it.

    It waits for them, and leaves by ``SystemExit`` with 128 and the signal's number. The second one
    has them leave at once, and does not wait.
    """

    def trains(self, body: Callable[[Any], Any]) -> Child:
        """The function, for processes that are to be told."""
        return Child(body, self._marks, self._parent)

    def __enter__(self) -> Children:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._marks = Path(self._folder.name)
        self._parent, self._signalled = os.getpid(), False
        self._before = {
            number: signal.signal(number, self._leave)
            for number in WATCHED
            if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._folder.cleanup()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._parent:  # a child that was forked has our handlers
            return
        told: set[int] = set()
        again, self._signalled = self._signalled, True
        if not again:
            name = signal.Signals(number).name
            say_in_handler(f"{name}: every run saves and leaves; once more leaves at once")
        while busy := self._busy():
            for pid in busy - told:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGTERM)
            told |= busy
            if again:
                break
            time.sleep(0.05)
        raise SystemExit(128 + number)

    def _busy(self) -> set[int]:
        """The processes that are training."""
        return {int(path.name) for path in self._marks.iterdir() if _alive(int(path.name))}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
