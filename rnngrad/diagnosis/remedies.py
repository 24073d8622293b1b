"""What to try against what, as it is typed, in the order in which the literature supports it.

Only what the run does not have already, and only what it could have: ``Setup`` knows its settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rnngrad.diagnosis.evidence import SHORTEST, Evidence, number, setting
from rnngrad.diagnosis.findings import Remedy, once
from rnngrad.diagnosis.thresholds import clip_thresholds

GATED = ("lstm", "gru", "ln_lstm", "bn_lstm")
FREE_MATRIX = ("rnn", "ln_rnn", "bn_rnn", "lstm", "gru", "ln_lstm", "bn_lstm")
"""Cells whose recurrent weight is a matrix that an initialisation may fill."""
ADAPTIVE = ("adam", "adamw", "rmsprop")
"""Optimisers whose steps do not depend on the gradient's length: clipping does not shorten them."""
FAINT, EXPLODED = 1e-6, 10.0
"""Norms between which the median is a threshold; beyond, 1 is, which is what most papers have."""
OMEGA = ("tanh", "sigmoid", "relu", "linear")
"""Nonlinearities that ``regularizer=omega`` is defined for."""


@dataclass(frozen=True)
class Setup:
    """What the remedies depend on.

    Args:
        config: As ``Run.config``; of a model of the user's own, as much as its layers tell.
        time_steps: ``T``.
        max_norm: The median of the norms seen; NaN if there was none.
        seen: How many norms that is of.
        updated: Whether there was an update, which a smaller step could have mended.
    """

    config: Mapping[str, Any]
    time_steps: int
    max_norm: float
    seen: int = SHORTEST
    updated: bool = True

    @classmethod
    def of(cls, evidence: Evidence) -> Setup:
        """That of a run or a model."""
        median = [t.threshold for t in clip_thresholds(evidence.log10_grad_norm[1])[:1]]
        _, norms = evidence.log10_grad_norm
        return cls(
            evidence.config,
            evidence.time_steps,
            median[0] if median else math.nan,
            int(np.isfinite(norms).sum()),
            evidence.summary.get("steps") != 0,
        )

    @property
    def ordinary(self) -> bool:
        """Whether the norms seen are such that a threshold among them makes sense."""
        return self.seen >= SHORTEST and FAINT < self.max_norm <= EXPLODED

    def get(self, key: str, default: Any = None) -> Any:
        """A setting, as ``cell.name``."""
        return setting(self.config, key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A setting that is computed with, as ``optim.lr``."""
        return number(self.config, key, default)

    @property
    def cell(self) -> str:
        """The cell's name; empty if unknown."""
        return str(self.get("cell.name", ""))

    def another_cell(self, name: str, more: str = "") -> str:
        """``cell=name``, with whatever else cannot stay when the cell changes."""
        words = [f"cell={name}", *more.split()]
        penalty = self.get("regularizer.name")
        if penalty == "omega" or (penalty == "orthogonality" and name == "orthogonal"):
            words.append("regularizer=none")
        if self.number("trainer.recompute_segments", 1) > 1 and name not in ("rnn", "lstm", "gru"):
            words.append("trainer.recompute_segments=1")
        if name == "orthogonal":
            if self.get("init.recurrent", "torch") not in ("torch", "orthogonal", "identity"):
                words.append("init.recurrent=torch")
            allowed = (None,) if "init.recurrent=torch" in words else (None, 1.0)
            if self.get("init.recurrent_scale") not in allowed:
                words.append("init.recurrent_scale=null")
        return " ".join(words)


def against_vanishing(setup: Setup) -> tuple[Remedy, ...]:
    """What keeps a gradient that is lost on its way back through time."""
    return tuple(once(_against_vanishing(setup)))


def _against_vanishing(setup: Setup) -> Iterator[Remedy]:
    yield from _whole_gradient(setup)
    if not setup.cell:
        return
    chrono = f"cell.chrono_length={max(2, setup.time_steps)}"
    remember = f"gate biases of log U(1, {max(2, setup.time_steps) - 1}) for memory of that length"
    if setup.cell in GATED:
        yield from _longer_gates(setup, chrono, remember)
    else:
        yield Remedy(
            setup.another_cell("lstm"),
            "nn.LSTM with a forget-gate bias of 1: its cell state keeps the gradient",
        )
        yield from _kept_length(setup)
        yield Remedy(
            setup.another_cell("lstm", chrono),
            f"nn.LSTM with {remember}",
        )
    if setup.cell != "orthogonal":
        yield Remedy(
            setup.another_cell("orthogonal"),
            "a recurrence by an orthogonal matrix, which cannot vanish",
        )
    if setup.cell == "rnn" and setup.number("cell.num_layers", 1) == 1:
        phi = setup.get("cell.nonlinearity")
        if phi in OMEGA and setup.get("regularizer.name") == "none":
            yield Remedy(
                "regularizer=omega", "a penalty on every step back that shortens the gradient"
            )


def _whole_gradient(setup: Setup) -> Iterator[Remedy]:
    """What cuts the gradient off has to go before anything else can help."""
    k2 = setup.get("trainer.tbptt_k2")
    if k2 is not None and k2 < setup.time_steps:
        k1 = "" if setup.get("trainer.tbptt_k1") is None else "trainer.tbptt_k1=null "
        yield Remedy(
            f"{k1}trainer.tbptt_k2=null",
            "back-propagation through the whole sequence: truncated, it ends before",
        )
    if setup.get("bptt_clip.name", "none") != "none":
        yield Remedy("bptt_clip=none", "no clipping on the way back, which shortens it for good")


def _longer_gates(setup: Setup, chrono: str, remember: str) -> Iterator[Remedy]:
    """Biases with which gates keep what they have."""
    fixed = setup.get("cell.chrono_length") is not None
    if setup.cell == "gru":
        if not fixed and (setup.number("cell.update_bias") or 0) < 1:
            yield Remedy("cell.update_bias=1", "an update-gate bias of 1")
        if setup.get("cell.chrono_length") != max(2, setup.time_steps):
            yield Remedy(chrono, remember)
        yield Remedy(
            setup.another_cell("lstm"),
            "nn.LSTM with a forget-gate bias of 1: its cell state keeps the gradient",
        )
        return
    gated = setup.get("cell.forget_gate", True)
    if gated and not fixed and (setup.number("cell.forget_bias") or 0) < 1:
        yield Remedy("cell.forget_bias=1", "a forget-gate bias of 1")
    if setup.cell != "lstm":
        yield Remedy(setup.another_cell("lstm", chrono), f"nn.LSTM with {remember}")
    elif gated and setup.get("cell.chrono_length") != max(2, setup.time_steps):
        yield Remedy(chrono, remember)


def _kept_length(setup: Setup) -> Iterator[Remedy]:
    """Recurrent weights that keep a vector's length."""
    if setup.cell == "rnn" and setup.get("cell.nonlinearity") == "sigmoid":
        yield Remedy("cell.nonlinearity=tanh", "tanh, whose slope reaches 1, for sigmoid's 1/4")
    irnn = setup.get("init.recurrent") == "identity"
    if setup.cell == "rnn" and setup.get("cell.nonlinearity") == "relu" and not irnn:
        yield Remedy("init=irnn", "the identity as recurrent weight, and small input weights")
    yield from _orthogonal(setup)


def _orthogonal(setup: Setup) -> Iterator[Remedy]:
    wanted = {"init.recurrent": "orthogonal"}
    if setup.get("init.recurrent_scale") not in (None, 1.0):
        wanted["init.recurrent_scale"] = "null"
    words = [f"{key}={value}" for key, value in wanted.items() if setup.get(key) != value]
    if setup.cell in FREE_MATRIX and words:
        yield Remedy(" ".join(words), "orthogonal recurrent weights (nn.init.orthogonal_)")


def against_exploding(setup: Setup) -> tuple[Remedy, ...]:
    """What keeps a gradient that grows, or a step that is too large."""
    return tuple(once(_against_exploding(setup)))


def _against_exploding(setup: Setup) -> Iterator[Remedy]:
    yield from _clipping(setup)
    yield from slower(setup)
    yield from _orthogonal(setup)
    if setup.cell and setup.cell not in (*GATED, "orthogonal"):
        yield Remedy(
            setup.another_cell("lstm"), "nn.LSTM, whose gates bound what a step can multiply"
        )


def _clipping(setup: Setup) -> Iterator[Remedy]:
    """Clipping by norm at what half of the norms seen lie under, if they are ordinary."""
    if not setup.max_norm > FAINT:
        return
    number = f"{setup.max_norm:.2g}" if setup.ordinary else "1"
    of = ", the median of the norms seen" if setup.ordinary else ""
    words = f"clip_grad_norm_(parameters, {number}){of}"
    if setup.get("clip.name") != "norm":
        yield Remedy(f"clip=norm clip.max_norm={number}", words)
    elif setup.get("clip.norm_type", 2.0) != 2:
        yield Remedy(f"clip.max_norm={number} clip.norm_type=2", words)
    elif float(setup.number("clip.max_norm", math.inf)) > 1.05 * float(number):
        yield Remedy(f"clip.max_norm={number}", words)


def against_jumps(setup: Setup, largest: float = 0.0) -> tuple[Remedy, ...]:
    """What keeps updates in proportion.

    Args:
        setup: Of the run.
        largest: The largest update, as a part of the weights.
    """
    rate = setup.number("optim.lr")
    too_fast = setup.ordinary or setup.get("optim.name") in ADAPTIVE
    if rate is None or not too_fast or not 1 < largest < math.inf:
        return against_exploding(setup)
    # with which that update would have been a hundredth of the weights
    wanted = f"{rate * 0.01 / largest:.0e}".replace("e-0", "e-").replace("e+0", "e")
    fitting = Remedy(f"optim.lr={wanted}", f"a learning rate of {wanted}")
    return tuple(once([fitting, *against_exploding(setup)]))


def slower(setup: Setup) -> Iterator[Remedy]:
    """A tenth of the learning rate."""
    rate = setup.number("optim.lr")
    if rate is not None and setup.updated:
        yield Remedy(f"optim.lr={rate / 10:.6g}", f"a learning rate of {rate / 10:.6g}")


def faster(setup: Setup) -> Iterator[Remedy]:
    """Ten times the learning rate."""
    rate = setup.number("optim.lr")
    if rate is not None:
        yield Remedy(f"optim.lr={rate * 10:.6g}", f"a learning rate of {rate * 10:.6g}")


def longer(setup: Setup) -> Iterator[Remedy]:
    """Twice the budget."""
    steps = setup.number("trainer.steps")
    if steps is not None:
        yield Remedy(f"trainer.steps={2 * steps}", f"{2 * steps} updates")


def against_saturation(setup: Setup) -> tuple[Remedy, ...]:
    """What keeps units where their slope is not 0."""
    return tuple(once(_against_saturation(setup)))


def _against_saturation(setup: Setup) -> Iterator[Remedy]:
    yield from _glorot(setup)
    yield from slower(setup)
    normalised = "ln_lstm" if setup.cell in ("lstm", "gru", "bn_lstm") else "ln_rnn"
    if setup.cell and setup.cell not in ("ln_rnn", "ln_lstm"):
        yield Remedy(
            setup.another_cell(normalised), "layer normalisation of what goes into the units"
        )


def against_dead_units(setup: Setup) -> tuple[Remedy, ...]:
    """What brings units back that are 0 whatever comes."""
    return tuple(once(_against_dead_units(setup)))


def _against_dead_units(setup: Setup) -> Iterator[Remedy]:
    if setup.cell == "rnn" and setup.get("init.recurrent") != "identity":
        yield Remedy("init=irnn", "biases of 0, the identity as recurrent weight")
    if setup.get("cell.nonlinearity") == "relu":
        if setup.cell == "rnn" and setup.get("regularizer.name") != "omega":
            yield Remedy("cell.nonlinearity=leaky_relu", "leaky ReLU, whose slope is nowhere 0")
        else:
            yield Remedy("cell.nonlinearity=tanh", "tanh, whose slope is nowhere 0")
    yield from slower(setup)


def against_nonfinite(setup: Setup, from_the_start: bool = False) -> tuple[Remedy, ...]:
    """What keeps numbers finite, once the data are known to be."""
    smaller, steps = [*_glorot(setup)], [*slower(setup), *_clipping(setup)]
    return tuple(once([*smaller, *steps] if from_the_start else [*steps, *smaller]))


def against_underflow(setup: Setup) -> tuple[Remedy, ...]:
    """What brings a gradient back into float32's range, once the loss's own scale is known."""
    return tuple(_glorot(setup))


def _glorot(setup: Setup) -> Iterator[Remedy]:
    glorot = {setup.get(f"init.{role}") for role in ("input", "recurrent", "output")}
    if setup.cell in FREE_MATRIX and glorot != {"xavier_uniform"}:
        yield Remedy("init=glorot", "nn.init.xavier_uniform_ for all weights, biases 0")


def against_depth(setup: Setup) -> tuple[Remedy, ...]:
    """What lets the lower layers learn."""
    return tuple(once(_against_depth(setup)))


def _against_depth(setup: Setup) -> Iterator[Remedy]:
    layers = setup.number("cell.num_layers", 1)
    if layers > 1:
        yield Remedy("cell.num_layers=1", "fewer layers")
    if setup.cell == "rnn" and setup.get("cell.nonlinearity") == "sigmoid":
        yield Remedy("cell.nonlinearity=tanh", "tanh, whose slope reaches 1, for sigmoid's 1/4")
    yield from _glorot(setup)
    if setup.get("optim.name") == "sgd":
        yield Remedy(
            "optim=adam optim.lr=0.001", "Adam, which gives every weight a step of its own size"
        )
    if setup.cell in ("rnn", "lstm"):
        yield Remedy(setup.another_cell(f"ln_{setup.cell}"), "layer normalisation")


def against_decay(setup: Setup) -> tuple[Remedy, ...]:
    """What lets weights be that no gradient holds up."""
    if setup.number("optim.weight_decay", 0) > 0:
        return (Remedy("optim.weight_decay=0", "no weight decay"),)
    if setup.get("regularizer.name", "none") != "none":
        return (Remedy("regularizer=none", "no penalty"),)
    return ()
