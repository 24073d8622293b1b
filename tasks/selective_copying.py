"""Selective copying."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rnngrad.parts import COUNT, Interval
from rnngrad.task import TASKS, VariableLength


@TASKS.register("selective_copying")
@dataclass(frozen=True)
class SelectiveCopying(VariableLength):
    """Repeat the tokens that came, in their order, and forget the noise between them.

    ``n_tokens`` tokens stand at random places among ``length`` steps of noise; then markers ask for
    them, all one-hot. With 3 tokens and ``length`` 5::

        input   _ c _ _ a _ c _ : : :
        target                  c a c

    A predictor without memory guesses among the ``vocabulary - 2`` tokens and gets
    ``ln(vocabulary - 2)``.

    Args:
        length: Steps of noise; the sequence has ``T = length + 2 n_tokens`` steps.
        min_length: If given, every batch draws its noise from ``min_length`` to ``length`` steps.
        n_tokens: Tokens to remember; 16 in the paper.
        vocabulary: Different inputs, the noise and the marker included; 16 in the paper, with
            sequences of 4096 steps.

    Reference:
        Gu & Dao, "Mamba: linear-time sequence modeling with selective state spaces", 2023, section
        4.1.1 and appendix E.1; data as in the code of Gu, Goel & Ré, "Efficiently modeling long
        sequences with structured state spaces", ICLR 2022.
    """

    last_step_only: ClassVar[bool] = False

    n_tokens: Annotated[int, COUNT]
    vocabulary: Annotated[int, Interval(low=4, high=10**6)]

    @property
    def input_size(self) -> int:
        return self.vocabulary

    @property
    def output_size(self) -> int:
        return self.vocabulary

    @property
    def time_steps(self) -> int:
        return self.length + 2 * self.n_tokens

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n, noise = self.n_tokens, self.draw_length(generator)
        tokens = torch.randint(1, self.vocabulary - 1, (n, batch_size), generator=generator)
        # the places of the n largest of as many random numbers are a random choice of n places
        where = torch.rand(noise + n, batch_size, generator=generator).topk(n, 0).indices
        inputs = torch.zeros(noise + 2 * n, batch_size, dtype=torch.int64)
        inputs.scatter_(0, where.sort(0).values, tokens)
        inputs[-n:] = self.vocabulary - 1
        targets = torch.zeros_like(inputs)
        targets[-n:] = tokens
        return one_hot(inputs, self.vocabulary).float(), targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, mean over the last ``n_tokens`` steps."""
        n = self.n_tokens
        return cross_entropy(outputs[-n:].flatten(0, 1), targets[-n:].flatten())

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of right tokens among those asked for."""
        n = self.n_tokens
        return (outputs[-n:].argmax(-1) == targets[-n:]).float().mean()

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocabulary - 2)

    def memoryless(self, targets: Tensor) -> Tensor:
        logits = torch.zeros(*targets.shape, self.vocabulary)
        logits[..., [0, -1]] = -50
        return logits

    def solved(self, loss: float, accuracy: float) -> bool:
        """Over 99 % of the tokens right; the paper states no rule, and reports up to 99.8 %."""
        return accuracy > 0.99
