"""The adding problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rnngrad.parts import Interval
from rnngrad.task import TASKS, Task


@TASKS.register("adding")
@dataclass(frozen=True)
class Adding(Task):
    """Add the two marked numbers of a sequence.

    Each step shows a number from U[0, 1) and a marker; the marker is 1 once in the first half and
    once in the second. After the last step the sum of the two marked numbers is asked for::

        numbers  .3  .9  .4  .1  .7  .2
        marker    0   1   0   0   0   1      ->  1.1

    A predictor that has seen nothing says 1 and gets the variance of the sum, 1/6.

    Args:
        length: ``T``.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", 1997, experiment 4, in the form of
        Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", ICML 2016, section
        5.2: unsigned numbers, plain sum, mean squared error.
    """

    input_size: ClassVar[int] = 2
    output_size: ClassVar[int] = 1
    last_step_only: ClassVar[bool] = True

    length: Annotated[int, Interval(low=2, high=10**9)]

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half = self.length // 2
        numbers = torch.rand(self.length, batch_size, generator=generator)
        first = torch.randint(half, (1, batch_size), generator=generator)
        second = torch.randint(half, self.length, (1, batch_size), generator=generator)
        marked = torch.cat([first, second])
        marker = torch.zeros(self.length, batch_size).scatter_(0, marked, 1)
        target = numbers.gather(0, marked).sum(0)
        return torch.stack([numbers, marker], -1), target.unsqueeze(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return torch.nn.functional.mse_loss(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of sequences within 0.04 of the sum (Hochreiter & Schmidhuber 1997)."""
        return ((outputs - targets).abs() < 0.04).float().mean()

    @property
    def chance_loss(self) -> float:
        return 1 / 6

    def solved(self, loss: float, accuracy: float) -> bool:
        """Mean squared error under 0.01, a sixteenth of chance."""
        return loss < 0.01
