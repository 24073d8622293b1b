"""What a task is, and where its random numbers come from.

A task owns its sizes, data, loss and rule for "solved"; training knows none of them. A new task is
one file in tasks/, which registers it, and one yaml in conf/task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import torch
from torch import Tensor

from rnngrad.parts import Part, Registry


@dataclass(frozen=True)
class Task(Part, ABC):
    """Sequences with targets, drawn afresh for every step.

    Attributes:
        input_size: ``I``.
        output_size: ``O``.
        last_step_only: The loss looks at the last step alone: outputs are ``[B, O]``, not
            ``[T, B, O]``.
    """

    input_size: ClassVar[int]
    output_size: ClassVar[int]
    last_step_only: ClassVar[bool]

    @abstractmethod
    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs ``[T, B, I]`` and targets, a pure function of the generator's state."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch, a scalar."""

    @abstractmethod
    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of what is asked for that is right, a scalar."""

    @property
    @abstractmethod
    def chance_loss(self) -> float:
        """What the best predictor that knows only the time step gets, in closed form."""

    @abstractmethod
    def solved(self, loss: float, accuracy: float) -> bool:
        """Whether an evaluation with this loss and accuracy counts as solved."""


TASKS: Registry[Task] = Registry("task", "rnngrad.tasks")


def training_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step: a pure function of ``(seed, step)``."""
    return _generator(0, seed, step)


def evaluation_generator(index: int) -> torch.Generator:
    """The random numbers of one evaluation batch: the same for every seed, never trained on."""
    return _generator(1, 0, index)


def _generator(stream: int, seed: int, number: int) -> torch.Generator:
    # torch's CPU generator keeps 32 bits of its seed: one bit for the stream, so that the streams
    # cannot meet, and 31 from a hash of the rest
    digest = blake2b(b"%d %d" % (seed, number), digest_size=4).digest()
    return torch.Generator().manual_seed(stream << 31 | int.from_bytes(digest, "little") >> 1)
