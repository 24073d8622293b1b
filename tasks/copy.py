"""Copy memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rnngrad.parts import COUNT
from rnngrad.task import TASKS, Task


@TASKS.register("copy")
@dataclass(frozen=True)
class Copy(Task):
    """Repeat ten symbols after a delay.

    Ten symbols out of eight, ``length - 1`` blanks, a marker, ten blanks, all one-hot; asked for
    are ``length + 10`` blanks and then the ten symbols. With four symbols and ``length`` 3::

        input   c a h b _ _ : _ _ _ _
        target  _ _ _ _ _ _ _ c a h b

    A predictor without memory knows the blanks and guesses the symbols: it gets
    ``10 ln 8 / (length + 20)``.

    Args:
        length: The delay; the sequence has ``T = length + 20`` steps.

    Reference:
        Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", ICML 2016, section
        5.1, after Hochreiter & Schmidhuber 1997.
    """

    SYMBOLS: ClassVar[int] = 8
    COPIED: ClassVar[int] = 10
    BLANK: ClassVar[int] = 8
    MARKER: ClassVar[int] = 9

    input_size: ClassVar[int] = 10
    output_size: ClassVar[int] = 9
    last_step_only: ClassVar[bool] = False

    length: Annotated[int, COUNT]

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        copied, steps = self.COPIED, self.length + 2 * self.COPIED
        symbols = torch.randint(self.SYMBOLS, (copied, batch_size), generator=generator)
        inputs = torch.full((steps, batch_size), self.BLANK)
        inputs[:copied] = symbols
        inputs[self.length + copied - 1] = self.MARKER
        targets = torch.full((steps, batch_size), self.BLANK)
        targets[-copied:] = symbols
        return one_hot(inputs, self.input_size).float(), targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, mean over all ``T`` steps."""
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of right symbols among the ten that are recalled; chance is 1/8."""
        recalled = outputs[-self.COPIED :].argmax(-1)
        return (recalled == targets[-self.COPIED :]).float().mean()

    @property
    def chance_loss(self) -> float:
        return self.COPIED * math.log(self.SYMBOLS) / (self.length + 2 * self.COPIED)

    def solved(self, loss: float, accuracy: float) -> bool:
        """99 % of the symbols recalled."""
        return accuracy >= 0.99
