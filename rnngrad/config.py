"""From Hydra's composed configuration to checked parts: the only place that knows its keys."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib import resources
from typing import Annotated, Any, Literal

import torch
import yaml

from rnngrad.bptt_clip import BPTT_CLIPS, BPTTClip
from rnngrad.cells import CELLS, CellPart
from rnngrad.cells.base import Unrolled
from rnngrad.cells.rnn import RNNPart
from rnngrad.clipping import CLIPS, Clip, ClipAudit, Clipper
from rnngrad.init import INITS, Init
from rnngrad.measure import MEASURES, Dynamics, Measure, Observer
from rnngrad.model import SequenceModel, build_model
from rnngrad.nonfinite import NonFinite
from rnngrad.optim import OPTIMS, Optim
from rnngrad.parts import (
    COUNT,
    MISSING,
    InputError,
    Interval,
    Part,
    Registry,
    as_key,
    build,
    unknown_key,
)
from rnngrad.regularization import REGULARIZERS, SLOPES, Regularizer, recurrent_weights
from rnngrad.saving import Saver
from rnngrad.task import TASKS, Task
from rnngrad.tracking import Tracker
from rnngrad.training import Training

REGISTRIES: dict[str, Registry[Any]] = {
    registry.group: registry
    for registry in (TASKS, CELLS, INITS, CLIPS, BPTT_CLIPS, REGULARIZERS, OPTIMS, MEASURES)
}


COMMAND = ("dry_run", "experiment", "plugins", "resume", "strict")
"""Keys that are about the command and not the run."""


@dataclass(frozen=True)
class Trainer(Part):
    """How long and how to train, and what to watch.

    Args:
        steps: Updates at most.
        batch_size: ``B``.
        eval_every: Evaluate after every so many updates, and after the last.
        eval_size: Sequences in an evaluation, the same for every seed.
        eval_lengths: Evaluate at these lengths of the task as well.
        log_every: Log metrics, and record gradients, every so many updates.
        log_per_decade: In place of ``log_every``: so many logged steps from each power of ten to
            the next.
        stop_when_solved: End at the first evaluation that meets the task's rule.
        tbptt_k1: Steps from one way back to the next in truncated back-propagation through time;
            ``null``: ``tbptt_k2``. The weights stay as they are within a batch, and the gradients
            of all ways are summed.
        tbptt_k2: Steps that each way goes back; ``null``, or at least the sequence's length, is all
            of back-propagation.
        recompute_segments: Parts of the sequence that are run again on the way back, to save
            memory.
        checkpoint_every: Save a checkpoint every so many updates, or so much time: ``30s``,
            ``5min``, ``2h``. The start, the best evaluation and the end are saved as well.
            ``null``: only the start and the end, or where the run is interrupted.
        checkpoint_keep: So many of the last checkpoints stay, at least 2, and the best; 0: all.
        nonfinite: What becomes of an update whose loss or gradient is not finite. ``stop``: the run
            ends, ``skip``: the update is left out, ``pascanu``: in its place the recurrent weights
            shrink, by a gradient of ``0.02 W_hh`` with all others 0 (as in the code of Pascanu,
            Mikolov & Bengio 2013).
        nonfinite_patience: So many such updates in a row are let pass, and the next ends the run;
            ``null``: all.
        clip_audit: Clip rules, by name or as ``{name: NAME, KEY: VALUE}``, that are shown every
            gradient and change none: how often and how hard would each have clipped?
    """

    steps: Annotated[int, COUNT]
    batch_size: Annotated[int, COUNT]
    eval_every: Annotated[int, COUNT]
    eval_size: Annotated[int, COUNT]
    eval_lengths: tuple[Annotated[int, COUNT], ...]
    log_every: Annotated[int, COUNT]
    log_per_decade: Annotated[int, COUNT] | None
    stop_when_solved: bool
    tbptt_k1: Annotated[int, COUNT] | None
    tbptt_k2: Annotated[int, COUNT] | None
    recompute_segments: Annotated[int, COUNT]
    checkpoint_every: Annotated[int, COUNT] | str | None
    checkpoint_keep: Annotated[int, Interval(low=0, high=10**9)]
    nonfinite: Literal["stop", "skip", "pascanu"]
    nonfinite_patience: Annotated[int, COUNT] | None
    clip_audit: tuple[str | dict, ...]  # type: ignore[type-arg]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({*self.eval_lengths}) < len(self.eval_lengths):
            allowed = "must not hold a length twice"
            raise InputError("eval_lengths", [*self.eval_lengths], allowed)
        if self.tbptt_k1 is not None and self.tbptt_k2 is None:
            raise InputError("tbptt_k1", self.tbptt_k1, "needs trainer.tbptt_k2 as well")
        if self.tbptt_k1 is not None and self.tbptt_k2 is not None:
            if self.tbptt_k1 > self.tbptt_k2:
                raise InputError(
                    "tbptt_k1",
                    self.tbptt_k1,
                    f"must be at most trainer.tbptt_k2, which is {self.tbptt_k2}",
                )
        if isinstance(self.checkpoint_every, str) and self.checkpoint_seconds is None:
            allowed = "must be an integer >= 1, a time as 30s, 5min or 2h, or null"
            raise InputError("checkpoint_every", self.checkpoint_every, allowed)
        if self.checkpoint_keep == 1:
            raise InputError("checkpoint_keep", 1, "must be >= 2, as one may be damaged, or 0: all")

    @property
    def checkpoint_seconds(self) -> float | None:
        """``checkpoint_every`` where it is a time."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(s|min|h)", str(self.checkpoint_every))
        if match is None or not float(match[1]):
            return None
        return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]

    @property
    def checkpoint_steps(self) -> int | None:
        """``checkpoint_every`` where it is a number of updates."""
        return self.checkpoint_every if isinstance(self.checkpoint_every, int) else None

    @property
    def tbptt(self) -> tuple[int, int] | None:
        """``(k1, k2)``, if the way back is to be truncated."""
        return None if self.tbptt_k2 is None else (self.tbptt_k1 or self.tbptt_k2, self.tbptt_k2)


def default_trainer() -> Trainer:
    """With the defaults of its yaml."""
    text = (resources.files("rnngrad.conf") / "trainer" / "default.yaml").read_text("utf-8")
    return Trainer(**yaml.safe_load(text))


@dataclass(frozen=True)
class General(Part):
    """The keys that belong to no group."""

    seed: Annotated[int, Interval(low=0, high=2**63 - 1)]
    device: str

    def __post_init__(self) -> None:
        super().__post_init__()
        # cpu:0 is cpu under another name, and would be another run
        if self.device.startswith("cpu:") or not _usable(self.device):
            raise InputError(
                "device", self.device, "is not a device that this torch can use; cpu is"
            )


@cache
def _usable(device: str) -> bool:
    try:
        torch.ones(1, device=device).item()
    except Exception:  # of torch, or of a backend that it tries to import
        return False
    return True


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a run, checked."""

    task: Task
    cell: CellPart
    init: Init
    clip: Clip
    bptt_clip: BPTTClip
    regularizer: Regularizer
    optim: Optim
    measure: Measure
    trainer: Trainer
    general: General
    names: Mapping[str, str]

    def __post_init__(self) -> None:
        """Checks what no part can check alone.

        Raises:
            InputError: Two parts do not go together.
        """
        task, cell, trainer, name = self.task, self.cell, self.trainer, self.names["cell"]
        if not task.reads_out and cell.hidden_size != task.output_size:
            raise InputError(
                "cell.hidden_size",
                cell.hidden_size,
                f"must be {task.output_size}, as task={self.names['task']} has no read-out",
            )
        if trainer.recompute_segments > 1 and not cell.recomputes:
            raise InputError(
                "trainer.recompute_segments",
                trainer.recompute_segments,
                f"must be 1, as cell={name} is run step by step by autograd",
            )
        # a small one: which weights there are, and whether a scheme can fill them, is the same
        small = (replace(cell, hidden_size=3, num_layers=1), task, self.init, self.bptt_clip)
        model = (_model if all(map(_has_hash, small)) else _model.__wrapped__)(*small)
        if any("running_mean" in n for n, _ in model.named_buffers()):
            if trainer.tbptt is not None:
                raise InputError(
                    "trainer.tbptt_k2",
                    trainer.tbptt_k2,
                    f"must be null, as cell={name} has statistics of its own for each time step",
                )
            if trainer.batch_size < 2:
                raise InputError(
                    "trainer.batch_size", trainer.batch_size, f"must be >= 2 with cell={name}"
                )
        if isinstance(model.rnn, Unrolled):
            self._check_bptt_clip(model.rnn)
        if self.optim.warmup_steps >= trainer.steps:
            raise InputError(
                "optim.warmup_steps",
                self.optim.warmup_steps,
                f"must be under trainer.steps, which is {trainer.steps}",
            )
        names = [parameter for parameter, _ in model.named_parameters()]
        try:
            self.clip.check(names)
        except InputError as error:
            raise error.under("clip") from None
        for rule in self.audited.values():
            with _of_the_audit():
                rule.check(names)
        if self.regularizer.needs_gradients:
            if cell.num_layers > 1 or self.nonlinearity not in SLOPES:
                raise InputError(
                    "regularizer",
                    self.names["regularizer"],
                    f"is defined for one layer of cell=rnn with {', '.join(SLOPES)}",
                )
        elif self.names["regularizer"] != "none" and not list(recurrent_weights(model.rnn)):
            raise InputError(
                "regularizer",
                self.names["regularizer"],
                f"needs a recurrent weight matrix that is a parameter, which cell={name} has not",
            )
        if trainer.nonfinite == "pascanu" and not list(recurrent_weights(model.rnn)):
            raise InputError(
                "trainer.nonfinite",
                trainer.nonfinite,
                f"needs a recurrent weight matrix that is a parameter, which cell={name} has not",
            )
        for length in trainer.eval_lengths:
            try:
                task.at_length(length)
            except InputError as error:
                raise InputError("trainer.eval_lengths", length, error.allowed) from None

    @torch.no_grad()
    def _check_bptt_clip(self, cells: Unrolled) -> None:
        """Tries whether the cells show what is to be clipped."""
        try:
            cells(torch.zeros(1, 2, self.task.input_size))
        except RuntimeError:
            if not hasattr(self.bptt_clip, "site"):
                raise
            raise InputError(
                "bptt_clip.site",
                self.bptt_clip.site,
                f"must be state or carry, as cell={self.names['cell']} never calls "
                "rnngrad.bptt_clip.preactivation",
            ) from None

    @property
    def nonlinearity(self) -> str | None:
        """That of a vanilla RNN."""
        return self.cell.nonlinearity if isinstance(self.cell, RNNPart) else None

    @cached_property
    def audited(self) -> dict[str, Clip]:
        """The rules of ``trainer.clip_audit`` by label: their name, and what is not its default."""
        rules: dict[str, Clip] = {}
        for entry in self.trainer.clip_audit:
            settings = {"name": entry} if isinstance(entry, str) else entry
            name = settings.get("name")
            if not isinstance(name, str) or name not in CLIPS:
                allowed = f"must name one of {', '.join(sorted(CLIPS))}"
                raise InputError("trainer.clip_audit", name or entry, allowed)
            with _of_the_audit():
                try:
                    usual = asdict(CLIPS.default(name))
                except FileNotFoundError:  # a plugin's, whose yaml is not in the package
                    usual = {}
                rule = CLIPS.build(usual | {"name": name} | dict(settings))
            label = "_".join(
                [name, *(f"{k}_{v}" for k, v in asdict(rule).items() if v != usual.get(k, ...))]
            )
            if label in rules:
                raise InputError("trainer.clip_audit", label, "stands there twice")
            rules[label] = rule
        return rules

    def training(
        self,
        tracker: Tracker,
        *,
        saver: Saver | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Training:
        """The training that is described, at its beginning; parameters as in ``Training``."""
        trainer, general, optim = self.trainer, self.general, self.optim
        model = build_model(
            self.cell,
            self.task,
            self.init,
            general.seed,
            trainer.recompute_segments,
            self.bptt_clip,
        ).to(general.device)
        named = list(model.named_parameters())
        return Training(
            model,
            self.task,
            optim.build(model.parameters()),
            Clipper(self.clip, named),
            tracker,
            seed=general.seed,
            steps=trainer.steps,
            batch_size=trainer.batch_size,
            eval_every=trainer.eval_every,
            eval_size=trainer.eval_size,
            log_every=trainer.log_every,
            log_per_decade=trainer.log_per_decade,
            stop_when_solved=trainer.stop_when_solved,
            eval_lengths=trainer.eval_lengths,
            tbptt=trainer.tbptt,
            regularizer=self.regularizer,
            nonlinearity=self.nonlinearity,
            audit=ClipAudit(self.audited, named) if self.audited else None,
            observer=self.observer(model),
            learning_rate=lambda step: optim.learning_rate(step, trainer.steps),
            nonfinite=NonFinite(trainer.nonfinite, trainer.nonfinite_patience),
            saver=saver,
            should_stop=should_stop,
        )

    def observer(self, model: SequenceModel) -> Observer | None:
        """Measures the model, if anything is to be."""
        if not isinstance(self.measure, Dynamics):
            return None
        tbptt = self.trainer.tbptt
        all_the_way = tbptt is None or tbptt[1] >= self.task.time_steps
        whole = all_the_way and self.trainer.recompute_segments == 1
        return Observer(self.measure, model, self.task.time_steps, whole=whole)

    @property
    def columns(self) -> list[str]:
        """Of metrics.csv, beside those that every run has."""
        lengths = [
            f"eval_{score}_at_{length}"
            for length in self.trainer.eval_lengths
            for score in ("loss", "accuracy")
        ]
        return lengths + [
            f"audit_{label}_{quantity}"
            for label in self.audited
            for quantity in ("clipped", "coef")
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """What defines the run, as plain values."""
        groups = {group: getattr(self, group) for group in REGISTRIES}
        parts = {group: {"name": self.names[group]} | asdict(p) for group, p in groups.items()}
        if self.task.data_digest is not None:
            parts["task"]["data"] = self.task.data_digest
        return parts | {"trainer": asdict(self.trainer)} | asdict(self.general)

    @property
    def run_name(self) -> str:
        """The name of the run's directory, the same for the same settings."""
        text = json.dumps(self.settings, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        n = self.names
        return f"{n['task']}_{n['cell']}_{n['clip']}_s{self.general.seed}-{digest}"


@lru_cache(maxsize=64)  # the runs of a sweep have few, and building one is most of a check
def _model(cell: CellPart, task: Task, init: Init, bptt_clip: BPTTClip) -> SequenceModel:
    return build_model(cell, task, init, 0, bptt_clip=bptt_clip)


def _has_hash(part: Part) -> bool:
    try:
        hash(part)
    except TypeError:  # one of a user's with a field that has none
        return False
    return True


def experiment(config: Mapping[str, Any]) -> Experiment:
    """Checks a composed configuration.

    Args:
        config: Plain values: one mapping a group, and the keys of ``General``.

    Raises:
        InputError: A key is missing or unknown, or its value is not allowed.
    """
    known = {*REGISTRIES, "trainer", *COMMAND, *General.__dataclass_fields__}
    for key in config:
        if key not in known:
            raise InputError(as_key(key), config[key], unknown_key(as_key(key), sorted(known)))
    if config.get("resume") is not None:
        allowed = "stands alone on the command line: rnngrad resume=DIR [trainer.steps=N]"
        raise InputError("resume", config["resume"], allowed)
    for key in ("strict", "dry_run"):
        if not isinstance(config.get(key, False), bool):
            raise InputError(key, config[key], "must be true or false")
    parts = {group: reg.build(config.get(group)) for group, reg in REGISTRIES.items()}
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        raise InputError("trainer", MISSING, "is missing; give trainer=default")
    checked = build(Trainer, trainer, "trainer")
    for key in General.__dataclass_fields__:
        if key not in config:  # deleted on the command line
            raise InputError(key, MISSING, "is missing")
    return Experiment(
        **parts,
        trainer=checked,
        general=General(**{key: config[key] for key in General.__dataclass_fields__}),
        names={group: config[group]["name"] for group in REGISTRIES},
    )


@contextmanager
def _of_the_audit() -> Iterator[None]:
    """Inside, an error of a clip rule is one of ``trainer.clip_audit``."""
    try:
        yield
    except InputError as error:
        key, allowed = error.key.removeprefix("clip."), error.allowed.replace("clip.", "")
        raise InputError(f"trainer.clip_audit.{key}", error.value, allowed) from None


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
