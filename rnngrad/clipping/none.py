"""No clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome


@CLIPS.register("none")
@dataclass(frozen=True)
class NoClip(Clip):
    """Measures, and changes nothing."""

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        return Outcome(clipped=False)
