"""One layer and direction over time in plain torch operations, for every device and dtype.

``α`` is ``∂L/∂(pre-activation)``, ``δ`` is ``∂L/∂h_t`` in total, ``e`` the part of ``δ`` that
arrives from outside the recurrence.

States are kept in one buffer of ``T + 1`` rows, so that "all states" and "all predecessors" are
two views of it and no weight gradient needs a copy. Back through time the recurrence is linear in
``δ``: everything that does not depend on ``δ`` is computed for all steps at once, and the loop is
left with one small product and a few element-wise operations.

Equations: torch.nn's documentation of RNN, LSTM and GRU (Elman 1990; Hochreiter & Schmidhuber 1997
with the forget gate of Gers 2000; Cho 2014 with the reset gate after the product).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rnngrad.contribution import OuterProducts
from rnngrad.kernels.activations import ALPHA, NEGATIVE_SLOPE, mode_of
from rnngrad.kernels.interface import (
    Gradients,
    Incoming,
    Passed,
    Recording,
    Walk,
    Wanted,
    Weights,
)
from rnngrad.kernels.rowclip import RowClip, Site
from rnngrad.norms import norms

_SITES: tuple[Site, ...] = ("state", "preact", "carry")


class _Saved(NamedTuple):
    """What the way back needs of the way there.

    Args:
        gates: The activated gates ``[T, B, gH]``, in the buffer of the pre-activations.
        hs: ``h`` in a buffer of ``T + 1`` states ``[T + 1, B, P]``.
        cs: ``c`` likewise, or ``None``.
        extra: What else a cell needs, or ``None``.
    """

    gates: Tensor
    hs: Tensor
    cs: Tensor | None = None
    extra: Tensor | None = None


class _Back(NamedTuple):
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


class _Clipping:
    """Clips what arises at one site, and counts.

    Args:
        clip: What to do.
        walk: In what order.
        like: ``[T, B, ·]``.
    """

    def __init__(self, clip: RowClip | None, walk: Walk, like: Tensor) -> None:
        self._clip = clip
        counts = like.shape[: 2 if clip is not None else 0]
        self._counts = torch.zeros(counts, dtype=torch.int64, device=like.device)
        self._rows = [] if clip is None else walk.rows(self._counts)

    def at(self, site: Site) -> bool:
        """Whether this is where to clip."""
        return self._clip is not None and self._clip.site == site

    def __call__(self, step: int, *gradients: Tensor) -> None:
        """Clips the rows ``[n, H]``, or ``[n, gates, H]``, of a visit in place."""
        assert self._clip is not None
        for rows in gradients:
            clipped, counts = self._clip(rows)
            rows.copy_(clipped)
            self._rows[step] += counts.flatten(1).sum(1) if counts.dim() > 1 else counts

    def fraction(self, *sizes: int) -> Tensor | None:
        """Of rows of these sizes, which each step has: how much was clipped ``[T, B]``."""
        if self._clip is None:
            return None
        return self._counts.cpu().double() / sum(map(self._clip.count, sizes))


class _Steps(Protocol):
    """The recurrence of one kind of cell."""

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> _Saved:
        """Fills the buffers of states, from ``gates``: what the input contributes, bias included.

        ``gates`` is overwritten.
        """

    def backward(
        self,
        walk: Walk,
        w: Weights,
        saved: _Saved,
        direct: Tensor,
        carry_h: Tensor,
        carry_c: Tensor | None,
        clip: _Clipping,
    ) -> _Back:
        """Takes ``e [T, B, P]`` back through time, and what is carried, which is overwritten."""


class _Activation(NamedTuple):
    """``h = φ(a)``.

    Args:
        apply_: In place.
        slope: ``φ'(a)`` from ``h``, which the gradient is multiplied with; ``None`` for relu, which
            has no factor: 0 · inf would be NaN where torch's gradient is 0.
    """

    apply_: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None


def _leaky_slope(h: Tensor) -> Tensor:
    return torch.full_like(h, NEGATIVE_SLOPE).masked_fill_(h > 0, 1)


_ACTIVATIONS = {
    "tanh": _Activation(Tensor.tanh_, lambda h: 1 - h * h),
    "relu": _Activation(Tensor.relu_, None),
    "sigmoid": _Activation(Tensor.sigmoid_, lambda h: h * (1 - h)),
    "linear": _Activation(lambda h: h, torch.ones_like),
    "leaky_relu": _Activation(lambda h: F.leaky_relu_(h, NEGATIVE_SLOPE), _leaky_slope),
    "elu": _Activation(lambda h: F.elu_(h, ALPHA), lambda h: (h + ALPHA).masked_fill_(h > 0, 1)),
}


class _RNN:
    """``h_t = φ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``."""

    def __init__(self, activation: _Activation) -> None:
        self.apply_, self.slope = activation

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> _Saved:
        if w.b_hh is not None:
            gates += w.b_hh
        w_hh = w.hh.t()
        steps = zip(
            walk.rows(gates), walk.rows(walk.before(hs)), walk.rows(walk.after(hs)), strict=True
        )
        for a, h_prev, h in steps:
            torch.addmm(a, h_prev, w_hh, out=h)
            self.apply_(h)
        return _Saved(gates, hs, cs)

    def backward(
        self,
        walk: Walk,
        w: Weights,
        saved: _Saved,
        direct: Tensor,
        carry_h: Tensor,
        carry_c: Tensor | None,
        clip: _Clipping,
    ) -> _Back:
        gates, hs, *_ = saved
        h = walk.after(hs)
        factor = h <= 0 if self.slope is None else self.slope(h)
        alpha, delta = torch.zeros_like(gates), torch.zeros_like(h)
        zero = h.new_zeros(())
        steps = zip(
            *map(walk.rows, (direct, factor, delta, alpha)), walk.every(carry_h), strict=True
        )
        at_state, at_preact, at_carry = map(clip.at, _SITES)
        for s, (e, f, d, a, r) in reversed(list(enumerate(steps))):
            torch.add(e, r, out=d)
            if at_state:
                clip(s, d)
            if self.slope is None:
                torch.where(f, zero, d, out=a)
            else:
                torch.mul(d, f, out=a)
            if at_preact:
                clip(s, a)
            torch.mm(a, w.hh, out=r)
            if at_carry:
                clip(s, r)
        return _Back(alpha, alpha, delta, None, carry_h, None)


class _LSTM:
    """The LSTM with forget gate, gates in torch's order ``i, f, g, o``, and ``proj_size``."""

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> _Saved:
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
        return _Saved(gates, hs, cs)

    def backward(
        self,
        walk: Walk,
        w: Weights,
        saved: _Saved,
        direct: Tensor,
        carry_h: Tensor,
        carry_c: Tensor | None,
        clip: _Clipping,
    ) -> _Back:
        gates, hs, cs, _ = saved
        assert cs is not None and carry_c is not None
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
        steps = zip(
            *map(walk.rows, (direct, delta, cell, alpha, alpha_ifg, alpha_o, through_tanh, f)),
            walk.every(carry_h),
            walk.every(carry_c),
            strict=True,
        )
        at_state, at_preact, at_carry = map(clip.at, _SITES)
        for s, (e, d, dc, a, a_ifg, a_o, tt, f_t, rh, rc) in reversed(list(enumerate(steps))):
            torch.add(e, rh, out=d)
            if at_state:
                clip(s, d)
            dm = d if w.hr is None else d @ w.hr
            torch.addcmul(rc, dm, tt, out=dc)
            if at_state:
                clip(s, dc)
            a_ifg.mul_(dc.unsqueeze(-2))
            a_o.mul_(dm)
            if at_preact:
                clip(s, a.unflatten(-1, (4, -1)))
            torch.mul(dc, f_t, out=rc)
            torch.mm(a, w.hh, out=rh)
            if at_carry:
                clip(s, rh, rc)
        walk.clear(alpha)
        return _Back(alpha, alpha, delta, cell, carry_h, carry_c)


class _GRU:
    """The GRU with torch's order ``r, z, n`` and the reset gate after the product with ``W_hn``."""

    def forward(
        self, walk: Walk, w: Weights, gates: Tensor, hs: Tensor, cs: Tensor | None
    ) -> _Saved:
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
        return _Saved(gates, hs, cs, before_reset)

    def backward(
        self,
        walk: Walk,
        w: Weights,
        saved: _Saved,
        direct: Tensor,
        carry_h: Tensor,
        carry_c: Tensor | None,
        clip: _Clipping,
    ) -> _Back:
        gates, hs, _, extra = saved
        assert extra is not None
        r, z, n = gates.chunk(3, -1)
        to_n = (1 - z) * (1 - n * n)
        # to r, and to the state's share of n, the way leads through n's pre-activation: where that
        # is clipped, these factors are of its own gradient d_n, else of δ as all others are
        at_state, at_preact, at_carry = map(clip.at, _SITES)
        d_n = to_n if at_preact else None
        through_n = to_n if d_n is None else torch.ones_like(to_n)
        to_r = through_n * extra * r * (1 - r)
        to_z = (walk.before(hs) - n) * z * (1 - z)
        # as in the LSTM: factors first, products in place
        alpha = torch.cat([to_r, to_z, through_n * r], -1)
        gated = alpha.unflatten(-1, (3, -1))
        delta = torch.zeros_like(n)
        steps = zip(
            *map(walk.rows, (direct, delta, alpha, gated, z)), walk.every(carry_h), strict=True
        )
        n_steps = [None] * walk.steps if d_n is None else walk.rows(d_n)
        for s, (e, d, a, a_gated, z_t, rest) in reversed(list(enumerate(steps))):
            torch.add(e, rest, out=d)
            if at_state:
                clip(s, d)
            if (dn := n_steps[s]) is None:
                a_gated.mul_(d.unsqueeze(-2))
            else:
                clip(s, dn.mul_(d))
                a_gated[:, 1].mul_(d)
                a_gated[:, ::2].mul_(dn.unsqueeze(-2))
                clip(s, a_gated[:, :2])
            torch.addmm(d * z_t, a, w.hh, out=rest)
            if at_carry:
                clip(s, rest)
        walk.clear(alpha)
        if d_n is None:
            d_n = delta * to_n
        else:
            walk.clear(d_n)
        alpha_input = torch.cat([alpha[..., : -n.shape[-1]], d_n], -1)
        return _Back(alpha_input, alpha, delta, None, carry_h, None)


_STEPS: dict[str, _Steps] = {
    **{mode_of(name): _RNN(activation) for name, activation in _ACTIVATIONS.items()},
    "LSTM": _LSTM(),
    "GRU": _GRU(),
}


class ReferenceKernel:
    """A recurrence in torch's operations.

    Args:
        mode: torch.nn's.
    """

    takes_runs = False

    def __init__(self, mode: str) -> None:
        self._steps = _STEPS[mode]

    def forward(
        self, walk: Walk, x: Tensor, h_0: Tensor, c_0: Tensor | None, w: Weights, keep: bool
    ) -> Passed:
        with torch.autocast(x.device.type, enabled=False):
            gates = torch.nn.functional.linear(x, w.ih, w.b_ih)
            hs, cs = walk.states(h_0), None if c_0 is None else walk.states(c_0)
            saved = self._steps.forward(walk, w, gates, hs, cs)
        c_n = None if cs is None else walk.last(cs)
        kept = tuple(tensor for tensor in saved if tensor is not None) if keep else ()
        return Passed(walk.after(hs).clone(), walk.last(hs), c_n, kept)

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
        gates, hs, *rest = saved
        is_lstm = isinstance(self._steps, _LSTM)
        cs = rest[0] if is_lstm else None
        kept = _Saved(gates, hs, cs, None if is_lstm or not rest else rest[0])
        direct = torch.zeros_like(walk.after(hs)) if incoming.output is None else incoming.output
        if incoming.h_n is not None:
            direct = walk.add_at_last(direct, incoming.h_n)
        with torch.autocast(x.device.type, enabled=False):
            carry_h = _sum(hs[0], incoming.carried_h)
            carry_c = None if cs is None else _sum(cs[0], incoming.carried_c, incoming.c_n)
            clipping = _Clipping(clip, walk, gates)
            back = self._steps.backward(walk, w, kept, direct, carry_h, carry_c, clipping)
            width = hs.shape[-1] if w.hr is None else w.hr.shape[1]
            states = (hs.shape[-1],) if cs is None else (hs.shape[-1], width)
            by_gate = (width,) * (gates.shape[-1] // width)
            clipped = clipping.fraction(*(by_gate if clipping.at("preact") else states))
            # one product each, over all steps and rows at once
            input, recurrent = back.input.flatten(0, 1), back.recurrent.flatten(0, 1)
            grad_hr = None
            if w.hr is not None and cs is not None and wanted.hr:
                projected = gates.chunk(4, -1)[3] * walk.after(cs).tanh()
                grad_hr = back.hidden.flatten(0, 1).t() @ projected.flatten(0, 1)
            before = walk.before(hs)
            if walk.lengths is not None:  # 0 times a last state that is infinite would be NaN
                before = before.clone()
                walk.clear(before)
            return Gradients(
                x=(input @ w.ih).view_as(x) if wanted.x else None,
                h_0=back.h_0,
                c_0=back.c_0,
                ih=input.t() @ x.flatten(0, 1) if wanted.ih else None,
                hh=recurrent.t() @ before.flatten(0, 1) if wanted.hh else None,
                b_ih=input.sum(0) if wanted.ih and w.b_ih is not None else None,
                b_hh=recurrent.sum(0) if wanted.ih and w.b_hh is not None else None,
                hr=grad_hr,
                recording=_record(wanted, back, direct, before, clipped) if wanted.norms else None,
            )


def _sum(like: Tensor, *terms: Tensor | None) -> Tensor:
    """A new tensor shaped as ``like``."""
    value = torch.zeros_like(like)
    for term in terms:
        if term is not None:
            value += term
    return value


def _record(
    wanted: Wanted, back: _Back, direct: Tensor, before: Tensor, clipped: Tensor | None
) -> Recording:
    return Recording(
        hidden_norm=norms(back.hidden),
        direct_norm=norms(direct),
        cell_norm=None if back.cell is None else norms(back.cell),
        hidden_grad=back.hidden if wanted.full else None,
        cell_grad=back.cell if wanted.full else None,
        clipped=clipped,
        contribution=OuterProducts(back.recurrent, before) if wanted.weight else None,
    )
