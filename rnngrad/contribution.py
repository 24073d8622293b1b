"""What each time step adds to the gradient of the recurrent weight: ``g = ∂L/∂W_hh = Σ_t G_t``.

``G_t`` is as large as the weight. A kernel has it as a sum over the batch of outer products, ``Σ_b
α_{t,b} ⊗ h_{t-1,b}``, none of which is built here; a cell that autograd runs has it as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rnngrad.norms import norms, scale_of, weight_norms, wide_parts


class Total(NamedTuple):
    """A sum of ``G_t``, float64: ``matrix · 2^exponent``, which may be beyond its range."""

    matrix: Tensor
    exponent: int

    def plus(self, other: Total) -> Total:
        """The sum of both."""
        exponent = max(self.exponent, other.exponent)
        terms = [_scaled(one.matrix, one.exponent - exponent) for one in (self, other)]
        return Total(terms[0] + terms[1], exponent)


class Contribution(ABC):
    """``G_t`` of every time step.

    Attributes:
        steps: ``T``.
        exponent: Of 2: what the largest is about, so that the rest can be computed without under-
            or overflow.
    """

    steps: int
    exponent: int

    @abstractmethod
    def norms(self, gates: int = 1) -> Tensor:
        """``‖G_t‖_F [T, gates]`` of each gate's rows, float64 on the CPU.

        Without under- or overflow before the norm itself does.

        Args:
            gates: Equal blocks of rows.
        """

    @abstractmethod
    def total(self) -> Total:
        """``g = Σ_t G_t``."""

    @abstractmethod
    def _along(self, direction: Tensor) -> Tensor:
        """``⟨2^-exponent G_t, direction⟩ [T]``, all in float64."""

    def along(self, direction: Tensor) -> Tensor:
        """``⟨G_t, direction⟩ [T]``, float64 on the CPU.

        Args:
            direction: Shaped as ``weight_hh``, as a clipped gradient is.
        """
        unit, exponent = _unit(direction.detach())
        return _scaled(self._along(unit).cpu(), self.exponent + exponent)

    def shares(self, total: Total) -> Tensor:
        """``⟨G_t, g⟩ / ‖g‖² [T]``, float64 on the CPU, of any ``g``; NaN if it is exactly 0."""
        unit, exponent = _unit(total.matrix)
        found = (self._along(unit) / unit.square().sum()).cpu()
        return _scaled(found, self.exponent - total.exponent - exponent)

    def attribution(self) -> Tensor:
        """``s_t = ⟨G_t, g⟩ / ‖g‖² [T]``, which sum to 1, float64 on the CPU.

        To first order, a step against ``g`` lowers the loss by as much as it does; ``s_t`` is the
        share of that which time step ``t`` is to be credited with, negative where it works against
        the others. NaN if ``g`` is exactly 0.
        """
        return self.shares(self.total())


class OuterProducts(Contribution):
    """``G_t = Σ_b α_{t,b} ⊗ h_{t-1,b}``, and the same with the batch already summed.

    Args:
        alpha: ``∂L/∂`` pre-activations ``[T, B, gH]``.
        predecessors: ``h_{t-1} [T, B, P]``.
    """

    def __init__(self, alpha: Tensor, predecessors: Tensor) -> None:
        if alpha.device.type == "mps":  # has no float64
            alpha, predecessors = alpha.cpu(), predecessors.cpu()
        self.alpha, self.predecessors = alpha, predecessors
        self.steps, self.exponent = len(alpha), 0
        self._scales: list[Tensor] = []
        if alpha.dtype == torch.float64:  # the square of any other fits into it
            self._scales = [scale_of(values, (0, 1, 2)) for values in (alpha, predecessors)]
            self.exponent = sum(map(_exponent, self._scales))

    @classmethod
    def joined(cls, parts: Sequence[OuterProducts]) -> OuterProducts:
        """Those of successive parts of the sequence."""
        alpha = torch.cat([part.alpha for part in parts])
        return cls(alpha, torch.cat([part.predecessors for part in parts]))

    def norms(self, gates: int = 1) -> Tensor:
        blocks = self.alpha.unflatten(-1, (gates, -1)).unbind(-2)
        return torch.stack([weight_norms(block, self.predecessors) for block in blocks], -1)

    def total(self) -> Total:
        rows, columns = self.alpha.shape[-1], self.predecessors.shape[-1]
        matrix = self.alpha.new_zeros(rows, columns, dtype=torch.float64)
        for a, h in self._parts():
            matrix.addmm_(a.flatten(0, 1).t(), h.flatten(0, 1))
        return Total(matrix, self.exponent)

    def _along(self, direction: Tensor) -> Tensor:
        direction = direction.to(self.alpha.device).t()
        return torch.cat([a.mul_(h @ direction).sum((1, 2)) for a, h in self._parts()])

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pair in wide_parts(self.alpha, self.predecessors):
            for values, scale in zip(pair, self._scales, strict=False):
                values.div_(scale)
            yield pair


class StepGradients(Contribution):
    """``G_t`` themselves, one tensor a step.

    Args:
        grads: Shaped as the weight; ``None`` is 0.
        like: The weight.
    """

    def __init__(self, grads: Sequence[Tensor | None], like: Tensor) -> None:
        self.grads, self._like = list(grads), like.new_zeros(()).expand_as(like)
        self.steps = len(self.grads)
        largest = [grad.abs().amax() for grad in self.grads if grad is not None]
        self._scale = torch.ones(1, dtype=torch.float64)
        if largest:
            self._scale = scale_of(torch.stack(largest), (0,))
        self.exponent = _exponent(self._scale)

    def norms(self, gates: int = 1) -> Tensor:
        found = torch.zeros(self.steps, gates, dtype=torch.float64)
        for t, grad in enumerate(self.grads):
            if grad is not None:
                found[t] = norms(grad.reshape(gates, -1))
        return found

    def total(self) -> Total:
        matrix = torch.zeros_like(self._like, dtype=torch.float64)
        for grad in self.grads:
            if grad is not None:
                matrix += grad / self._scale
        return Total(matrix, self.exponent)

    def _along(self, direction: Tensor) -> Tensor:
        found = torch.zeros(self.steps, dtype=torch.float64)
        direction = direction.to(self._like.device)
        for t, grad in enumerate(self.grads):
            if grad is not None:
                found[t] = (grad / self._scale * direction).sum()
        return found


def _unit(values: Tensor) -> tuple[Tensor, int]:
    """``values = unit · 2^exponent`` in float64, with the unit's largest entry near 1."""
    scale = scale_of(values, tuple(range(values.dim())))
    return values / scale, _exponent(scale)


def _exponent(scale: Tensor) -> int:
    return int(torch.frexp(scale).exponent) - 1


def _scaled(values: Tensor, exponent: int) -> Tensor:
    """``values · 2^exponent``, whatever the exponent."""
    exponent = max(-2100, min(2046, exponent))
    half = exponent // 2  # 2^exponent itself may be beyond the range
    return values * 2.0**half * 2.0 ** (exponent - half)
