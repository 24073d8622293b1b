"""Copy memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rnngrad.task import TASKS, VariableLength


@TASKS.register("copy")
@dataclass(frozen=True)
class Copy(VariableLength):
    """Repeat ten symbols after a delay.

    Ten symbols out of eight, blanks, a marker, blanks; asked for are ``length + 10`` blanks and
    then the ten symbols. In the literature the marker stands in three places. With four symbols
    instead of ten, and ``length`` 3::

        arjovsky2016  c a h b _ _ : _ _ _ _      the marker, then the recall
        lezcano2019   c a h b _ _ _ : _ _ _      the marker at the first step of the recall
        tcn2018       c a h b _ _ : : : : :      markers to the end
        target        _ _ _ _ _ _ _ c a h b

    A step is one-hot, or one number: 1 to 8 for the symbols, 0 for a blank, 9 for the marker.

    A predictor without memory knows the blanks and guesses the symbols: it gets
    ``10 ln 8 / (length + 20)``, in the mean over the lengths.

    >>> round(TASKS.default("copy", length=100).chance_loss, 5)
    0.17329

    Args:
        length: The delay; the sequence has ``T = length + 20`` steps.
        min_length: If given, every batch draws its delay from ``min_length`` to ``length``; 1 is
            the variable copy task of Henaff et al. 2016.
        layout: Where the markers stand: arjovsky2016, lezcano2019 or tcn2018.
        coding: onehot (10 inputs) or scalar (1 input).

    Reference:
        Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", ICML 2016, section
        5.1, after Hochreiter & Schmidhuber 1997; the code of Lezcano-Casado & Martínez-Rubio,
        "Cheap orthogonal constraints in neural networks", ICML 2019; Bai, Kolter & Koltun, "An
        empirical evaluation of generic convolutional and recurrent networks for sequence
        modeling", 2018, which has coding scalar, as has the code of Kerg et al., "Non-normal
        recurrent neural network (nnRNN)", NeurIPS 2019; Henaff, Szlam & LeCun, "Recurrent
        orthogonal networks and long-memory tasks", ICML 2016.
    """

    SYMBOLS: ClassVar[int] = 8
    COPIED: ClassVar[int] = 10
    BLANK: ClassVar[int] = 8
    MARKER: ClassVar[int] = 9

    output_size: ClassVar[int] = 9
    last_step_only: ClassVar[bool] = False

    layout: Literal["arjovsky2016", "lezcano2019", "tcn2018"]
    coding: Literal["onehot", "scalar"]

    @property
    def input_size(self) -> int:
        return 10 if self.coding == "onehot" else 1

    @property
    def time_steps(self) -> int:
        return self.length + 2 * self.COPIED

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length = self.draw_length(generator)
        copied, steps = self.COPIED, length + 2 * self.COPIED
        symbols = torch.randint(self.SYMBOLS, (copied, batch_size), generator=generator)
        inputs = torch.full((steps, batch_size), self.BLANK)
        inputs[:copied] = symbols
        first = length + copied - (self.layout != "lezcano2019")
        inputs[first : None if self.layout == "tcn2018" else first + 1] = self.MARKER
        targets = torch.full((steps, batch_size), self.BLANK)
        targets[-copied:] = symbols
        if self.coding == "scalar":
            numbers = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 0, 9.0])
            return numbers[inputs].unsqueeze(-1), targets
        return one_hot(inputs, 10).float(), targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, mean over all ``T`` steps."""
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of right symbols among the ten that are recalled; chance is 1/8."""
        recalled = outputs[-self.COPIED :].argmax(-1)
        return (recalled == targets[-self.COPIED :]).float().mean()

    @property
    def chance_loss(self) -> float:
        nats = self.COPIED * math.log(self.SYMBOLS)
        return self.mean_over_lengths(lambda length: nats / (length + 2 * self.COPIED))

    def memoryless(self, targets: Tensor) -> Tensor:
        logits = torch.full((*targets.shape, self.output_size), -50.0)
        logits[: -self.COPIED, :, self.BLANK] = 50
        logits[-self.COPIED :, :, : self.SYMBOLS] = 50
        return logits

    def solved(self, loss: float, accuracy: float) -> bool:
        """99 % of the symbols recalled."""
        return accuracy >= 0.99
