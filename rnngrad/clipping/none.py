"""No clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rnngrad.clipping.base import CLIPS, Clip


@CLIPS.register("none")
@dataclass(frozen=True)
class NoClip(Clip):
    """Measures, and changes nothing."""

    def clip_(self, grads: Sequence[Tensor], norm: float) -> bool:
        return False
