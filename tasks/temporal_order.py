"""The temporal order problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rnngrad.parts import Interval
from rnngrad.task import TASKS, VariableLength


@TASKS.register("temporal_order")
@dataclass(frozen=True)
class TemporalOrder(VariableLength):
    """Say in which order two or three symbols X or Y came, far apart among others.

    All other steps show one of a, b, c, d, at random, all one-hot. After the last step the order is
    asked for: XX, XY, YX or YY, or one of XXX to YYY::

        c X d a a b Y c a d  ->  XY
        E d X b a c b Y a B  ->  XY      (hochreiter1997: E and B are its first and last symbol)

    ==============  ======  ===================  ==================================================
    form            inputs  ``T``                where X or Y stand (the first step is 0)
    ==============  ======  ===================  ==================================================
    pascanu2013     6       length               [.1 T, .2 T), [.5 T, .6 T); of three symbols
                                                 [.1 T, .2 T), [.3 T, .4 T), [.6 T, .7 T)
    hochreiter1997  8       [length, 1.1 length] of length 100: [10, 20], [50, 60]; of three
                                                 symbols [10, 20], [33, 43], [66, 76]
    ==============  ======  ===================  ==================================================

    A predictor that has seen nothing gets ``ln 4``, or ``ln 8``.

    Args:
        length: The least ``T``; at least 10.
        min_length: If given, every batch draws its length from ``min_length`` to ``length``.
        symbols: How many, 2 or 3.
        form: pascanu2013 or hochreiter1997.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", 1997, experiments 6a and 6b; Pascanu,
        Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, by its code.
    """

    last_step_only: ClassVar[bool] = True
    shortest: ClassVar[int] = 10

    symbols: Annotated[int, Interval(low=2, high=3)]
    form: Literal["pascanu2013", "hochreiter1997"]

    @property
    def input_size(self) -> int:
        return 6 if self.form == "pascanu2013" else 8

    @property
    def output_size(self) -> int:
        return int(2**self.symbols)

    @property
    def time_steps(self) -> int:
        return self.length + (self.length // 10 if self.form == "hochreiter1997" else 0)

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        length = steps = self.draw_length(generator)
        old = self.form == "hochreiter1997"
        if old:
            steps += int(torch.randint(length // 10 + 1, (), generator=generator))
        shown = 2 + torch.randint(4, (steps, batch_size), generator=generator)
        if old:
            shown[0], shown[-1] = 6, 7
        order = torch.randint(2, (self.symbols, batch_size), generator=generator)
        tenths, hundredths = ((1, 5), (10, 50)) if self.symbols == 2 else ((1, 3, 6), (10, 33, 66))
        for k in range(self.symbols):
            if old:
                low, high = hundredths[k] * length // 100, (hundredths[k] + 10) * length // 100 + 1
            else:
                low = tenths[k] * length // 10
                high = low + length // 10
            where = torch.randint(low, high, (1, batch_size), generator=generator)
            shown.scatter_(0, where, order[k : k + 1])
        place_values = 2 ** torch.arange(self.symbols - 1, -1, -1)
        return one_hot(shown, self.input_size).float(), place_values @ order

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return cross_entropy(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of sequences whose order is said right."""
        return (outputs.argmax(-1) == targets).float().mean()

    @property
    def chance_loss(self) -> float:
        return self.symbols * math.log(2)

    def memoryless(self, targets: Tensor) -> Tensor:
        return torch.zeros(*targets.shape, self.output_size)

    def solved(self, loss: float, accuracy: float) -> bool:
        """By form.

        With pascanu2013, under 1 % of sequences wrong (Pascanu 2013). With hochreiter1997, an error
        under 0.1 and no sequence wrong (experiment 6: of the 2000 most recent; there the error is
        the squared one of logistic outputs).
        """
        if self.form == "pascanu2013":
            return accuracy > 0.99
        return loss < 0.1 and accuracy == 1
