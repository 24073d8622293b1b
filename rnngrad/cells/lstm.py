"""Long short-term memory, with a forget gate or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnngrad.bptt_clip import preactivation
from rnngrad.cells.base import CELLS, CellPart, chrono, gate_biases, set_forget_bias_, set_gate_
from rnngrad.nn import LSTM
from rnngrad.parts import FLOAT32, InputError, Interval


class LSTMCell(torch.nn.LSTMCell):
    """``c' = f ∘ c + i ∘ g``, ``h' = o ∘ tanh(c')``; parameters are torch.nn.LSTMCell's.

    The gates ``i, f, o`` are ``σ`` and ``g`` is ``tanh`` of ``W_ih x + b_ih + W_hh h + b_hh``.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997; the forget gate
        is Gers, Schmidhuber & Cummins, "Learning to forget", Neural Computation 2000.
    """

    gates = ("i", "f", "g", "o")

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        h, c = zeros(input, self.hidden_size) if hx is None else hx
        a = linear(input, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        i, f, g, o = preactivation(a, 4).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class NoForgetGateLSTMCell(torch.nn.RNNCellBase):
    """``c' = c + i ∘ g``, ``h' = o ∘ tanh(c')``: what is in ``c`` stays there.

    Parameters are named as torch.nn.LSTMCell's, with three blocks of rows, ``i, g, o``.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997, with ``tanh``
        in place of their scaled sigmoids; NFG in Greff et al., "LSTM: a search space odyssey",
        IEEE TNNLS 2017.
    """

    gates = ("i", "g", "o")

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, bias=True, num_chunks=3)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        h, c = zeros(input, self.hidden_size) if hx is None else hx
        a = linear(input, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)
        i, g, o = preactivation(a, 3).chunk(3, -1)
        c = c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


def zeros(input: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """``h_0`` and ``c_0``."""
    state = input.new_zeros(*input.shape[:-1], hidden_size)
    return state, state


@CELLS.register("lstm")
@dataclass(frozen=True)
class LSTMPart(CellPart):
    """LSTM.

    Args:
        forget_bias: Initial bias of the forget gate, the sum of torch's two; ``null`` leaves both
            as initialised, which vanishes almost as fast as a tanh RNN. 1 is what Gers (2000) and
            Jozefowicz, Zaremba & Sutskever (2015) advise.
        forget_gate: Without it ``c' = c + i ∘ g``, the form of 1997; takes ``forget_bias`` and
            ``chrono_length`` null, and is unrolled step by step. With it and a ``forget_bias`` of
            100, where float32 has it at 1 and its gradient at 0, the same is compiled.
        chrono_length: ``T_max``, the longest dependency expected. The forget gates' biases then
            start at ``log U([1, T_max - 1])``, in place of ``forget_bias``, and the input gates' at
            minus that, in place of ``input_bias`` (Tallec & Ollivier, 2018).
        input_bias: Initial biases of the input gates, the sums of torch's two, in as many equal
            shares of the units, in their order: ``[-2,-4]`` for two halves, as in experiment 6a of
            Hochreiter & Schmidhuber (1997). ``null`` leaves them as initialised.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 1997; Gers,
        Schmidhuber & Cummins, "Learning to forget", Neural Computation 2000; Tallec & Ollivier,
        "Can recurrent neural networks warp time?", ICLR 2018.
    """

    forget_bias: Annotated[float, FLOAT32] | None
    forget_gate: bool
    chrono_length: Annotated[int, Interval(low=2, high=10**9)] | None
    input_bias: tuple[Annotated[float, FLOAT32], ...] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("forget_bias", "chrono_length"):
            value = getattr(self, key)
            if value is not None and not self.forget_gate:
                raise InputError(key, value, "must be null where forget_gate is false")
        if self.input_bias == ():
            raise InputError("input_bias", [], "must have a number or more, or be null")

    @property
    def recomputes(self) -> bool:
        return self.forget_gate

    def cell(self, input_size: int) -> LSTMCell | NoForgetGateLSTMCell:
        return (LSTMCell if self.forget_gate else NoForgetGateLSTMCell)(
            input_size, self.hidden_size
        )

    def layers(self, input_size: int) -> torch.nn.Module:
        if not self.forget_gate:
            return super().layers(input_size)
        return LSTM(input_size, self.hidden_size, self.num_layers)

    @torch.no_grad()
    def adjust_(self, module: torch.nn.Module) -> None:
        if self.chrono_length is None:
            set_forget_bias_(module, self.hidden_size, self.forget_bias)
        for biases in gate_biases(module, self.hidden_size):
            if self.chrono_length is not None:
                forget = chrono(biases[0][1], self.chrono_length)
                set_gate_(biases, 1, forget)
                set_gate_(biases, 0, -forget)
            elif self.input_bias is not None:
                units = torch.arange(self.hidden_size)
                share = units * len(self.input_bias) // self.hidden_size
                set_gate_(biases, 0, torch.tensor(self.input_bias)[share])
