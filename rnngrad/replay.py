"""A recorded call of one layer, gone over again: forward, and back from any step to any other.

``rnngrad.dynamics`` measures with it. Nothing is left behind: no gradient, no statistics, no
random number drawn, and no ``record`` block sees it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from rnngrad.bptt import Trajectory
from rnngrad.bptt_clip import RunClip
from rnngrad.cells import GRUCell, LSTMCell
from rnngrad.cells.batch_norm import BatchNormOverTime
from rnngrad.kernels import kernel_for
from rnngrad.kernels.interface import Incoming, Walk, Wanted, Weights
from rnngrad.nn import states_over_time
from rnngrad.norms import norms

State = tuple[Tensor, ...]
"""``(h,)`` or ``(h, c)``, ``[B, ·]``; empty before a cell that begins by itself."""


class Back(NamedTuple):
    """What went back through some steps.

    Args:
        hidden: ``‖∂L/∂h_t‖ [n, B]`` of those steps, float64 on the CPU.
        cell: ``‖∂L/∂c_t‖``, the path through ``h_t`` included; ``None`` without cell state.
        adjoint: What arrives at the state before the first of them, as a state.
    """

    hidden: Tensor
    cell: Tensor | None
    adjoint: State


class Replay(ABC):
    """A call of one layer and direction, in the order in which the layer visits the steps.

    Positions count visits: for a layer that goes from the last step to the first, position 0 is
    the last step.

    Args:
        x: What comes in, by position ``[T, B, I]``.
        initial: The state before position 0.
        reverse: Whether position 0 is the last step.
        rows: The numbers of the sequences gone over, ``[B]``.

    Attributes:
        asked: How many of them were asked for, the first ones.
    """

    couples_rows = False
    """Whether a sequence's states depend on the other sequences (batch normalisation)."""

    def __init__(self, x: Tensor, initial: State, reverse: bool, rows: Tensor) -> None:
        self.x, self.initial, self._reverse = x, initial, reverse
        self.rows, self.asked = rows, len(rows)

    def position(self, t: int) -> int:
        """The position of time step ``t``."""
        return len(self.x) - 1 - t if self._reverse else t

    @abstractmethod
    def forward(self, start: int, stop: int, state: State) -> State:
        """From the state before position ``start`` to the one before ``stop``."""

    @abstractmethod
    def back(self, start: int, stop: int, state: State, adjoint: State) -> Back:
        """From the state before ``stop`` back to the one before ``start``.

        Args:
            start: First position.
            stop: Position after the last.
            state: The one before ``start``.
            adjoint: What arrives at the state before ``stop``: at its ``h`` in total; at its ``c``
                what does not come through that ``h``, 0 if it is left out.
        """

    @abstractmethod
    def pull(self, start: int, stop: int, state: State, adjoints: Tensor) -> Tensor:
        """Several adjoints at once through the same steps, ``Jᵀ v``, of whole states ``(h, c)``.

        Where rows are coupled, ``J`` is of each sequence by itself, the others held; then the steps
        must be one.

        Args:
            start: First position.
            stop: Position after the last.
            state: The one before ``start``.
            adjoints: ``[k, B, n]``; ``h`` first, then ``c``.
        """

    @abstractmethod
    def gates(self, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Every ``h_t``, and what goes into each gate's sigmoid: ``[T, B, H]``, by time.

        The latter is empty if the cell does not show as many as there are names.
        """

    def begin(self) -> None:
        """Has a cell begin with zeros, if that is what it does by itself."""
        return

    @property
    def size(self) -> int:
        """``n``: numbers in a sequence's state."""
        return sum(part.shape[-1] for part in self.forward(0, 1, self.initial))

    def states(self, positions: Sequence[int]) -> dict[int, State]:
        """The states before some positions."""
        found, state, at = {}, self.initial, 0
        for position in sorted(set(positions)):
            state, at = self.forward(at, position, state), position
            found[position] = state
        return found


class KernelReplay(Replay):
    """Of a layer that has a kernel, which goes over it without autograd."""

    def __init__(
        self, trajectory: Trajectory, rows: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        layer: Any = trajectory.module
        dtype = dtype or trajectory.input.dtype
        self.weights = _weights(trajectory, dtype)
        x = trajectory.input[:, rows].to(dtype)
        self._beyond: Tensor | None = None
        self._times: Tensor | None = None
        if trajectory.lengths is not None:
            lengths = trajectory.lengths[rows].to(x.device)
            steps = torch.arange(len(x), device=x.device).unsqueeze(1)
            self._beyond = steps >= lengths
            self._times = (lengths - 1 - steps).clamp_min(0).unsqueeze(-1)
        super().__init__(
            self._reversed(x) if trajectory.reverse else x,
            tuple(part[rows].to(dtype) for part in trajectory.state),
            trajectory.reverse,
            rows,
        )
        self._kernel = kernel_for(layer.mode, self.x, projected=self.weights.hr is not None)

    def forward(self, start: int, stop: int, state: State) -> State:
        if start == stop:
            return state
        _, h, c, _ = self._forward(start, stop, state, keep=False)
        return (h,) if c is None else (h, c)

    def back(self, start: int, stop: int, state: State, adjoint: State) -> Back:
        saved = self._forward(start, stop, state, keep=True).saved
        back = self._kernel.backward(
            Walk(stop - start),
            self.x[start:stop],
            self.weights,
            saved,
            Incoming(None, None, None, *adjoint),
            _NORMS,
        )
        recording = back.recording
        assert recording is not None
        before = (back.h_0,) if back.c_0 is None else (back.h_0, back.c_0)
        return Back(recording.hidden_norm, recording.cell_norm, before)

    def pull(self, start: int, stop: int, state: State, adjoints: Tensor) -> Tensor:
        count = len(adjoints)
        x = self.x[start:stop].repeat(1, count, 1)
        h, *c = (part.repeat(count, 1) for part in state)
        walk, weights = Walk(stop - start), self.weights
        saved = self._kernel.forward(walk, x, h, c[0] if c else None, weights, keep=True).saved
        carried = adjoints.flatten(0, 1).split([part.shape[-1] for part in state], -1)
        arriving = Incoming(None, None, None, *carried)
        back = self._kernel.backward(walk, x, weights, saved, arriving, _NOTHING)
        parts = [back.h_0] if back.c_0 is None else [back.h_0, back.c_0]
        return torch.cat(parts, -1).view_as(adjoints)

    def gates(self, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self._forward(0, len(self.x), self.initial, keep=False).output
        w, before = self.weights, torch.cat([self.initial[0].unsqueeze(0), hidden[:-1]])
        a = linear(self.x, w.ih, w.b_ih) + linear(before, w.hh, w.b_hh)
        found = dict(zip(names, a.chunk(len(names), -1), strict=True))
        found.pop("n", None)  # of a GRU, whose reset gate comes in between
        return self._by_time(hidden), {name: self._by_time(part) for name, part in found.items()}

    def _by_time(self, values: Tensor) -> Tensor:
        values = self._reversed(values) if self._reverse else values
        if self._beyond is not None:
            values = values.masked_fill(self._beyond.unsqueeze(-1), math.nan)
        return values

    def _reversed(self, values: Tensor) -> Tensor:
        """Each sequence from its own end."""
        if self._times is None:
            return values.flip(0)
        return values.take_along_dim(self._times, 0)

    def _forward(self, start: int, stop: int, state: State, *, keep: bool) -> Any:
        h, c = state if len(state) == 2 else (state[0], None)
        x = self.x[start:stop]
        return self._kernel.forward(Walk(stop - start), x, h, c, self.weights, keep)


_NOTHING = Wanted(x=False, ih=False, hh=False, hr=False, norms=False, full=False, weight=False)
_NORMS = _NOTHING._replace(norms=True)


def _weights(trajectory: Trajectory, dtype: torch.dtype) -> Weights:
    weights: list[Any] = []
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
        weight = getattr(trajectory.module, f"{name}_{trajectory.suffix}", None)
        weights.append(None if weight is None else weight.detach().to(dtype))
    return Weights(*weights)


class CellReplay(Replay):
    """Of a cell that ``unroll`` ran, through autograd; it must be a function of its arguments."""

    def __init__(
        self, trajectory: Trajectory, rows: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        self._cell = trajectory.module
        if dtype is not None:
            self._cell = copy.deepcopy(trajectory.module).to(dtype)
        self._start = trajectory.start
        self.couples_rows = any(_takes_batch_statistics(m) for m in self._cell.modules())
        asked = len(rows)
        if self.couples_rows:  # they all take part
            others = torch.ones(trajectory.input.shape[1], dtype=torch.bool)
            others[rows] = False
            rows = torch.cat([rows, others.nonzero().flatten()])
        x = trajectory.input[:, rows]
        state = tuple(part[rows].to(dtype) for part in trajectory.state)
        super().__init__(x.to(dtype) if x.is_floating_point() else x, state, False, rows)
        self.asked = asked

    def forward(self, start: int, stop: int, state: State) -> State:
        return self._run(self.x[start:stop], start, state)[-1] if stop > start else state

    def back(self, start: int, stop: int, state: State, adjoint: State) -> Back:
        with torch.enable_grad():
            before = tuple(part.detach().requires_grad_() for part in state)
            x = self.x[start:stop]
            if x.is_floating_point():  # a first state may be a function of the input alone
                x = x.clone().requires_grad_()
            states = self._run(x, start, before)
            by_kind = list(zip(*states, strict=True))  # every h_t, and every c_t
            wanted = [part for parts in by_kind for part in parts] + list(before)
            grads = _gradients(states[-1], wanted, adjoint)
        hidden, *cell = (
            norms(torch.stack(grads[n * len(states) : (n + 1) * len(states)]))
            for n in range(len(by_kind))
        )
        return Back(hidden, cell[0] if cell else None, tuple(grads[len(wanted) - len(before) :]))

    def pull(self, start: int, stop: int, state: State, adjoints: Tensor) -> Tensor:
        with torch.enable_grad():
            before = tuple(part.detach().requires_grad_() for part in state)
            after = self._run(self.x[start:stop], start, before)[-1]
            widths = [part.shape[-1] for part in after]
            pulled = torch.zeros_like(adjoints)
            # one sequence at a time where the gradient of one goes through the others too
            alone = [[b] for b in range(self.asked)] if self.couples_rows else [slice(None)]
            for adjoint, out in zip(adjoints, pulled, strict=True):
                for rows in alone:
                    only = torch.zeros_like(adjoint)
                    only[rows] = adjoint[rows]
                    grads = _gradients(after, before, only.split(widths, -1), retain=True)
                    out[rows] = torch.cat(grads, -1)[rows]
        return pulled

    def begin(self) -> None:
        if not self.initial:
            first = self.forward(0, 1, ())
            zeros = tuple(map(torch.zeros_like, first))
            if all(map(torch.equal, first, self.forward(0, 1, zeros))):
                self.initial = zeros

    def gates(self, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        seen = _Preactivations(len(self.x))
        cell, given = _as_equation(self._cell), _given(self.initial)
        states = states_over_time(cell, self.x, given, self._start, clip=seen)
        hidden = torch.stack([h for h, *_ in states])
        steps = [torch.cat(parts, -1) for parts in seen.found if parts]
        if len(steps) < len(hidden) or steps[0].shape[-1] != len(names) * hidden.shape[-1]:
            return hidden, {}
        return hidden, dict(zip(names, torch.stack(steps).chunk(len(names), -1), strict=True))

    def _run(self, x: Tensor, start: int, state: State) -> list[State]:
        return states_over_time(self._cell, x, _given(state), self._start + start)


def _given(state: State) -> Any:
    """A state as a cell is given it."""
    return state if len(state) == 2 else state[0] if state else None


class _Preactivations(RunClip):
    """Keeps what a cell shows of its pre-activations, and clips nothing."""

    def __init__(self, steps: int) -> None:
        self.found: list[list[Tensor]] = [[] for _ in range(steps)]

    def enter(self, step: int, state: Any) -> Any:
        self._step = step
        return state

    def leave(self, state: Any) -> None:
        return

    def preactivation(self, a: Tensor, gates: int) -> Tensor:
        self.found[self._step].append(a)
        return a

    def close(self, cell: Any) -> None:
        return


def _as_equation(cell: Any) -> Any:
    """A gated cell of torch.nn's as ours, which shows its pre-activations, with its weights."""
    ways: tuple[tuple[Any, Any], ...] = ((nn.LSTMCell, LSTMCell), (nn.GRUCell, GRUCell))
    for torchs, ours in ways:
        if type(cell).forward is torchs.forward:
            equation = ours.__new__(ours)
            equation.__dict__ = cell.__dict__
            return equation
    return cell


def _gradients(
    outputs: State, wanted: Sequence[Tensor], adjoint: Sequence[Tensor], *, retain: bool = False
) -> list[Tensor]:
    """``∂ Σ ⟨adjoint, outputs⟩ / ∂`` each of what is wanted; NaN where autograd does not see it."""
    found = [torch.full_like(tensor, 0 if tensor.requires_grad else math.nan) for tensor in wanted]
    ways = [(o, a) for o, a in zip(outputs, adjoint, strict=False) if o.requires_grad]
    reached = [n for n, tensor in enumerate(wanted) if tensor.requires_grad]
    if ways and reached:
        ends, arriving = zip(*ways, strict=True)
        leaves = [wanted[n] for n in reached]
        grads = torch.autograd.grad(ends, leaves, arriving, retain_graph=retain, allow_unused=True)
        for n, grad in zip(reached, grads, strict=True):
            if grad is not None:
                found[n] = grad
    return found


def _takes_batch_statistics(module: nn.Module) -> bool:
    if isinstance(module, BatchNormOverTime):
        return module.training
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


@contextmanager
def replay(
    trajectory: Trajectory, sequences: int | None, *, dtype: torch.dtype | None = None
) -> Iterator[Replay]:
    """The call, of the first sequences; of packed ones, of those that go on to the end.

    Args:
        trajectory: Of the call.
        sequences: How many at most; ``None`` for all, those that end before included.
        dtype: To compute in, with a copy of the layer; by default as the layer does.

    Raises:
        ValueError: No trajectory, or less than one sequence.
        RuntimeError: The input has been changed in place since.
    """
    if not isinstance(trajectory, Trajectory):
        raise ValueError(
            "trajectory must be that of a LayerRecord; record with record(model, trajectory=True), "
            f"got {trajectory!r}"
        )
    if sequences is not None and sequences < 1:
        raise ValueError(f"sequences must be at least 1, got {sequences}")
    if trajectory.input._version > trajectory.version:
        raise RuntimeError(
            "the layer's input has been changed in place since the call was recorded"
        )
    steps, batch = trajectory.input.shape[:2]
    whole = torch.arange(batch)
    if trajectory.lengths is not None and sequences is not None:
        whole = whole[trajectory.lengths == steps]
    kind = KernelReplay if isinstance(trajectory.module, nn.RNNBase) else CellReplay
    module, device = trajectory.module, trajectory.input.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), statistics_kept(module), torch.no_grad():
        with parametrize.cached():  # a parametrised weight is computed once, not at every step
            yield kind(trajectory, whole[:sequences], dtype)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Has the module write its statistics elsewhere: a graph may still need its own as they are."""
    originals = [(part, dict(part._buffers)) for part in module.modules()]
    extra = extra_states(module)
    try:
        for part, buffers in originals:
            for name, buffer in buffers.items():
                part._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for part, buffers in originals:
            part._buffers.update(buffers)
        for part, kept in extra:
            part.set_extra_state(kept)


def extra_states(module: nn.Module) -> list[tuple[nn.Module, Any]]:
    """What submodules keep beside parameters and buffers, copied: for ``set_extra_state``."""
    return [
        (part, copy.deepcopy(part.get_extra_state()))
        for part in module.modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    ]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Statistics, as batch norm's, and random streams are afterwards as they were."""
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), statistics_kept(model):
        yield
