"""Full, broken and read-only disks, and kills, at every single write of a whole run."""

import errno
import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from rnngrad.checkpoint import load
from rnngrad.kernels import native
from rnngrad.resume import has_checkpoints
from tests.processes import SMALL, Processes, differing, processes
from tests.writes import count_writes, fail_writes, kill_at_write, written

__all__ = ["processes"]

RUN = "hydra.run.dir=run"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
SOME = 16
"""So many of a run's writes are tried where not all are."""


def stop_at_step(step: int) -> None:
    """The process gets a SIGTERM in a step."""
    from rnngrad.tracking import Tracker

    real = Tracker.updated

    def updated(self: Tracker, *args: Any) -> None:
        real(self, *args)
        nonlocal step
        step -= 1
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.updated = updated  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def whole(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, and what it wrote."""
    folder = tmp_path_factory.mktemp("whole")
    assert processes.run(folder, *SMALL, RUN, arrange=count_writes) == (0, "")
    return folder


@pytest.fixture(scope="module")
def stopped(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was stopped after step 7."""
    folder = tmp_path_factory.mktemp("stopped")
    code, _ = processes.run(folder, *SMALL, RUN, arrange=stop_at_step, using=(7,))
    assert code == 128 + signal.SIGTERM and load(folder / "run" / "checkpoint").step == 7
    return folder


@pytest.fixture(scope="module")
def goes_on(
    stopped: Path, processes: Processes, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same when it has gone on, and what it then wrote."""
    folder = tmp_path_factory.mktemp("goes_on") / "it"
    shutil.copytree(stopped, folder)
    code, said = processes.run(folder, "resume=run", arrange=count_writes)
    assert code == 0 and said == "rnngrad: run goes on after step 7\n"
    assert differing(folder / "run", whole / "run") == []
    return folder


BEGINNINGS = pytest.mark.parametrize("beginning", ["new", "resumed"])
NUMBERS = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])


@pytest.fixture
def cases(
    beginning: str, every: bool, whole: Path, stopped: Path, goes_on: Path, tmp_path: Path
) -> Iterator[tuple[int, Path, list[str]]]:
    """The number of a write, a folder of its own, and a command line that comes to this write."""

    def made() -> Iterator[tuple[int, Path, list[str]]]:
        count = len(written(goes_on if beginning == "resumed" else whole))
        assert count > 100
        for number in range(count) if every else range(0, count, count // SOME):
            folder = tmp_path / f"write {number}"
            if beginning == "resumed":
                shutil.copytree(stopped, folder)
                yield number, folder, ["resume=run"]
            else:
                yield number, folder, [*SMALL, RUN]
            shutil.rmtree(folder)

    return made()


def end(processes: Processes, folder: Path, whole: Path) -> None:
    """Once all is well again a run ends as the one that nothing happened to."""
    there = has_checkpoints(folder / "run")
    if there:
        assert load(folder / "run" / "checkpoint").skipped == []
    code, said = processes.run(folder, *(["resume=run"] if there else [*SMALL, RUN]))
    assert code == 0, said
    assert differing(folder / "run", whole / "run") == []


@BEGINNINGS
@NUMBERS
def test_killed_in_place_of_any_write_a_run_goes_on_to_the_same_bytes(
    cases: Iterator[tuple[int, Path, list[str]]], processes: Processes, whole: Path
) -> None:
    for number, folder, line in cases:
        code, said = processes.run(folder, *line, arrange=kill_at_write, using=(number,))
        assert code == -signal.SIGKILL, (number, said)
        end(processes, folder, whole)


@BEGINNINGS
@NUMBERS
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from then on"])
def test_a_write_that_fails_is_told_in_a_line_and_loses_nothing(
    persistent: bool,
    cases: Iterator[tuple[int, Path, list[str]]],
    processes: Processes,
    whole: Path,
) -> None:
    for number, folder, line in cases:
        error = ERRORS[number % len(ERRORS)]
        using = (number, error, persistent)
        code, said = processes.run(folder, *line, arrange=fail_writes, using=using)
        failed = (folder / "failed").read_text().splitlines()
        context = (number, failed, said)
        told = [each for each in said.splitlines() if "goes on after step" not in each]
        assert code in (0, 1, 2) and len(told) <= 1 + persistent, context
        assert all(each.startswith("rnngrad: ") for each in told), context
        assert all(any(name_of(path) in each for path in failed) for each in told), context
        if code == 0 and not told:  # what was to be removed stays, or nothing was lost at all
            assert differing(folder / "run", whole / "run") == [], context
        end(processes, folder, whole)


def name_of(path: str) -> str:
    """Of the file that was to be written, under whatever name at first."""
    return Path(path).name.removeprefix(".").removesuffix(".tmp")


def doubled(numbers: Any) -> None:
    numbers[0] *= 2


def test_a_kernel_for_which_there_is_no_room_on_the_disk_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "replace", full)
    kernel = native.compiled(doubled, torch.float32, "kernel of this test")
    number = torch.tensor([21.0])
    native.run(kernel, number.data_ptr(), 1)
    assert number.item() == 42
    assert "(not kept: " in capfd.readouterr().err


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_message_for_which_there_is_no_room_either_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
        patch.setattr(sys, "stderr", FullDisk())
        assert native.compiled(doubled, torch.float64, "kernel of this test")
