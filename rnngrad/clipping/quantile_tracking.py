"""Clipping at a threshold that follows a quantile of the norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norm import clip_norm_
from rnngrad.parts import POSITIVE, Interval

_RANGE = math.exp(20)


@CLIPS.register("quantile_tracking")
@dataclass(frozen=True)
class QuantileTrackingClip(Clip):
    """Clips by norm at a threshold that follows a quantile of the norms.

    After each step ``C ← C exp(-η (b - γ))``, where ``b`` is 1 if the norm was at most ``C``, else
    0: it settles where a fraction ``γ`` of the norms lies below. ``C`` is all that is remembered,
    and stays within a factor of e^20 of its first value.

    Args:
        quantile: ``γ``.
        lr: ``η``, the largest change of ``log C`` a step.
        initial_norm: ``C`` at the first step.

    Reference:
        Andrew, Thakkar, McMahan & Ramaswamy, "Differentially private learning with adaptive
        clipping", NeurIPS 2021, the geometric update; there of the norms of clients' updates, and
        with noise.
    """

    quantile: Annotated[float, Interval(low=0, high=1)]
    lr: Annotated[float, POSITIVE]
    initial_norm: Annotated[float, POSITIVE]

    def initial_state(self) -> dict[str, Any]:
        return {"threshold": self.initial_norm}

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        threshold: float = state["threshold"]
        below = gradient.norm <= threshold
        outcome = clip_norm_(gradient, threshold)
        moved = threshold * math.exp(min(-self.lr * (below - self.quantile), 40.0))
        low, high = self.initial_norm / _RANGE, self.initial_norm * _RANGE
        state["threshold"] = min(max(moved, low), high)
        return outcome
