"""The multiplication problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rnngrad.task import TASKS, VariableLength

from . import marked


@TASKS.register("multiplication")
@dataclass(frozen=True)
class Multiplication(VariableLength):
    """Multiply the two marked numbers of a sequence.

    Each step shows a number from U[0, 1) and a marker. After the last step the product of the two
    marked numbers is asked for, with a mean squared error. An excerpt::

        numbers  .3  .9  .4  .1  .7  .2
        marker    0   1   0   0   1   0      ->  .63

    ==============  ====================  =========================================================
    form            ``T``                 marked
    ==============  ====================  =========================================================
    pascanu2013     [length, 1.1 length)  one number in the first tenth, one in the next four tenths
    hochreiter1997  [length, 1.1 length]  one among the first ten, one in the first half; the first
                                          and last marker are -1
    ==============  ====================  =========================================================

    A predictor that has seen nothing says the mean, 1/4, and gets the variance of the product,
    7/144. With hochreiter1997 the first number is 1 if it was to be marked; with the probability
    ``q = 1/10 + 9/10 / (length/2 - 2)`` of that, the mean is ``(1 + q)/4`` and the variance
    ``(1 + 2q)/9 - (1 + q)²/16``.

    Args:
        length: The least ``T``; at least 10 with form pascanu2013, 6 with hochreiter1997.
        min_length: If given, every batch draws its length from ``min_length`` to ``length``.
        form: pascanu2013 or hochreiter1997.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", 1997, experiment 5; Pascanu, Mikolov &
        Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, by
        its code.
    """

    input_size: ClassVar[int] = 2
    output_size: ClassVar[int] = 1
    last_step_only: ClassVar[bool] = True

    form: Literal["pascanu2013", "hochreiter1997"]

    @property
    def shortest(self) -> int:
        return 10 if self.form == "pascanu2013" else 6

    @property
    def time_steps(self) -> int:
        return self.length + self.length // 10 - (self.form == "pascanu2013")

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length = self.draw_length(generator)
        if self.form == "pascanu2013":
            inputs, pair = marked.pascanu2013(length, batch_size, generator)
        else:
            inputs, pair = marked.hochreiter1997(length, batch_size, generator, low=0, neutral=1)
        return inputs, pair.prod(0).unsqueeze(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return torch.nn.functional.mse_loss(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of sequences with an error under 0.04; with pascanu2013, a squared error."""
        errors = (outputs - targets).abs()
        squared = self.form == "pascanu2013"
        return ((errors.square() if squared else errors) < 0.04).float().mean()

    @property
    def chance_loss(self) -> float:
        return (1 + 2 * self._q) / 9 - (1 + self._q) ** 2 / 16

    def memoryless(self, targets: Tensor) -> Tensor:
        return torch.full_like(targets, (1 + self._q) / 4)

    @property
    def _q(self) -> float:
        if self.form == "pascanu2013":
            return 0.0
        return self.mean_over_lengths(marked.first_step_is_marked)

    def solved(self, loss: float, accuracy: float) -> bool:
        """By form.

        With pascanu2013, under 1 % of sequences wrong (Pascanu 2013). With hochreiter1997, under 13
        in 2000 (experiment 5, the stricter of its two rules).
        """
        return accuracy > (0.99 if self.form == "pascanu2013" else 1 - 13 / 2000)
