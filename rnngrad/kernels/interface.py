"""What every way of running the recurrence takes and gives.

Shapes: ``T`` time steps, ``B`` batch, ``I`` input, ``H`` hidden size, ``P`` width of ``h`` (``H``,
or ``proj_size``), ``g`` gates (1 RNN, 3 GRU, 4 LSTM). A kernel may also take ``R`` runs of equal
shape at once: every tensor then has a leading axis ``R``, weights included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rnngrad.contribution import Contribution
from rnngrad.kernels.rowclip import RowClip


@dataclass(frozen=True)
class Walk:
    """The order in which a direction visits the time steps, and which rows take part in each.

    Args:
        steps: ``T``.
        lengths: Length of each sequence ``[B]``, longest first, on the CPU; ``None`` if all are
            ``T``.
        reverse: From the last step to the first.
    """

    steps: int
    lengths: Tensor | None = None
    reverse: bool = False

    def rows(self, buffer: Tensor) -> list[Tensor]:
        """``buffer [T, B, ·]`` as one view per step, active rows only, in visiting order."""
        views = list(buffer.unbind(0))
        if self.lengths is not None:
            views = [view[:n] for view, n in zip(views, self._active(), strict=True)]
        return views[::-1] if self.reverse else views

    def every(self, state: Tensor) -> list[Tensor]:
        """``state [B, ·]``, one for all steps, as its active rows at each, in visiting order."""
        if self.lengths is None:
            return [state] * self.steps
        views = [state[:n] for n in self._active()]
        return views[::-1] if self.reverse else views

    def before(self, states: Tensor) -> Tensor:
        """Predecessors ``[T, B, ·]`` of the steps, in a buffer of ``T + 1`` states."""
        return states[1:] if self.reverse else states[:-1]

    def after(self, states: Tensor) -> Tensor:
        """The steps' own states ``[T, B, ·]``, in a buffer of ``T + 1`` states."""
        return states[:-1] if self.reverse else states[1:]

    def states(self, initial: Tensor) -> Tensor:
        """A buffer of ``T + 1`` states that holds ``initial [B, ·]`` before each first step."""
        shape = (self.steps + 1, *initial.shape)
        states = initial.new_empty(shape) if self.lengths is None else initial.new_zeros(shape)
        states[self._index(first=True)] = initial
        return states

    def last(self, states: Tensor) -> Tensor:
        """The state ``[B, ·]`` after each sequence's last visited step."""
        return states[self._index(first=False)].clone()

    def add_at_last(self, buffer: Tensor, state: Tensor) -> Tensor:
        """``buffer [T, B, ·]`` plus ``state [B, ·]`` at each sequence's last visited step."""
        if self.reverse or self.lengths is None:
            index: _Index = 0 if self.reverse else self.steps - 1
        else:
            index = (self.lengths - 1, torch.arange(len(self.lengths)))
        buffer = buffer.clone()
        buffer[index] += state
        return buffer

    def clear(self, *buffers: Tensor) -> None:
        """Zeroes, in place, what lies beyond the sequences' ends."""
        if self.lengths is not None:
            for buffer in buffers:
                buffer.masked_fill_(self.beyond().unsqueeze(-1).to(buffer.device), 0)

    def clear_first(self, buffer: Tensor | None) -> None:
        """Zeroes, in place, each sequence's first visited step of ``buffer [..., T, B]``."""
        if buffer is None:
            return
        if not self.reverse:
            buffer[..., 0, :] = 0
        elif self.lengths is None:
            buffer[..., -1, :] = 0
        else:
            buffer[..., self.lengths - 1, torch.arange(len(self.lengths))] = 0

    def beyond(self) -> Tensor:
        """Mask ``[T, B]``: true where a sequence has already ended."""
        assert self.lengths is not None
        return torch.arange(self.steps).unsqueeze(1) >= self.lengths

    def parts(self, count: int) -> list[Part]:
        """The walk as at most ``count`` successive ones, in visiting order."""
        length = -(-self.steps // count)
        parts = [
            Part(self, start, min(self.steps, start + length))
            for start in range(0, self.steps, length)
        ]
        return parts[::-1] if self.reverse else parts

    def _active(self) -> list[int]:
        return (~self.beyond()).sum(1).tolist()

    def _index(self, first: bool) -> _Index:
        """Where a buffer of ``T + 1`` states holds the initial or the last state of each row."""
        if first != self.reverse:
            return 0
        if self.lengths is None:
            return self.steps
        return (self.lengths, torch.arange(len(self.lengths)))


@dataclass(frozen=True)
class Part:
    """The steps from ``start`` to before ``stop`` of a walk."""

    whole: Walk
    start: int
    stop: int

    @property
    def walk(self) -> Walk:
        """The part as a walk of its own; sequences may have no step in it."""
        steps, lengths = self.stop - self.start, self.whole.lengths
        if lengths is not None:
            lengths = (lengths - self.start).clamp(0, steps)
        return Walk(steps, lengths, self.whole.reverse)

    def of(self, buffer: Tensor) -> Tensor:
        """The part's steps of ``buffer [..., T, B, ·]``."""
        return buffer.narrow(-3, self.start, self.stop - self.start)

    def ending(self, state: Tensor | None) -> Tensor | None:
        """``state [..., B, ·]`` of the sequences whose last visited step is here, else 0."""
        whole = self.whole
        if state is None or whole.reverse or whole.lengths is None:
            here = self.start == 0 if whole.reverse else self.stop == whole.steps
            return state if here else None
        ends = (whole.lengths > self.start) & (whole.lengths <= self.stop)
        return torch.where(ends.unsqueeze(-1).to(state.device), state, 0)


_Index = int | tuple[Tensor, Tensor]


class Weights(NamedTuple):
    """``ih [gH, I]``, ``hh [gH, P]``, ``b_ih [gH]``, ``b_hh [gH]`` and ``hr [P, H]``."""

    ih: Tensor
    hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    hr: Tensor | None


class Passed(NamedTuple):
    """What went forward through time.

    Args:
        output: ``h [T, B, P]``, nobody else's: the caller may change it in place.
        h_n: The last ``h [B, P]``.
        c_n: The last ``c [B, H]``, or ``None``.
        saved: What the kernel's way back needs.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor | None
    saved: tuple[Tensor, ...]


class Incoming(NamedTuple):
    """What comes back into the recurrence; ``None`` is 0.

    Args:
        output: ``∂L/∂output [T, B, P]``.
        h_n: ``∂L/∂h_n [B, P]``; with ``output`` the direct part of ``∂L/∂h_t``.
        c_n: ``∂L/∂c_n [B, H]``.
        carried_h: ``[B, P]``: what later steps, run as another part of the sequence, send back.
        carried_c: ``[B, H]``, likewise.
    """

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    carried_h: Tensor | None = None
    carried_c: Tensor | None = None


class Wanted(NamedTuple):
    """What is to be computed on the way back beside ``∂L/∂h_0`` and ``∂L/∂c_0``.

    Args:
        x: ``∂L/∂x``.
        ih: Gradients of ``W_ih`` and the biases.
        hh: That of ``W_hh``.
        hr: That of ``W_hr``.
        norms: Norms of ``∂L/∂h_t``, ``∂L/∂c_t`` and the direct part.
        full: The gradients themselves.
        weight: Each step's contribution to ``∂L/∂W_hh``, as ``Recording.contribution``.
    """

    x: bool
    ih: bool
    hh: bool
    hr: bool
    norms: bool
    full: bool
    weight: bool


class Recording(NamedTuple):
    """What is recorded of a way back, by time step; see ``rnngrad.bptt.LayerRecord``.

    A kernel gives the contributions alone: what they say takes the whole sequence.
    """

    hidden_norm: Tensor
    direct_norm: Tensor
    cell_norm: Tensor | None
    hidden_grad: Tensor | None
    cell_grad: Tensor | None
    clipped: Tensor | None = None
    contribution: Contribution | None = None
    weight_norm: Tensor | None = None
    attribution: Tensor | None = None


class Gradients(NamedTuple):
    """What came back, ``None`` where it was not wanted."""

    x: Tensor | None
    h_0: Tensor
    c_0: Tensor | None
    ih: Tensor | None
    hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    hr: Tensor | None
    recording: Recording | None


class Kernel(Protocol):
    """One layer and direction over time, there and back.

    Attributes:
        takes_runs: Whether several runs may come at once, on a leading axis.
    """

    takes_runs: bool

    def forward(
        self, walk: Walk, x: Tensor, h_0: Tensor, c_0: Tensor | None, w: Weights, keep: bool
    ) -> Passed:
        """From ``x [T, B, I]`` and the initial states; ``keep`` says whether to save."""

    def backward(
        self,
        walk: Walk,
        x: Tensor,
        w: Weights,
        saved: tuple[Tensor, ...],
        incoming: Incoming,
        wanted: Wanted,
        clip: RowClip | None = None,
    ) -> Gradients:
        """With what ``forward`` saved; rows are clipped as they arise if there is a ``clip``."""
