"""ZClip: clipping of norms that stand out from their moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.history import mean_std
from rnngrad.clipping.norm import clip_norm_
from rnngrad.parts import COUNT, POSITIVE, Interval


@CLIPS.register("zclip")
@dataclass(frozen=True)
class ZClip(Clip):
    """Clips by norm where it lies ``z > z_threshold`` deviations above its moving average.

    ``z = (‖g‖ - μ) / (σ + ε μ)``, and the norm becomes ``μ + z_threshold² σ / z``: the further out,
    the nearer to the mean. μ and σ, of the first ``warmup_steps`` norms, become exponential
    averages of the norms that came after, clipped ones as clipped. During the warm-up, and at steps
    that do not stand out, only ``max_norm`` clips.

    Args:
        alpha: Of the averages: ``μ ← α μ + (1 - α) ‖g‖``, ``σ² ← α σ² + (1 - α) (‖g‖ - μ)²``.
        z_threshold: ``z*``.
        warmup_steps: Norms that the averages start from.
        max_norm: An upper limit at every step; null for none. The authors' code has 1.0, which
            makes it clipping by norm as soon as the norms exceed 1.
        eps: ``ε``, here in units of the mean, so that the rule does not depend on the loss's scale.

    Reference:
        Kumar, Owen, Chowdhury & Güra, "ZClip: adaptive spike mitigation for LLM pre-training",
        arXiv:2504.02507; code at github.com/bluorion-com/ZClip, mode ``zscore``, option
        ``adaptive_scaling``.
    """

    alpha: Annotated[float, Interval(low=0, high=1, without=(0, 1))]
    z_threshold: Annotated[float, POSITIVE]
    warmup_steps: Annotated[int, COUNT]
    max_norm: Annotated[float, POSITIVE] | None
    eps: Annotated[float, POSITIVE]

    def initial_state(self) -> dict[str, Any]:
        return {"warmup": [], "mean": 0.0, "std": 0.0}

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        norm = gradient.norm
        warmup: list[float] = state["warmup"]
        if len(warmup) < self.warmup_steps:
            warmup.append(norm)
            if len(warmup) == self.warmup_steps:
                state["mean"], state["std"] = mean_std(warmup, ddof=0)
            return self._clip(gradient, math.inf)
        mean, std = state["mean"], state["std"]
        scale = std + self.eps * mean
        limit = mean + self.z_threshold * scale
        target = math.inf
        if norm > limit:
            target = mean + self.z_threshold**2 * std * (scale / (norm - mean))
        taken = min(norm, target)
        state["mean"] = self.alpha * mean + (1 - self.alpha) * taken
        # as lengths, whose squares could leave the range
        state["std"] = math.hypot(
            math.sqrt(self.alpha) * std, math.sqrt(1 - self.alpha) * (taken - state["mean"])
        )
        outcome = self._clip(gradient, target)
        return outcome._replace(threshold=min(limit, self.max_norm or math.inf))

    def _clip(self, gradient: Gradient, threshold: float) -> Outcome:
        threshold = min(threshold, self.max_norm or math.inf)
        return clip_norm_(gradient, threshold) if threshold < math.inf else Outcome(clipped=False)
