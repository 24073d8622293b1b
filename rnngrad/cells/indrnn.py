"""The independently recurrent network: every unit sees its own past alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rnngrad.bptt_clip import preactivation
from rnngrad.cells.base import CELLS, CellModule, CellPart
from rnngrad.cells.nonlinearity import NONLINEARITIES
from rnngrad.parts import COUNT, POSITIVE


class IndRNNCell(CellModule):
    """``h' = φ(W_ih x + b_ih + u ∘ h)``; ``u`` is ``weight_hh [H]``.

    ``u`` starts at ``U(0, max_abs)``, or ``U(0, 1)`` without a bound, ``W_ih`` as the authors'
    ``kaiming_uniform_(a=8)``, ``b_ih`` at 0.

    Args:
        input_size: ``I``.
        hidden_size: ``H``.
        nonlinearity: One of ``rnngrad.cells.nonlinearity``.
        max_abs: What ``|u|`` may be at most: what an update has taken beyond is set back to it at
            the first step of the next sequence, as the authors' code does; ``None`` for no bound.

    Reference:
        Li, Li, Cook, Zhu & Gao, "Independently recurrent neural network (IndRNN)", CVPR 2018.
    """

    takes_time = True
    gates = ("h",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: str = "relu",
        max_abs: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.max_abs = max_abs
        self.weight_hh = nn.Parameter(torch.empty(hidden_size))
        self.nonlinearity = nonlinearity
        self.phi = NONLINEARITIES[nonlinearity](hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.kaiming_uniform_(self.weight_ih, a=8)
        nn.init.uniform_(self.weight_hh, 0, 1 if self.max_abs is None else self.max_abs)
        assert self.bias_ih is not None
        nn.init.zeros_(self.bias_ih)

    def forward(self, input: Tensor, hx: Tensor | None = None, t: int = 0) -> Tensor:
        if t == 0:
            self._bound_()
        h = self.zeros(input) if hx is None else hx
        a = linear(input, self.weight_ih, self.bias_ih) + self.weight_hh * h
        phi: Tensor = self.phi(preactivation(a, 1))
        return phi

    @torch.no_grad()
    def _bound_(self) -> None:
        # not where nothing changes: an earlier sequence's backward may still need the weight as is
        if self.max_abs is not None and bool((self.weight_hh.abs() > self.max_abs).any()):
            self.weight_hh.clamp_(-self.max_abs, self.max_abs)


@CELLS.register("indrnn")
@dataclass(frozen=True)
class IndRNNPart(CellPart):
    """IndRNN: each unit sees its own past alone.

    Args:
        nonlinearity: ``relu`` or ``tanh``.
        bound: γ in ``|u| <= γ^(1/T)``: what a unit's own past can grow to over ``T`` steps;
            ``null`` for no bound.
        bound_length: ``T``, the longest sequence.

    Reference:
        Li, Li, Cook, Zhu & Gao, "Independently recurrent neural network (IndRNN)", CVPR 2018,
        sections 3 and 4; γ = 2 in their code.
    """

    nonlinearity: Literal["relu", "tanh"]
    bound: Annotated[float, POSITIVE] | None
    bound_length: Annotated[int, COUNT]

    def cell(self, input_size: int) -> IndRNNCell:
        max_abs = None if self.bound is None else self.bound ** (1 / self.bound_length)
        return IndRNNCell(input_size, self.hidden_size, self.nonlinearity, max_abs)
