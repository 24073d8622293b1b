"""From Hydra's composed configuration to checked parts: the only place that knows its keys."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch

from rnngrad.cells import CELLS, CellPart
from rnngrad.clipping import CLIPS, Clip
from rnngrad.init import INITS, Init
from rnngrad.optim import OPTIMS, Optim
from rnngrad.parts import COUNT, MISSING, InputError, Interval, Part, Registry, build, unknown_key
from rnngrad.task import TASKS, Task

REGISTRIES: dict[str, Registry[Any]] = {
    registry.group: registry for registry in (TASKS, CELLS, INITS, CLIPS, OPTIMS)
}


@dataclass(frozen=True)
class Trainer(Part):
    """The keys of conf/trainer; ``rnngrad.training.train`` says what they mean."""

    steps: Annotated[int, COUNT]
    batch_size: Annotated[int, COUNT]
    eval_every: Annotated[int, COUNT]
    eval_size: Annotated[int, COUNT]
    log_every: Annotated[int, COUNT]
    stop_when_solved: bool
    recompute_segments: Annotated[int, COUNT]


@dataclass(frozen=True)
class General(Part):
    """The keys that belong to no group."""

    seed: Annotated[int, Interval(low=0, high=2**63 - 1)]
    device: str

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            if self.device.startswith("cpu:"):
                raise RuntimeError  # cpu under another name, and so another run
            torch.ones(1, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError):
            raise InputError(
                "device", self.device, "is not a device that this torch can use; cpu is"
            ) from None


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a run, checked."""

    task: Task
    cell: CellPart
    init: Init
    clip: Clip
    optim: Optim
    trainer: Trainer
    general: General
    names: Mapping[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """What defines the run, as plain values."""
        groups = {group: getattr(self, group) for group in REGISTRIES}
        parts = {group: {"name": self.names[group]} | asdict(p) for group, p in groups.items()}
        return parts | {"trainer": asdict(self.trainer)} | asdict(self.general)

    @property
    def run_name(self) -> str:
        """The name of the run's directory, the same for the same settings."""
        text = json.dumps(self.settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        n = self.names
        return f"{n['task']}_{n['cell']}_{n['clip']}_s{self.general.seed}-{digest}"


def experiment(config: Mapping[str, Any]) -> Experiment:
    """Checks a composed configuration.

    Args:
        config: Plain values: one mapping a group, and the keys of ``General``.

    Raises:
        InputError: A key is missing or unknown, or its value is not allowed.
    """
    known = {*REGISTRIES, "trainer", "experiment", "plugins", *General.__dataclass_fields__}
    for key in config:
        if key not in known:
            raise InputError(key, config[key], unknown_key(key, sorted(known)))
    parts = {group: reg.build(config.get(group)) for group, reg in REGISTRIES.items()}
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        raise InputError("trainer", MISSING, "is missing; give trainer=default")
    checked = build(Trainer, trainer, "trainer")
    if checked.recompute_segments > 1 and not parts["cell"].recomputes:
        raise InputError(
            "trainer.recompute_segments",
            checked.recompute_segments,
            f"must be 1, as cell={config['cell']['name']} is run step by step by autograd",
        )
    general = {key: config[key] for key in General.__dataclass_fields__ if key in config}
    try:
        return Experiment(
            **parts,
            trainer=checked,
            general=General(**general),
            names={group: config[group]["name"] for group in REGISTRIES},
        )
    except TypeError:  # a key of General was deleted on the command line
        (missing, *_) = set(General.__dataclass_fields__) - set(general)
        raise InputError(missing, MISSING, "is missing") from None


def load_plugins(config: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Imports the modules named by ``plugins=[...]``, which register parts of the user's own.

    Raises:
        InputError: A stored file asks for plugins, or a module cannot be imported.
    """
    plugins = config.get("plugins") or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise InputError("plugins", plugins, "must be a list of module names, as in plugins=[mine]")
    if plugins and not any(o.lstrip("+").startswith("plugins=") for o in overrides):
        raise InputError("plugins", plugins, "is only taken from the command line")
    for name in plugins:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise InputError(
                "plugins", name, f"cannot be imported ({type(error).__name__}: {error})"
            ) from None
