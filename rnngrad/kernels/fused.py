"""The recurrence as compiled code on the CPU: memory, slices and addresses for ``loops``."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnngrad.kernels import loops, native
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
from rnngrad.kernels.vector import REGISTER_BYTES
from rnngrad.norms import weight_norms

SERIAL_WORK = 100_000
"""Multiplications under which a second thread costs more than it brings."""


class FusedKernel:
    """A recurrence as compiled code; also of ``R`` runs at once, on a leading axis of everything.

    float32 and float64 on the CPU, without ``proj_size``. A thread works through a slice of the
    batch; results depend on the slices only by the order in which weight gradients are added up,
    and the slices only on the shape and on ``torch.get_num_threads()``.

    Args:
        mode: torch.nn's.
    """

    takes_runs = True

    def __init__(self, mode: str) -> None:
        self._mode, self._cell = mode, CELLS[mode]

    def forward(
        self, walk: Walk, x: Tensor, h_0: Tensor, c_0: Tensor | None, w: Weights, keep: bool
    ) -> Passed:
        cell = self._cell
        *lead, steps, batch, inputs = x.shape
        hidden, states = h_0.shape[-1], h_0.numel()
        self._check(x, h_0, c_0, w)
        x, h_0, w = _rows(x), h_0.contiguous(), _contiguous(w)
        bounds, threads = self._slices(walk, x, hidden)
        call = _Call(walk, x, w, hidden, bounds)
        scratch = call.scratch(loops.forward_scratch, cell.gates, cell.blocks)

        gates = _empty(x, states * cell.kept * (steps if keep else 1)) if cell.kept else None
        hs = _empty(x, states * (steps + 1))
        cs = None
        output, h_n, c_n = x.new_empty(*lead, steps, batch, hidden), torch.empty_like(h_0), None
        _in_large_pages(output)
        if c_0 is not None:
            c_0, c_n = c_0.contiguous(), torch.empty_like(h_0)
            cs = _empty(x, states * (steps + 1 if keep else 1))
        call.set(
            (loops.H_0, h_0),
            (loops.C_0, c_0),
            (loops.B_IH, w.b_ih),
            (loops.B_HH, w.b_hh),
            (loops.GATES, gates),
            (loops.HS, hs),
            (loops.CS, cs),
            (loops.OUTPUT, output),
            (loops.H_N, h_n),
            (loops.C_N, c_n),
        )
        call.arguments[loops.KEPT] = keep
        call.run(
            native.compiled(cell.forward, x.dtype, self._title("the way there")), threads, scratch
        )
        saved = (bounds, hs, *(t for t in (gates, cs) if t is not None)) if keep else ()
        return Passed(output, h_n, c_n, saved)

    def backward(
        self,
        walk: Walk,
        x: Tensor,
        w: Weights,
        saved: tuple[Tensor, ...],
        incoming: Incoming,
        wanted: Wanted,
    ) -> Gradients:
        cell = self._cell
        bounds, hs, *rest = saved
        gates = rest.pop(0) if cell.kept else None
        cs = rest.pop() if rest else None
        *lead, steps, batch, inputs = x.shape
        hidden = w.hh.shape[-1]
        x, w = _rows(x), _contiguous(w)
        incoming = Incoming(*(None if g is None else g.contiguous() for g in incoming))
        call = _Call(walk, x, w, hidden, bounds)
        scratch = call.scratch(loops.backward_scratch, cell.gates, cell.blocks)

        # what is not visited, beyond the sequences' ends, stays 0
        new = x.new_empty if walk.lengths is None else x.new_zeros
        slices = len(bounds)
        h_0 = x.new_empty(*lead, batch, hidden)
        c_0 = None if cs is None else torch.empty_like(h_0)
        grad_x = new(x.shape) if wanted.x else None
        hh = x.new_zeros(slices, cell.gates * hidden, hidden) if wanted.hh else None
        ih = x.new_zeros(slices, cell.blocks * hidden, inputs + 1) if wanted.ih else None
        norms = hidden_grad = cell_grad = alpha = before = None
        if wanted.norms:
            count = 2 if cs is None else 3
            norms = torch.zeros(count, *lead, steps, batch, dtype=torch.float64)
        if wanted.full:
            hidden_grad = x.new_zeros(*lead, steps, batch, hidden)
            cell_grad = None if cs is None else torch.zeros_like(hidden_grad)
        if wanted.weight:
            alpha = x.new_zeros(*lead, steps, batch, cell.gates * hidden)
            before = x.new_zeros(*lead, steps, batch, hidden)
        call.set(
            (loops.GATES, gates),
            (loops.HS, hs),
            (loops.CS, cs),
            (loops.GRAD_OUTPUT, incoming.output),
            (loops.GRAD_H_N, incoming.h_n),
            (loops.GRAD_C_N, incoming.c_n),
            (loops.CARRY_H, incoming.carried_h),
            (loops.CARRY_C, incoming.carried_c),
            (loops.GRAD_X, grad_x),
            (loops.GRAD_H_0, h_0),
            (loops.GRAD_C_0, c_0),
            (loops.GRAD_HH, hh),
            (loops.GRAD_IH, ih),
            (loops.HIDDEN_NORM, None if norms is None else norms[0]),
            (loops.DIRECT_NORM, None if norms is None else norms[1]),
            (loops.CELL_NORM, None if norms is None or cs is None else norms[2]),
            (loops.HIDDEN_GRAD, hidden_grad),
            (loops.CELL_GRAD, cell_grad),
            (loops.ALPHA, alpha),
            (loops.BEFORE, before),
        )
        kernel = native.compiled(cell.backward, x.dtype, self._title("the way back"))
        call.run(kernel, torch.get_num_threads() if slices > 1 else 1, scratch)

        hh, ih = _over_slices(hh, lead), _over_slices(ih, lead)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if ih is not None:
            # rows for the input's share, and for the state's, which differ in a GRU's last gate
            shared = (cell.gates - 1) * hidden
            own = ih if cell.blocks == cell.gates else _without(ih, shared, hidden)
            state = ih[..., : cell.gates * hidden, -1]
            grads = (own[..., :-1], own[..., -1], state)
        recording = None
        if norms is not None:
            weight = None
            if alpha is not None and before is not None:
                weight = weight_norms(alpha, before)
            recording = Recording(
                norms[0],
                norms[1],
                None if cs is None else norms[2],
                weight,
                hidden_grad,
                cell_grad,
            )
        has_bias = w.b_ih is not None
        return Gradients(
            x=grad_x,
            h_0=h_0,
            c_0=c_0,
            ih=grads[0],
            hh=hh,
            b_ih=grads[1] if has_bias else None,
            b_hh=grads[2] if has_bias else None,
            hr=None,
            recording=recording,
        )

    def _check(self, x: Tensor, h_0: Tensor, c_0: Tensor | None, w: Weights) -> None:
        """Compiled code reads whatever lies at an address: nothing gets there that does not fit."""
        *lead, _, batch, inputs = x.shape
        hidden, rows = h_0.shape[-1], self._cell.gates * h_0.shape[-1]
        expected = (
            ("h_0", h_0, (batch, hidden)),
            ("c_0", c_0, (batch, hidden)),
            ("weight_ih", w.ih, (rows, inputs)),
            ("weight_hh", w.hh, (rows, hidden)),
            ("bias_ih", w.b_ih, (rows,)),
            ("bias_hh", w.b_hh, (rows,)),
        )
        for name, tensor, shape in expected:
            if tensor is None:
                continue
            if tensor.shape != (*lead, *shape):
                wanted, got = [*lead, *shape], list(tensor.shape)
                raise RuntimeError(f"{name}: expected size {wanted}, got {got}")
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise RuntimeError(
                    f"{name}: expected {x.dtype} on {x.device} as the input is, got "
                    f"{tensor.dtype} on {tensor.device}"
                )

    def _title(self, way: str) -> str:
        return f"{self._mode.replace('_', ' ')} kernel, {way}"

    def _slices(self, walk: Walk, x: Tensor, hidden: int) -> tuple[Tensor, int]:
        """``(run, first row, row after the last)`` of each slice ``[S, 3]``, and the threads."""
        *lead, steps, batch, inputs = x.shape
        runs = lead[0] if lead else 1
        threads = torch.get_num_threads()
        work = runs * steps * batch * self._cell.gates * hidden * (hidden + inputs)
        if work < SERIAL_WORK:
            threads = 1
        lengths = None if walk.lengths is None else tuple(walk.lengths.tolist())
        bounds = _bounds(runs, batch, threads, lengths)
        return bounds, threads if len(bounds) > 1 else 1


@cache
def _uncached_bounds(runs: int, batch: int, threads: int) -> Tensor:
    return _cut(runs, [1] * batch, threads)


def _bounds(runs: int, batch: int, threads: int, lengths: tuple[int, ...] | None) -> Tensor:
    if lengths is None:
        return _uncached_bounds(runs, batch, threads)
    return _cut(runs, list(lengths), threads)


def _cut(runs: int, weights: list[int], threads: int) -> Tensor:
    """Slices of equal weight, as many a run as occupy all threads."""
    parts = min(len(weights), -(-threads // runs))
    total, done, ends = sum(weights), 0, [0]
    for row, weight in enumerate(weights):
        done += weight
        if done * parts >= total * len(ends) and len(ends) < parts:
            ends.append(row + 1)
    if ends[-1] < len(weights):
        ends.append(len(weights))
    return torch.tensor(
        [(r, a, b) for r in range(runs) for a, b in zip(ends, ends[1:], strict=False)]
    )


class _Call:
    """The arguments of one call, and whatever must live until it returns."""

    def __init__(self, walk: Walk, x: Tensor, w: Weights, hidden: int, bounds: Tensor) -> None:
        *lead, steps, batch, inputs = x.shape
        self.x, self.hidden, self.bounds = x, hidden, bounds
        self.next = np.zeros(1, dtype=np.int64)
        self.arguments = np.zeros(loops.COUNT, dtype=np.int64)
        size = x.element_size()
        strides = [s * size for s in x.stride()]
        a = self.arguments
        a[loops.SLICES], a[loops.BOUNDS] = len(bounds), bounds.data_ptr()
        a[loops.NEXT] = self.next.ctypes.data
        a[loops.STEPS], a[loops.BATCH], a[loops.INPUT] = steps, batch, inputs
        a[loops.HIDDEN], a[loops.REVERSE] = hidden, walk.reverse
        a[loops.X_RUN] = strides[0] if lead else 0
        a[loops.X_STEP], a[loops.X_ROW] = strides[-3], strides[-2]
        self.lengths = None if walk.lengths is None else walk.lengths.contiguous()
        self.set(
            (loops.X, x), (loops.W_IH, w.ih), (loops.W_HH, w.hh), (loops.LENGTHS, self.lengths)
        )
        a[loops.PRODUCT] = native.compiled(product_kernel, x.dtype, "matrix product of all kernels")

    def set(self, *places: tuple[int, Tensor | None]) -> None:
        for place, tensor in places:
            if tensor is not None:
                self.arguments[place] = tensor.data_ptr()

    def scratch(self, measure: Any, gates: int, blocks: int) -> Tensor:
        """Scratch memory for every slice."""
        size = self.x.element_size()
        width = REGISTER_BYTES // size
        rows = (self.bounds[:, 2] - self.bounds[:, 1]).unique().tolist()
        share = max(
            measure(gates, blocks, n, self.x.shape[-1], self.hidden, width, size) for n in rows
        )
        memory = torch.empty(len(self.bounds) * share + loops.ALIGN, dtype=torch.uint8)
        start = memory.data_ptr()
        self.arguments[loops.SCRATCH] = -(-start // loops.ALIGN) * loops.ALIGN
        self.arguments[loops.SCRATCH_SIZE] = share
        return memory

    def run(self, kernel: int, threads: int, scratch: Tensor) -> None:
        native.run(kernel, self.arguments, threads)


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last axis in one piece; other strides are as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(w: Weights) -> Weights:
    return Weights(*(None if t is None else t.contiguous() for t in w))  # type: ignore[arg-type]


def _empty(like: Tensor, count: int) -> Tensor:
    """Memory that may be read a vector beyond its end."""
    memory = like.new_empty(count + REGISTER_BYTES // like.element_size())
    _in_large_pages(memory)
    return memory


def _in_large_pages(memory: Tensor) -> None:
    """Asks Linux for pages of 2 MiB: zeroing 512 small ones one by one takes ten times as long."""
    size = memory.numel() * memory.element_size()
    advise = _madvise()
    if size >= 2**22 and advise is not None:
        page = 4096
        first = -(-memory.data_ptr() // page) * page
        last = (memory.data_ptr() + size) // page * page
        advise(first, last - first, _MADV_HUGEPAGE)


_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def _over_slices(grad: Tensor | None, lead: list[int]) -> Tensor | None:
    """``[R · slices a run, ...]`` summed to ``[R, ...]``, or to one without that axis."""
    if grad is None:
        return None
    per_run = grad.unflatten(0, (*lead, -1)) if lead else grad
    axis = len(lead)
    return per_run.select(axis, 0) if per_run.shape[axis] == 1 else per_run.sum(axis)


def _without(rows: Tensor, start: int, count: int) -> Tensor:
    return torch.cat([rows[..., :start, :], rows[..., start + count :, :]], -2)
