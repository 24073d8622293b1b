"""The figures and the numbers of docs/tutorial.md, a walk through the vanishing gradient.

``python -m rnngrad.tutorial [FIGURE ...]`` computes them, prints the numbers and draws the figures.
Three of them are of runs, which the page's other commands train; the rest is a function of seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rnngrad.bptt import record
from rnngrad.cells import CELLS
from rnngrad.cliff import sigmoid, surface
from rnngrad.clipping import CLIPS, Clipper
from rnngrad.init import INITS
from rnngrad.initial import gaussian, lag_profile
from rnngrad.model import SequenceModel, build_model
from rnngrad.nn import RNN
from rnngrad.norms import log10_rms
from rnngrad.report import tutorial as drawing
from rnngrad.runs import Run, find_runs
from rnngrad.task import TASKS, training_generator
from rnngrad.truncation import truncated_backward

Floats = npt.NDArray[np.float64]

Made = tuple[Any, Iterator[str]]
"""A figure, and its numbers line by line."""

VISIBLE = 2.0**-24
"""Half of float32's spacing at 1: what is smaller, relative to a sum, need not change it."""

UNITS = 64
SEEDS = range(10)

# --- activations --------------------------------------------------------------------------------


class Activation(NamedTuple):
    """A nonlinearity and its derivative.

    Args:
        phi: ``φ(a)``.
        slope: ``φ'(a)``.
        most: The largest ``φ'``.
        where: Where it is reached.
    """

    phi: Callable[[Floats], Any]
    slope: Callable[[Floats], Any]
    most: float
    where: str


ACTIVATIONS: Mapping[str, Activation] = {
    "sigmoid": Activation(sigmoid, lambda a: sigmoid(a) * (1 - sigmoid(a)), 1 / 4, "at a = 0"),
    "tanh": Activation(np.tanh, lambda a: 1 - np.tanh(a) ** 2, 1.0, "at a = 0"),
    "relu": Activation(lambda a: np.maximum(a, 0), lambda a: 1.0 * (a > 0), 1.0, "at every a > 0"),
    "leaky_relu": Activation(
        lambda a: np.where(a > 0, a, 0.01 * a),
        lambda a: np.where(a > 0, 1.0, 0.01),
        1.0,
        "at every a > 0",
    ),
}
"""At ``a = 0``, where the last two have no derivative, torch takes 0 and 0.01, and so do these."""

# --- one unit -----------------------------------------------------------------------------------

REST = 0.6
"""A state with round numbers: ``tanh'`` is ``1 - 0.36 = 0.64``, and ``atanh 0.6 = ln 2``."""


class Unit(NamedTuple):
    """One unit ``h_t = φ(w h_{t-1} + x)``.

    Args:
        products: ``∂h_T/∂h_{T-k}`` by ``w`` and ``k``, of a tanh unit that is held at ``REST``.
        weights: ``w`` of ``factors``.
        factors: ``w φ'`` once the unit has come to rest with ``x = 0``, by activation.
    """

    products: dict[float, Floats]
    weights: Floats
    factors: dict[str, Floats]


def unit_products(weight: float, steps: int, x: float, h: float) -> Floats:
    """``∂h_T/∂h_{T-k}``, ``k = 0 ... steps``, of ``h_t = tanh(w h_{t-1} + x)`` from ``h``."""
    factors = []
    for _ in range(steps):
        h = math.tanh(weight * h + x)
        factors.append(weight * (1 - h * h))
    products: Floats = np.cumprod(np.array([1.0, *reversed(factors)]))
    return products


def resting_factors(activation: str, weights: Floats, steps: int = 10_000) -> Floats:
    """``w φ'`` of units without input, ``steps`` after they started from 0.5."""
    phi, slope, *_ = ACTIVATIONS[activation]
    h = a = np.full_like(weights, 0.5)
    if activation != "relu":  # whose state, while it is positive, grows without end if w > 1
        for _ in range(steps):
            a = weights * h
            h = phi(a)
    factors: Floats = weights * slope(a)
    return factors


def unit() -> Unit:
    """What section "One unit" shows."""
    weights = np.linspace(0, 3, 301)
    held = {
        w: unit_products(w, 30, math.log(2) - w * REST, REST) for w in (0.5, 1, 1.25, 1.5625, 2)
    }
    rest = {name: resting_factors(name, weights) for name in ("relu", "tanh", "sigmoid")}
    return Unit(held, weights, rest)


# --- one layer ----------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A tanh layer as ``torch.nn.RNN`` starts it, at one seed.

    Args:
        eigenvalues: Of ``W_hh``, complex ``[H]``.
        largest: Its largest singular value.
        jacobian: Largest singular value of ``∂h_T/∂h_{T-k}`` by ``k``, of one sequence.
        gradient: ``‖∂L/∂h_{T-k}‖ / ‖∂L/∂h_T‖`` by ``k``, RMS over 16 sequences, ``log10``.
    """

    eigenvalues: npt.NDArray[np.complex128]
    largest: float
    jacobian: Floats
    gradient: Floats

    @property
    def radius(self) -> float:
        """The spectral radius of ``W_hh``."""
        return float(np.abs(self.eigenvalues).max())


def layer(seed: int = 0, lags: int = 100) -> Layer:
    """What section "One layer" shows; the weights are those that ``lag_profile`` draws."""
    x = gaussian(lags + 1, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rnn = RNN(x.shape[-1], UNITS)
        INITS.default("torch")(rnn)
    hidden, _ = rnn.double()(x[:, :1])
    weight, states = rnn.get_parameter("weight_hh_l0").detach(), hidden.detach().squeeze(1)
    product, largest = torch.eye(UNITS, dtype=torch.float64), [1.0]
    for h in states[1:].flip(0):
        product = product @ ((1 - h * h).unsqueeze(1) * weight)  # diag(φ') W
        largest.append(float(torch.linalg.matrix_norm(product, 2)))
    profile = lag_profile(CELLS.default("rnn", hidden_size=UNITS), INITS.default("torch"), x, seed)
    return Layer(
        torch.linalg.eigvals(weight).numpy(),
        float(torch.linalg.matrix_norm(weight, 2)),
        np.array(largest),
        profile - profile[0],
    )


def expected_factor(variance: float, mean_square_slope: float) -> float:
    """``√(H Var[W] E[φ'²])``: what a step back is expected to leave of the gradient's length.

    As Glorot & Bengio (2010, for ``φ' = 1``) and He et al. (2015, for relu: 1/2) count it from
    layer to layer; for a random ``W`` that the gradient does not depend on.

    Args:
        variance: ``H Var[W]``.
        mean_square_slope: ``E[φ'²]``.

    >>> round(math.log10(expected_factor(1 / 3, 1)), 4)
    -0.2386
    """
    return math.sqrt(variance * mean_square_slope)


def slope(profile: Floats) -> float:
    """Decades a step, from lag 10, where the gradient has found its direction, to lag 100."""
    return float((profile[100] - profile[10]) / 90)


# --- depth against time -------------------------------------------------------------------------


class Depth(NamedTuple):
    """Gradients ``log10``, relative to where the loss is.

    Args:
        stacks: ``[seeds, depth + 1]`` through as many layers with weights of their own.
        recurrences: ``[seeds, depth + 1]`` through one layer applied as many times.
        field: ``[layer, t]`` of a stacked RNN, loss on the last layer's last step.
    """

    stacks: Floats
    recurrences: Floats
    field: Floats


def through(layers: Sequence[torch.nn.Module], h: Tensor) -> Floats:
    """``log10`` of ``‖∂L/∂h‖`` before each layer, from the last back, relative to after the last.

    With ``h <- tanh(layer(h))`` and as loss the sum of the last ``h``.
    """
    states = [h.requires_grad_()]
    for module in layers:
        states.append(torch.tanh(module(states[-1])))
        states[-1].retain_grad()
    states[-1].sum().backward()
    norms = [float(state.grad.norm()) for state in reversed(states) if state.grad is not None]
    relative: Floats = np.log10(np.array(norms) / norms[0])
    return relative


def depth(steps: int = 100) -> Depth:
    """What section "Depth against time" shows."""
    stacks, recurrences = [], []
    for seed in SEEDS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            linears = [torch.nn.Linear(UNITS, UNITS).double() for _ in range(steps)]
            start = torch.randn(UNITS, dtype=torch.float64)
        stacks.append(through(linears, start.clone()))
        recurrences.append(through([linears[0]] * steps, start.clone()))
    return Depth(np.stack(stacks), np.stack(recurrences), layer_time())


def layer_time(layers: int = 6, steps: int = 40, seed: int = 0) -> Floats:
    """``log10 ‖∂L/∂h_t^l‖ [layer, t]`` of a stacked tanh RNN, relative to the last of both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rnn = RNN(7, UNITS, num_layers=layers).double()
    with record(rnn) as tape:
        hidden, _ = rnn(gaussian(steps, seed=seed))
        hidden[-1].sum().backward()
    field = torch.stack([log10_rms(tape[f"l{i}"].hidden_norm) for i in range(layers)])
    relative: Floats = (field - field[-1, -1]).numpy()
    return relative


# --- remedies -----------------------------------------------------------------------------------

TANH: dict[str, Any] = {}
REMEDIES: Mapping[str, Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]] = {
    "activation": (
        ("cell.nonlinearity=sigmoid", "rnn", {"nonlinearity": "sigmoid"}, {}),
        ("cell.nonlinearity=tanh", "rnn", TANH, {}),
        ("cell.nonlinearity=relu", "rnn", {"nonlinearity": "relu"}, {}),
        ("cell.nonlinearity=leaky_relu", "rnn", {"nonlinearity": "leaky_relu"}, {}),
    ),
    "initialisation": (
        ("init.recurrent=torch", "rnn", TANH, {}),
        ("init.recurrent=xavier_uniform", "rnn", TANH, {"recurrent": "xavier_uniform"}),
        ("init.recurrent=orthogonal", "rnn", TANH, {"recurrent": "orthogonal"}),
        (
            "init=irnn cell.nonlinearity=relu",
            "rnn",
            {"nonlinearity": "relu"},
            {
                "input": "normal",
                "recurrent": "identity",
                "input_scale": 0.001,
                "recurrent_scale": 1.0,
                "bias": "zero",
            },
        ),
    ),
    "gates": (
        ("cell=lstm cell.forget_bias=null", "lstm", {"forget_bias": None}, {}),
        ("cell=gru", "gru", {}, {}),
        ("cell=lstm", "lstm", {}, {}),
        ("cell=lstm cell.chrono_length=200", "lstm", {"chrono_length": 200}, {}),
    ),
    "normalisation": (
        ("cell=rnn", "rnn", TANH, {}),
        ("cell=bn_rnn", "bn_rnn", {}, {}),
        ("cell=ln_rnn", "ln_rnn", {}, {}),
    ),
}
"""By kind: what to type, and the cell and initialisation that this is. All weights that are not
named start as torch.nn's."""

REMEDY_SEEDS = range(5)
TRUNCATED = 20
LENGTHS = (20, 50, 100)


class Remedies(NamedTuple):
    """What each remedy leaves of the gradient.

    Args:
        profiles: ``log10 ‖∂L/∂h_{T-k}‖`` relative to lag 0, ``[seeds, T]``, by kind and command.
        shorter: The same of adding, one seed, by length; cut off after ``TRUNCATED`` steps last.
        penalty: ``log10 ‖∂L/∂h_{T-k}‖`` relative to lag 0 by regulariser and training step, in
            two runs on adding.
        penalty_loss: The runs' last evaluation.
    """

    profiles: dict[str, dict[str, Floats]]
    shorter: dict[str, Floats]
    penalty: dict[str, dict[int, Floats]]
    penalty_loss: dict[str, float]


def remedies(runs: Path) -> Remedies:
    """What section "What each remedy does" shows."""
    profiles: dict[str, dict[str, Floats]] = {}
    for kind, rows in REMEDIES.items():
        for command, cell, changes, scheme in rows:
            part = CELLS.default(cell, hidden_size=UNITS, **changes)
            init = INITS.default("torch", **scheme)
            found = [lag_profile(part, init, gaussian(201, seed=s), s) for s in REMEDY_SEEDS]
            profiles.setdefault(kind, {})[command] = np.stack([p - p[0] for p in found])
    shorter = {f"task.length={length}": adding_profile(length) for length in LENGTHS}
    shorter[f"trainer.tbptt_k2={TRUNCATED}"] = adding_profile(LENGTHS[-1], TRUNCATED)
    penalty, losses = {}, {}
    for run in _runs(runs, "penalty", lambda c: c["regularizer"]["name"], ("none", "omega")):
        name = run.config["regularizer"]["name"]
        history = run.bptt["l0"]
        penalty[name] = {
            int(step): (row - row[-1])[::-1]
            for step, row in zip(history.step, history.hidden, strict=True)
        }
        losses[name] = float(run.summary["eval_loss"])
    return Remedies(profiles, shorter, penalty, losses)


def adding_model(cell: str, length: int, seed: int = 0) -> SequenceModel:
    """The model of ``rnngrad task=adding cell=CELL cell.hidden_size=64``, in float64."""
    part = CELLS.default(cell, hidden_size=UNITS)
    task = TASKS.default("adding", length=length)
    return build_model(part, task, INITS.default("torch"), seed).double()


def adding_backward(
    model: SequenceModel, length: int, kept: int | None = None, seed: int = 0
) -> Tensor:
    """One backward of the run's first batch; ``‖∂L/∂h_t‖ [T, B]``.

    Args:
        model: Of ``adding_model``; its gradients are set.
        length: ``T``.
        kept: Go back so many steps only.
        seed: Of the data.
    """
    model.zero_grad()
    kept = length if kept is None else kept
    task = TASKS.default("adding", length=length)
    inputs, targets = task.batch(50, training_generator(seed, 1))
    *_, records = truncated_backward(
        model, task, inputs.double(), targets.double(), None, k1=kept, k2=kept, recorded=True
    )
    return records["rnn.l0"].hidden_norm


def adding_profile(length: int, kept: int | None = None) -> Floats:
    """``log10 ‖∂L/∂h_{T-k}‖`` of a tanh RNN on adding, relative to lag 0; ``-inf`` if it is 0."""
    norm = adding_backward(adding_model("rnn", length), length, kept)
    profile = log10_rms(norm).flip(0)
    relative: Floats = (profile - profile[0]).numpy()
    return relative


# --- exploding: the cliff -----------------------------------------------------------------------


class Cliff(NamedTuple):
    """One unit before the wall in its error surface.

    Args:
        bias: ``b``.
        error: ``(s_T - 0.7)²`` at ``w = 5``.
        slope: ``∂error/∂b``.
        loss: By clip rule, the run's loss at every step.
        norm: The gradient's norm before clipping.
        length: How far the step went in the space of the weights.
    """

    bias: Floats
    error: Floats
    slope: Floats
    loss: dict[str, Floats]
    norm: dict[str, Floats]
    length: dict[str, Floats]


def cliff(runs: Path) -> Cliff:
    """What section "Exploding" shows."""
    bias = np.union1d(np.linspace(-3, -2.2, 2_001), np.linspace(-2.613, -2.612, 10_001))
    found = {
        run.config["clip"]["name"]: run
        for run in _runs(runs, "cliff", lambda c: c["clip"]["name"], ("none", "norm"))
    }
    metrics = {name: run.metrics for name, run in found.items()}
    rate = {name: run.config["optim"]["lr"] for name, run in found.items()}
    wall = surface(5.0, bias)
    return Cliff(
        bias,
        wall.error,
        wall.by_bias,
        {name: m["loss"] for name, m in metrics.items()},
        {name: m["grad_norm_pre"] for name, m in metrics.items()},
        {name: rate[name] * m["grad_norm_post"] for name, m in metrics.items()},
    )


# --- what clipping does not do ------------------------------------------------------------------


class Clipping(NamedTuple):
    """The adding problem, T = 100, with and without clipping.

    Args:
        before: ``log10`` of ``‖G_t‖``, what step ``t`` adds to ``∂L/∂W_hh``, of a tanh RNN's first
            batch ``[T]``.
        after: The same once the sum was clipped.
        norm: ``‖∂L/∂W_hh‖`` before clipping.
        coefficient: What clipping multiplied with.
        left_out: Relative change of ``∂L/∂W_hh`` if only so many last steps are gone back.
        profiles: By run, ``log10 ‖∂L/∂h_t‖`` relative to the last ``t``, at the last logged step.
        steps: By run, training steps of the evaluations.
        losses: Their losses.
        chance: What a predictor gets that has seen nothing.
        clipped: By run, the fraction of steps that were clipped.
        solved: By run, the step at which it had solved the task.
    """

    before: Floats
    after: Floats
    norm: float
    coefficient: float
    left_out: Floats
    profiles: dict[str, Floats]
    steps: dict[str, Floats]
    losses: dict[str, Floats]
    chance: float
    clipped: dict[str, float]
    solved: dict[str, int | None]


MAX_NORM = 0.1
"""So low that it clips most steps."""


def contributions(length: int = 100) -> tuple[Floats, Floats, float, float]:
    """``before``, ``after``, ``norm`` and ``coefficient`` of ``Clipping``."""
    model, task = adding_model("rnn", length), TASKS.default("adding", length=length)
    inputs, targets = task.batch(50, training_generator(0, 1))
    with record(model, weight=True) as tape:
        task.loss(model(inputs.double()).outputs, targets.double()).backward()
    steps = tape["rnn.l0"].weight_norm
    weight = model.get_parameter("rnn.weight_hh_l0").grad
    assert steps is not None and weight is not None
    norm = float(weight.norm())
    report = Clipper(CLIPS.default("norm", max_norm=MAX_NORM), model.named_parameters())()
    with np.errstate(divide="ignore"):  # h_0 is 0, and so is the first step's
        before = np.log10(steps.numpy())
    return before, before + math.log10(float(weight.norm()) / norm), norm, report.coef


def left_out(length: int = 100) -> Floats:
    """``‖g_K - g‖ / ‖g‖`` for ``K = 1 ... T``, ``g_K`` being ``∂L/∂W_hh`` from ``K`` steps back."""
    model = adding_model("rnn", length)
    weight = model.get_parameter("rnn.weight_hh_l0")
    grads = []
    for kept in range(1, length + 1):
        adding_backward(model, length, kept)
        assert weight.grad is not None
        grads.append(weight.grad.clone())
    return np.array([float((g - grads[-1]).norm() / grads[-1].norm()) for g in grads])


def run_name(config: Mapping[str, Any]) -> str:
    """A run of section "What clipping does not do", in words."""
    rule = config["clip"]
    clip = "no clipping" if rule["name"] == "none" else f"clipped at {rule['max_norm']:g}"
    return f"{'LSTM' if config['cell']['name'] == 'lstm' else 'tanh RNN'}, {clip}"


RUN_NAMES = tuple(
    f"{cell}, {clip}"
    for cell in ("tanh RNN", "LSTM")
    for clip in ("no clipping", f"clipped at {MAX_NORM:g}")
)


def clipping(runs: Path) -> Clipping:
    """What section "What clipping does not do" shows."""
    found = {run_name(r.config): r for r in _runs(runs, "clipping", run_name, RUN_NAMES)}
    last = {name: run.bptt["l0"].hidden[-1] for name, run in found.items()}
    metrics = {name: run.metrics for name, run in found.items()}
    there = {name: ~np.isnan(m["eval_loss"]) for name, m in metrics.items()}
    return Clipping(
        *contributions(),
        left_out(),
        {name: profile - profile[-1] for name, profile in last.items()},
        {name: m["step"][there[name]] for name, m in metrics.items()},
        {name: m["eval_loss"][there[name]] for name, m in metrics.items()},
        next(iter(found.values())).summary["chance_loss"],
        {name: run.summary["clip_fraction"] for name, run in found.items()},
        {name: run.summary["solved_at"] for name, run in found.items()},
    )


def _runs(
    folder: Path, figure: str, name: Callable[[Any], str], wanted: Sequence[str]
) -> list[Run]:
    """The runs of a figure in the order that it names them."""
    found = {name(run.config): run for run in map(Run, find_runs(folder / figure))}
    if missing := [each for each in wanted if each not in found]:
        _refuse(
            f"{folder / figure}: no run of {missing[0]!r}; the commands of docs/tutorial.md train "
            "it, and --runs names the folder"
        )
    return [found[each] for each in wanted]


# --- the command --------------------------------------------------------------------------------


def activation_lines() -> Iterator[str]:
    """Largest and smallest derivatives."""
    for name, (_, _, most, where) in ACTIVATIONS.items():
        yield f"{name:<12} largest slope {most:<5g} {where}"


def unit_lines(found: Unit) -> Iterator[str]:
    """Products over 10 and 20 steps, and the largest factors at rest."""
    for w, product in found.products.items():
        yield (
            f"w = {w:<7g} a step {product[1]:<5.3g} 10 steps {product[10]:<9.3g} "
            f"20 steps {product[20]:.3g}"
        )
    for name in ("tanh", "sigmoid"):
        most = int(found.factors[name].argmax())
        yield (
            f"{name:<7} without input, at rest: at most {found.factors[name][most]:.3f} a step, "
            f"at w = {found.weights[most]:.2f}"
        )


def layer_lines(found: Sequence[Layer]) -> Iterator[str]:
    """Means over seeds."""
    rows = {
        "spectral radius": [one.radius for one in found],
        "largest singular value": [one.largest for one in found],
        "decades a step": [slope(one.gradient) for one in found],
    }
    for name, values in rows.items():
        yield f"{name:<24} {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    yield f"{'log10(1/√3)':<24} {math.log10(expected_factor(1 / 3, 1)):.3f}"


def depth_lines(found: Depth) -> Iterator[str]:
    """After 100 layers or steps, and the corners of the field."""
    for name, rows in (("100 layers", found.stacks), ("100 steps", found.recurrences)):
        last = rows[:, -1]
        yield f"{name:<11} {last.mean():.1f} decades, from {last.min():.1f} to {last.max():.1f}"
    yield f"6 layers, 40 steps: first layer, last step {found.field[0, -1]:.1f}"
    yield f"                    last layer, first step {found.field[-1, 0]:.1f}"
    yield f"                    first layer, first step {found.field[0, 0]:.1f}"


def remedy_lines(found: Remedies) -> Iterator[str]:
    """What each leaves."""
    for rows in found.profiles.values():
        for command, profiles in rows.items():
            each = np.mean([slope(profile) for profile in profiles])
            yield f"{command:<35} {each:7.3f} decades a step: leaves {10**each:.3f} of it"
    for command, profile in found.shorter.items():
        if np.isfinite(profile[-1]):
            yield f"{command:<35} {profile[-1]:7.1f} decades to the first step"
        else:
            yield f"{command:<35} exactly 0 from lag {np.argmin(np.isfinite(profile))} on"
    for name, by_step in found.penalty.items():
        first, last = min(by_step), max(by_step)
        yield (
            f"{'regularizer=' + name:<35} {by_step[last][-1]:7.1f} decades to the first step at "
            f"training step {last} ({by_step[first][-1]:.1f} at {first}), "
            f"loss {found.penalty_loss[name]:.3f}"
        )


def cliff_lines(found: Cliff) -> Iterator[str]:
    """The steepest place, and where the runs ran into it."""
    steepest = int(np.abs(found.slope).argmax())
    yield f"steepest at b = {found.bias[steepest]:.4f}: gradient {abs(found.slope[steepest]):.0f}"
    for name, norm in found.norm.items():
        largest = int(norm.argmax())
        yield (
            f"clip={name}: at training step {largest + 1} a gradient of {norm[largest]:.0f}, and a "
            f"step {found.length[name][largest]:.3g} long; in the end error "
            f"{found.loss[name][-1]:.3g}, gradient {norm[-1]:.2g}"
        )


def clipping_lines(found: Clipping) -> Iterator[str]:
    """Shares of the time steps, and how the runs ended."""
    kept = int(np.argmax(found.left_out < VISIBLE)) + 1
    yield f"‖∂L/∂W_hh‖ is {found.norm:.3g}; clipping multiplies it by {found.coefficient:.3g}"
    yield f"the last {kept} of {len(found.left_out)} time steps give it to within 2^-24 of itself"
    for name, profile in found.profiles.items():
        solved = found.solved[name]
        yield (
            f"{name + ':':<25} {profile[0]:5.1f} decades to the first step, "
            f"{found.clipped[name]:4.0%} clipped, loss {found.losses[name][-1]:.4f}, "
            + ("not solved" if solved is None else f"solved at {solved}")
        )


def _activations(runs: Path) -> Made:
    return drawing.activations_figure(ACTIVATIONS), activation_lines()


def _unit(runs: Path) -> Made:
    found = unit()
    return drawing.unit_figure(found), unit_lines(found)


def _layer(runs: Path) -> Made:
    found = [layer(seed) for seed in SEEDS]
    return drawing.layer_figure(found[0]), layer_lines(found)


def _depth(runs: Path) -> Made:
    found = depth()
    return drawing.depth_figure(found), depth_lines(found)


def _remedies(runs: Path) -> Made:
    found = remedies(runs)
    return drawing.remedies_figure(found), remedy_lines(found)


def _cliff(runs: Path) -> Made:
    found = cliff(runs)
    return drawing.cliff_figure(found), cliff_lines(found)


def _clipping(runs: Path) -> Made:
    found = clipping(runs)
    return drawing.clipping_figure(found, VISIBLE), clipping_lines(found)


FIGURES: Mapping[str, Callable[[Path], Made]] = {
    "activations": _activations,
    "unit": _unit,
    "layer": _layer,
    "depth": _depth,
    "remedies": _remedies,
    "cliff": _cliff,
    "clipping": _clipping,
}
"""By name: what draws it and says its numbers, given the folder of the runs."""


def main() -> None:
    """Makes the figures of docs/tutorial.md and prints their numbers."""
    parser = argparse.ArgumentParser(prog="python -m rnngrad.tutorial", description=main.__doc__)
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)}; default: all"
    )
    parser.add_argument(
        "--runs", default="runs/tutorial", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--out", default="tutorial", metavar="DIR", help="default: %(default)s")
    arguments = parser.parse_args()
    for name in arguments.figures:
        if name not in FIGURES:
            _refuse(f"{name!r}: no such figure; there are {', '.join(FIGURES)}")
    out = Path(arguments.out)
    for name in arguments.figures or FIGURES:
        figure, lines = FIGURES[name](Path(arguments.runs))
        try:
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(out / f"{name}.png", dpi=110)
        except OSError as error:
            _refuse(f"--out={out}: cannot be written ({error.strerror})")
        print("\n".join([f"{out / name}.png", *(f"  {line}" for line in lines)]))


def _refuse(line: str) -> NoReturn:
    print(f"python -m rnngrad.tutorial: {line}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
