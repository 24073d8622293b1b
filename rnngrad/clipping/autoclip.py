"""AutoClip: a percentile of all norms so far."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.history import quantile
from rnngrad.clipping.norm import clip_norm_
from rnngrad.parts import Interval


@CLIPS.register("autoclip")
@dataclass(frozen=True)
class AutoClip(Clip):
    """Clips by norm at a percentile of all norms so far, this step's included.

    With the paper's percentile most steps are clipped: it is close to a normalised gradient whose
    length follows the small norms. The first step never is.

    Memory is bounded. Up to ``history_length`` steps the percentile is exact. Whenever the history
    is full, every second norm in order of size is dropped, and from then on every second step that
    would have been kept: what is left still stands for all of the past, evenly.

    Args:
        percentile: ``p``, from 0 to 100.
        history_length: Norms kept.

    Reference:
        Seetharaman, Wichern, Pardo & Le Roux, "AutoClip: adaptive gradient clipping for source
        separation networks", MLSP 2020; code at github.com/pseeth/autoclip.
    """

    percentile: Annotated[float, Interval(low=0, high=100)]
    history_length: Annotated[int, Interval(low=2, high=10**7)]

    def initial_state(self) -> dict[str, Any]:
        return {"ordered": [], "stride": 1, "seen": 0}

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        ordered: list[float] = state["ordered"]
        if len(ordered) == self.history_length and state["seen"] % state["stride"] == 0:
            del ordered[1::2]
            state["stride"] *= 2
        place = bisect_left(ordered, gradient.norm)
        ordered.insert(place, gradient.norm)
        outcome = clip_norm_(gradient, quantile(ordered, self.percentile / 100))
        if state["seen"] % state["stride"]:
            del ordered[place]
        state["seen"] += 1
        return outcome
