"""Clipping by the global norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norms import refuse_above, scale_, total_norm
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

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        return clip_norm_(gradient, self.max_norm, self.norm_type)


def clip_norm_(gradient: Gradient, max_norm: float, norm_type: float = 2.0) -> Outcome:
    """Scales the whole gradient to norm ``max_norm`` if its norm is above."""
    grads = gradient.grads
    norm = gradient.norm if norm_type == 2 else total_norm(grads, norm_type)
    if norm <= max_norm:
        return Outcome(clipped=False, threshold=max_norm)
    if norm == math.inf:  # of a finite gradient, as norms of p < 2 may be: of a part of it
        for grad in grads:
            grad.mul_(2.0**-500)
        norm = total_norm(grads, norm_type)
    for grad in grads:
        scale_(grad, max_norm, norm)
    after = total_norm(grads, norm_type)
    refuse_above(max_norm, after, grads)
    return Outcome(True, max_norm, norm=after if norm_type == 2 else None)
