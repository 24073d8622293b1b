"""Whole runs in processes of their own that cost a fork: one warm process has imported all."""

from __future__ import annotations

import faulthandler
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from rnngrad.checkpoint import best_step, load
from tests.faults import raw

ROOT = Path(__file__).parent.parent

SMALL = [
    *("task.length=5", "cell=rnn", "cell.hidden_size=4", "trainer.steps=12"),
    *("trainer.batch_size=2", "trainer.eval_size=2", "trainer.eval_every=4"),
    *("trainer.eval_lengths=[3]", "trainer.log_every=2", "trainer.checkpoint_every=3"),
]
"""A run with a few of everything: steps logged and not, evaluations, checkpoints."""


PATIENCE = 300
"""Seconds after which what has not come will not come, on however slow and busy a machine."""


@dataclass
class Started:
    """A run that has been started.

    Args:
        processes: That started it.
        pid: Of the process.
        told: What it says on standard error, also when it is killed.
    """

    processes: Processes
    pid: int
    told: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, negative if it was a signal; who hangs says where and is killed."""
        code = self.processes.ask({"wait": self.pid, "timeout": timeout})
        assert code is not None, f"hangs after {timeout} s: {self.said}"
        return int(code)

    @property
    def said(self) -> str:
        """Standard error."""
        return self.told.read_text(errors="replace")


class Processes:
    """Starts command lines as forks of one warm process, inside ``with``."""

    def start(
        self,
        folder: Path,
        *arguments: str,
        arrange: Callable[..., None] | None = None,
        using: tuple[Any, ...] = (),
        into: str = "said",
    ) -> Started:
        """Starts ``rnngrad`` with ``arguments``.

        Args:
            folder: The current one of the process; is made if it is missing.
            arguments: The command line.
            arrange: A function of a module, called in the process before.
            using: Its arguments, plain values.
            into: The file in ``folder`` that gets standard error.
        """
        folder.mkdir(exist_ok=True)
        name = arrange and f"{arrange.__module__}:{arrange.__qualname__}"
        start = (str(folder), into, arguments, name, using)
        return Started(self, int(self.ask({"start": start})), folder / into)

    def run(self, folder: Path, *arguments: str, **options: Any) -> tuple[int, str]:
        """Exit code and standard error of a command line."""
        started = self.start(folder, *arguments, **options)
        return started.wait(), started.said

    def ask(self, order: Mapping[str, Any]) -> Any:
        """Has the warm process do something; what it answers."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the warm process has died"
        return json.loads(answer)

    def __enter__(self) -> Processes:
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.processes import serve; serve()"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stream in (self._server.stdin, self._server.stdout):
            assert stream is not None
            stream.close()
        self._server.wait(PATIENCE)


def serve() -> None:
    """The warm process: forks runs, and waits for them, as it is told on standard input."""
    import torch

    torch.set_num_threads(1)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _run([*SMALL], quiet=True)
        os.chdir(before)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_obeyed(order)), flush=True)


def _obeyed(order: Mapping[str, Any]) -> int | None:
    if "wait" in order:
        return _wait(order["wait"], order["timeout"])
    if (pid := os.fork()) == 0:
        _become(*order["start"])
    return pid


def _wait(pid: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _become(
    folder: str, into: str, arguments: list[str], arrange: str | None, using: list[Any]
) -> None:
    """The fork's whole life."""
    code = 99
    try:
        os.chdir(folder)
        for target, name in ((0, os.devnull), (1, os.devnull), (2, into)):
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, target)
            os.close(file)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if arrange is not None:
            module, _, function = arrange.partition(":")
            getattr(importlib.import_module(module), function)(*using)
        code = _run(arguments)
        sys.stdout.flush()
    finally:
        if (error := sys.exc_info()[1]) is not None:
            import traceback

            os.write(2, "".join(traceback.format_exception(error)).encode())
        os._exit(code)


def _run(arguments: list[str], *, quiet: bool = False) -> int:
    from rnngrad.__main__ import run_command

    stdout = sys.stdout
    sys.argv = ["rnngrad", *arguments]
    sys.stdout = io.StringIO() if quiet else open(1, "w", closefd=False)
    try:
        return run_command()
    finally:
        sys.stdout = stdout


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """One warm process for all tests that start runs."""
    with Processes() as warm:
        yield warm


# What a run leaves


FILES = (
    *("metrics.csv", "summary.json", "updates.f32"),
    *("bptt.f64", "bptt.json", "measures.f64", "measures.json"),
)


def left_by(directory: Path) -> dict[str, Any]:
    """All that a run leaves but for times and numbers of processes: two runs that are the same
    leave the same, to the last byte and bit."""
    loaded = load(directory / "checkpoint")
    values = {key: value for key, value in loaded.values.items() if key != "tracker"}
    files = loaded.values["tracker"]["files"]
    values["files"] = {name: size for name, size in files.items() if name in FILES}
    return {
        **{name: (directory / name).read_bytes() for name in FILES},
        **{name: (t.dtype, t.shape, raw(t)) for name, t in loaded.tensors.items()},
        "values": values,
        "step": loaded.step,
        "best": best_step(directory / "checkpoint"),
        "there": sorted(path.name for path in directory.iterdir() if "tfevents" not in path.name),
        "curves": curves(directory),
    }


def curves(directory: Path) -> dict[str, list[tuple[int, str]]]:
    """What TensorBoard shows of a run: steps and values by tag, but for times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    shown.Reload()
    return {
        tag: [(event.step, repr(event.value)) for event in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
        if not tag.startswith("time/")
    }


def differing(directory: Path, other: Path) -> list[str]:
    """In what two runs differ."""
    here, there = left_by(directory), left_by(other)
    return sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
