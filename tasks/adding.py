"""The adding problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from rnngrad.parts import Interval
from rnngrad.task import TASKS, VariableLength

from . import marked


@TASKS.register("adding")
@dataclass(frozen=True)
class Adding(VariableLength):
    """Add the two marked numbers of a sequence.

    Each step shows a number and a marker. After the last step the sum of the two marked numbers is
    asked for, with a mean squared error; with form ``sum``::

        numbers  .3  .9  .4  .1  .7  .2
        marker    0   1   0   0   0   1      ->  1.1

    ======  =======  ==============  ===================  =====================================
    form    numbers  target          ``T``                marked
    ======  =======  ==============  ===================  =====================================
    sum     [0, 1)   X1 + X2         length               one in each half
    mean    [0, 1)   (X1 + X2)/2     [length, 1.1 length) in the first tenth, in the next four
    signed  [-1, 1)  .5 + (X1+X2)/4  [length, 1.1 length] in the first ten, in the first half
    ======  =======  ==============  ===================  =====================================

    A predictor that has seen nothing says the mean (1; 1/2; 1/2) and gets the variance of the
    target: 1/6 with sum, 1/24 with mean, and with signed ``(2 - q) / 48``, where ``q`` is how
    probable it is that the first step is chosen, whose marker is -1 and whose number is then 0:
    ``q = 1/10 + 9/10 / (length/2 - 2)``.

    Args:
        length: The least ``T``; at least 10 with form mean, 6 with signed.
        min_length: If given, every batch draws its length from ``min_length`` to ``length``.
        form: sum (Arjovsky 2016), mean (Pascanu 2013) or signed (Hochreiter & Schmidhuber 1997).

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", 1997, experiment 4 (signed); Arjovsky,
        Shah & Bengio, "Unitary evolution recurrent neural networks", ICML 2016, section 5.2 (sum);
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, by its code (mean).
    """

    input_size: ClassVar[int] = 2
    output_size: ClassVar[int] = 1
    last_step_only: ClassVar[bool] = True

    length: Annotated[int, Interval(low=2, high=10**9)]
    form: Literal["sum", "mean", "signed"]

    @property
    def shortest(self) -> int:
        return {"sum": 2, "mean": 10, "signed": 6}[self.form]

    @property
    def time_steps(self) -> int:
        tenth = self.length // 10
        return self.length + {"sum": 0, "mean": tenth - 1, "signed": tenth}[self.form]

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length = self.draw_length(generator)
        if self.form == "mean":
            inputs, pair = marked.pascanu2013(length, batch_size, generator)
            return inputs, pair.mean(0).unsqueeze(-1)
        if self.form == "signed":
            inputs, pair = marked.hochreiter1997(length, batch_size, generator, low=-1, neutral=0)
            return inputs, (0.5 + pair.sum(0) / 4).unsqueeze(-1)
        half = length // 2
        numbers = torch.rand(length, batch_size, generator=generator)
        first = torch.randint(half, (1, batch_size), generator=generator)
        second = torch.randint(half, length, (1, batch_size), generator=generator)
        both = torch.cat([first, second])
        marker = torch.zeros(length, batch_size).scatter_(0, both, 1)
        target = numbers.gather(0, both).sum(0)
        return torch.stack([numbers, marker], -1), target.unsqueeze(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return torch.nn.functional.mse_loss(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of sequences with an error under 0.04; with form mean, a squared error."""
        errors = (outputs - targets).abs()
        return ((errors.square() if self.form == "mean" else errors) < 0.04).float().mean()

    @property
    def chance_loss(self) -> float:
        if self.form == "signed":
            return (2 - self.mean_over_lengths(marked.first_step_is_marked)) / 48
        return {"sum": 1 / 6, "mean": 1 / 24}[self.form]

    def memoryless(self, targets: Tensor) -> Tensor:
        return torch.full_like(targets, 1.0 if self.form == "sum" else 0.5)

    def solved(self, loss: float, accuracy: float) -> bool:
        """By form.

        With sum, a mean squared error under 0.01, a sixteenth of chance. With mean, under 1 % of
        sequences wrong (Pascanu 2013). With signed, an error under 0.01 and no
        sequence wrong (Hochreiter & Schmidhuber 1997: of the 2000 most recent).
        """
        if self.form == "mean":
            return accuracy > 0.99
        return loss < 0.01 and (self.form == "sum" or accuracy == 1)
