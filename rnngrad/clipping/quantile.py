"""Clipping at a quantile of the last norms."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.history import empty_window, quantile, remember
from rnngrad.clipping.norm import clip_norm_
from rnngrad.parts import Interval


@CLIPS.register("quantile")
@dataclass(frozen=True)
class QuantileClip(Clip):
    """Clips by norm at a quantile of the last norms, this step's not included.

    The first step is not clipped. The norm of all parameters is used, where the package of that
    name takes each parameter's by default.

    Args:
        quantile: From 0 to 1.
        history_length: Norms kept.

    Reference:
        github.com/pseeth/autoclip, ``QuantileClip`` with ``global_threshold``.
    """

    quantile: Annotated[float, Interval(low=0, high=1)]
    history_length: Annotated[int, Interval(low=1, high=10**7)]

    def initial_state(self) -> dict[str, Any]:
        return {**empty_window(), "ordered": []}

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        ordered: list[float] = state["ordered"]
        if ordered:
            outcome = clip_norm_(gradient, quantile(ordered, self.quantile))
        else:
            outcome = Outcome(clipped=False)
        displaced = remember(state, gradient.norm, self.history_length)
        if displaced is not None:
            del ordered[bisect_left(ordered, displaced)]
        insort(ordered, gradient.norm)
        return outcome
