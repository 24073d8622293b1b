"""Norms of many tensors in float64, and scaling to them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rnngrad.kernels import sums


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> float:
    """The norm of all gradients as one vector, in float64.

    Gradients whose norm leaves the range of float64 only on the way are scaled by their largest
    entry: the norm of finite gradients is 0 only if all are, and infinite only if it exceeds
    float64.

    Args:
        grads: Tensors of any shapes and dtypes, at least one.
        norm_type: ``p >= 1``, or infinity.

    Returns:
        ``(Σ |g|^p)^(1/p)``; NaN if an entry is NaN.
    """
    if norm_type == 2 and (norms := sums.tensor_norms(grads)) is not None:
        # of infinity and NaN the hypotenuse is infinite
        return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)
    if norm_type in (1, 2, math.inf):  # the powers of others leave the range much earlier
        norm = _norm(grads, norm_type)
        if 1e-140 < norm < math.inf or math.isnan(norm):
            return norm
    largest = _norm(grads, math.inf)
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * _norm([grad.double() / largest for grad in grads], norm_type)


def tensor_norms(grads: Sequence[Tensor]) -> list[float]:
    """The L2 norm of each gradient, in float64, with the guarantees of ``total_norm``."""
    if (compiled := sums.tensor_norms(grads)) is not None:
        return compiled
    norms = _cpu(torch._foreach_norm(list(grads), 2.0, dtype=torch.float64)).tolist()
    return [
        norm if 1e-140 < norm < math.inf else total_norm([grad])
        for norm, grad in zip(norms, grads, strict=True)
    ]


def scale_(grad: Tensor, to: float, of: float) -> None:
    """``grad *= to / of``, to the gradient's own rounding, whatever ``to / of`` is."""
    coef = to / of
    if 1e-30 < coef < 1e30:
        grad.mul_(coef)
    else:  # beyond float32's normal range, or float64's, it would be rounded to few digits
        root = to**0.5 / of**0.5
        grad.mul_(root).mul_(root)


def refuse_above(threshold: float, value: float, grads: Sequence[Tensor]) -> None:
    """The rules' invariant: after clipping, at most the threshold, to the gradients' rounding.

    Raises:
        RuntimeError: ``value`` is above.
    """
    if value <= threshold * (1 + 1e-6):
        return
    limits = [torch.finfo(grad.dtype) for grad in grads]
    relative = max(1e-6, *(4 * limit.eps for limit in limits))
    # next to 0 numbers are this far apart, however small they are
    spacing = max(limit.smallest_normal * limit.eps for limit in limits)
    entries = sum(grad.numel() for grad in grads)
    if value > threshold * (1 + relative) + spacing * entries:
        raise RuntimeError(f"clip: {value!r} after clipping at {threshold!r}; this is a bug")


def _norm(grads: Sequence[Tensor], norm_type: float) -> float:
    if norm_type == math.inf:
        # torch's own infinity norm takes twenty times as long, and refuses what has no entries
        ends = [end.double() for grad in grads if grad.numel() for end in torch.aminmax(grad)]
        return _cpu(tuple(ends)).abs().max().item() if ends else 0.0
    parts = torch._foreach_norm(list(grads), norm_type, dtype=torch.float64)
    return float(torch.linalg.vector_norm(_cpu(parts), norm_type))


def _cpu(numbers: tuple[Tensor, ...]) -> Tensor:
    """One tensor of many of one number each; from one device in one transfer."""
    try:
        return torch.stack(numbers).cpu()
    except RuntimeError:  # they lie on several devices
        return torch.stack([number.cpu() for number in numbers])
