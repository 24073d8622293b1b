"""The vanilla cell of Elman (1990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnngrad.bptt_clip import preactivation
from rnngrad.cells.base import CELLS, CellPart
from rnngrad.cells.nonlinearity import NONLINEARITIES
from rnngrad.kernels.activations import ACTIVATIONS
from rnngrad.nn import RNN


class RNNCell(torch.nn.RNNCell):
    """``h' = φ(W_ih x + b_ih + W_hh h + b_hh)``; parameters are torch.nn.RNNCell's.

    ``φ`` is one of ``rnngrad.cells.nonlinearity``; its own parameters, if any, are ``phi.*``.

    Reference:
        Elman, "Finding structure in time", Cognitive Science 1990.
    """

    gates = ("h",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self.phi = NONLINEARITIES[nonlinearity](hidden_size).to(device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        a = linear(input, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        phi: Tensor = self.phi(preactivation(a, 1))
        return phi


@CELLS.register("rnn")
@dataclass(frozen=True)
class RNNPart(CellPart):
    """Vanilla RNN.

    Args:
        nonlinearity: ``leaky_relu`` has slope 0.01, ``elu`` α = 1. Two have parameters, and no
            kernel: ``prelu`` one learned slope for negative values, which starts at 0.25 (He et
            al., 2015), ``modrelu`` a learned bias per unit (Arjovsky, Shah & Bengio, 2016).

    Reference:
        Elman, "Finding structure in time", Cognitive Science 1990.
    """

    nonlinearity: Literal[
        "tanh", "sigmoid", "relu", "leaky_relu", "prelu", "elu", "linear", "modrelu"
    ]

    @property
    def recomputes(self) -> bool:
        return self.nonlinearity in ACTIVATIONS

    def cell(self, input_size: int) -> RNNCell:
        return RNNCell(input_size, self.hidden_size, nonlinearity=self.nonlinearity)

    def layers(self, input_size: int) -> torch.nn.Module:
        if not self.recomputes:
            return super().layers(input_size)
        return RNN(input_size, self.hidden_size, self.num_layers, nonlinearity=self.nonlinearity)
