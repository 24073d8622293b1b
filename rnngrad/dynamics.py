"""A layer's linearised dynamics along a recorded trajectory: how fast an error decays going back.

The gradient that a run records at step ``t`` is a sum over all later steps' errors, of which the
last ones refresh it. What tells vanishing from exploding is one error going back alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rnngrad.bptt import Trajectory
from rnngrad.replay import Replay, State, replay

CHUNK = 64
"""Steps that an error goes back between two looks at its size."""

TRANSIENT = 10
"""Lags left out of a slope: there the error still turns towards the slowest direction."""


class LagCurves(NamedTuple):
    """How large one step's error still is, by the lag ``k`` that it has gone back.

    Args:
        hidden: ``log10 ‖δ_{τ-k}‖ / ‖δ_τ‖ [T, N]``, float64: one column an anchor ``τ`` and
            sequence, the sequences of the first anchor first. ``-inf`` where it is exactly 0, NaN
            beyond an anchor's reach and where the error itself is 0 or not finite.
        cell: The same of ``∂L/∂c``; ``None`` without cell state.
    """

    hidden: Tensor
    cell: Tensor | None


def lag_curves(
    trajectory: Trajectory, hidden_grad: Tensor, anchors: Sequence[int], sequences: int = 16
) -> LagCurves:
    """The error of single steps on its way back through one layer.

    At each anchor the recorded error is injected into ``h_τ`` alone, and goes back through this
    layer's recurrence alone, in the layer's own precision and without ``bptt_clip``. On the way it
    is scaled, by powers of two, so that it neither under- nor overflows: a curve goes as far down
    as it does.

    Args:
        trajectory: ``LayerRecord.trajectory``.
        hidden_grad: ``LayerRecord.hidden_grad [T, B, P]``, or any other error to inject.
        anchors: Time steps ``τ``. Of a layer that goes from the last step to the first, lag ``k``
            is at step ``τ + k``.
        sequences: How many at most, the first ones; of packed ones, those of full length.

    Raises:
        ValueError: No anchor, or one that is no time step; or the error's shape is not the
            trajectory's.
    """
    if not anchors:
        raise ValueError("anchors must be time steps, got none")
    columns: list[tuple[Tensor, ...]] = []
    with replay(trajectory, sequences) as again:
        steps, batch = trajectory.input.shape[:2]
        if hidden_grad.dim() != 3 or hidden_grad.shape[:2] != (steps, batch):
            shape = list(hidden_grad.shape)
            raise ValueError(f"hidden_grad must be [T, B, P] = [{steps}, {batch}, P], got {shape}")
        states = again.states(range(0, steps, CHUNK))
        for anchor in anchors:
            if not 0 <= anchor < steps:
                raise ValueError(f"anchors must be time steps 0 to {steps - 1}, got {anchor}")
            error = hidden_grad[anchor, again.rows.to(hidden_grad.device)]
            way = _WayBack(again, error)
            end = again.position(anchor) + 1
            for start in range((end - 1) // CHUNK * CHUNK, -1, -CHUNK):
                way.through(start, min(start + CHUNK, end), states[start])
            columns.append(way.curves(again.asked))
    hidden, *cell = (torch.cat(parts, 1) for parts in zip(*columns, strict=True))
    return LagCurves(hidden, cell[0] if cell else None)


class _WayBack:
    """One error of every sequence, going back and being scaled to keep within the range.

    Args:
        again: What it goes through.
        error: ``∂L/∂h [B, P]`` to begin with.
    """

    def __init__(self, again: Replay, error: Tensor) -> None:
        self._replay = again
        info = torch.finfo(error.dtype)
        self._least = info.tiny / info.eps  # above it, the digits of a norm are all there
        self._adjoint: State = (error,)
        self._exponent = torch.zeros(len(error), dtype=torch.float64)  # of what it was scaled by
        self._parts: list[tuple[Tensor, ...]] = []
        self._scale()
        self._exponent[self._exponent.isneginf()] = math.nan  # an error of 0 has no decay

    def through(self, start: int, stop: int, state: State) -> None:
        """Goes back from the state before position ``stop`` to ``state``, before ``start``."""
        back = self._replay.back(start, stop, state, self._adjoint)
        if stop - start > 1 and not self._in_range(back.hidden, back.cell, back.adjoint):
            middle = (start + stop) // 2
            self.through(middle, stop, self._replay.forward(start, middle, state))
            self.through(start, middle, state)
            return
        found = [back.hidden] if back.cell is None else [back.hidden, back.cell]
        log2 = [norm.log2() + self._exponent for norm in found]
        self._parts.append(tuple(part.flip(0) for part in log2))
        self._adjoint = back.adjoint
        self._scale()

    def curves(self, count: int) -> tuple[Tensor, ...]:
        """``log10`` of the first ``count`` sequences' norms by lag, relative to the first."""
        steps = len(self._replay.x)
        curves = []
        for parts in zip(*self._parts, strict=True):
            log2 = torch.cat(parts)[:, :count]
            curve = log2.new_full((steps, count), math.nan)
            curve[: len(log2)] = (log2 - log2[0]) * math.log10(2)
            curves.append(curve)
        return tuple(curves)

    def _in_range(self, hidden: Tensor, cell: Tensor | None, adjoint: State) -> bool:
        """Whether nothing that is not 0 by now has come near the limits of the numbers."""
        sizes = hidden if cell is None else torch.maximum(hidden, cell)
        if adjoint:
            sizes = torch.cat([sizes, self._largest(adjoint).double().cpu().unsqueeze(0)])
        if self._replay.couples_rows:
            sizes = sizes.amax(1, keepdim=True).expand_as(sizes)
        alive = sizes[:, self._exponent.isfinite()]
        return bool((alive.isfinite() & (alive >= self._least)).all())

    def _scale(self) -> None:
        """Brings each sequence's largest entry to between 1/2 and 1."""
        if not self._adjoint:
            return
        largest = self._largest(self._adjoint)
        usable = largest.isfinite() & (largest > 0)
        exponent = torch.where(usable, torch.frexp(largest).exponent, 0)
        half = exponent // 2  # in two steps: 2^-e of a subnormal number is beyond the range
        scaled = []
        for part in self._adjoint:
            part = part * torch.exp2(-half.to(part.dtype)).unsqueeze(-1)
            part = part * torch.exp2((half - exponent).to(part.dtype)).unsqueeze(-1)
            scaled.append(torch.where(usable.unsqueeze(-1), part, 0))
        self._adjoint = tuple(scaled)
        self._exponent += exponent.double().cpu()
        self._exponent[(largest == 0).cpu()] -= math.inf
        self._exponent[~largest.isfinite().cpu()] = math.nan

    def _largest(self, state: State) -> Tensor:
        """The largest magnitude of each sequence ``[B]``, NaN if one is NaN.

        Of sequences that are coupled, that of all: they can only be scaled as one.
        """
        largest = torch.cat(state, -1).abs().amax(-1)
        return largest.amax().expand_as(largest) if self._replay.couples_rows else largest


def lyapunov(trajectory: Trajectory, count: int, sequences: int = 4, every: int = 5) -> Tensor:
    """The leading Lyapunov exponents of the whole state, ``(h, c)``: how fast directions grow.

    Of the product of the Jacobians ``∂s_t/∂s_{t-1}`` between the first and the last state, taken in
    the order in which an error goes back: an orthonormal frame is pulled back by their transposes
    and made orthonormal again, and what that takes out is the growth. In float64, without
    ``bptt_clip``. The first tenth of the steps is left out, where the frame still turns towards the
    directions it is to measure.

    Args:
        trajectory: ``LayerRecord.trajectory``.
        count: How many exponents; NaN for those that the state is too small to have.
        sequences: To take the mean over; the first ones, of packed ones those of full length.
        every: Steps between two orthonormalisations at most; less where directions grow so
            differently that the slow ones would be lost.

    Returns:
        ``[count]`` in nats a step, the largest first, float64 on the CPU; ``-inf`` where a
        direction dies.

    Raises:
        ValueError: No exponent is asked for, or there are fewer than two steps.

    Reference:
        Benettin, Galgani, Giorgilli & Strelcyn, "Lyapunov characteristic exponents for smooth
        dynamical systems", Meccanica 1980; Engelken, Wolf & Abbott, "Lyapunov spectra of chaotic
        recurrent neural networks", Physical Review Research 2023.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    with replay(trajectory, sequences, dtype=torch.float64) as again:
        steps, size = len(again.x), again.size
        if steps < 2:
            raise ValueError("Lyapunov exponents take at least 2 time steps, got 1")
        kept = max(2, steps - -(-steps // 10))  # from here back everything counts
        ends = [*range(steps, kept, -every), *range(kept, 1, -every), 1]
        states = again.states(ends[1:])
        frame = _Frame(again, min(count, size), 1 if again.couples_rows else every)
        for start, stop in zip(ends[1:], ends, strict=False):
            if stop == kept:
                frame.growth.zero_()
            frame.through(start, stop, states[start])
    mean = frame.growth[: again.asked].mean(0) / (kept - 1)
    found = mean.new_full((count,), math.nan)
    found[: len(mean)] = mean.sort(descending=True).values
    return found.cpu()


class _Frame:
    """Orthonormal directions of every sequence's state, pulled back through time.

    Args:
        again: What they go through.
        count: How many.
        longest: Steps at most between two orthonormalisations.

    Attributes:
        growth: Sum of the logarithms of what they have grown by ``[B, count]``.
    """

    def __init__(self, again: Replay, count: int, longest: int) -> None:
        self._replay, self._longest = again, longest
        batch, device = again.x.shape[1], again.x.device
        generator = torch.Generator().manual_seed(0)  # no direction is special
        start = torch.randn(again.size, count, generator=generator, dtype=torch.float64)
        self._directions = torch.linalg.qr(start)[0].to(device).expand(batch, -1, -1)
        self.growth = torch.zeros(batch, count, dtype=torch.float64, device=device)

    def through(self, start: int, stop: int, state: State) -> None:
        """Back from the state before position ``stop`` to ``state``, the one before ``start``."""
        if stop - start <= self._longest:
            pulled = self._replay.pull(start, stop, state, self._directions.permute(2, 0, 1))
            directions, triangle = torch.linalg.qr(pulled.permute(1, 2, 0))
            grown = triangle.diagonal(dim1=1, dim2=2).abs()
            least, most = grown.amin(), grown.amax(1, keepdim=True)
            precise = bool((grown > 1e-6 * most).all() and 1e-200 < least and most.max() < 1e200)
            if precise or stop - start == 1:
                self._directions, self.growth = directions, self.growth + grown.log()
                return
        middle = (start + stop) // 2
        self.through(middle, stop, self._replay.forward(start, middle, state))
        self.through(start, middle, state)


def jacobian_norms(trajectory: Trajectory, steps: Sequence[int], sequences: int = 4) -> Tensor:
    """The largest singular value of one step's Jacobian ``∂s_t/∂s_{t-1}``, ``s = (h, c)``.

    The most that an error can grow in that step. In float64, without ``bptt_clip``.

    Args:
        trajectory: ``LayerRecord.trajectory``.
        steps: Time steps ``t``; of a layer that goes from the last step to the first, ``s_{t-1}``
            is the state after step ``t + 1``.
        sequences: To take the mean over; the first ones, of packed ones those of full length.

    Returns:
        One number a step ``[n]``, float64 on the CPU. NaN at the first step of a cell that has
        been given no state and does not begin with zeros.

    Raises:
        ValueError: One is no time step.
    """
    with replay(trajectory, sequences, dtype=torch.float64) as again:
        for t in steps:
            if not 0 <= t < len(again.x):
                raise ValueError(f"steps must be time steps 0 to {len(again.x) - 1}, got {t}")
        again.begin()
        positions = [again.position(t) for t in steps]
        states, size = again.states(positions), again.size
        rows = again.x.shape[1]
        unit = torch.eye(size, dtype=torch.float64, device=again.x.device)
        units = unit.unsqueeze(1).expand(-1, rows, -1)
        found = torch.full((len(positions),), math.nan, dtype=torch.float64)
        for n, position in enumerate(positions):
            if states[position]:
                rows_of_j = again.pull(position, position + 1, states[position], units)
                jacobians = rows_of_j[:, : again.asked].transpose(0, 1)
                found[n] = torch.linalg.matrix_norm(jacobians, 2).mean()
    return found


class Units(NamedTuple):
    """What a layer's units did along a trajectory.

    Args:
        hidden: ``h_t [T, B, P]``, as the layer computes it; NaN beyond a packed sequence's end.
        gates: Values ``[T, B, H]`` of the sigmoid gates, by name: ``i``, ``f``, ``o`` of an LSTM,
            ``r``, ``z`` of a GRU.
    """

    hidden: Tensor
    gates: dict[str, Tensor]


def units(trajectory: Trajectory) -> Units:
    """Hidden states and gates of all sequences, from one run forward without gradients.

    A cell shows its gates by handing their pre-activations to ``rnngrad.bptt_clip.preactivation``,
    in the order of the names in its attribute ``gates``.
    """
    with replay(trajectory, None) as again:
        hidden, found = again.gates(gate_names(trajectory.module))
    return Units(hidden, {name: a.sigmoid() for name, a in found.items() if name in _SIGMOID})


_SIGMOID = {"i", "f", "o", "r", "z"}


def gate_names(module: Any) -> tuple[str, ...]:
    """The blocks of rows of a layer's or cell's ``weight_hh``, in order; empty if not known.

    ``i``, ``f``, ``g``, ``o`` of an LSTM, ``r``, ``z``, ``n`` of a GRU, ``h`` of a vanilla RNN; of
    any other cell its attribute ``gates``.
    """
    for kinds, names in _GATES:
        if isinstance(module, kinds):
            return names
    return tuple(getattr(module, "gates", ()))


_GATES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ((nn.LSTM, nn.LSTMCell), ("i", "f", "g", "o")),
    ((nn.GRU, nn.GRUCell), ("r", "z", "n")),
    ((nn.RNN, nn.RNNCell), ("h",)),
)


class Decay(NamedTuple):
    """A straight line through a curve of ``log10`` values against the lag.

    Args:
        slope: In decades a step; under 0 the gradient vanishes.
        r2: Share of the variance that the line explains.
        half_life: Steps in which the line halves; infinite where it does not fall.
        points: Lags that the line goes through; under 2 the others are NaN.
        floor_reached: Whether the curve ends in an exact 0, before all lags were seen.
    """

    slope: float
    r2: float
    half_life: float
    points: int
    floor_reached: bool


def decay(curve: Any, first: int = TRANSIENT) -> Decay:
    """The line through a curve by least squares, up to the first value that is not finite.

    Args:
        curve: ``log10`` by lag ``[K]``, as an array or a tensor.
        first: Lags left out at the beginning.
    """
    values = np.asarray(curve, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(values))
    end = int(broken[0]) if len(broken) else len(values)
    floor = end < len(values) and bool(np.isneginf(values[end]))
    kept = values[first:end]
    if len(kept) < 2:
        return Decay(math.nan, math.nan, math.nan, len(kept), floor)
    lag = np.arange(len(kept)) - (len(kept) - 1) / 2
    level = kept - kept.mean()
    slope = float(lag @ level / (lag @ lag))
    left, whole = float(np.square(level - slope * lag).sum()), float(np.square(level).sum())
    half_life = math.log10(2) / -slope if slope < 0 else math.inf
    return Decay(slope, 1 - left / whole if whole else 1.0, half_life, len(kept), floor)


def step_factor(levels: Any) -> float:
    """What a step back leaves on average, ``(N_1 / N_T)^(1/(T-1))``.

    Args:
        levels: ``log10 N_t`` by time step ``[T]``, as an array or a tensor.
    """
    return float(10 ** ((levels[0] - levels[-1]) / (len(levels) - 1)))


def horizon(curve: Any, ratio: float = 1e-3) -> int:
    """The largest lag up to which a curve stays at or above ``log10(ratio)``; -1 if none does.

    Args:
        curve: ``log10`` by lag ``[K]``, as an array or a tensor; it ends where it is NaN.
        ratio: What is left of the error at the least.
    """
    values = np.asarray(curve, dtype=np.float64)
    under = np.flatnonzero(~(values >= math.log10(ratio)))
    return int(under[0]) - 1 if len(under) else len(values) - 1


class Spectrum(NamedTuple):
    """What a recurrent weight's eigenvalues ``λ`` and singular values say of it.

    Args:
        radius: ``max |λ|``: growth over many steps, if the activation is the identity.
        norm: The largest singular value: growth in one step at most.
        nonnormality: Henrici's ``√(‖W‖_F² - Σ|λ|²) / ‖W‖_F``: 0 for a normal matrix, up to 1. The
            larger, the more an error can grow at first though it decays in the end.
    """

    radius: float
    norm: float
    nonnormality: float


def spectrum(weight: Tensor) -> Spectrum:
    """Spectral radius, norm and departure from normality, in float64.

    Args:
        weight: ``W_hh [H, H]`` or one gate's block of it; ``[H]`` for a diagonal, as IndRNN's.

    Raises:
        ValueError: It is not square.

    Reference:
        Henrici, "Bounds for iterates, inverses, spectral variation and fields of values of
        non-normal matrices", Numerische Mathematik 1962.
    """
    w = weight.detach().cpu().double()
    if w.dim() == 1:
        w = w.diag()
    if w.dim() != 2 or w.shape[0] != w.shape[1]:
        raise ValueError(f"weight must be square [H, H], or a diagonal [H], got {list(w.shape)}")
    if not w.isfinite().all():
        return Spectrum(math.nan, math.nan, math.nan)
    size = float(torch.linalg.matrix_norm(w))
    if size == 0:
        return Spectrum(0.0, 0.0, 0.0)
    eigenvalues = torch.linalg.eigvals(w).abs()
    departure = 1 - float((eigenvalues / size).square().sum())
    return Spectrum(
        float(eigenvalues.max()),
        float(torch.linalg.matrix_norm(w, 2)),
        math.sqrt(max(0.0, departure)),
    )
