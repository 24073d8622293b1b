"""Clipping by the norm of each parameter's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norms import refuse_above, scale_, tensor_norms
from rnngrad.parts import POSITIVE


@CLIPS.register("per_parameter_norm")
@dataclass(frozen=True)
class PerParameterNormClip(Clip):
    """Scales each parameter's gradient ``g_i`` by ``min(1, max_norm / ‖g_i‖₂)``.

    The direction stays within a parameter and changes between them: of a recurrent layer, the
    matrices are clipped long before the biases are.

    Args:
        max_norm: ``C``, of every parameter.

    Reference:
        Keras, ``keras.optimizers.Optimizer(clipnorm=...)``.
    """

    max_norm: Annotated[float, POSITIVE]

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        max_norm, grads = self.max_norm, gradient.grads
        norms = tensor_norms(grads) if gradient.norm > max_norm else [0.0]
        if max(norms) <= max_norm:
            return Outcome(False, max_norm)
        for grad, norm in zip(grads, norms, strict=True):
            if norm > max_norm:
                scale_(grad, max_norm, norm)
        norms = tensor_norms(grads)
        refuse_above(max_norm, max(norms), grads)
        return Outcome(True, max_norm, norm=math.hypot(*norms))
