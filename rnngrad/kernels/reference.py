"""One layer and direction over time in plain torch operations, forward and backward.

Legend: ``T`` time steps, ``B`` batch, ``H`` hidden size, ``P`` width of ``h`` (``H``, or
``proj_size``), ``g`` gates (1 RNN, 3 GRU, 4 LSTM). ``α`` is ``∂L/∂(pre-activation)``, ``δ`` is
``∂L/∂h_t`` in total, ``e`` the part of ``δ`` that arrives from outside the recurrence.

States are kept in one buffer of ``T + 1`` rows, so that "all states" and "all predecessors" are
two views of it and no weight gradient needs a copy. Back through time the recurrence is linear in
``δ``: everything that does not depend on ``δ`` is computed for all steps at once, and the loop is
left with one small product and a few element-wise operations.

Equations: torch.nn's documentation of RNN, LSTM and GRU (Elman 1990; Hochreiter & Schmidhuber 1997
with the forget gate of Gers 2000; Cho 2014 with the reset gate after the product).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


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

    def beyond(self) -> Tensor:
        """Mask ``[T, B]``: true where a sequence has already ended."""
        assert self.lengths is not None
        return torch.arange(self.steps).unsqueeze(1) >= self.lengths

    def _active(self) -> list[int]:
        return (~self.beyond()).sum(1).tolist()

    def _index(self, first: bool) -> _Index:
        """Where a buffer of ``T + 1`` states holds the initial or the last state of each row."""
        if first != self.reverse:
            return 0
        if self.lengths is None:
            return self.steps
        return (self.lengths, torch.arange(len(self.lengths)))


_Index = int | tuple[Tensor, Tensor]


class Weights(NamedTuple):
    """What the recurrence multiplies with: ``hh [gH, P]``, ``b_hh [gH]`` and ``hr [P, H]``."""

    hh: Tensor
    b_hh: Tensor | None
    hr: Tensor | None


class Saved(NamedTuple):
    """What the way back needs of the way there.

    Args:
        gates: The activated gates ``[T, B, gH]``, in the buffer of the pre-activations.
        hs: ``h`` in a buffer of ``T + 1`` states ``[T + 1, B, P]``.
        cs: ``c`` likewise, or ``None``.
        extra: What else a kernel needs, or ``None``.
    """

    gates: Tensor
    hs: Tensor
    cs: Tensor | None
    extra: Tensor | None = None


class Gradients(NamedTuple):
    """What went back through time.

    Args:
        input: ``∂L/∂`` of what the input contributes to the pre-activations ``[T, B, gH]``.
        recurrent: ``α [T, B, gH]``: ``∂L/∂`` of what ``h_{t-1}`` contributes to them.
        hidden: ``δ [T, B, P]``.
        cell: ``∂L/∂c_t [T, B, H]``, the path through ``h_t`` included, or ``None``.
        h_0: ``∂L/∂h_0 [B, P]``.
        c_0: ``∂L/∂c_0 [B, H]``, or ``None``.
    """

    input: Tensor
    recurrent: Tensor
    hidden: Tensor
    cell: Tensor | None
    h_0: Tensor
    c_0: Tensor | None


class Kernel(Protocol):
    """The recurrence of one kind of cell."""

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> Saved:
        """Fills the buffers of states, from ``gates``: what the input contributes, bias included.

        ``gates`` is overwritten.
        """

    def backward(
        self, walk: Walk, w: Weights, saved: Saved, direct: Tensor, grad_c_n: Tensor | None
    ) -> Gradients:
        """Takes ``e [T, B, P]`` and ``∂L/∂c_n [B, H]`` back through time."""


class RNNKernel:
    """``h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`` with ``φ`` tanh or relu."""

    def __init__(self, nonlinearity: str) -> None:
        self.relu = nonlinearity == "relu"

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> Saved:
        if w.b_hh is not None:
            gates += w.b_hh
        w_hh = w.hh.t()
        steps = zip(
            walk.rows(gates), walk.rows(walk.before(hs)), walk.rows(walk.after(hs)), strict=True
        )
        for a, h_prev, h in steps:
            torch.addmm(a, h_prev, w_hh, out=h)
            h.relu_() if self.relu else h.tanh_()
        return Saved(gates, hs, cs)

    def backward(
        self, walk: Walk, w: Weights, saved: Saved, direct: Tensor, grad_c_n: Tensor | None
    ) -> Gradients:
        gates, hs, *_ = saved
        h = walk.after(hs)
        # relu has no factor: 0 · inf would be NaN where torch's gradient is 0
        factor = h <= 0 if self.relu else 1 - h * h
        alpha, delta = torch.zeros_like(gates), torch.zeros_like(h)
        carry, zero = torch.zeros_like(hs[0]), h.new_zeros(())
        steps = zip(*map(walk.rows, (direct, factor, delta, alpha)), walk.every(carry), strict=True)
        for e, f, d, a, r in reversed(list(steps)):
            torch.add(e, r, out=d)
            if self.relu:
                torch.where(f, zero, d, out=a)
            else:
                torch.mul(d, f, out=a)
            torch.mm(a, w.hh, out=r)
        return Gradients(alpha, alpha, delta, None, carry, None)


class LSTMKernel:
    """The LSTM with forget gate, gates in torch's order ``i, f, g, o``, and ``proj_size``."""

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> Saved:
        assert cs is not None
        if w.b_hh is not None:
            gates += w.b_hh
        w_hh = w.hh.t()
        i, f, g, o = gates.chunk(4, -1)
        sigmoids = gates[..., : 2 * i.shape[-1]]
        steps = zip(
            *map(walk.rows, (gates, sigmoids, i, f, g, o)),
            *map(walk.rows, (walk.before(hs), walk.before(cs), walk.after(hs), walk.after(cs))),
            strict=True,
        )
        for a, if_t, i_t, f_t, g_t, o_t, h_prev, c_prev, h, c in steps:
            a.addmm_(h_prev, w_hh)
            if_t.sigmoid_()
            g_t.tanh_()
            o_t.sigmoid_()
            torch.mul(f_t, c_prev, out=c)
            c.addcmul_(i_t, g_t)
            if w.hr is None:
                torch.mul(o_t, c.tanh(), out=h)
            else:
                torch.mm(o_t * c.tanh(), w.hr.t(), out=h)
        return Saved(gates, hs, cs)

    def backward(
        self, walk: Walk, w: Weights, saved: Saved, direct: Tensor, grad_c_n: Tensor | None
    ) -> Gradients:
        gates, hs, cs, _ = saved
        assert cs is not None
        i, f, g, o = gates.chunk(4, -1)
        tanh_c = walk.after(cs).tanh()
        # α is first the factors that δ and ∂L/∂c_t are multiplied with, then the products
        alpha = torch.cat(
            [
                g * i * (1 - i),
                walk.before(cs) * f * (1 - f),
                i * (1 - g * g),
                tanh_c * o * (1 - o),
            ],
            -1,
        )
        through_tanh = o * (1 - tanh_c * tanh_c)
        alpha_ifg = alpha.unflatten(-1, (4, -1))[..., :3, :]
        alpha_o = alpha.unflatten(-1, (4, -1))[..., 3, :]
        delta, cell = torch.zeros_like(walk.after(hs)), torch.zeros_like(tanh_c)
        carry_h = torch.zeros_like(hs[0])
        carry_c = torch.zeros_like(cs[0]) if grad_c_n is None else grad_c_n.clone()
        steps = zip(
            *map(walk.rows, (direct, delta, cell, alpha, alpha_ifg, alpha_o, through_tanh, f)),
            walk.every(carry_h),
            walk.every(carry_c),
            strict=True,
        )
        for e, d, dc, a, a_ifg, a_o, tt, f_t, rh, rc in reversed(list(steps)):
            torch.add(e, rh, out=d)
            dm = d if w.hr is None else d @ w.hr
            torch.addcmul(rc, dm, tt, out=dc)
            a_ifg.mul_(dc.unsqueeze(-2))
            a_o.mul_(dm)
            torch.mul(dc, f_t, out=rc)
            torch.mm(a, w.hh, out=rh)
        walk.clear(alpha)
        return Gradients(alpha, alpha, delta, cell, carry_h, carry_c)


class GRUKernel:
    """The GRU with torch's order ``r, z, n`` and the reset gate after the product with ``W_hn``."""

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> Saved:
        size = hs.shape[-1]
        w_hh = w.hh.t()
        bias = w.hh.new_zeros(3 * size) if w.b_hh is None else w.b_hh
        before_reset = torch.zeros_like(hs[:-1])  # W_hn h_{t-1} + b_hn
        rz, n = gates[..., : 2 * size], gates[..., 2 * size :]
        r, z = rz.chunk(2, -1)
        steps = zip(
            *map(walk.rows, (rz, r, z, n, before_reset)),
            *map(walk.rows, (walk.before(hs), walk.after(hs))),
            strict=True,
        )
        for rz_t, r_t, z_t, n_t, hn_t, h_prev, h in steps:
            a = torch.addmm(bias, h_prev, w_hh)
            rz_t.add_(a[:, : 2 * size]).sigmoid_()
            hn_t.copy_(a[:, 2 * size :])
            n_t.addcmul_(r_t, hn_t).tanh_()
            # (1 - z) n + z h, in the form of torch's cell
            torch.sub(h_prev, n_t, out=h)
            h.mul_(z_t).add_(n_t)
        return Saved(gates, hs, cs, before_reset)

    def backward(
        self, walk: Walk, w: Weights, saved: Saved, direct: Tensor, grad_c_n: Tensor | None
    ) -> Gradients:
        gates, hs, _, extra = saved
        assert extra is not None
        r, z, n = gates.chunk(3, -1)
        to_n = (1 - z) * (1 - n * n)
        to_r = to_n * extra * r * (1 - r)
        to_z = (walk.before(hs) - n) * z * (1 - z)
        # as in the LSTM: factors first, products in place
        alpha = torch.cat([to_r, to_z, to_n * r], -1)
        gated = alpha.unflatten(-1, (3, -1))
        delta = torch.zeros_like(n)
        carry = torch.zeros_like(hs[0])
        steps = zip(
            *map(walk.rows, (direct, delta, alpha, gated, z)), walk.every(carry), strict=True
        )
        for e, d, a, a_gated, z_t, rest in reversed(list(steps)):
            torch.add(e, rest, out=d)
            a_gated.mul_(d.unsqueeze(-2))
            torch.addmm(d * z_t, a, w.hh, out=rest)
        walk.clear(alpha)
        alpha_input = torch.cat([alpha[..., : -n.shape[-1]], delta * to_n], -1)
        return Gradients(alpha_input, alpha, delta, None, carry, None)


KERNELS: dict[str, Kernel] = {
    "RNN_TANH": RNNKernel("tanh"),
    "RNN_RELU": RNNKernel("relu"),
    "LSTM": LSTMKernel(),
    "GRU": GRUKernel(),
}
"""By torch.nn's ``mode``."""
