"""The optimisers of torch.optim, as parts of a configuration.

In one call for all parameters where torch has one: parameter by parameter, an update of a small
model takes as long as its recurrence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from rnngrad.parts import POSITIVE, Interval, Part, Registry

FRACTION = Interval(low=0, high=1, without=(1,))


@dataclass(frozen=True)
class Optim(Part, ABC):
    """An optimiser's settings; see torch.optim for their meaning.

    Args:
        lr: Learning rate.
    """

    lr: Annotated[float, POSITIVE]

    @abstractmethod
    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of ``parameters``."""


OPTIMS: Registry[Optim] = Registry("optim", "rnngrad.optim")


@OPTIMS.register("adam")
@dataclass(frozen=True)
class Adam(Optim):
    """Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015."""

    betas: tuple[Annotated[float, FRACTION], Annotated[float, FRACTION]]
    eps: Annotated[float, POSITIVE]

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@OPTIMS.register("sgd")
@dataclass(frozen=True)
class SGD(Optim):
    """Stochastic gradient descent, with momentum if asked for."""

    momentum: Annotated[float, FRACTION]

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, fused=True)


@OPTIMS.register("rmsprop")
@dataclass(frozen=True)
class RMSprop(Optim):
    """Tieleman & Hinton's RMSprop (2012) as torch has it: accumulator from 0, epsilon outside."""

    alpha: Annotated[float, FRACTION]
    eps: Annotated[float, POSITIVE]
    momentum: Annotated[float, FRACTION]

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.RMSprop:
        return torch.optim.RMSprop(
            parameters,
            lr=self.lr,
            alpha=self.alpha,
            eps=self.eps,
            momentum=self.momentum,
            foreach=True,  # there is no fused form of it
        )
