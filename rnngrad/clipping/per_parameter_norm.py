"""Clipping by the norm of each parameter's gradient."""

from __future__ import annotations

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
        clipped = False
        for grad, norm in zip(gradient.grads, tensor_norms(gradient.grads), strict=True):
            if norm > self.max_norm:
                scale_(grad, self.max_norm / norm)
                clipped = True
        if clipped:
            refuse_above(self.max_norm, max(tensor_norms(gradient.grads)), gradient.grads)
        return Outcome(clipped, self.max_norm)
