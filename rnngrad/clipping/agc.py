"""Adaptive gradient clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from rnngrad.clipping.base import CLIPS, Clip, Gradient, Outcome
from rnngrad.clipping.norms import refuse_above
from rnngrad.norms import norms
from rnngrad.parts import POSITIVE, InputError


@CLIPS.register("agc")
@dataclass(frozen=True)
class AdaptiveGradientClip(Clip):
    """Scales each unit's gradient ``G_i`` by ``min(1, λ max(‖W_i‖, ε) / ‖G_i‖)``.

    A unit is a row of a matrix, in torch's layout the weights into one unit, or into one of its
    gates; and a bias vector as a whole. The direction stays within a unit.

    Args:
        clipping: ``λ``, the largest ratio of a gradient's norm to its weights'.
        eps: ``ε``, without which a unit whose weights are 0 could never leave it.
        exclude: The module that is left alone, the paper's last linear layer; null for none.

    Reference:
        Brock, De, Smith & Simonyan, "High-performance large-scale image recognition without
        normalization", ICML 2021, equation 3; defaults and ``exclude`` as in the authors' code.
    """

    clipping: Annotated[float, POSITIVE]
    eps: Annotated[float, POSITIVE]
    exclude: str | None

    def check(self, names: Sequence[str]) -> None:
        if self.exclude is not None and not any(map(self._excludes, names)):
            modules = sorted({name.rpartition(".")[0] for name in names} - {""})
            raise InputError(
                "exclude",
                self.exclude,
                f"must be null or the path of a module with parameters: {', '.join(modules)}",
            )

    def clip_(self, gradient: Gradient, state: dict[str, Any]) -> Outcome:
        clipped = False
        for name, parameter, grad in zip(
            gradient.names, gradient.parameters, gradient.grads, strict=True
        ):
            if self._excludes(name) or grad.numel() == 0:
                continue
            largest = self.clipping * norms(_units(parameter)).clamp_min(self.eps)
            norm = norms(_units(grad))
            above = norm > largest
            if not above.any():
                continue
            clipped = True
            coef = torch.where(above, largest / norm, 1.0).to(grad.device)
            ones = [1] * (grad.dim() - 1)
            # float64 with as many dimensions, so that the product is rounded once
            grad.mul_(coef.view(-1, *ones) if grad.dim() else coef.squeeze())
            refuse_above(1.0, (norms(_units(grad)) / largest).max().item(), [grad])
        return Outcome(clipped, self.clipping)

    def _excludes(self, name: str) -> bool:
        return self.exclude is not None and name.startswith(f"{self.exclude}.")


def _units(tensor: Tensor) -> Tensor:
    """One row a unit, ``[units, fan_in]``: of a matrix its rows, of a vector or a number itself."""
    return tensor.detach().reshape(len(tensor) if tensor.dim() > 1 else 1, -1)
