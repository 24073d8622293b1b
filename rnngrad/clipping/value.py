"""Clipping by value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norms import refuse_above, total_norm
from rnngrad.parts import POSITIVE


@CLIPS.register("value")
@dataclass(frozen=True)
class ValueClip(Clip):
    """Clamps every entry to ``[-clip_value, clip_value]``; the direction changes.

    Args:
        clip_value: The largest magnitude left.

    Reference:
        Mikolov, "Statistical language models based on neural networks", PhD thesis 2012, as
        described by Pascanu, Mikolov & Bengio 2013, section 3.1.
    """

    clip_value: Annotated[float, POSITIVE]

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        grads = gradient.grads
        if total_norm(grads, math.inf) <= self.clip_value:
            return Outcome(False, self.clip_value)
        for grad in grads:
            grad.clamp_(-self.clip_value, self.clip_value)
        refuse_above(self.clip_value, total_norm(grads, math.inf), grads)
        return Outcome(True, self.clip_value)
