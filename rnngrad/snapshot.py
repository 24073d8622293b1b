"""All that shapes a training's future, as tensors and plain values, and back again.

What is a function of the configuration alone (settings, tasks, schedules) is not in it: data are a
function of ``(seed, step)``, so of them there is one number, the step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numba
import numpy as np
import torch
from torch import Tensor

from rnngrad import __version__
from rnngrad.parts import NothingUsable
from rnngrad.runs import wrong_in_summary

if TYPE_CHECKING:
    from rnngrad.checkpoint import Loaded
    from rnngrad.training import Training

Tensors = dict[str, Tensor]
Values = dict[str, Any]


def snapshot(training: Training) -> tuple[Tensors, Values]:
    """The state between two updates, and where the run's files end.

    Returns:
        Tensors by name, which may share the training's memory; and values as JSON has them.
    """
    tensors: Tensors = {}
    extra: Values = {}
    """What modules have in their own form, by ``get_extra_state``."""
    for name, state in training.model.state_dict().items():
        if isinstance(state, Tensor):
            tensors[f"model/{name}"] = state
        else:
            extra[name] = _packed(state, tensors, f"extra/{name}")
    progress = training.progress
    whole = replace(progress, state=None)  # asdict copies every field
    audit, observer = training.audit, training.observer
    values = {
        "progress": {k: v for k, v in asdict(whole).items() if k != "state"},
        "carried": _packed(progress.state, tensors, "carried"),
        "extra": extra,
        "optimizer": _packed(_optimizer_state(training.optimizer), tensors, "optimizer"),
        "clipper": _packed(training.clipper.state_dict(), tensors, "clipper"),
        "audit": None if audit is None else _packed(audit.state_dict(), tensors, "audit"),
        "observer": None
        if observer is None
        else _packed(observer.state_dict(), tensors, "observer"),
        "random": _packed(_random_state(_device(training)), tensors, "random"),
        "tracker": training.tracker.position(),
        "environment": environment(_device(training)),
    }
    return tensors, values


def restore(training: Training, loaded: Loaded) -> None:
    """Puts a training of the same configuration where ``snapshot`` was taken, bit for bit.

    Of the tracker, which is made with ``values["tracker"]``, nothing is touched here.

    Raises:
        NothingUsable: It is the state of another training; this one may have taken a part of it.
    """
    tensors, values = loaded.tensors, loaded.values
    try:
        own = {k.removeprefix("model/"): t for k, t in tensors.items() if k.startswith("model/")}
        own |= {name: _unpacked(state, tensors) for name, state in values["extra"].items()}
        _check_model(training.model.state_dict(), own)
        training.model.load_state_dict(own)
        _restore_optimizer(training.optimizer, _unpacked(values["optimizer"], tensors))
        for part, name in (
            (training.clipper, "clipper"),
            (training.audit, "audit"),
            (training.observer, "observer"),
        ):
            if (part is None) != (values[name] is None):
                raise _Mismatch(f"it has {'no' if part is not None else 'an'} {name}")
            if part is not None:
                part.load_state_dict(_unpacked(values[name], tensors))
        device = _device(training)
        carried = _unpacked(values["carried"], tensors, lambda tensor: tensor.to(device))
        _check_progress(values["progress"], loaded.step, training.steps)
        training.progress = replace(training.progress, **values["progress"], state=carried)
        if wrong := wrong_in_summary(training.result().as_dict()):
            raise _Mismatch(wrong)
        _restore_random(_unpacked(values["random"], tensors), device)
    except _Mismatch as error:
        raise NothingUsable(f"{loaded.path}: is not of this run: {error}") from None
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        LookupError,
        ArithmeticError,
    ) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NothingUsable(f"{loaded.path}: is not of this run ({said})") from None


class _Mismatch(Exception):
    """What does not fit."""


def seed_streams(seed: int) -> None:
    """Starts the global streams, which nothing of ours draws from but parts of a user's own may."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def environment(device: torch.device | str) -> dict[str, Any]:
    """What the bits of a run depend on beside its configuration and its state."""
    device = torch.device(device)
    return {
        "rnngrad": __version__,
        "torch": torch.__version__,
        "numba": numba.__version__,
        "threads": torch.get_num_threads(),
        "processor": llvmlite.binding.get_host_cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _check_model(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Names the first parameter or buffer that is not there, or of another dtype or shape."""
    for name in sorted(here.keys() | there.keys()):
        kinds = [_kind(state[name]) if name in state else "missing" for state in (there, here)]
        if kinds[0] != kinds[1]:
            raise _Mismatch(f"{name} is {kinds[0]} there and {kinds[1]} here")


_COUNTS = ("step", "clipped", "skipped", "nonfinite", "in_a_row")
_PROGRESS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_COUNTS, (int,)),
    **dict.fromkeys(("loss", "best"), (float,)),
    "solved_at": (int, type(None)),
    "evaluation": (dict,),
    "row": (dict, type(None)),
    "reason": (str, type(None)),
}


def _check_progress(values: Mapping[str, Any], step: int, steps: int) -> None:
    """Refuses what no run of so many ``steps`` can have come to after a ``step``.

    Otherwise the loop would find out in the middle of something, or who reads its files.
    """
    for name, kinds in _PROGRESS.items():
        inner = values[name].values() if isinstance(values[name], dict) else ()
        if type(values[name]) not in kinds or not {*map(type, inner)} <= {int, float}:
            raise _Mismatch(f"progress.{name} is {values[name]!r}"[:80])
    row, solved_at = values["row"], values["solved_at"]
    possible = {name: 0 <= values[name] <= step for name in _COUNTS}
    possible["step"] = values["step"] == step <= steps
    possible["best"] = not math.isnan(values["best"])
    possible["solved_at"] = solved_at is None or 1 <= solved_at <= step
    possible["row"] = row is None or row.get("step") == step
    for name in (name for name, there in possible.items() if not there):
        raise _Mismatch(f"progress.{name} is {values[name]!r} at step {step} of {steps}"[:80])


def _kind(state: Any) -> str:
    return f"{str(state.dtype)[6:]} {list(state.shape)}" if isinstance(state, Tensor) else "extra"


def _device(training: Training) -> torch.device:
    return training.parameters[0].device


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Slots by the parameter's number, and groups without the parameters themselves."""
    state = optimizer.state_dict()
    return {
        "slots": {str(index): slot for index, slot in state["state"].items()},
        "groups": [
            {key: value for key, value in group.items() if key != "params"}
            for group in state["param_groups"]
        ],
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    fresh = optimizer.state_dict()["param_groups"]
    if [own.keys() - {"params"} for own in fresh] != [kept.keys() for kept in stored["groups"]]:
        raise _Mismatch("it is of another optimiser")
    groups = [
        {"params": own["params"]} | kept for own, kept in zip(fresh, stored["groups"], strict=True)
    ]
    slots = {int(index): slot for index, slot in stored["slots"].items()}
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _random_state(device: torch.device) -> dict[str, Any]:
    """The global streams."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": list(np.random.get_state()),
    }


def _restore_random(stored: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(stored["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(stored["cuda"], device)
    random.setstate(stored["python"])
    np.random.set_state(tuple(stored["numpy"]))


_LONG = 16
"""Lists of so many numbers are put among the tensors: as text they would take milliseconds."""


def _packed(value: Any, tensors: Tensors, name: str) -> Any:
    """``value`` as JSON has it; its tensors, arrays and long lists of numbers go to ``tensors``."""
    while name in tensors:  # a key with a slash in it
        name += "+"
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.copy())
        return {"array": name}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        for number, dtype in ((float, torch.float64), (int, torch.int64)):
            if len(value) >= _LONG and {type(item) for item in value} == {number}:
                if number is int and not -(2**63) <= min(value) <= max(value) < 2**63:
                    break
                tensors[name] = torch.tensor(value, dtype=dtype)
                return {f"{kind} of numbers": name}
        return {kind: [_packed(item, tensors, f"{name}/{i}") for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        # in pairs, as a checkpoint sorts keys, and somebody may add up in the order of his
        pairs = [[key, _packed(item, tensors, f"{name}/{key}")] for key, item in value.items()]
        return {"mapping": pairs}
    return value


def _unpacked(
    packed: Any, tensors: Mapping[str, Tensor], moved: Callable[[Tensor], Tensor] = lambda t: t
) -> Any:
    """What ``_packed`` was given."""
    if not isinstance(packed, Mapping):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return moved(tensors[content])
    if kind == "array":
        return tensors[content].numpy()
    if kind.endswith(" of numbers"):
        numbers = tensors[content].tolist()
        return numbers if kind.startswith("list") else tuple(numbers)
    if kind == "mapping":
        return {key: _unpacked(item, tensors, moved) for key, item in content}
    items = [_unpacked(item, tensors, moved) for item in content]
    return items if kind == "list" else tuple(items)
