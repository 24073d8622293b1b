"""Parity of a sequence of bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rnngrad.task import TASKS, VariableLength


@TASKS.register("parity")
@dataclass(frozen=True)
class Parity(VariableLength):
    """Say whether the number of ones so far is odd.

    Every step shows a fair bit. Asked for is the parity after the last step, or after each::

        bits           1 0 1 1
        scored last          1
        scored every   1 1 0 1

    A predictor that has seen nothing gets ``ln 2``.

    Args:
        length: ``T``.
        min_length: If given, every batch draws its length from ``min_length`` to ``length``.
        scored: last or every.

    Reference:
        Bengio, Simard & Frasconi, "Learning long-term dependencies with gradient descent is
        difficult", IEEE Transactions on Neural Networks 1994 (last); Liu et al., "Transformers
        learn shortcuts to automata", ICLR 2023 (every).
    """

    input_size: ClassVar[int] = 1
    output_size: ClassVar[int] = 2

    scored: Literal["last", "every"]

    @property
    def last_step_only(self) -> bool:
        return self.scored == "last"

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        steps = self.draw_length(generator)
        bits = torch.randint(2, (steps, batch_size), generator=generator)
        parity = bits.cumsum(0) % 2
        return bits.unsqueeze(-1).float(), parity[-1] if self.last_step_only else parity

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, mean over the steps that are scored."""
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of right answers, over sequences and the steps that are scored."""
        return (outputs.argmax(-1) == targets).float().mean()

    @property
    def chance_loss(self) -> float:
        return math.log(2)

    def memoryless(self, targets: Tensor) -> Tensor:
        return torch.zeros(*targets.shape, self.output_size)

    def solved(self, loss: float, accuracy: float) -> bool:
        """Over 99 % of the answers right; the papers state no rule."""
        return accuracy > 0.99
