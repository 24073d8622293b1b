"""SIGINT, SIGTERM and SIGHUP: asked about between updates, and no update is lost."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

WATCHED = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


_last: list[Callable[[], object]] = []


@contextmanager
def before_leaving(act: Callable[[], object]) -> Iterator[None]:
    """Inside, a second signal, which leaves at once, first has this done."""
    _last.append(act)
    try:
        yield
    finally:
        _last.remove(act)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is there inside, and not any more after whatever but SIGKILL."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with before_leaving(lambda: shutil.rmtree(folder, ignore_errors=True)):
            yield Path(folder)


class Interrupted(KeyboardInterrupt):
    """A signal came before anybody asked for one: its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Inside ``with``, the first signal is noted and the second one leaves at once.

    Called, it says whether there has been one. Until it is called for the first time nothing is
    there that could be lost, and the first signal raises ``Interrupted`` wherever the program is.
    Handlers that were there before are called as well, and put back at the end; a signal that was
    ignored, as under ``nohup``, stays ignored. Off the main thread nothing is watched, since Python
    delivers signals to that one alone.

    Attributes:
        number: Of the first signal.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        self._asked = True
        return self.number is not None

    def stop(self, number: int) -> None:
        """As if this signal had come, when somebody says so in another way."""
        if self.number is None:
            self.number = number

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in WATCHED:
                    before = signal.getsignal(number)
                    if before is not signal.SIG_IGN and before is not None:
                        self._before[number] = before
                        signal.signal(number, self._notice)
            except Interrupted:  # already
                self._restore()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        again, name = self.number is not None, signal.Signals(number).name
        if not again:
            self.number = number
        before = self._before[number]
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
        if again:
            for act in reversed(_last):
                with suppress(OSError):
                    act()
            say_in_handler(f"{name} again: left at once; the last checkpoint is whole")
            os._exit(128 + number)
        if not self._asked:
            raise Interrupted(number)
        say_in_handler(f"{name}: saves and leaves after this update; once more leaves at once")


def say_in_handler(line: str) -> None:
    """One line for the person at the terminal, from wherever a signal has come."""
    # print may be at work already, and must not be called from within itself; after a SIGHUP
    # there is no terminal any more
    with suppress(OSError):
        os.write(2, f"\nrnngrad: {line}\n".encode())
