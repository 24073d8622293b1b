"""Norms that neither under- nor overflow before the gradient itself does.

They are accumulated in float64, scaled where even its square would leave the range: a float32 norm
is 0 about fifteen decades before the gradient is.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        scale = _scale(vectors, (-1,))
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
    steps, batch, rows = alpha.shape
    gram = batch * (rows + predecessors.shape[-1]) < rows * predecessors.shape[-1]
    cells = batch * batch if gram else rows * predecessors.shape[-1]
    chunk = max(1, 2**22 // max(1, cells))  # at most some 32 MiB of products at a time
    if alpha.device.type == "mps":
        alpha, predecessors = alpha.cpu(), predecessors.cpu()
    parts = []
    for start in range(0, steps, chunk):
        a = alpha[start : start + chunk].double()
        h = predecessors[start : start + chunk].double()
        scale_a, scale_h = _scale(a, (1, 2)), _scale(h, (1, 2))
        a, h = a / scale_a, h / scale_h
        if gram:
            squares = ((a @ a.mT) * (h @ h.mT)).sum((1, 2))
            part = squares.clamp_min(0).sqrt()
            # where the rows cancel, a difference of squares has lost the digits that are left
            cancelled = squares < 1e-5 * (a.norm(dim=-1) * h.norm(dim=-1)).sum(1).square()
            part[cancelled] = torch.linalg.matrix_norm(a[cancelled].mT @ h[cancelled])
        else:
            part = torch.linalg.matrix_norm(a.mT @ h)
        parts.append(part * (scale_a * scale_h).flatten())
    return torch.cat(parts).cpu()


def log10_rms(norm: Tensor) -> Tensor:
    """``log10`` of the root mean square over the batch, computed in log space.

    Args:
        norm: ``[T, B]``, float64.

    Returns:
        ``[T]``; ``-inf`` where every norm is exactly 0, NaN where one is NaN, as beyond the end of
        the shortest packed sequence.
    """
    scale = _scale(norm, (-1,))
    return (norm / scale).square().mean(-1).log10() / 2 + scale.squeeze(-1).log10()


def log10_mean(norm: Tensor) -> Tensor:
    """``log10`` of the mean over the batch, what most papers plot; ``[T, B] -> [T]``."""
    scale = _scale(norm, (-1,))
    return (norm / scale).mean(-1).log10() + scale.squeeze(-1).log10()


def _scale(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """A power of two near the largest magnitude over ``dim``, kept; 1 if that is 0 or not finite.

    A power of two, so that scaling by it rounds nothing.
    """
    largest = values.abs().amax(dim, keepdim=True) if values.numel() else values.sum(dim, True)
    exponent = torch.frexp(largest).exponent - 1
    return torch.where((largest > 0) & largest.isfinite(), torch.exp2(exponent.double()), 1.0)
