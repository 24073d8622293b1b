"""Nonlinearities of ungated cells, by name; those with parameters hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rnngrad.kernels.activations import ALPHA, NEGATIVE_SLOPE


class ModReLU(nn.Module):
    """``sign(a) ∘ relu(|a| + b)``, with a learned ``b`` per unit; starts at ``U(-0.01, 0.01)``.

    The real form: it changes how large an activation is, never its sign.

    Reference:
        Arjovsky, Shah & Bengio, "Unitary evolution recurrent neural networks", ICML 2016;
        the initial ``b`` as in their code and that of Lezcano-Casado & Martínez-Rubio (2019).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``b`` anew."""
        nn.init.uniform_(self.bias, -0.01, 0.01)

    def forward(self, a: Tensor) -> Tensor:
        return a.sign() * (a.abs() + self.bias).relu()


NONLINEARITIES: dict[str, Callable[[int], nn.Module]] = {
    "tanh": lambda size: nn.Tanh(),
    "sigmoid": lambda size: nn.Sigmoid(),
    "relu": lambda size: nn.ReLU(),
    "leaky_relu": lambda size: nn.LeakyReLU(NEGATIVE_SLOPE),
    "prelu": lambda size: nn.PReLU(),
    "elu": lambda size: nn.ELU(ALPHA),
    "linear": lambda size: nn.Identity(),
    "modrelu": ModReLU,
}
"""Made for ``size`` units."""
