"""The gated recurrent unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnngrad.cells.base import CELLS, CellPart
from rnngrad.nn import GRU


class GRUCell(torch.nn.GRUCell):
    """``h' = (1 - z) ∘ n + z ∘ h``; parameters are torch.nn.GRUCell's.

    Reset ``r`` and update ``z`` are ``σ`` of ``W_ih x + b_ih + W_hh h + b_hh``; the new state is
    ``n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn))``, the reset gate after the product.

    Reference:
        Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        from_input = linear(input, self.weight_ih, self.bias_ih).chunk(3, -1)
        from_hidden = linear(h, self.weight_hh, self.bias_hh).chunk(3, -1)
        r = (from_input[0] + from_hidden[0]).sigmoid()
        z = (from_input[1] + from_hidden[1]).sigmoid()
        n = (from_input[2] + r * from_hidden[2]).tanh()
        return (1 - z) * n + z * h


@CELLS.register("gru")
@dataclass(frozen=True)
class GRUPart(CellPart):
    """GRU."""

    recomputes: ClassVar[bool] = True

    def cell(self, input_size: int) -> GRUCell:
        return GRUCell(input_size, self.hidden_size)

    def layers(self, input_size: int) -> GRU:
        return GRU(input_size, self.hidden_size, self.num_layers)
