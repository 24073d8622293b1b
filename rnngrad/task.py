"""What a task is, and where its random numbers come from.

A task owns its sizes, data, loss and rule for "solved"; training knows none of them. A new task is
one file in tasks/, which registers it, and one yaml in conf/task.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from rnngrad.parts import COUNT, InputError, Interval, Part, Registry

EVALUATION_CHUNK = 100  # sequences a forward pass: bounds memory, and keeps the numbers the same


class Batch(NamedTuple):
    """Sequences and what is asked of them.

    Args:
        inputs: ``[T, B, I]``.
        targets: What the task's loss compares the outputs with.
        continues: These sequences go on where the previous batch's ended, row by row, and so does
            the layers' state; a smaller batch than the previous goes on with its first rows.
    """

    inputs: Tensor
    targets: Tensor
    continues: bool = False


T = TypeVar("T", bound="Task")


@dataclass(frozen=True)
class Task(Part, ABC):
    """Sequences with targets, drawn afresh for every step.

    Attributes:
        reads_out: A linear read-out follows the layers; otherwise the outputs are the hidden units
            themselves, and the hidden size must be ``O``.
        initial_hidden: What every unit of ``h_0`` is.
    """

    reads_out: ClassVar[bool] = True
    initial_hidden: ClassVar[float] = 0.0

    # each of these three may also be a plain attribute of the class
    @property
    @abstractmethod
    def input_size(self) -> int:
        """``I``."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """``O``."""

    @property
    @abstractmethod
    def last_step_only(self) -> bool:
        """The loss looks at the last step alone: outputs are ``[B, O]``, not ``[T, B, O]``."""

    @abstractmethod
    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs ``[T, B, I]`` and targets, a pure function of the generator's state."""

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """What step ``step >= 1`` trains on: a pure function of the arguments."""
        return Batch(*self.batch(batch_size, training_generator(seed, step)))

    def evaluation_batch(self, index: int, batch_size: int) -> Batch:
        """The evaluation's batch ``index >= 0``: the same for every seed, never trained on.

        Args:
            index: An evaluation asks for 0, 1, 2, ...
            batch_size: ``EVALUATION_CHUNK`` sequences, or fewer in the last batch.
        """
        return Batch(*self.batch(batch_size, evaluation_generator(index)))

    @property
    def time_steps(self) -> int:
        """``T`` of the longest sequence that is drawn: ``length``, unless the task says more."""
        if "length" not in vars(self):
            raise NotImplementedError(f"{type(self).__name__}: how many time_steps has a sequence?")
        return int(vars(self)["length"])

    @property
    def data_digest(self) -> str | None:
        """What else makes a run the run it is: a hash of the data, where they are a user's own."""
        return None

    def at_length(self: T, length: int) -> T:
        """The same task with this ``length`` for every batch.

        >>> TASKS.default("parity", length=20, min_length=1).at_length(1000)
        Parity(length=1000, min_length=None, scored='last')

        Raises:
            InputError: The task cannot have this length, or has none to choose.
        """
        names = {field.name for field in fields(self)}
        if "length" not in names:
            raise InputError("length", length, f"{type(self).__name__} has one length only")
        changes: dict[str, Any] = {"length": length}
        if "min_length" in names:
            changes["min_length"] = None
        return replace(self, **changes)

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

    def memoryless(self, targets: Tensor) -> Tensor:
        """The outputs of that predictor; of ``targets`` it may look at the shape alone."""
        raise NotImplementedError(f"{type(self).__name__}: what does one say who saw nothing?")

    @abstractmethod
    def solved(self, loss: float, accuracy: float) -> bool:
        """Whether an evaluation with this loss and accuracy counts as solved."""


@dataclass(frozen=True)
class VariableLength(Task):
    """A task with a length to choose, and with batches of different lengths if one likes.

    Args:
        length: The longest; what it counts is the task's to say.
        min_length: If given, every batch draws its length from ``min_length`` to ``length``.

    Attributes:
        shortest: The least length that has room for what the task shows.
    """

    length: Annotated[int, COUNT]
    min_length: Annotated[int, COUNT] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < self.shortest:
            allowed = f"must be an integer {Interval(low=self.shortest, high=COUNT.high)}"
            raise InputError("length", self.length, allowed)
        if self.min_length is not None and not self.shortest <= self.min_length <= self.length:
            allowed = f"must be an integer >= {self.shortest} and <= length, which is {self.length}"
            raise InputError("min_length", self.min_length, allowed)

    @property
    def shortest(self) -> int:
        return 1

    def draw_length(self, generator: torch.Generator) -> int:
        """A batch's length; with one length only, nothing is drawn."""
        if self.min_length is None:
            return self.length
        return int(torch.randint(self.min_length, self.length + 1, (), generator=generator))

    def mean_over_lengths(self, value: Callable[[int], float]) -> float:
        """The mean of ``value(length)`` over the lengths that are drawn."""
        low = self.length if self.min_length is None else self.min_length
        return math.fsum(map(value, range(low, self.length + 1))) / (self.length + 1 - low)


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
