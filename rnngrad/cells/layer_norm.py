"""Layer normalisation inside the recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from rnngrad.cells.base import CELLS, CellPart, set_forget_bias_
from rnngrad.cells.normalized import NormalizedLSTMCell, NormalizedRNNCell
from rnngrad.parts import FLOAT32


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, called as a normaliser of a recurrence is; every time step is equal."""

    def __init__(self, num_features: int, shift: bool) -> None:
        super().__init__(num_features, bias=shift)

    def forward(self, a: Tensor, t: int = 0) -> Tensor:
        return super().forward(a)


@CELLS.register("ln_rnn")
@dataclass(frozen=True)
class LayerNormRNNPart(CellPart):
    """Vanilla RNN with layer normalisation of its pre-activations.

    The sum of both products is normalised over the units; gain 1 and bias 0 are learned.

    Args:
        nonlinearity: ``tanh`` or ``relu``.

    Reference:
        Ba, Kiros & Hinton, "Layer normalization", arXiv 1607.06450 (2016), eq. 4.
    """

    nonlinearity: Literal["tanh", "relu"]

    def cell(self, input_size: int) -> NormalizedRNNCell:
        return NormalizedRNNCell(input_size, self.hidden_size, LayerNorm, self.nonlinearity)


@CELLS.register("ln_lstm")
@dataclass(frozen=True)
class LayerNormLSTMPart(CellPart):
    """LSTM with layer normalisation of its gates and of what leaves its cell.

    Both products are normalised on their own, over all four gates' units at once, and ``c`` before
    its ``tanh``; gains start at 1. The paper's biases of the two products are one here, as only
    their sum counts.

    Args:
        forget_bias: Initial bias of the forget gate; ``null``: 0, as of the others.

    Reference:
        Ba, Kiros & Hinton, "Layer normalization", arXiv 1607.06450 (2016), supplement, eq. 20-22.
    """

    forget_bias: Annotated[float, FLOAT32] | None

    def cell(self, input_size: int) -> NormalizedLSTMCell:
        return NormalizedLSTMCell(input_size, self.hidden_size, LayerNorm)

    def adjust_(self, module: torch.nn.Module) -> None:
        set_forget_bias_(module, self.hidden_size, self.forget_bias)
