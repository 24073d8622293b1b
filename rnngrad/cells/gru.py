"""The gated recurrent unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnngrad.bptt_clip import preactivation
from rnngrad.cells.base import CELLS, CellPart, chrono, gate_biases, set_gate_
from rnngrad.nn import GRU
from rnngrad.parts import FLOAT32, Interval


class GRUCell(torch.nn.GRUCell):
    """``h' = (1 - z) ∘ n + z ∘ h``; parameters are torch.nn.GRUCell's.

    Reset ``r`` and update ``z`` are ``σ`` of ``W_ih x + b_ih + W_hh h + b_hh``; the new state is
    ``n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn))``, the reset gate after the product.

    Reference:
        Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014.
    """

    gates = ("r", "z", "n")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        sizes = [2 * self.hidden_size, self.hidden_size]
        gates_x, new_x = linear(input, self.weight_ih, self.bias_ih).split(sizes, -1)
        gates_h, new_h = linear(h, self.weight_hh, self.bias_hh).split(sizes, -1)
        r, z = preactivation(gates_x + gates_h, 2).sigmoid().chunk(2, -1)
        n = preactivation(new_x + r * new_h, 1).tanh()
        return (1 - z) * n + z * h


@CELLS.register("gru")
@dataclass(frozen=True)
class GRUPart(CellPart):
    """GRU.

    Args:
        update_bias: Initial bias of the update gate, the sum of torch's two; ``null`` leaves both
            as initialised. In torch's form ``z`` keeps the old state, so that a positive bias means
            a longer memory.
        chrono_length: ``T_max``, the longest dependency expected. The update gates' biases then
            start at ``log U([1, T_max - 1])``, in place of ``update_bias``: that of leaky units in
            Tallec & Ollivier (2018), whose gate is ``1 - z``, and so minus theirs.

    Reference:
        Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014; Tallec
        & Ollivier, "Can recurrent neural networks warp time?", ICLR 2018.
    """

    update_bias: Annotated[float, FLOAT32] | None
    chrono_length: Annotated[int, Interval(low=2, high=10**9)] | None

    @property
    def recomputes(self) -> bool:
        return True

    def cell(self, input_size: int) -> GRUCell:
        return GRUCell(input_size, self.hidden_size)

    def layers(self, input_size: int) -> GRU:
        return GRU(input_size, self.hidden_size, self.num_layers)

    @torch.no_grad()
    def adjust_(self, module: torch.nn.Module) -> None:
        for biases in gate_biases(module, self.hidden_size):
            if self.chrono_length is not None:
                set_gate_(biases, 1, chrono(biases[0][1], self.chrono_length))
            elif self.update_bias is not None:
                set_gate_(biases, 1, self.update_bias)
