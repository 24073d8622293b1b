"""Faults on purpose: system calls that fail, processes that are killed, power cuts, forgeries."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rnngrad import checkpoint
from rnngrad.checkpoint import MANIFEST, STATE, TENSORS, AsyncCheckpointer, load, save

CALLS = (
    *("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir"),
    *("listdir", "scandir", "stat", "lstat", "fstat", "kill"),
)


class PowerCut(BaseException):
    """Nothing that the process does after it has any effect."""


class Faults:
    """Makes the ``fail_at``-th call of the functions of ``os`` in ``CALLS`` fail, inside ``with``.

    Args:
        fail_at: Counted from 0; ``None`` only records.
        error: An ``errno``, or what is raised. After a ``PowerCut`` every further call raises it.
        forgotten: The number of an ``fsync`` that is not called, as if it were not in the program.
    """

    def __init__(
        self,
        fail_at: int | None = None,
        error: int | BaseException = errno.EIO,
        *,
        forgotten: int | None = None,
    ) -> None:
        self.fail_at, self.error, self.forgotten = fail_at, error, forgotten
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        """Name and arguments, a file descriptor as the path that was opened."""
        self._paths: dict[int, Path] = {}

    @property
    def failed(self) -> str | None:
        """The first call that failed."""
        return next((name[7:] for name, _ in self.calls if name.startswith("failed ")), None)

    def count(self, name: str) -> int:
        return [called for called, _ in self.calls].count(name)

    @contextmanager
    def __call__(self) -> Iterator[Faults]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._faulty(name, getattr(os, name)))
            yield self

    def _faulty(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            file = args[0] if args else None
            known = tuple(self._paths.get(a, a) if isinstance(a, int) else a for a in args[:1])
            number = len(self.calls)
            dead = isinstance(self.error, PowerCut) and self._struck(number - 1)
            if dead or self._struck(number, exactly=True):
                if name == "close" and not isinstance(self.error, KeyboardInterrupt):
                    real(*args)  # as the system does, which says afterwards what went wrong
                self.calls.append(("failed " + name, known + args[1:]))
                raise self._exception(known)
            self.calls.append((name, known + args[1:]))
            if name == "fsync" and self.forgotten == self.count("fsync") - 1:
                self.calls[number] = ("forgotten fsync", known)
                self.forgotten = None
                return None
            try:
                result = real(*args, **kwargs)
            except OSError:
                self.calls[number] = ("refused " + name, known + args[1:])
                raise
            if name == "open":
                self._paths[result] = Path(args[0])
            elif name == "close":
                self._paths.pop(file, None)  # type: ignore[arg-type]
            return result

        return call

    def _struck(self, number: int, exactly: bool = False) -> bool:
        if self.fail_at is None:
            return False
        return number == self.fail_at if exactly else number >= self.fail_at

    def _exception(self, arguments: tuple[Any, ...]) -> BaseException:
        if isinstance(self.error, BaseException):
            return self.error
        path = [str(a) for a in arguments if isinstance(a, str | Path)]
        return OSError(self.error, os.strerror(self.error), *path[:1])


def cut_power(
    calls: list[tuple[str, tuple[Any, ...]]],
    directory: Path,
    copy: Path,
    *,
    data: bool,
    names: bool,
) -> None:
    """Takes from a copy of a directory what a power cut may take: what was not synced.

    Args:
        calls: What was done to ``directory``, as ``Faults`` recorded it.
        directory: The original, which is left alone.
        copy: Loses what is lost.
        data: What was written to files that were not synced is lost.
        names: Files, folders and renames in folders that were not synced are lost.
    """
    unsynced: list[Path] = []
    made: list[tuple[Path, Path | None]] = []
    """What, and where it was before."""
    for name, (first, *rest) in calls:
        if name == "write":
            unsynced.append(first)
        elif (name == "open" and rest[0] & os.O_CREAT) or name == "mkdir":
            made.append((Path(first), None))
        elif name == "rename":
            source, target = Path(first), Path(rest[0])
            unsynced = [_moved(path, source, target) for path in unsynced]
            made = [(_moved(path, source, target), before) for path, before in made]
            made.append((target, source))
        elif name == "fsync":
            unsynced = [path for path in unsynced if path != first]
            made = [(path, before) for path, before in made if path.parent != first]
    for path in unsynced if data else []:
        if (there := _moved(path, directory, copy)).exists():
            there.unlink()
            there.touch()
    for path, before in reversed(made) if names else []:
        there = _moved(path, directory, copy)
        if not os.path.lexists(there):
            continue  # the process itself removed it
        if before is not None:
            there.rename(_moved(before, directory, copy))
        elif there.is_dir():
            shutil.rmtree(there)
        else:
            there.unlink()


def _moved(path: Path, source: Path, target: Path) -> Path:
    return target / path.relative_to(source) if path.is_relative_to(source) else path


def content(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the checkpoint of a step holds in these tests, some 100 kB of it."""
    generator = torch.Generator().manual_seed(step)
    tensors = {f"p{i}": torch.randn(1250, generator=generator) for i in range(20)}
    return tensors, {"step": step, "loss": 1 / (step + 1), "best": float("inf")}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal in names, dtypes, shapes and every bit."""
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
        for a, b in ((one[name], other[name]) for name in one)
    )


def raw(tensor: Tensor) -> bytes:
    packed = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytes(packed.reshape(-1).view(torch.uint8).tolist())


def kill_savers(
    directory: Path, kills: int, *, seed: int, asynchronous: bool, disk: bool
) -> dict[str, int]:
    """Kills one saving process after the other, and checks each time what it leaves.

    Args:
        directory: Of the checkpoints; empty.
        kills: How many.
        seed: Of the moments.
        asynchronous: Saves in a thread.
        disk: Waits for the disk, however slow it is; else a millisecond, which is the same to a
            process that is killed.

    Returns:
        In how many cases something was being written, and the last step.
    """
    random_ = random.Random(seed)
    torn = last = 0
    if not disk:
        setattr(os, "fsync", lambda file: time.sleep(0.001))  # noqa: B010
    for _ in range(kills):
        told, telling = os.pipe()
        if (child := os.fork()) == 0:
            _save_until_killed(directory, last, telling, asynchronous)
        os.close(telling)
        if last == 0 or random_.random() < 0.8:  # before the first nothing is promised
            last = int.from_bytes(os.read(told, 8), "little")
        time.sleep(random_.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while step := os.read(told, 8):
            last = int.from_bytes(step, "little")
        os.close(told)
        torn += any(name.startswith(".") for name in os.listdir(directory))
        loaded = load(directory)
        assert last <= loaded.step <= last + 1 + asynchronous, (loaded.step, last)
        assert loaded.skipped == []
        assert same(loaded.tensors, content(loaded.step)[0])
        assert loaded.values == content(loaded.step)[1]
        last = loaded.step
    return {"torn": torn, "last": last}


def _save_until_killed(directory: Path, step: int, telling: int, asynchronous: bool) -> None:
    """Saves one step after the other, and tells of each that is safe."""
    try:
        checkpointer = AsyncCheckpointer(directory)
        first = step + 1
        while True:
            step += 1
            if not asynchronous:
                save(directory, step, *content(step))
                os.write(telling, step.to_bytes(8, "little"))
                continue
            checkpointer.save(step, *content(step))
            if step > first:
                os.write(telling, (step - 1).to_bytes(8, "little"))
    finally:
        os._exit(1)


def forge(
    directory: Path, step: int, *, tensors: bytes, state: bytes = b"{}", manifest: Any = None
) -> Path:
    """A checkpoint whose sizes and hashes are right, whatever is in it.

    Args:
        directory: Of the checkpoints.
        step: As in its name.
        tensors: Its ``tensors.safetensors``.
        state: Its ``state.json``.
        manifest: Changes the manifest, as a tree, or is its bytes.
    """
    path = directory / f"step-{step:09}"
    path.mkdir(parents=True)
    (path / TENSORS).write_bytes(tensors)
    (path / STATE).write_bytes(state)
    files = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in ((TENSORS, tensors), (STATE, state))
    }
    tree = {"format": checkpoint.FORMAT, "step": step, "best": False, "files": files}
    if callable(manifest):
        manifest(tree)
        manifest = None
    data = (json.dumps(tree, indent=1) + "\n").encode() if manifest is None else manifest
    (path / MANIFEST).write_bytes(data)
    return path


def safetensors_file(header: bytes | Mapping[str, Any], body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body
