"""Clipping by the global norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from rnngrad.clipping.base import CLIPS, Clip, refuse_above, total_norm
from rnngrad.parts import POSITIVE, Interval


@CLIPS.register("norm")
@dataclass(frozen=True)
class NormClip(Clip):
    """Scales the whole gradient by ``min(1, max_norm / ‖g‖_p)``; its direction stays.

    Without the epsilon of torch's: a gradient of norm at most ``max_norm`` is not touched.

    Args:
        max_norm: ``C``.
        norm_type: ``p``, at least 1; ``inf`` looks at the largest entry alone.

    Reference:
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, algorithm 1.
    """

    max_norm: Annotated[float, POSITIVE]
    norm_type: Annotated[float, Interval(low=1, without=())]

    def clip_(self, grads: Sequence[Tensor], norm: float) -> bool:
        if self.norm_type != 2:
            norm = total_norm(grads, self.norm_type)
        if norm <= self.max_norm:
            return False
        coef = self.max_norm / norm
        # a coefficient under float32's normal range would be rounded to few digits: in two steps
        factors = (coef,) if coef > 1e-30 else (coef**0.5, coef**0.5)
        for grad in grads:
            for factor in factors:
                grad.mul_(factor)
        refuse_above(self.max_norm, total_norm(grads, self.norm_type), grads)
        return True
