"""The recurrence over time, forward and backward, for the three standard cells.

``reference`` writes it in plain torch operations, for every device and dtype; ``fused`` is compiled
code for the CPU, which is used wherever it can be. Both keep to ``interface``, and to one another
to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from rnngrad.kernels.interface import Kernel
from rnngrad.kernels.reference import ReferenceKernel

_REFERENCE_ONLY: ContextVar[bool] = ContextVar("rnngrad_reference_only", default=False)


def kernel_for(mode: str, x: Tensor, projected: bool) -> Kernel:
    """The fastest kernel for a layer and its input.

    Args:
        mode: The layer's: ``LSTM``, ``GRU``, or ``RNN_`` and one of ``activations.ACTIVATIONS``.
        x: ``[..., T, B, I]``.
        projected: Whether the layer has a ``proj_size``.
    """
    fused = (
        type(x) in (Tensor, torch.nn.Parameter)  # a subclass may have no memory of its own
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not projected
        and x.numel() > 0
        and not _REFERENCE_ONLY.get()
    )
    return _fused(mode) if fused else _reference(mode)


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, layers use plain torch operations, to compare with or to rule out a fault."""
    token = _REFERENCE_ONLY.set(True)
    try:
        yield
    finally:
        _REFERENCE_ONLY.reset(token)


@cache
def _reference(mode: str) -> Kernel:
    return ReferenceKernel(mode)


@cache
def _fused(mode: str) -> Kernel:
    import numba  # takes half a second to import

    if getattr(
        numba.config, "DISABLE_JIT", 0
    ):  # who debugs with NUMBA_DISABLE_JIT=1 wants Python code
        return _reference(mode)
    from rnngrad.kernels.fused import FusedKernel

    return FusedKernel(mode)
