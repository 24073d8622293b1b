"""The recurrence as compiled code on the CPU: memory, slices and addresses for ``loops``."""

from __future__ import annotations

import math
import struct
from array import array
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnngrad.contribution import OuterProducts
from rnngrad.kernels import loops, memory, native
from rnngrad.kernels.cells import CELLS
from rnngrad.kernels.interface import (
    Gradients,
    Incoming,
    Passed,
    Recording,
    Walk,
    Wanted,
    Weights,
)
from rnngrad.kernels.product import product_kernel
from rnngrad.kernels.rowclip import RowClip
from rnngrad.kernels.vector import REGISTER_BYTES

SERIAL_WORK = 100_000
"""Multiplications under which a second thread costs more than it brings."""
FEWEST_ROWS = 4
"""Of a slice: with fewer it takes as long, for the weights have to be read all the same."""


class FusedKernel:
    """A recurrence as compiled code; also of ``R`` runs at once, on a leading axis of everything.

    float32 and float64 on the CPU, without ``proj_size``. A thread works through a slice of the
    batch. How the batch is cut depends on shapes, lengths and ``torch.get_num_threads()`` alone,
    and so, by the order in which weight gradients are added up, do the last digits.

    Args:
        mode: torch.nn's.
    """

    takes_runs = True

    def __init__(self, mode: str) -> None:
        self._mode, self._cell = mode, CELLS[mode]
        self._code: dict[tuple[torch.dtype, str], int] = {}

    def forward(
        self, walk: Walk, x: Tensor, h_0: Tensor, c_0: Tensor | None, w: Weights, keep: bool
    ) -> Passed:
        threads = torch.get_num_threads()
        self._check(x, h_0.shape[-1], w, ("h_0", h_0), ("c_0", c_0))
        cell, plan, states = self._cell, self._plan(walk, x, h_0.shape[-1], threads), h_0.numel()
        steps = walk.steps
        h_0, c_0 = _plain(h_0), _plain(c_0)
        gates = _kept(x, states * cell.kept * (steps if keep else 1)) if cell.kept else None
        hs = _kept(x, states * (steps + 1))
        cs = None if c_0 is None else _kept(x, states * (steps + 1 if keep else 1))
        output, h_n = x.new_empty(*x.shape[:-1], h_0.shape[-1]), torch.empty_like(h_0)
        c_n = None if c_0 is None else torch.empty_like(h_0)
        self._run(
            "forward",
            plan,
            walk,
            x,
            w,
            keep,
            {
                loops.H_0: h_0,
                loops.C_0: c_0,
                loops.GATES: gates,
                loops.HS: hs,
                loops.CS: cs,
                loops.OUTPUT: output,
                loops.H_N: h_n,
                loops.C_N: c_n,
            },
        )
        # how many threads goes with them, for what is saved lies as the slices do
        kept = (torch.tensor(threads), hs, gates, cs) if keep else ()
        return Passed(output, h_n, c_n, tuple(t for t in kept if t is not None))

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
        cell = self._cell
        threads, hs, *rest = saved
        gates = rest.pop(0) if cell.kept else None
        cs = rest.pop() if rest else None
        *lead, steps, batch, inputs = x.shape
        hidden = w.hh.shape[-1]
        plan = self._plan(walk, x, hidden, int(threads))
        slices = plan.slices
        states = [
            (name, grad)
            for name, grad in incoming._asdict().items()
            if name != "output" and grad is not None
        ]
        self._check(x, hidden, w, *states)
        size = math.prod(lead) * batch * hidden
        for name, tensor, count in (
            ("output", incoming.output, size * steps),
            ("states", hs, size * (steps + 1)),
            ("gates", gates, size * steps * cell.kept),
            ("cells", cs, size * (steps + 1)),
        ):
            if tensor is not None and (tensor.dtype != x.dtype or tensor.numel() < count):
                raise RuntimeError(f"{name}: not what the forward saved, or of another dtype")
        incoming = Incoming(*[_plain(g) for g in incoming])

        # what is not visited, beyond the sequences' ends, stays 0
        grad_x = None
        if wanted.x:
            grad_x = x.new_empty(x.shape) if walk.lengths is None else x.new_zeros(x.shape)
        h_0 = x.new_empty(*lead, batch, hidden)
        c_0 = None if cs is None else torch.empty_like(h_0)
        hh = x.new_zeros(slices, cell.gates * hidden, hidden) if wanted.hh else None
        ih = x.new_zeros(slices, cell.blocks * hidden, inputs + 1) if wanted.ih else None
        norms: tuple[Tensor | None, ...] = (None, None, None)
        clipped = None
        if wanted.norms:
            count = 2 if cs is None else 3
            make = torch.empty if walk.lengths is None else torch.zeros
            norms = make(count, *lead, steps, batch, dtype=torch.float64).unbind(0)
            norms = norms if cs is not None else (*norms, None)
            if clip is not None:
                clipped = make(*lead, steps, batch, dtype=torch.float64)
        hidden_grad = cell_grad = alpha = before = None
        if wanted.full:
            hidden_grad = x.new_zeros(*lead, steps, batch, hidden)
            cell_grad = None if cs is None else torch.zeros_like(hidden_grad)
        if wanted.weight:
            alpha = x.new_zeros(*lead, steps, batch, cell.gates * hidden)
            before = x.new_zeros(*lead, steps, batch, hidden)
        self._run(
            "backward",
            plan,
            walk,
            x,
            w,
            True,
            {
                loops.GATES: gates,
                loops.HS: hs,
                loops.CS: cs,
                loops.GRAD_OUTPUT: incoming.output,
                loops.GRAD_H_N: incoming.h_n,
                loops.GRAD_C_N: incoming.c_n,
                loops.CARRY_H: incoming.carried_h,
                loops.CARRY_C: incoming.carried_c,
                loops.GRAD_X: grad_x,
                loops.GRAD_H_0: h_0,
                loops.GRAD_C_0: c_0,
                loops.GRAD_HH: hh,
                loops.GRAD_IH: ih,
                loops.HIDDEN_NORM: norms[0],
                loops.DIRECT_NORM: norms[1],
                loops.CELL_NORM: norms[2],
                loops.HIDDEN_GRAD: hidden_grad,
                loops.CELL_GRAD: cell_grad,
                loops.ALPHA: alpha,
                loops.BEFORE: before,
                loops.CLIPPED: clipped,
            },
            clip,
        )
        recording = None
        if norms[0] is not None and norms[1] is not None:
            weight = None if alpha is None or before is None else OuterProducts(alpha, before)
            recording = Recording(
                norms[0], norms[1], norms[2], hidden_grad, cell_grad, clipped, weight
            )
        hh, ih = _over_slices(hh, lead), _over_slices(ih, lead)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if ih is not None:
            # rows of the input's share of the gates, and of the state's
            own = ih if cell.blocks == cell.gates else _without_block(ih, cell.gates - 1, hidden)
            # autograd keeps a contiguous gradient as it is, and a column of one row is one: the two
            # biases must not share their memory, or who scales one in place scales both
            grads = (own[..., :-1], own[..., -1], ih[..., : cell.gates * hidden, -1].clone())
        biased = w.b_ih is not None
        return Gradients(
            x=grad_x,
            h_0=h_0,
            c_0=c_0,
            ih=grads[0],
            hh=hh,
            b_ih=grads[1] if biased else None,
            b_hh=grads[2] if biased else None,
            hr=None,
            recording=recording,
        )

    def _run(
        self,
        way: str,
        plan: _Plan,
        walk: Walk,
        x: Tensor,
        w: Weights,
        keep: bool,
        tensors: dict[int, Tensor | None],
        clip: RowClip | None = None,
    ) -> None:
        """Fills in the arguments that both ways share, and goes."""
        x = x if x.stride(-1) == 1 and not x.is_neg() else _plain(x)
        w = Weights(*map(_plain, w))
        lengths = None if walk.lengths is None else walk.lengths.contiguous()
        size, strides = x.element_size(), x.stride()
        share = plan.scratch[way]
        scratch = torch.empty(plan.slices * share + loops.ALIGN, dtype=torch.uint8)
        a = [0] * loops.COUNT
        a[loops.PRODUCT] = self._compiled(x.dtype, "product")
        a[loops.SLICES], a[loops.BOUNDS] = plan.slices, plan.bounds.data_ptr()
        a[loops.STEPS], a[loops.BATCH], a[loops.INPUT] = x.shape[-3:]
        a[loops.HIDDEN], a[loops.REVERSE] = w.hh.shape[-1], walk.reverse
        a[loops.SCRATCH] = -(-scratch.data_ptr() // loops.ALIGN) * loops.ALIGN
        a[loops.SCRATCH_SIZE] = share
        a[loops.X_RUN] = strides[0] * size if len(strides) == 4 else 0
        a[loops.X_STEP], a[loops.X_ROW] = strides[-3] * size, strides[-2] * size
        a[loops.KEPT] = keep
        code = way
        if clip is not None:
            code = "backward with clipping"
            a[loops.CLIP_SITE] = loops.SITES.index(clip.site)
            a[loops.CLIP_BY_NORM] = clip.kind == "norm"
            at = clip.threshold if clip.kind == "norm" else clip.limit(x.dtype)
            (a[loops.CLIP_AT],) = struct.unpack("q", struct.pack("d", at))
        for place, tensor in (*tensors.items(), *zip(_SHARED, (x, *w[:4], lengths), strict=True)):
            if tensor is not None:
                a[place] = tensor.data_ptr()
        arguments = array("q", a)
        native.run(self._compiled(x.dtype, code), arguments.buffer_info()[0], plan.threads)

    def _check(
        self, x: Tensor, hidden: int, w: Weights, *states: tuple[str, Tensor | None]
    ) -> None:
        """Compiled code reads whatever lies at an address: nothing gets there that does not fit."""
        *lead, _, batch, inputs = x.shape
        rows = self._cell.gates * hidden
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("weight_ih", w.ih, (*lead, rows, inputs)),
            ("weight_hh", w.hh, (*lead, rows, hidden)),
            ("bias_ih", w.b_ih, (*lead, rows)),
            ("bias_hh", w.b_hh, (*lead, rows)),
        ]
        expected += [(name, state, (*lead, batch, hidden)) for name, state in states]
        for name, tensor, shape in expected:
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise RuntimeError(f"{name}: expected size {list(shape)}, got {list(tensor.shape)}")
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise RuntimeError(
                    f"{name}: expected {x.dtype} on {x.device} as the input is, got "
                    f"{tensor.dtype} on {tensor.device}"
                )

    def _compiled(self, dtype: torch.dtype, part: str) -> int:
        """The address of ``product`` or of one of the ways."""
        if (dtype, part) not in self._code:
            ways = {
                "forward": self._cell.forward,
                "backward": self._cell.backward,
                "backward with clipping": self._cell.clipped,
            }
            function = ways.get(part, product_kernel)
            name = (
                f"{self._mode.replace('_', ' ')} kernel, {part}"
                if part in ways
                else "matrix product"
            )
            self._code[dtype, part] = native.compiled(function, dtype, name)
        return self._code[dtype, part]

    def _plan(self, walk: Walk, x: Tensor, hidden: int, threads: int) -> _Plan:
        *lead, steps, batch, inputs = x.shape
        runs, gates = lead[0] if lead else 1, self._cell.gates
        work = runs * steps * batch * gates * hidden * (hidden + inputs)
        threads = threads if work >= SERIAL_WORK else 1
        sizes = (gates, self._cell.blocks, inputs, hidden, x.element_size())
        if walk.lengths is None:
            return _plan_of_equal_rows(runs, batch, threads, *sizes)
        return _Plan(runs, walk.lengths.tolist(), threads, *sizes)


_SHARED = (loops.X, loops.W_IH, loops.W_HH, loops.B_IH, loops.B_HH, loops.LENGTHS)


class _Plan:
    """How a call is cut into slices of about equal work, and the memory that each of them needs.

    Attributes:
        bounds: ``(run, first row, row after the last)`` of each slice ``[S, 3]``.
        threads: That share them.
        scratch: Bytes of scratch memory of a slice, by way.
    """

    def __init__(
        self,
        runs: int,
        weights: list[int],
        threads: int,
        gates: int,
        blocks: int,
        inputs: int,
        hidden: int,
        size: int,
    ) -> None:
        parts = min(-(-len(weights) // FEWEST_ROWS), -(-threads // runs))
        done = np.cumsum(weights) * parts
        cuts = np.searchsorted(done, np.arange(1, parts) * done[-1] // parts) + 1
        ends = sorted({0, *cuts.tolist(), len(weights)})
        pairs = list(zip(ends, ends[1:], strict=False))
        self.bounds = torch.tensor([(r, *pair) for r in range(runs) for pair in pairs])
        self.slices = len(self.bounds)
        self.threads = threads if self.slices > 1 else 1
        rows, width = {b - a for a, b in pairs}, REGISTER_BYTES // size
        sizes = (inputs, hidden, width, size)
        self.scratch = {
            "forward": loops.forward_scratch(gates, blocks, *sizes),
            "backward": max(loops.backward_scratch(gates, blocks, n, *sizes) for n in rows),
        }


@lru_cache(maxsize=1024)
def _plan_of_equal_rows(runs: int, batch: int, threads: int, *sizes: int) -> _Plan:
    return _Plan(runs, [1] * batch, threads, *sizes)


def _plain(tensor: Any) -> Any:
    """In one piece of memory, and with its sign in it."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _kept(like: Tensor, count: int) -> Tensor:
    return memory.empty(count, like.dtype, spare=REGISTER_BYTES)


def _over_slices(grad: Tensor | None, lead: list[int]) -> Tensor | None:
    """``[R · slices a run, ...]`` summed to ``[R, ...]``, or to one without that axis."""
    if grad is None:
        return None
    per_run = grad.unflatten(0, (*lead, -1)) if lead else grad
    axis = len(lead)
    return per_run.select(axis, 0) if per_run.shape[axis] == 1 else per_run.sum(axis)


def _without_block(rows: Tensor, block: int, size: int) -> Tensor:
    return torch.cat([rows[..., : block * size, :], rows[..., (block + 1) * size :, :]], -2)
