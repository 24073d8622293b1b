"""Norms that neither under- nor overflow before the gradient itself does.

They are accumulated in float64, scaled where even its square would leave the range: a float32 norm
is 0 about fifteen decades before the gradient is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WIDE = 2**16
"""Numbers turned into float64 at a time: as many as a processor keeps near."""


def norms(vectors: Tensor) -> Tensor:
    """``‖v‖₂`` over the last dimension, float64 on the CPU, without under- or overflow.

    Args:
        vectors: ``[..., H]``.

    Returns:
        ``[...]``. A vector with a NaN has norm NaN, one with an infinity (and no NaN) infinity.
    """
    if vectors.device.type == "mps":  # has no float64
        vectors = vectors.cpu()
    return norms_on_device(vectors).cpu()


def norms_on_device(vectors: Tensor) -> Tensor:
    """``norms`` on the vectors' own device, so that nothing waits for it; not on mps."""
    if vectors.dtype == torch.float64:
        scale = scale_of(vectors, (-1,))
        norm: Tensor = torch.linalg.vector_norm(vectors / scale, dim=-1) * scale.squeeze(-1)
    else:  # the square of any float32 fits into a float64
        norm = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64)
    return norm


def weight_norms(alpha: Tensor, predecessors: Tensor) -> Tensor:
    """``‖G_t‖_F``, ``G_t = Σ_b α_{t,b} ⊗ h_{t-1,b}``: each step's contribution to ``∂L/∂W_hh``.

    By the cheaper of two forms: ``G_t`` itself, or ``‖G_t‖² = Σ_bb' (α_b·α_b')(h_b·h_b')``, which
    never builds it.

    Args:
        alpha: ``∂L/∂`` pre-activations ``[T, B, gH]``.
        predecessors: ``h_{t-1} [T, B, P]``.

    Returns:
        ``[T]``, float64 on the CPU.
    """
    _, batch, rows = alpha.shape
    gram = batch * (rows + predecessors.shape[-1]) < rows * predecessors.shape[-1]
    if alpha.device.type == "mps":
        alpha, predecessors = alpha.cpu(), predecessors.cpu()
    parts = []
    for a, h in wide_parts(alpha, predecessors):
        scale = None
        if alpha.dtype == torch.float64:  # of any other, products and their squares fit into it
            scale_a, scale_h = scale_of(a, (1, 2)), scale_of(h, (1, 2))
            a, h, scale = a.div_(scale_a), h.div_(scale_h), (scale_a * scale_h).flatten()
        if gram:
            gram_a, gram_h = a @ a.mT, h @ h.mT
            squares = (gram_a * gram_h).sum((1, 2))
            part = squares.clamp_min(0).sqrt()
            # where the rows cancel, a difference of squares has lost the digits that are left
            separately = gram_a.diagonal(dim1=1, dim2=2) * gram_h.diagonal(dim1=1, dim2=2)
            cancelled = squares < 1e-5 * separately.sqrt().sum(1).square()
            if cancelled.any():
                part[cancelled] = torch.linalg.matrix_norm(a[cancelled].mT @ h[cancelled])
        else:
            part = torch.linalg.matrix_norm(a.mT @ h)
        parts.append(part if scale is None else part * scale)
    return torch.cat(parts).cpu()


def wide_parts(alpha: Tensor, predecessors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both ``[T, B, ·]`` as float64, some steps at a time, in memory that is used again."""
    steps, batch, rows = alpha.shape
    chunk = min(steps, max(1, WIDE // max(1, batch * rows)))
    wide = [
        values.new_empty(chunk, *values.shape[1:], dtype=torch.float64)
        for values in (alpha, predecessors)
    ]
    for start in range(0, steps, chunk):
        stop = min(steps, start + chunk)
        a, h = (
            buffer[: stop - start].copy_(values[start:stop])
            for buffer, values in zip(wide, (alpha, predecessors), strict=True)
        )
        yield a, h


def log10_rms(norm: Tensor) -> Tensor:
    """``log10`` of the root mean square over the batch, computed in log space.

    Sequences that have ended by a step, NaN from there to the end, do not count at it.

    Args:
        norm: ``[..., T, B]``, float64.

    Returns:
        ``[..., T]``; ``-inf`` where every norm is exactly 0, NaN where one is NaN, and where all
        sequences have ended.
    """
    scale, norm, count = _those_there(norm)
    return (norm / scale).square().sum(-1).div(count).log10() / 2 + scale.squeeze(-1).log10()


def log10_mean(norm: Tensor) -> Tensor:
    """``log10`` of the mean over the batch, what most papers plot; otherwise as ``log10_rms``."""
    scale, norm, count = _those_there(norm)
    return (norm / scale).sum(-1).div(count).log10() + scale.squeeze(-1).log10()


def _those_there(norm: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
    """A scale, the norms with 0 for sequences that have ended, and how many have not."""
    missing, count = norm.isnan(), norm.shape[-1]
    if not missing.any():
        return scale_of(norm, (-1,)), norm, count
    ended = missing.flip(-2).cumprod(-2).flip(-2).bool()
    ended &= ~ended[..., :1, :]  # one that is NaN throughout has not ended: it is NaN
    norm = norm.masked_fill(ended, 0)
    return scale_of(norm, (-1,)), norm, (~ended).sum(-1)


def scale_of(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """A power of two near the largest magnitude over ``dim``, kept; 1 if that is 0 or not finite.

    A power of two, so that scaling by it rounds nothing.
    """
    largest = values.abs().amax(dim, keepdim=True) if values.numel() else values.sum(dim, True)
    exponent = torch.frexp(largest).exponent - 1
    return torch.where((largest > 0) & largest.isfinite(), torch.exp2(exponent.double()), 1.0)
