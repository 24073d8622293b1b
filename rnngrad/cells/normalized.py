"""Cells whose pre-activations are normalised at every time step, by whatever normaliser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rnngrad.bptt_clip import preactivation
from rnngrad.cells.base import CellModule
from rnngrad.cells.nonlinearity import NONLINEARITIES

Normalization = Callable[[int, bool], nn.Module]
"""``(number of features, whether it shifts them too)`` -> a module called with ``(a, t)``."""


class NormalizedRNNCell(CellModule):
    """``h' = φ(N(W_ih x + W_hh h) + b)``: the normaliser has a gain, the cell the bias.

    The sum is normalised as a whole, as in Ba et al. (2016), eq. 4, and in the code of Cooijmans et
    al. (2017). Weights start orthogonal, ``b`` at 0.
    """

    takes_time = True
    gates = ("h",)

    def __init__(
        self, input_size: int, hidden_size: int, normalization: Normalization, nonlinearity: str
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.norm = normalization(hidden_size, False)
        self.nonlinearity = nonlinearity
        self.phi = NONLINEARITIES[nonlinearity](hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _orthogonal_(self)

    def forward(self, input: Tensor, hx: Tensor | None = None, t: int = 0) -> Tensor:
        h = self.zeros(input) if hx is None else hx
        a = self.norm(linear(input, self.weight_ih) + linear(h, self.weight_hh), t) + self.bias_ih
        phi: Tensor = self.phi(preactivation(a, 1))
        return phi


class NormalizedLSTMCell(CellModule):
    """An LSTM whose gates see ``N(W_ih x) + N(W_hh h) + b``, and with ``h' = o ∘ tanh(N(c'))``.

    Each of the three normalisers has a gain, that of ``c'`` a shift too; ``c'`` itself stays as it
    is, so that the gradient through it does. Blocks of rows are torch's, ``i, f, g, o``. Weights
    start orthogonal, gate by gate; ``b`` and the shift at 0.
    """

    takes_time = True
    gates = ("i", "f", "g", "o")

    def __init__(self, input_size: int, hidden_size: int, normalization: Normalization) -> None:
        super().__init__(input_size, hidden_size, gates=4)
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.norm_ih = normalization(4 * hidden_size, False)
        self.norm_hh = normalization(4 * hidden_size, False)
        self.norm_c = normalization(hidden_size, True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _orthogonal_(self)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, t: int = 0
    ) -> tuple[Tensor, Tensor]:
        h, c = (self.zeros(input), self.zeros(input)) if hx is None else hx
        a = self.norm_ih(linear(input, self.weight_ih), t)
        a = a + self.norm_hh(linear(h, self.weight_hh), t) + self.bias_ih
        i, f, g, o = preactivation(a, 4).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c, t).tanh(), c


def _orthogonal_(cell: CellModule) -> None:
    for weight in (cell.weight_ih, cell.weight_hh):
        for block in weight.detach().split(cell.hidden_size):
            nn.init.orthogonal_(block)
    assert cell.bias_ih is not None
    nn.init.zeros_(cell.bias_ih)
