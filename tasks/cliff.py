"""The cliff of one recurrent unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from rnngrad.parts import COUNT
from rnngrad.task import TASKS, Task


@TASKS.register("cliff")
@dataclass(frozen=True)
class Cliff(Task):
    """Bring one unit without input to 0.7, over the steep wall in its error surface.

    In the paper's terms ``x_t = w σ(x_{t-1}) + b``, ``x_0 = 0.5``, and the error is
    ``(σ(x_T) - 0.7)²``. With ``s_t = σ(x_t)`` that is an RNN of one sigmoid unit without a
    read-out, ``s_t = σ(w s_{t-1} + b)`` from ``s_0 = σ(0.5)``, whose input is always 0 and whose
    output is ``s_T``::

        0 0 0 0 ... 0  ->  0.7

    At ``w = 5`` and ``T = 50`` the error falls from 0.34 to 0.01 between ``b = -2.613`` and -2.612,
    and its gradient there reaches 6,800; at -2.45 and at -3 it is 0.1. The unit is cell=rnn
    cell.nonlinearity=sigmoid cell.hidden_size=1; it has two biases, which are added, so that their
    sum moves twice as far in a step as the paper's one.

    There is nothing to remember; as chance counts a unit with ``w = b = 0``, which says 1/2 and
    gets 0.04.

    Args:
        length: ``T``; 50 in the paper.

    Reference:
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, section 2.3 and figure 6.
    """

    input_size: ClassVar[int] = 1
    output_size: ClassVar[int] = 1
    last_step_only: ClassVar[bool] = True
    reads_out: ClassVar[bool] = False
    initial_hidden: ClassVar[float] = 1 / (1 + math.exp(-0.5))

    TARGET: ClassVar[float] = 0.7

    length: Annotated[int, COUNT]

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``batch_size`` times the same; nothing is drawn."""
        return torch.zeros(self.length, batch_size, 1), torch.full((batch_size, 1), self.TARGET)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return torch.nn.functional.mse_loss(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1 if the unit ends within 0.04 of 0.7, otherwise 0."""
        return ((outputs - targets).abs() < 0.04).float().mean()

    @property
    def chance_loss(self) -> float:
        return (0.5 - self.TARGET) ** 2

    def memoryless(self, targets: Tensor) -> Tensor:
        return torch.full_like(targets, 0.5)

    def solved(self, loss: float, accuracy: float) -> bool:
        """An error under 0.001, a fortieth of chance; the paper follows the path, not the end."""
        return loss < 0.001
