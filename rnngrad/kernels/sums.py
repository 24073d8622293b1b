"""Norms of many tensors in one call of compiled code: what a clip rule asks of every gradient."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rnngrad.kernels import native
from rnngrad.kernels.loops import norm_of
from rnngrad.kernels.vector import field, put_double

FIRST = 2
"""Fields before the tensors': how many these are, and where their norms go."""


def tensor_norms_kernel(p: Any) -> None:
    """The L2 norms of tensors, each given by two fields: its address and its number of elements."""
    for i in range(field(p, 0)):
        place = FIRST + 2 * i
        put_double(field(p, 1) + 8 * i, norm_of(p, field(p, place), field(p, place + 1)))


def tensor_norms(tensors: Sequence[Tensor]) -> list[float] | None:
    """The L2 norm of each tensor, in float64, without under- or overflow on the way.

    Each is NaN or infinite only if an entry is. ``None`` if compiled code cannot read them: they
    are not all on the CPU, of one dtype, float32 or float64, and in one piece of memory.
    """
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64) or not _compiles():
        return None
    fields = [len(tensors), 0]
    for tensor in tensors:
        plain = tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()
        if not plain or type(tensor) is not Tensor or tensor.is_neg():
            return None
        fields += (tensor.data_ptr(), tensor.numel())
    found = array("d", [0.0]) * len(tensors)
    fields[1] = found.buffer_info()[0]
    arguments = array("q", fields)
    native.run(_compiled(dtype), arguments.buffer_info()[0], 1)
    return found.tolist()


@cache
def _compiled(dtype: torch.dtype) -> int:
    return native.compiled(tensor_norms_kernel, dtype, "norm of gradients")


@cache
def _compiles() -> bool:
    import numba

    return not getattr(numba.config, "DISABLE_JIT", 0)
