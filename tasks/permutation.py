"""The random permutation problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rnngrad.parts import Interval
from rnngrad.task import TASKS, VariableLength


@TASKS.register("permutation")
@dataclass(frozen=True)
class Permutation(VariableLength):
    """Say after the last step which of two symbols came first, in spite of all others.

    The first step shows symbol 0 or 1, every other step one of 2 to 99, at random, all one-hot;
    after the last step the first symbol comes again, and is asked for::

        1 57 8 91 33 8  ->  1

    The name is that of the first version, in which all symbols after the first were a permutation.

    A predictor that has seen nothing knows that it is one of the two and gets ``ln 2``.

    Args:
        length: ``T``.
        min_length: If given, every batch draws its length from ``min_length`` to ``length``.
        n_symbols: Different symbols, the first two included; 100 in the papers.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", 1997, experiment 2; Martens & Sutskever,
        "Learning recurrent neural networks with Hessian-free optimization", ICML 2011; Pascanu,
        Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, by its code: the last step alone is scored.
    """

    last_step_only: ClassVar[bool] = True

    n_symbols: Annotated[int, Interval(low=3, high=10**6)]

    @property
    def input_size(self) -> int:
        return self.n_symbols

    @property
    def output_size(self) -> int:
        return self.n_symbols

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        steps = self.draw_length(generator)
        shown = torch.randint(2, self.n_symbols, (steps, batch_size), generator=generator)
        first = torch.randint(2, (batch_size,), generator=generator)
        shown[0] = first
        return one_hot(shown, self.n_symbols).float(), first

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return cross_entropy(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of sequences whose first symbol is said; chance is 1/2."""
        return (outputs.argmax(-1) == targets).float().mean()

    @property
    def chance_loss(self) -> float:
        return math.log(2)

    def memoryless(self, targets: Tensor) -> Tensor:
        logits = torch.full((*targets.shape, self.n_symbols), -50.0)
        logits[:, :2] = 50
        return logits

    def solved(self, loss: float, accuracy: float) -> bool:
        """Under 1 % of sequences wrong (Pascanu 2013)."""
        return accuracy > 0.99
