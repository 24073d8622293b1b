"""Long short-term memory with a forget gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnngrad.cells.base import CELLS, CellPart
from rnngrad.nn import LSTM
from rnngrad.parts import Interval


class LSTMCell(torch.nn.LSTMCell):
    """``c' = f ∘ c + i ∘ g``, ``h' = o ∘ tanh(c')``; parameters are torch.nn.LSTMCell's.

    The gates ``i, f, o`` are ``σ`` and ``g`` is ``tanh`` of ``W_ih x + b_ih + W_hh h + b_hh``.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997; the forget gate
        is Gers, Schmidhuber & Cummins, "Learning to forget", Neural Computation 2000.
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros)
        h, c = hx
        gates = linear(input, self.weight_ih, self.bias_ih) + linear(
            h, self.weight_hh, self.bias_hh
        )
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


@CELLS.register("lstm")
@dataclass(frozen=True)
class LSTMPart(CellPart):
    """LSTM.

    Args:
        forget_bias: Initial bias of the forget gate, the sum of torch's two; ``null`` leaves both
            as initialised, which vanishes almost as fast as a tanh RNN. 1 is what Gers (2000) and
            Jozefowicz, Zaremba & Sutskever (2015) advise.
    """

    recomputes: ClassVar[bool] = True

    forget_bias: Annotated[float, Interval()] | None

    def cell(self, input_size: int) -> LSTMCell:
        return LSTMCell(input_size, self.hidden_size)

    def layers(self, input_size: int) -> LSTM:
        return LSTM(input_size, self.hidden_size, self.num_layers)

    @torch.no_grad()
    def adjust_(self, module: torch.nn.Module) -> None:
        if self.forget_bias is None:
            return
        for name, parameter in module.named_parameters():
            if "bias" in name:
                forget = parameter[self.hidden_size : 2 * self.hidden_size]
                forget.fill_(self.forget_bias if "bias_ih" in name else 0)
