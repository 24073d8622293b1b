"""What is measured of a model's dynamics while it trains, beside the norms that are recorded.

Nothing that is measured changes the run: parameters, losses and random streams are bitwise those of
the run without it. The quantities' names, ``l0/lag`` or ``parameter/readout.bias/norm``, are those
of ``Run.measures``; docs/diagnosis.md says what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rnngrad.bptt import LayerRecord, Trajectory
from rnngrad.cells.base import Unrolled
from rnngrad.clipping import CLIPS, Clip, Gradient
from rnngrad.clipping.clipper import apply, checked
from rnngrad.clipping.norms import total_norm
from rnngrad.dynamics import (
    gate_names,
    jacobian_norms,
    lag_curves,
    lyapunov,
    spectrum,
    units,
)
from rnngrad.model import SequenceModel, layer_key
from rnngrad.norms import log10_rms, norms
from rnngrad.parts import InputError, Interval, Part, Registry
from rnngrad.replay import undisturbed
from rnngrad.runs import Floats

Quantities = dict[str, float | Floats]

_FEW = Interval(low=0, high=10**3)
SATURATED = 0.97
"""Beyond this a tanh's derivative is under .06."""


@dataclass(frozen=True)
class Measure(Part):
    """What is measured, and when."""


MEASURES: Registry[Measure] = Registry("measure", "rnngrad.measure")


@MEASURES.register("none")
@dataclass(frozen=True)
class NoMeasure(Measure):
    """Nothing beside the recorded norms."""


@MEASURES.register("standard")
@dataclass(frozen=True)
class Dynamics(Measure):
    """What the diagnosis and the report's figures need.

    With truncated back-propagation or ``trainer.recompute_segments``, both there to save memory,
    only ``spectrum`` and ``parameters`` are.

    Args:
        when: ``evaluated``: at the first step, the last, and wherever the run is evaluated;
            ``logged``: at every logged step.
        lag_anchors: Time steps at which an error is injected alone and followed back, evenly
            spaced over the last quarter of the sequence, the last step among them: its norm against
            the lag.
        contributions: What each time step adds to ``∂L/∂W_hh``: its norm, and its signed share.
        inputs: ``‖∂L/∂x_t‖``: which input mattered.
        units: Saturated and dead units, gates near 0 and 1.
        spectrum: Spectral radius, largest singular value and non-normality of ``W_hh``, gate by
            gate.
        parameters: Norm of each parameter, of its gradient and of its update.
        gates: What each time step adds to ``∂L/∂W_hh``, gate by gate; needs ``contributions``.
        lyapunov_exponents: How many leading ones.
        jacobians: Time steps, evenly spaced over the sequence, at which the one-step Jacobian's
            norm is taken.
        noise_scale: Gradient noise scale, from the batch and one of a quarter of its size.
        clip_effects: What each clip rule, with its defaults, would make of the share of each time
            step; rules that remember see the measured steps alone. Needs ``contributions``.
        smoothness: ``‖g(x') - g(x)‖ / ‖x' - x‖`` of the loss's gradient on this batch, before the
            update and after it.

    Reference:
        docs/diagnosis.md says what each is for. The noise scale is that of McCandlish et al.,
        arXiv:1812.06162, 2018; local smoothness that of Zhang, He, Sra & Jadbabaie,
        arXiv:1905.11881, 2020, between two iterates; Lyapunov exponents are measured as by Benettin
        et al., "Lyapunov characteristic exponents for smooth dynamical systems", Meccanica 1980.
    """

    when: Literal["evaluated", "logged"]
    lag_anchors: Annotated[int, _FEW]
    contributions: bool
    inputs: bool
    units: bool
    spectrum: bool
    parameters: bool
    gates: bool
    lyapunov_exponents: Annotated[int, _FEW]
    jacobians: Annotated[int, _FEW]
    noise_scale: bool
    clip_effects: bool
    smoothness: bool


@MEASURES.register("full")
@dataclass(frozen=True)
class Everything(Dynamics):
    """All there is: for a look into one run rather than for a sweep.

    Reference:
        As of ``measure=standard``.
    """


class Observer:
    """Measures one run.

    Args:
        chosen: What, and when.
        model: Is only looked at.
        time_steps: ``T`` of the longest sequence; what belongs to time steps is padded with NaN.
        whole: Whether the way back is whole, and kept in memory.
    """

    def __init__(
        self, chosen: Dynamics, model: SequenceModel, time_steps: int, *, whole: bool = True
    ) -> None:
        self.chosen, self.model, self.time_steps, self.whole = chosen, model, time_steps, whole
        weights = [weight for _, _, weight in _recurrent_weights(model)]
        self.contributes = (
            whole
            and chosen.contributions
            and all(isinstance(w, nn.Parameter) and w.requires_grad for w in weights)
        )
        self.rules: dict[str, tuple[Clip, dict[str, Any]]] = {}
        if self.contributes and chosen.clip_effects:
            self.rules = dict(_rules([name for name, _ in model.named_parameters()]))

    def due(self, step: int, *, logged: bool, evaluated: bool) -> bool:
        """Whether a step is measured."""
        return step == 1 or evaluated or (self.chosen.when == "logged" and logged)

    def state_dict(self) -> dict[str, Any]:
        """What the clip rules that are looked at remember, by name, as JSON has it."""
        return {name: checked(rule, state) for name, (rule, state) in self.rules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken.

        Raises:
            ValueError: It is the state of other rules.
        """
        if sorted(state) != sorted(self.rules):
            raise ValueError(f"measure: the saved state is of {sorted(state)}")
        for name, (rule, _) in self.rules.items():
            self.rules[name] = rule, checked(rule, state[name])

    @property
    def recording(self) -> dict[str, bool]:
        """What ``record`` is to keep of a measured step."""
        if not self.whole:
            return {}
        return {"full": True, "trajectory": True, "weight": self.contributes}

    @property
    def wants_inputs(self) -> bool:
        """Whether the input of a measured step is to require a gradient."""
        return self.whole and self.chosen.inputs


class Observation:
    """One step's measurements, at four moments, of which the first is after the loss's backward.

    Args:
        observer: Says what to measure.
        records: Of the step's backward.
        inputs: The batch ``[T, B, I]``, with its gradient.
        loss_of: Loss, with its graph, of a batch of the size given: of this very one if that is its
            size, otherwise of another, ``None`` if there is none.
    """

    def __init__(
        self,
        observer: Observer,
        records: Mapping[str, LayerRecord],
        inputs: Tensor,
        loss_of: Callable[[int], Tensor | None],
    ) -> None:
        self._observer, self._chosen = observer, observer.chosen
        self._quantities: Quantities = {}
        self._parameters = {
            name: p for name, p in observer.model.named_parameters() if p.requires_grad
        }
        self._before = [p.detach().clone() for p in self._parameters.values()]
        self._grads = self._of_loss = self._gradient()
        self._loss = partial(loss_of, inputs.shape[1])
        with undisturbed(observer.model):
            if self._chosen.spectrum:
                self._quantities |= _spectra(observer.model)
            if observer.whole:
                self._measure(records, inputs, loss_of)

    def whole(self) -> None:
        """To be called when the gradient is whole, with any penalty's, before clipping."""
        self._grads = self._gradient()

    def clipped(self) -> None:
        """To be called between clipping and the update."""
        self._quantities["clip/cosine"] = _cosine(self._grads, self._gradient())

    def updated(self) -> Quantities:
        """To be called after the update: everything that was measured."""
        if self._chosen.parameters:
            named = zip(self._parameters.items(), self._before, self._grads, strict=True)
            for (name, parameter), before, grad in named:
                moved = parameter.detach() - before
                for kind, values in (("norm", before), ("grad_norm", grad), ("update_norm", moved)):
                    self._quantities[f"parameter/{name}/{kind}"] = total_norm([values])
        if self._chosen.smoothness and self._observer.whole:
            with undisturbed(self._observer.model):
                self._quantities["smoothness"] = self._smoothness()
        return self._quantities

    def _gradient(self) -> list[Tensor]:
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in self._parameters.values()
        ]

    def _measure(
        self,
        records: Mapping[str, LayerRecord],
        inputs: Tensor,
        loss_of: Callable[[int], Tensor | None],
    ) -> None:
        if self._chosen.inputs:
            grad = torch.zeros_like(inputs) if inputs.grad is None else inputs.grad
            self._quantities["input_norm"] = self._padded(log10_rms(norms(grad)))
        for name, layer in records.items():
            self._measure_layer(layer_key(name), layer)
        if self._observer.rules:
            self._measure_rules(list(records.values())[-1])
        if self._chosen.noise_scale:
            self._measure_noise(inputs.shape[1], loss_of)

    def _measure_layer(self, key: str, layer: LayerRecord) -> None:
        into, chosen, trajectory = self._quantities, self._chosen, layer.trajectory
        assert trajectory is not None and layer.hidden_grad is not None
        if chosen.lag_anchors:
            for name, curve in lags(layer, chosen.lag_anchors).items():
                into[f"{key}/{name}"] = self._padded(curve)
        if layer.weight_norm is not None and layer.attribution is not None:
            into[f"{key}/weight_norm"] = self._padded(layer.weight_norm.log10())
            into[f"{key}/attribution"] = self._padded(layer.attribution)
        names = gate_names(trajectory.module)
        if chosen.gates and names and layer.contribution is not None:
            blocks = layer.contribution.norms(len(names)).log10()
            for gate, values in zip(names, blocks.unbind(1), strict=True):
                into[f"{key}/gate_norm/{gate}"] = self._padded(values)
        if chosen.units:
            into |= {f"{key}/{name}": part for name, part in at_their_ends(trajectory).items()}
        if chosen.lyapunov_exponents:
            into[f"{key}/lyapunov"] = np.full(chosen.lyapunov_exponents, math.nan)
            if len(trajectory.input) > 1:
                exponents = lyapunov(trajectory, chosen.lyapunov_exponents)
                into[f"{key}/lyapunov"] = exponents.numpy()
        if chosen.jacobians:
            steps = np.linspace(0, len(trajectory.input) - 1, chosen.jacobians).round().astype(int)
            into[f"{key}/jacobian_norm"] = jacobian_norms(trajectory, steps.tolist()).numpy()

    def _measure_rules(self, layer: LayerRecord) -> None:
        """What each rule makes of each time step's share in the last layer's ``∂L/∂W_hh``."""
        contribution, parameters = layer.contribution, [*self._parameters.values()]
        assert contribution is not None
        *_, (_, _, weight) = _recurrent_weights(self._observer.model)
        place = next(i for i, p in enumerate(parameters) if p is weight)
        square = total_norm([self._grads[place]]) ** 2
        for name, (rule, state) in self._observer.rules.items():
            grads = [grad.clone() for grad in self._grads]
            with torch.no_grad():
                apply(
                    rule, Gradient([*self._parameters], parameters, grads, total_norm(grads)), state
                )
            share = contribution.along(grads[place]) / (square or math.nan)
            self._quantities[f"clip_effect/{name}"] = self._padded(share)

    def _measure_noise(self, large: int, loss_of: Callable[[int], Tensor | None]) -> None:
        """``|G|²`` and ``S`` from two sizes of batch.

        Reference:
            McCandlish, Kaplan, Amodei & OpenAI Dota Team, "An empirical model of large-batch
            training", arXiv:1812.06162, 2018, appendix A.
        """
        small, signal, variance = large // 4, math.nan, math.nan
        loss = loss_of(small) if small >= 2 else None
        if loss is not None:
            parameters = [*self._parameters.values()]
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            in_small = total_norm([grad for grad in grads if grad is not None]) ** 2
            in_large = total_norm(self._grads) ** 2
            signal = (large * in_large - small * in_small) / (large - small)
            variance = (in_small - in_large) / (1 / small - 1 / large)
        self._quantities |= {"noise/signal": signal, "noise/variance": variance}

    def _smoothness(self) -> float:
        """``‖g(x') - g(x)‖ / ‖x' - x‖``; NaN if the update was none."""
        parameters, loss = [*self._parameters.values()], self._loss()
        assert loss is not None
        after = torch.autograd.grad(loss, parameters, materialize_grads=True)
        turned = [g.sub_(before) for g, before in zip(after, self._of_loss, strict=True)]
        moved = [p.detach() - before for p, before in zip(parameters, self._before, strict=True)]
        return total_norm(turned) / (total_norm(moved) or math.nan)

    def _padded(self, values: Tensor | Floats) -> Floats:
        row = np.asarray(values, dtype=np.float64)
        return np.pad(row, (0, self._observer.time_steps - len(row)), constant_values=np.nan)


def _recurrent_weights(model: SequenceModel) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """Of each layer its key in a run, its module, and its ``W_hh`` if it has one of that name."""
    if isinstance(model.rnn, Unrolled):
        for number, cell in enumerate(model.rnn.cells):
            yield f"l{number}", cell, getattr(cell, "weight_hh", None)
    else:
        for name, weight in model.rnn.named_parameters():
            if name.startswith("weight_hh_"):
                yield name.removeprefix("weight_hh_"), model.rnn, weight


def _spectra(model: SequenceModel) -> Quantities:
    found: Quantities = {}
    for key, layer, weight in _recurrent_weights(model):
        if weight is None:
            continue
        matrix = weight.detach()
        if matrix.dim() == 1:  # as IndRNN's
            matrix = matrix.diag()
        names = gate_names(layer)
        if not names or len(matrix) != len(names) * matrix.shape[1]:
            continue  # a cell that does not name its blocks; or projected ones, not square
        for gate, block in zip(names, matrix.chunk(len(names)), strict=True):
            end = f"/{gate}" if len(names) > 1 else ""
            measured = spectrum(block)
            found[f"{key}/spectral_radius{end}"] = measured.radius
            found[f"{key}/sigma_max{end}"] = measured.norm
            found[f"{key}/nonnormality{end}"] = measured.nonnormality
    return found


def lags(layer: LayerRecord, anchors: int) -> dict[str, Floats]:
    """Over sequences and ``anchors`` time steps, what is left of an error by lag ``[T]``.

    Args:
        layer: Recorded with ``full`` and ``trajectory``.
        anchors: How many time steps at most, of the last quarter.

    Returns:
        ``lag``, ``lag_p5`` and ``lag_p95``, and with a cell state ``lag_cell``.
    """
    assert layer.trajectory is not None and layer.hidden_grad is not None
    steps = _anchors(layer.hidden_grad, anchors, layer.trajectory.reverse)
    curves = lag_curves(layer.trajectory, layer.hidden_grad, steps)
    shares = {"lag": 0.5, "lag_p5": 0.05, "lag_p95": 0.95}
    found = {name: _quantile(curves.hidden, share) for name, share in shares.items()}
    if curves.cell is not None:
        found["lag_cell"] = _quantile(curves.cell, 0.5)
    return found


def at_their_ends(trajectory: Trajectory) -> dict[str, float]:
    """``saturated``, ``dead``, ``gate_low/<gate>`` and ``gate_high/<gate>`` of a layer."""
    values = units(trajectory)
    hidden, found = values.hidden, {"saturated": math.nan, "dead": math.nan}
    kind = getattr(trajectory.module, "nonlinearity", None)  # what has gates may be at 1 for good
    if kind == "tanh":
        found["saturated"] = (hidden.abs() > SATURATED).double().mean().item()
    elif kind == "sigmoid":
        far = (hidden > SATURATED) | (hidden < 1 - SATURATED)
        found["saturated"] = far.double().mean().item()
    elif kind == "relu":
        found["dead"] = (hidden <= 0).flatten(0, 1).all(0).double().mean().item()
    for gate, opened in values.gates.items():
        found[f"gate_low/{gate}"] = (opened < 0.1).double().mean().item()
        found[f"gate_high/{gate}"] = (opened > 0.9).double().mean().item()
    return found


def _rules(names: Sequence[str]) -> Iterator[tuple[str, tuple[Clip, dict[str, Any]]]]:
    """Every rule that suits these parameters, with its defaults and a memory."""
    for name in sorted(CLIPS.load()):
        try:
            rule = CLIPS.default(name)
            rule.check(names)
        except (FileNotFoundError, InputError):  # a plugin's yaml is not in the package
            continue
        yield name, (rule, rule.initial_state())


def _anchors(hidden_grad: Tensor, count: int, reverse: bool) -> list[int]:
    """``count`` time steps of the last quarter visited, each moved back to one with an error."""
    steps = len(hidden_grad)
    reached = (hidden_grad.flip(0) if reverse else hidden_grad).flatten(1).any(1)
    anchors = []
    for number in range(count):
        wanted = steps - 1 - number * (steps // 4) // count
        before = reached[: wanted + 1].nonzero()
        anchors.append(int(before[-1]) if len(before) else wanted)
    return [steps - 1 - anchor if reverse else anchor for anchor in sorted({*anchors})[::-1]]


def _quantile(curves: Tensor, share: float) -> Floats:
    """Over the last dimension, of what is not NaN; NaN where all is.

    A value that is there, the least that ``share`` of them do not exceed: between ``-inf`` and a
    number lies nothing.
    """
    ordered = np.sort(curves.numpy(), axis=-1)  # NaN last
    there = (~np.isnan(ordered)).sum(-1, keepdims=True)
    place = np.maximum(np.ceil(share * there).astype(int) - 1, 0)
    quantile: Floats = np.take_along_axis(ordered, place, -1)[..., 0]
    return quantile


def _cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Of two gradients as one vector each; NaN if one is 0."""
    lengths = total_norm(one), total_norm(other)
    if not all(0 < length < math.inf for length in lengths):
        return math.nan
    return math.fsum(
        torch.sum((a.double() / lengths[0]) * (b.double() / lengths[1])).item()
        for a, b in zip(one, other, strict=True)
    )
