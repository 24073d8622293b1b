"""Penalties on the recurrent weights, against vanishing: their gradient joins the loss's.

It is added between backward and clipping, as Pascanu, Mikolov & Bengio's code does, so that a
penalty cannot make a step that the clip rule would not allow.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from rnngrad.parts import POSITIVE, Interval, Part, Registry


@dataclass(frozen=True)
class Regularizer(Part, ABC):
    """A penalty ``λ Ω``.

    Attributes:
        needs_gradients: Whether it looks at ``∂L/∂h_t``: every step is then recorded in full, and
            the layers must be one tanh, sigmoid, relu or linear RNN.
    """

    needs_gradients: ClassVar[bool] = False

    @abstractmethod
    def add_(
        self, rnn: nn.Module, hidden: Tensor, hidden_grad: Tensor | None, nonlinearity: str | None
    ) -> float:
        """Adds ``λ ∂Ω/∂W_hh`` to the gradients of the recurrent weights.

        Args:
            rnn: The layers, after a backward.
            hidden: The last layer's states ``h_t [T, B, H]``.
            hidden_grad: ``∂L/∂h_t [T, B, H]``, if ``needs_gradients``.
            nonlinearity: Of a vanilla RNN.

        Returns:
            ``λ Ω``, NaN if there is none.
        """


REGULARIZERS: Registry[Regularizer] = Registry("regularizer", "rnngrad.regularization")

SLOPES = {
    "tanh": lambda h: 1 - h * h,
    "sigmoid": lambda h: h * (1 - h),
    "relu": lambda h: (h > 0).to(h.dtype),
    "linear": torch.ones_like,
}
"""``φ'`` from ``h = φ(a)``."""


@REGULARIZERS.register("none")
@dataclass(frozen=True)
class NoRegularizer(Regularizer):
    """No penalty."""

    def add_(
        self, rnn: nn.Module, hidden: Tensor, hidden_grad: Tensor | None, nonlinearity: str | None
    ) -> float:
        return math.nan


@REGULARIZERS.register("omega")
@dataclass(frozen=True)
class Omega(Regularizer):
    """Asks every step back through time to keep the gradient's length.

    With ``δ_t = ∂L/∂h_t`` and ``ρ_t = ‖δ_t ∂h_t/∂h_{t-1}‖² / ‖δ_t‖²``, the mean over steps and
    sequences of ``(ρ_t - 1)²`` (``form=code``, what the authors' program computes) or of
    ``(√ρ_t - 1)²`` (``form=paper``, equations 9 and 10). Only the immediate dependence on ``W_hh``
    counts: ``h_t`` and ``δ_t`` are constants. For one layer of ``cell=rnn``; with ``bptt_clip``
    ``δ_t`` is the clipped one.

    Args:
        weight: ``λ``; 4 in the paper, 2 in the authors' log.
        form: Squares of the ratio of squared norms, as in the code, or of norms, as in the paper.
        bound: Steps with ``‖δ_t‖²`` under it are left out, as in the code; it is an absolute one,
            so a gradient that has vanished is not asked for.

    Reference:
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, and the code at github.com/pascanur/trainingRNNs.
    """

    needs_gradients: ClassVar[bool] = True

    weight: Annotated[float, POSITIVE]
    form: Literal["code", "paper"]
    bound: Annotated[float, Interval(low=0)]

    @torch.no_grad()
    def add_(
        self, rnn: nn.Module, hidden: Tensor, hidden_grad: Tensor | None, nonlinearity: str | None
    ) -> float:
        assert hidden_grad is not None and nonlinearity is not None
        ((_, weight),) = recurrent_weights(rnn)
        omega, gradient = self.penalty(weight, hidden, hidden_grad, nonlinearity)
        assert weight.grad is not None
        weight.grad += self.weight * gradient
        return self.weight * omega

    def penalty(
        self, weight: Tensor, hidden: Tensor, hidden_grad: Tensor, nonlinearity: str
    ) -> tuple[float, Tensor]:
        """``Ω`` and ``∂Ω/∂W_hh [H, H]``; norms are taken in float64.

        With ``u = δ / ‖δ‖``, ``α = u ∘ φ'`` and ``v = α W_hh``: ``∂ρ/∂W_hh = 2 α ⊗ v``.
        """
        delta, h = hidden_grad.flatten(0, 1), hidden.flatten(0, 1)
        norms = torch.linalg.vector_norm(delta, dim=-1, dtype=torch.float64)
        squares = norms.square()
        kept = (squares >= self.bound) & (squares > 0)
        # of length 1, so that no product underflows; 0 where a step is left out
        inverse = torch.where(kept, 1 / norms, 0)
        alpha = (delta * inverse.unsqueeze(-1)).to(h.dtype) * SLOPES[nonlinearity](h)  # type: ignore[no-untyped-call]
        back = alpha @ weight
        root = torch.linalg.vector_norm(back, dim=-1, dtype=torch.float64)
        if self.form == "code":
            miss = root.square() - 1
            slope = 2 * miss
        else:
            miss = root - 1
            slope = torch.where(root > 0, miss / root, 0)  # v is 0 there
        count = max(1, int(kept.sum()))
        miss, slope = miss * kept, slope * (2 / count)
        gradient = (alpha * slope.unsqueeze(-1).to(h.dtype)).t() @ back
        return miss.square().sum().item() / count, gradient.to(weight.dtype)


@REGULARIZERS.register("orthogonality")
@dataclass(frozen=True)
class Orthogonality(Regularizer):
    """``λ Σ ‖W_hhᵀ W_hh - I‖²_F``, over layers and, in gated cells, gates.

    Args:
        weight: ``λ``.

    Reference:
        Vorontsov, Trabelsi, Kadoury & Pal, "On orthogonality and learning recurrent networks with
        long term dependencies", ICML 2017.
    """

    weight: Annotated[float, POSITIVE]

    @torch.no_grad()
    def add_(
        self, rnn: nn.Module, hidden: Tensor, hidden_grad: Tensor | None, nonlinearity: str | None
    ) -> float:
        penalty = 0.0
        for _, weight in recurrent_weights(rnn):
            gates = weight.unflatten(0, (-1, weight.shape[-1]))
            miss = gates.mT @ gates
            miss.diagonal(dim1=-2, dim2=-1).sub_(1)
            penalty += self.weight * miss.double().square().sum().item()
            if weight.grad is not None:
                weight.grad += (4 * self.weight * gates @ miss).flatten(0, 1)
        return penalty


def recurrent_weights(rnn: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The recurrent weight matrices ``[gH, H]`` of layers or cells, by name."""
    for name, parameter in rnn.named_parameters():
        if name.rpartition(".")[2].startswith("weight_hh") and parameter.dim() == 2:
            yield name, parameter
