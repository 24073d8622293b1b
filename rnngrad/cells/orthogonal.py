"""An RNN whose recurrent weight is orthogonal, before training and after every update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import orthogonal

from rnngrad.bptt_clip import preactivation
from rnngrad.cells.base import CELLS, CellModule, CellPart
from rnngrad.cells.nonlinearity import NONLINEARITIES


class OrthogonalRNNCell(CellModule):
    """``h' = φ(W_ih x + b_ih + W_hh h)`` with ``W_hh`` orthogonal; no ``b_ih`` under modReLU.

    ``weight_hh`` is parametrised by torch.nn.utils.parametrizations.orthogonal: what is trained is
    ``parametrizations.weight_hh.original``, and an orthogonal matrix can be assigned. It starts as
    rotations of pairs of units by ``U(-π, π)``, ``W_ih`` as ``kaiming_normal_``, ``b_ih`` at 0.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        nonlinearity: One of ``rnngrad.cells.nonlinearity``.
        orthogonal_map: See torch.nn.utils.parametrizations.orthogonal.

    Reference:
        Lezcano-Casado & Martínez-Rubio, "Cheap orthogonal constraints in neural networks: a simple
        parametrization of the orthogonal and unitary group", ICML 2019; initial rotations: Henaff,
        Szlam & LeCun, "Recurrent orthogonal networks and long-memory tasks", ICML 2016.
    """

    gates = ("h",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: str = "modrelu",
        orthogonal_map: str = "matrix_exp",
    ) -> None:
        super().__init__(input_size, hidden_size, bias=nonlinearity != "modrelu")
        self.weight_hh = nn.Parameter(torch.eye(hidden_size))
        self.nonlinearity = nonlinearity
        self.phi = NONLINEARITIES[nonlinearity](hidden_size)
        orthogonal(self, "weight_hh", orthogonal_map)
        type(
            self
        ).__module__ = __name__  # torch's new class for this object is still a cell of ours
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.kaiming_normal_(self.weight_ih, nonlinearity="relu")
        self.weight_hh = _rotations(self.weight_hh)
        if self.bias_ih is not None:
            nn.init.zeros_(self.bias_ih)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        h = self.zeros(input) if hx is None else hx
        a = linear(input, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh)
        phi: Tensor = self.phi(preactivation(a, 1))
        return phi


def _rotations(like: Tensor) -> Tensor:
    """Block-diagonal: a rotation by ``U(-π, π)`` for every pair of units."""
    size = len(like)
    angles = torch.empty(size // 2, dtype=like.dtype, device=like.device).uniform_(
        -math.pi, math.pi
    )
    matrix = torch.eye(size, dtype=like.dtype, device=like.device)
    even, odd = torch.arange(0, size - 1, 2), torch.arange(1, size, 2)
    matrix[even, even] = matrix[odd, odd] = angles.cos()
    matrix[odd, even] = angles.sin()
    matrix[even, odd] = -angles.sin()
    return matrix


@CELLS.register("orthogonal")
@dataclass(frozen=True)
class OrthogonalPart(CellPart):
    """Vanilla RNN whose recurrent weight stays orthogonal.

    Args:
        nonlinearity: ``modrelu`` is the paper's; ``linear`` keeps the gradient's norm exactly.
        orthogonal_map: From the trained matrix to an orthogonal one: ``matrix_exp`` is the paper's,
            ``cayley`` that of Helfrich, Willmott & Ye (2018), ``householder`` the cheapest.

    Reference:
        Lezcano-Casado & Martínez-Rubio, "Cheap orthogonal constraints in neural networks: a simple
        parametrization of the orthogonal and unitary group", ICML 2019.
    """

    nonlinearity: Literal["modrelu", "tanh", "linear", "relu"]
    orthogonal_map: Literal["matrix_exp", "cayley", "householder"]

    def cell(self, input_size: int) -> OrthogonalRNNCell:
        return OrthogonalRNNCell(
            input_size, self.hidden_size, self.nonlinearity, self.orthogonal_map
        )
