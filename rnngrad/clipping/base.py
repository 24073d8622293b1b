"""What a clip rule is: settings that see a gradient, change it in place, and say what they did."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from rnngrad.parts import Part, Registry


class Gradient(NamedTuple):
    """What a rule sees: every entry finite, and not all of them 0.

    Args:
        names: Of the parameters that have a gradient, as in ``model.named_parameters()``.
        parameters: In the same order; a rule only reads them.
        grads: Theirs, which the rule changes in place.
        norm: L2 norm of all gradients as one vector, in float64.
    """

    names: Sequence[str]
    parameters: Sequence[Tensor]
    grads: Sequence[Tensor]
    norm: float


class Outcome(NamedTuple):
    """What a rule did.

    Args:
        clipped: Whether it changed the gradient.
        threshold: Above which it does, in terms of what the rule compares; NaN without one.
        skip: The optimiser must not step.
        norm: L2 norm of the gradient now, if the rule has measured it; else it will be.
    """

    clipped: bool
    threshold: float = math.nan
    skip: bool = False
    norm: float | None = None


@dataclass(frozen=True)
class ClipReport:
    """What one call did.

    Args:
        norm_pre: L2 norm of the whole gradient before the rule, in float64.
        norm_post: The same after it, measured and not computed.
        coef: ``norm_post / norm_pre``; 1 if there was nothing to scale.
        clipped: Whether the rule changed the gradient.
        finite: False if an entry was NaN or infinite, or the norm beyond float64; gradient and
            state are then left as they were.
        threshold: Above which the rule clips, in terms of what it compares; NaN if it had none.
        skipped: The rule wants no step: the gradient is 0, and the optimiser must not be called.
    """

    norm_pre: float
    norm_post: float
    coef: float
    clipped: bool
    finite: bool
    threshold: float = math.nan
    skipped: bool = False


@dataclass(frozen=True)
class Clip(Part, ABC):
    """A clip rule's settings; a ``Clipper`` applies it to a model, and keeps its state."""

    def check(self, names: Sequence[str]) -> None:
        """Refuses a model that the settings do not suit.

        Args:
            names: Of all its parameters.

        Raises:
            InputError: A setting names something that the model does not have.
        """

    def initial_state(self) -> dict[str, Any]:
        """What the rule remembers, before the first step: plain numbers, and lists of them."""
        return {}

    @abstractmethod
    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        """Applies the rule in place.

        Args:
            gradient: Of one step. One that is not finite, or all zeros, is never shown to a rule.
            state: What ``initial_state`` made and the rule has changed since.
        """


CLIPS: Registry[Clip] = Registry("clip", "rnngrad.clipping")
