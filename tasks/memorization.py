"""Noiseless memorization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rnngrad.parts import COUNT, Interval
from rnngrad.task import TASKS, VariableLength


@TASKS.register("memorization")
@dataclass(frozen=True)
class Memorization(VariableLength):
    """Repeat a pattern after a delay; one wrong step makes the sequence wrong.

    ``n_positions`` symbols out of ``n_values``, ``length`` blanks, a marker, ``n_positions - 1``
    blanks, all one-hot; asked for are blanks, and from the marker on the pattern. With 4 positions
    and ``length`` 2::

        input   c a a b _ _ : _ _ _
        target  _ _ _ _ _ _ c a a b

    The 5-bit problem has 5 positions of 2 values, the 20-bit problem 10 of 5 (23 bits).

    A predictor without memory knows the blanks and guesses the pattern: it gets
    ``n_positions ln n_values / (length + 2 n_positions)``, in the mean over the lengths.

    Args:
        length: The delay; the sequence has ``T = length + 2 n_positions`` steps.
        min_length: If given, every batch draws its delay from ``min_length`` to ``length``.
        n_positions: Symbols in the pattern.
        n_values: Different symbols.

    Reference:
        Martens & Sutskever, "Learning recurrent neural networks with Hessian-free optimization",
        ICML 2011; Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural
        networks", ICML 2013, by its code.
    """

    last_step_only: ClassVar[bool] = False

    n_positions: Annotated[int, COUNT]
    n_values: Annotated[int, Interval(low=2, high=10**6)]

    @property
    def input_size(self) -> int:
        return self.n_values + 2

    @property
    def output_size(self) -> int:
        return self.n_values + 1

    @property
    def time_steps(self) -> int:
        return self.length + 2 * self.n_positions

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n, delay = self.n_positions, self.draw_length(generator)
        pattern = torch.randint(self.n_values, (n, batch_size), generator=generator)
        blank, marker = self.n_values, self.n_values + 1
        inputs = torch.full((delay + 2 * n, batch_size), blank)
        inputs[:n] = pattern
        inputs[n + delay] = marker
        targets = torch.full((delay + 2 * n, batch_size), blank)
        targets[-n:] = pattern
        return one_hot(inputs, self.input_size).float(), targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, mean over all ``T`` steps."""
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of sequences that are right at every step."""
        return (outputs.argmax(-1) == targets).all(0).float().mean()

    @property
    def chance_loss(self) -> float:
        nats = self.n_positions * math.log(self.n_values)
        return self.mean_over_lengths(lambda length: nats / (length + 2 * self.n_positions))

    def memoryless(self, targets: Tensor) -> Tensor:
        logits = torch.full((*targets.shape, self.output_size), -50.0)
        logits[: -self.n_positions, :, self.n_values] = 50
        logits[-self.n_positions :, :, : self.n_values] = 50
        return logits

    def solved(self, loss: float, accuracy: float) -> bool:
        """Under 1 % of sequences wrong (Pascanu 2013)."""
        return accuracy > 0.99
