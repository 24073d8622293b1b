"""Gradient normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norms import refuse_above, scale_, total_norm
from rnngrad.parts import POSITIVE


@CLIPS.register("normalize")
@dataclass(frozen=True)
class Normalize(Clip):
    """Scales every gradient to length 1: ``g / (‖g‖ + β)``; its direction stays.

    Small gradients grow as well, noise at a stationary point included. With plain SGD the step's
    length is the learning rate.

    Args:
        beta: ``β``; gradients much shorter than that shrink to 0.

    Reference:
        Zhang, He, Sra & Jadbabaie, "Why gradient clipping accelerates training", ICLR 2020,
        normalised gradient descent with step ``η / (‖g‖ + β)``.
    """

    beta: Annotated[float, POSITIVE]

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        length = gradient.norm + self.beta
        if length == 1:
            return Outcome(clipped=False)
        for grad in gradient.grads:
            scale_(grad, 1.0, length)
        after = total_norm(gradient.grads)
        refuse_above(1.0, after, gradient.grads)
        return Outcome(True, norm=after)
