"""The optimisers of torch.optim, and how their learning rate goes over a run.

In one call for all parameters where torch has one: parameter by parameter, an update of a small
model takes as long as its recurrence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from rnngrad.parts import FLOAT32, POSITIVE, InputError, Interval, Part, Registry

FRACTION = Interval(low=0, high=1, without=(1,))
NOT_NEGATIVE = Interval(low=0)


@dataclass(frozen=True)
class Optim(Part, ABC):
    """An optimiser's settings, with the names and meanings of torch.optim.

    Args:
        lr: Learning rate; with a schedule, the highest.
        weight_decay: ``λ``: adds ``λ θ`` to the gradient, after clipping (``adamw``: shrinks
            ``θ`` itself). Of all parameters, biases included.
        schedule: What follows the warm-up: ``constant``, or down towards 0 at the last step, on a
            line (``linear``) or half a period of a cosine (``cosine``).
        warmup_steps: Over the first so many steps the learning rate rises on a line.
    """

    lr: Annotated[float, POSITIVE, FLOAT32]
    weight_decay: Annotated[float, NOT_NEGATIVE, FLOAT32]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Interval(low=0, high=10**9)]

    @abstractmethod
    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of ``parameters``."""

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of one step, a function of its number alone.

        Args:
            step: Counted from 1.
            steps: Of the whole run.

        Example:
            >>> sgd = OPTIMS.default("sgd", lr=1, schedule="linear", warmup_steps=2)
            >>> [sgd.learning_rate(step, 6) for step in range(1, 7)]
            [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        gone = (step - 1 - self.warmup_steps) / max(1, steps - self.warmup_steps)
        left = 1 - gone if self.schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2
        return self.lr * left


OPTIMS: Registry[Optim] = Registry("optim", "rnngrad.optim")


@OPTIMS.register("adam")
@dataclass(frozen=True)
class Adam(Optim):
    """Adaptive moments.

    Args:
        betas: Decay of the averages of the gradient and of its square.
        eps: Is added to the root of the second.

    Reference:
        Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015.
    """

    _kind: ClassVar[type[torch.optim.Adam]] = torch.optim.Adam

    betas: tuple[Annotated[float, FRACTION], Annotated[float, FRACTION]]
    eps: Annotated[float, POSITIVE]

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return self._kind(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )


@OPTIMS.register("adamw")
@dataclass(frozen=True)
class AdamW(Adam):
    """Adam whose weight decay does not pass through the moments.

    Args:
        betas: As of ``adam``.
        eps: As of ``adam``.

    Reference:
        Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """

    _kind: ClassVar[type[torch.optim.Adam]] = torch.optim.AdamW


@OPTIMS.register("sgd")
@dataclass(frozen=True)
class SGD(Optim):
    """Stochastic gradient descent, with momentum if asked for.

    Args:
        momentum: Of the velocity, which the gradient is added to undamped.
        nesterov: The gradient is looked at one velocity further on; needs momentum.

    Reference:
        Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep
        learning", ICML 2013, in the form of torch.optim.SGD.
    """

    momentum: Annotated[float, FRACTION]
    nesterov: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0:
            raise InputError("nesterov", True, "needs optim.momentum > 0")

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


@OPTIMS.register("rmsprop")
@dataclass(frozen=True)
class RMSprop(Optim):
    """Gradient over the root of its running mean square.

    Libraries differ in where the mean square starts and where epsilon stands, and the first steps
    with it: from 0, the first update is ``lr / sqrt(1 - alpha)`` in every entry whatever the
    gradient is, so that no clipping before it changes a thing.

    Args:
        alpha: Decay of the mean square; torch's own default is 0.99.
        eps: Is added to its root.
        momentum: Of the update.
        initial_accumulator: What the mean square starts from: 0 in torch, 0.001 in the Theano code
            of Arjovsky, Shah & Bengio (``optim=rmsprop_theano``, which has no epsilon either).

    Reference:
        Tieleman & Hinton, "Lecture 6.5: RMSprop", COURSERA Neural networks for machine learning,
        2012.
    """

    alpha: Annotated[float, FRACTION]
    eps: Annotated[float, NOT_NEGATIVE]
    momentum: Annotated[float, FRACTION]
    initial_accumulator: Annotated[float, NOT_NEGATIVE, FLOAT32]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eps == 0 and self.initial_accumulator == 0:
            raise InputError("eps", self.eps, "must be > 0, as optim.initial_accumulator is 0")

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.RMSprop(
            parameters,
            lr=self.lr,
            alpha=self.alpha,
            eps=self.eps,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            foreach=True,  # there is no fused form of it
        )
        if self.initial_accumulator:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = self._initial_state(parameter)
        return optimizer

    def _initial_state(self, parameter: Tensor) -> dict[str, Any]:
        """What torch would put there at the first step, but for the mean square."""
        state = {
            "step": torch.zeros((), dtype=torch.float32),
            "square_avg": torch.full_like(parameter, self.initial_accumulator).detach(),
        }
        if self.momentum:
            state["momentum_buffer"] = torch.zeros_like(parameter).detach()
        return state
