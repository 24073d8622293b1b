"""Every call with which a process writes, counted: any one can fail, or be its last."""

from __future__ import annotations

import builtins
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Writes:
    """Counts what a process writes from now on, wherever; something happens at one of the calls.

    Counted are opening for writing, every write that reaches the system, syncing, truncating,
    renaming, removing and making folders.

    Args:
        at: The number of a call, counted from 0; ``None`` only counts.
        strike: Is given what is written to, and whether the call names it, in its place.
        on: It happens at all later calls too.
    """

    def __init__(
        self, at: int | None, strike: Callable[[str, bool], None], *, on: bool = False
    ) -> None:
        self.at, self.strike, self.on = at, strike, on
        self.count = 0
        self._paths: dict[int, str] = {}
        self._pid = os.getpid()
        self._log = open("writes", "w", buffering=1)
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "truncate"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        for name in ("write", "fsync", "ftruncate"):
            setattr(os, name, self._counted_by_file(name, getattr(os, name)))
        os.open = self._os_open(os.open)
        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]

    def _counts(self, name: str, path: str, named: bool = False) -> None:
        number, self.count = self.count, self.count + 1
        self._log.write(f"{name} {path}\n")
        if self.at is not None and (number == self.at or self.on and number > self.at):
            self.strike(path, named)

    def _counted(self, name: str, real: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            self._counts(name, os.fsdecode(path), named=True)
            return real(path, *args, **kwargs)

        return call

    def _counted_by_file(self, name: str, real: Any) -> Any:
        def call(file: int, *args: Any) -> Any:
            if file > 2:
                self._counts(name, self._paths.get(file, "?"))
            return real(file, *args)

        return call

    def _os_open(self, real: Any) -> Any:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_CREAT | os.O_TRUNC):
                self._counts("open", os.fsdecode(path), named=True)
            file: int = real(path, flags, *args, **kwargs)
            self._paths[file] = os.fsdecode(path)
            return file

        return call

    def _open(self, real: Any) -> Any:
        def call(
            path: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return real(path, mode, buffering, encoding, errors, newline, closefd, opener)
            self._counts("open", os.fsdecode(path), named=True)
            raw = _CountedFile(
                self, os.fsdecode(path), mode.replace("b", "").replace("t", ""), opener
            )
            self._paths[raw.fileno()] = os.fsdecode(path)
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
            buffered = kind(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(
                buffered, encoding, errors, newline, line_buffering=buffering == 1
            )

        return call


class _CountedFile(io.FileIO):
    def __init__(self, writes: Writes, path: str, mode: str, opener: Any) -> None:
        super().__init__(path, mode, opener=opener)
        self._writes, self._path = writes, path

    def write(self, data: Any) -> int:
        self._writes._counts("write", self._path)
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self._writes._counts("ftruncate", self._path)
        return super().truncate(size)


# What can happen, each to be arranged for in a process of its own


def count_writes() -> None:
    """Leaves a line of each in the file ``writes``."""
    _fast_disk()
    Writes(None, lambda path, named: None)


def fail_writes(at: int, number: int, on: bool) -> None:
    """One call fails with ``errno`` ``number``, and with ``on`` all later ones; ``failed`` has
    what they were to write to."""

    def fail(path: str, named: bool) -> None:
        failed.write(f"{path}\n")
        raise OSError(number, os.strerror(number), *[path][:named])

    _fast_disk()
    failed = open("failed", "w", buffering=1)
    Writes(at, fail, on=on)


def kill_at_write(at: int) -> None:
    """The process is killed in place of a call."""
    _fast_disk()
    Writes(at, lambda path, named: os.kill(os.getpid(), signal.SIGKILL))


def _fast_disk() -> None:
    # the same to a process that is killed, and does not depend on the disk
    setattr(os, "fsync", lambda file: time.sleep(0.0001))  # noqa: B010


def written(folder: Path) -> list[str]:
    """What a process has counted in ``folder``."""
    return (folder / "writes").read_text().splitlines()
