"""Trainings compared bit for bit: what they are in memory, and what they have left on disk."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import struct
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor, nn

from rnngrad import job
from rnngrad.checkpoint import (
    STATE,
    TENSORS,
    Loaded,
    _encode,
    _tensors_from_bytes,
    _values_from_bytes,
)
from rnngrad.config import REGISTRIES, Experiment, experiment
from rnngrad.runs import BPTT, BPTT_LAYOUT, MEASURES, MEASURES_LAYOUT, METRICS, SUMMARY, UPDATES
from rnngrad.snapshot import restore, seed_streams, snapshot
from rnngrad.tracking import Tracker
from rnngrad.training import Training
from tests.faults import raw

FILES = (METRICS, BPTT, BPTT_LAYOUT, MEASURES, MEASURES_LAYOUT, UPDATES, SUMMARY)
"""What equal runs leave byte for byte."""

CONF = Path(__file__).parent.parent / "conf"

SMALL = {
    "task.length": 6,
    "cell.hidden_size": 4,
    "measure": "none",
    "trainer.steps": 12,
    "trainer.batch_size": 3,
    "trainer.eval_every": 5,
    "trainer.eval_size": 5,
    "trainer.log_every": 2,
    "trainer.checkpoint_every": 1,
    "trainer.checkpoint_keep": 0,
}
LIVELY = {
    "clip": {"history_length": 4, "min_observations": 2, "warmup_steps": 3, "max_norm": 0.3},
    "optim": {"momentum": 0.5, "lr": 0.02},
}
"""With these, what a part remembers begins to matter within a few steps."""


def composed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as Hydra composes it from these overrides; a part may be a mapping too."""
    config = yaml.safe_load((CONF / "config.yaml").read_text())
    values: dict[str, Any] = {}
    for entry in config["defaults"]:
        ((group, name),) = entry.items() if isinstance(entry, dict) else (("", ""),)
        if group and name is not None:
            values[group] = defaults(group, changes.get(group, name))
    values |= {key: config[key] for key in config if key not in ("defaults", "hydra")}
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        if group:
            assert name in values[group], key
            values[group][name] = value
        elif key not in REGISTRIES:
            values[key] = value
    return values


def defaults(group: str, part: Any) -> dict[str, Any]:
    """A part's yaml, or its settings themselves."""
    if isinstance(part, Mapping):
        return dict(part)
    settings: dict[str, Any] = yaml.safe_load((CONF / group / f"{part}.yaml").read_text())
    return settings


def small(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of a small run with these parts, in which everything happens soon."""
    lively = {
        f"{group}.{name}": value
        for group, values in LIVELY.items()
        for name, value in values.items()
        if name in defaults(group, changes.get(group, {}))
    }
    return SMALL | lively | changes


class Shelf:
    """Keeps in memory, in the bytes that go to the disk, what a ``Saver`` would write.

    Args:
        steps: Of which; all, if there are none.

    Attributes:
        contents: By step.
        ended: At the end, or where the run could not go on.
    """

    failure = None

    def __init__(self, steps: Collection[int] = ()) -> None:
        self.steps = steps
        self.contents: dict[int, dict[str, bytes]] = {}

    def begin(self, training: Training) -> None:
        self.save(training)

    def after_update(self, training: Training, *, best: bool, now: bool) -> None:
        self.save(training)

    def save(self, training: Training) -> None:
        step = training.progress.step
        if not self.steps or step in self.steps:
            training.tracker.finish(training.result())
            self.contents[step] = _encode(step, *snapshot(training))

    def end(self, training: Training) -> None:
        self.ended = _encode(training.progress.step, *snapshot(training))

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def loaded(self, step: int) -> Loaded:
        """What ``checkpoint.load`` would have made of it."""
        return read(self.contents[step], step)


def read(contents: Mapping[str, bytes], step: int) -> Loaded:
    """What a checkpoint's files hold."""
    path = Path(f"step-{step:09}")
    tensors = _tensors_from_bytes(path / TENSORS, contents[TENSORS])
    return Loaded(step, tensors, _values_from_bytes(path / STATE, contents[STATE]), path, [])


def train(
    spec: Experiment,
    directory: Path,
    shelf: Any,
    loaded: Loaded | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Training:
    """A run from its beginning, or from what was loaded, as the command line makes it."""
    seed_streams(spec.general.seed)
    tracker = Tracker(
        directory,
        spec.task.chance_loss,
        spec.task.time_steps,
        spec.columns,
        {},
        None if loaded is None else loaded.values["tracker"],
    )
    training = spec.training(tracker, saver=shelf, should_stop=should_stop)
    if loaded is not None:
        restore(training, loaded)
    with tracker:
        tracker.finish(training.run())
    return training


class Asked:
    """Stands for ``Signals``: a run is to stop from the time on that it has asked so often.

    Attributes:
        asked: How often it did.
    """

    def __init__(self, often: float = math.inf) -> None:
        self.often, self.asked = often, 0

    @property
    def number(self) -> int | None:
        return signal.SIGTERM if self.asked > self.often else None

    def __call__(self) -> bool:
        self.asked += 1
        return self.number is not None

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        return


def command(
    values: Mapping[str, Any], directory: Path, often: float = math.inf, **options: Any
) -> tuple[int, int]:
    """A run as the command line makes it or goes on with it, until it has asked ``often``.

    Returns:
        Exit code, and how often it asked whether to stop.
    """
    asked = Asked(often)
    directory.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # nobody cuts the power here
        patch.setattr("rnngrad.job.Signals", lambda: asked)
        code, _ = job.train(dict(values), directory, **options)
    return code, asked.asked


def kill_at(step: int) -> None:
    """Has this process kill itself between an update and what follows from it."""
    apply = Training._applied

    def applied(training: Training, update: Any) -> None:
        apply(training, update)
        if training.progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Training._applied = applied  # type: ignore[assignment, method-assign]


def everything(directory: Path, *, board: bool = True) -> dict[Any, bytes]:
    """What a run has left: its files, what TensorBoard shows, and its last checkpoint.

    Without the second, if there is no ``board``.
    """
    step, name = max((int(path.name[5:14]), path.name) for path in directory.glob("checkpoint/*"))
    folder = directory / "checkpoint" / name
    state = read(
        {TENSORS: (folder / TENSORS).read_bytes(), STATE: (folder / STATE).read_bytes()}, 0
    )
    sizes = state.values["tracker"]["files"]
    state.values["tracker"]["files"] = {k: v for k, v in sizes.items() if k in FILES}
    found: dict[Any, bytes] = {**left(directory), **(shown(directory) if board else {})}
    found |= {name: raw(tensor) for name, tensor in state.tensors.items()}
    return found | {"step": repr(step).encode(), STATE: repr(state.values).encode()}


CHANGES = ("truncate", "rename", "replace", "unlink", "rmdir", "mkdir")
"""What changes a directory at once; files grow when a tracker is told something."""


class _Here:
    """Stands for a thread: does at once what it is given."""

    def __init__(self, *_: object, **__: object) -> None:
        return

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self) -> None:
        return


@contextmanager
def killed_at_every_moment(directory: Path, folder: Path) -> Iterator[list[Path]]:
    """Inside, copies are made of a run's directory whenever it has changed: what a kill leaves.

    Args:
        directory: Of the run.
        folder: Is made, and holds the copies.
    """
    copies: list[Path] = []
    last: list[Mapping[str, bytes]] = [{}]
    folder.mkdir()

    def copy() -> None:
        files = [path for path in directory.glob("**/*") if path.is_file()]
        now = {str(path): path.read_bytes() for path in files}
        if now != last[0]:
            last[0] = now
            copies.append(folder / f"{len(copies):03}")
            shutil.copytree(directory, copies[-1])

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if not copying:
                copying.append(True)
                copy()
                copying.pop()
            return result

        return call

    copying: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnngrad.checkpoint.ThreadPoolExecutor", _Here)
        for name in CHANGES:
            patch.setattr(os, name, watched(getattr(os, name)))
        for name in ("log", "measured", "recorded", "position", "finish"):
            patch.setattr(Tracker, name, watched(getattr(Tracker, name)))
        yield copies


class Uninterrupted:
    """A run that was never interrupted, and its state after every step.

    Args:
        changes: Overrides.
        directory: Of the run.
    """

    def __init__(self, changes: Mapping[str, Any], directory: Path) -> None:
        self.spec = experiment(composed(changes))
        self.directory, self.shelf = directory, Shelf()
        training = train(self.spec, directory, self.shelf)
        self.end = training.progress.step
        self.memory, self.files = memory(training), left(directory)

    def resumed(self, step: int, directory: Path, loaded: Loaded | None = None) -> list[str]:
        """In what a run that was killed and went on after ``step`` differs from this one.

        It finds the files as this run has left them at its end, so later than its checkpoint, and
        global streams that somebody has drawn from.
        """
        shutil.copytree(self.directory, directory)
        for draw in (torch.rand, np.random.rand, random.seed):
            draw(3)
        shelf = Shelf([self.end])
        training = train(self.spec, directory, shelf, loaded or self.shelf.loaded(step))
        different = [name for name in FILES if self.files.get(name) != left(directory).get(name)]
        different += differences(self.memory, memory(training))
        for name in (TENSORS, STATE) if step < self.end else ():
            if self.shelf.contents[self.end][name] != shelf.contents[self.end][name]:
                different.append(name)
        return different


def left(directory: Path) -> dict[str, bytes]:
    """The files of a run, but for TensorBoard's."""
    return {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}


def memory(training: Training) -> dict[str, bytes]:
    """Every number that can be reached from a training, its tracker left out, and the streams."""
    found = dict(_walk(training, "training", set()))
    version, inner, gauss = random.getstate()
    found |= _walk([version, inner, gauss], "python", set())
    found |= _walk(list(np.random.get_state()), "numpy", set())
    found |= _walk(torch.get_rng_state(), "torch", set())
    return found


def differences(one: Mapping[Any, bytes], other: Mapping[Any, bytes]) -> list[str]:
    """Names of what is not there in both, or not the same in every bit."""
    names = one.keys() | other.keys()
    return sorted(str(name) for name in names if one.get(name) != other.get(name))


_OUTSIDE = ("tracker", "saver", "should_stop", "learning_rate")


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, bytes]]:
    if isinstance(value, bool | int | str | type(None)):
        yield path, repr(value).encode()
    elif isinstance(value, float):
        yield path, struct.pack(">d", value)
    elif isinstance(value, Tensor):
        yield path, f"{value.dtype} {list(value.shape)} ".encode() + raw(value)
        if value.is_leaf and value.grad is not None:
            yield from _walk(value.grad, f"{path}.grad", seen)
    elif isinstance(value, np.ndarray):
        yield path, f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    elif id(value) in seen or isinstance(value, type | types.ModuleType):
        return
    elif isinstance(value, torch.optim.Optimizer):
        yield from _walk(value.state_dict(), path, seen)
    else:
        seen.add(id(value))
        for name, part in _parts(value):
            yield from _walk(part, f"{path}.{name}", seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield "len", len(value)
        yield from ((str(i), part) for i, part in enumerate(value))
    elif not callable(value) or isinstance(value, nn.Module) or ours(value):
        for name, part in getattr(value, "__dict__", {}).items():
            if name not in _OUTSIDE:
                yield name, part


def ours(value: Any) -> bool:
    return type(value).__module__.startswith(("rnngrad", "tests"))


@contextmanager
def without_tensorboard() -> Iterator[None]:
    """Inside, runs leave no event files, which take longer than the training."""

    class Nothing:
        def __init__(self, *_: object, **__: object) -> None:
            return

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rnngrad.tracking.files.Board", Nothing)
        yield


def events(directory: Path) -> Iterator[Event]:
    """Of all event files, the older first, each whole to its last byte."""
    files = []
    for path in directory.glob("events.out.tfevents.*"):
        data, found = path.read_bytes(), []
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            assert len(data) >= size + 16, f"{path} ends within an event"
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
        files.append(found)
    for found in sorted(files, key=lambda file: file[0].wall_time):
        yield from found


def shown(directory: Path) -> dict[tuple[str, int], bytes]:
    """What TensorBoard has of a run by tag and step, each there once; but for times and pictures.

    Pictures count at the last step, as when others are drawn depends on the clock.
    """
    found: dict[tuple[str, int], bytes] = {}
    last = max(event.step for event in events(directory) if event.HasField("summary"))
    steps: dict[str, list[int]] = {}
    for event in events(directory):
        if event.HasField("session_log"):
            assert event.session_log.status == SessionLog.START
            assert all(before < event.step for tag in steps for before in steps[tag])
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
            timed = value.tag in ("time/step_ms",) or value.tag.startswith("_hparams_")
            if not timed and (not value.HasField("image") or event.step == last):
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.SerializeToString(deterministic=True)
    for tag, there in steps.items():
        assert there == sorted({*there}), f"{tag} at {there}"
    return found
