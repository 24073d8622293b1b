"""The vanilla cell of Elman (1990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnngrad.cells.base import CELLS, CellPart
from rnngrad.nn import RNN


class RNNCell(torch.nn.RNNCell):
    """``h' = φ(W_ih x + b_ih + W_hh h + b_hh)``; parameters are torch.nn.RNNCell's.

    Reference:
        Elman, "Finding structure in time", Cognitive Science 1990.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        phi = torch.tanh if self.nonlinearity == "tanh" else torch.relu
        return phi(
            linear(input, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        )


@CELLS.register("rnn")
@dataclass(frozen=True)
class RNNPart(CellPart):
    """Vanilla RNN.

    Args:
        nonlinearity: ``tanh`` or ``relu``.
    """

    recomputes: ClassVar[bool] = True

    nonlinearity: Literal["tanh", "relu"]

    def cell(self, input_size: int) -> RNNCell:
        return RNNCell(input_size, self.hidden_size, nonlinearity=self.nonlinearity)

    def layers(self, input_size: int) -> RNN:
        return RNN(input_size, self.hidden_size, self.num_layers, nonlinearity=self.nonlinearity)
