"""What every clip rule shares: finite first, then the rule, then a report that was measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnngrad.parts import Part, Registry


@dataclass(frozen=True)
class ClipReport:
    """What one call did.

    Args:
        norm_pre: L2 norm of the whole gradient before the rule, in float64.
        norm_post: The same after it, measured and not computed.
        coef: ``norm_post / norm_pre``; 1 if there was nothing to scale.
        clipped: Whether the rule changed the gradient.
        finite: False if an entry was NaN or infinite; the gradient is then left as it was.
    """

    norm_pre: float
    norm_post: float
    coef: float
    clipped: bool
    finite: bool


@dataclass(frozen=True)
class Clip(Part, ABC):
    """A clip rule; call it on the parameters between ``backward()`` and ``step()``."""

    def __call__(self, parameters: Iterable[Tensor]) -> ClipReport:
        """Clips the gradients of ``parameters`` in place.

        Raises:
            RuntimeError: No parameter has a gradient, as before ``backward()``; or the gradient
                does not keep to the threshold afterwards.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            raise RuntimeError(
                "clip: no parameter has a gradient; clip between loss.backward() and "
                "optimizer.step()"
            )
        with torch.no_grad():
            pre = total_norm(grads)
            # a finite norm has no other entries; an infinite one may be float64's own limit
            if not (math.isfinite(pre) or all(bool(grad.isfinite().all()) for grad in grads)):
                return ClipReport(pre, pre, 1.0, clipped=False, finite=False)
            clipped = self.clip_(grads, pre)
            post = total_norm(grads) if clipped else pre
        return ClipReport(pre, post, post / pre if pre else 1.0, clipped, finite=True)

    @abstractmethod
    def clip_(self, grads: Sequence[Tensor], norm: float) -> bool:
        """Applies the rule to finite gradients in place; true if it changed them.

        Args:
            grads: All of a model's.
            norm: Their L2 norm, as one vector.
        """


CLIPS: Registry[Clip] = Registry("clip", "rnngrad.clipping")


def total_norm(grads: Sequence[Tensor], norm_type: float = 2.0) -> float:
    """The norm of all gradients as one vector, in float64.

    Gradients whose norm leaves the range of float64 only on the way are scaled by their largest
    entry: a finite gradient has a finite norm, and only a gradient of zeros has norm 0.

    Args:
        grads: Tensors of any shapes and dtypes.
        norm_type: ``p >= 1``, or infinity.

    Returns:
        ``(Σ |g|^p)^(1/p)``; NaN if an entry is NaN.
    """
    if norm_type in (1, 2, math.inf):  # the powers of others leave the range much earlier
        norm = _norm(grads, norm_type)
        if 1e-140 < norm < math.inf or math.isnan(norm):
            return norm
    largest = _norm(grads, math.inf)
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * _norm([grad.double() / largest for grad in grads], norm_type)


def _norm(grads: Sequence[Tensor], norm_type: float) -> float:
    parts = [
        norm.cpu() for norm in torch._foreach_norm(list(grads), norm_type, dtype=torch.float64)
    ]
    return float(torch.linalg.vector_norm(torch.stack(parts), norm_type))


def refuse_above(threshold: float, value: float, grads: Sequence[Tensor]) -> None:
    """The rules' invariant: after clipping, at most the threshold, to the gradients' rounding."""
    rounding = max(1e-6, *(4 * torch.finfo(grad.dtype).eps for grad in grads))
    if value > threshold * (1 + rounding):
        raise RuntimeError(f"clip: {value!r} after clipping at {threshold!r}; this is a bug")
