"""Soft clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norms import refuse_above, scale_, total_norm
from rnngrad.parts import POSITIVE


@CLIPS.register("soft")
@dataclass(frozen=True)
class SoftClip(Clip):
    """Scales the whole gradient smoothly, to a norm that approaches ``max_norm``.

    Every gradient shrinks, a small one hardly: read the coefficient, not how often it clips.

    Args:
        max_norm: ``C``.
        kind: ``rational``: ``g C / (C + ‖g‖)``; ``tanh``: ``g C tanh(‖g‖ / C) / ‖g‖``, closer to
            clipping by norm.

    Reference:
        ``rational``: Zhang, He, Sra & Jadbabaie, "Why gradient clipping accelerates training", ICLR
        2020, where ``η / (‖g‖ + β)`` with ``η = β = C`` is this.
    """

    max_norm: Annotated[float, POSITIVE]
    kind: Literal["rational", "tanh"]

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        norm, ratio = gradient.norm, gradient.norm / self.max_norm
        if self.kind == "rational":
            target = norm / (1 + ratio) if ratio < 1 else self.max_norm / (1 + 1 / ratio)
        elif ratio > 1e-4:
            target = self.max_norm * math.tanh(ratio)
        else:  # the first terms of the series, whose digits do not cancel
            target = norm * (1 - ratio * ratio / 3)
        if target == norm:
            return Outcome(False, self.max_norm)
        for grad in gradient.grads:
            scale_(grad, target, norm)
        after = total_norm(gradient.grads)
        refuse_above(self.max_norm, after, gradient.grads)
        return Outcome(True, self.max_norm, norm=after)
