"""A text of your own, character by character."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from rnngrad.parts import COUNT, InputError, Interval
from rnngrad.stored import Unreadable, bytes_of
from rnngrad.task import EVALUATION_CHUNK, TASKS, Batch, Task, training_generator

MAX_BYTES = 100_000_000


@TASKS.register("chars")
@dataclass(frozen=True)
class Chars(Task):
    """Predict the next character of a text file, in bits per character.

    The text is read by several readers at once, the rows of a batch. Each goes through a stretch of
    its own, ``length`` characters a batch, and the layers' state goes on from batch to batch; at
    the end of the stretches they start again, a little aside. With ``length`` 3 and two rows::

        text     t h e _ c a t _ s a t _ o n
        row 0    t h e -> h e _    then    _ c a -> c a t
        row 1    t _ s -> _ s a    then    a t _ -> t _ o

    The last ``valid_fraction`` of the text is kept for evaluation, and read in the same way by 100
    readers, so that an evaluation of 1000 sequences is 10 batches long. Where there is too little
    text for the readers, they overlap.

    A predictor without memory knows how frequent the characters are: it gets the entropy of those
    of the evaluation's part.

    Args:
        path: A UTF-8 text of at most 100 MB; every character in it is an input and an output.
        length: Time steps in a batch.
        valid_fraction: The part of the text that is not trained on.

    Reference:
        Sutskever, Martens & Hinton, "Generating text with recurrent neural networks", ICML 2011;
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, with the Penn Treebank.
    """

    last_step_only: ClassVar[bool] = False

    path: str | None
    length: Annotated[int, COUNT]
    valid_fraction: Annotated[float, Interval(low=0, high=1, without=(0, 1))]

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest = min(len(self._part(valid)) for valid in (False, True))
        if shortest < 2:
            allowed = (
                f"is too short a text: of its {len(self._text[1])} characters the smaller part of "
                f"the two that task.valid_fraction makes has {shortest}"
            )
            raise InputError("path", self.path, allowed)
        if self.length >= shortest:
            allowed = f"must be under {shortest}, what the smaller part of the text has"
            raise InputError("length", self.length, allowed)

    @cached_property
    def _text(self) -> tuple[str, Tensor, str]:
        """The characters there are, the text in their numbers, and its hash."""
        if self.path is None:
            raise InputError("path", None, "must be a text file; give task.path=FILE")
        try:
            file = Path(self.path).resolve()
            seen = file.stat()
            return _read(file, seen.st_size, seen.st_mtime_ns)
        except OSError as error:
            why = error.strerror or "an error of the system"
        except Unreadable as error:
            why = error.why
        except ValueError as error:
            why = str(error)
        raise InputError("path", self.path, f"must be a text file: {why}")

    @property
    def data_digest(self) -> str:
        return self._text[2]

    @property
    def characters(self) -> str:
        """Those that occur, in the order of their numbers."""
        return self._text[0]

    @property
    def input_size(self) -> int:
        return len(self.characters)

    @property
    def output_size(self) -> int:
        return len(self.characters)

    def _part(self, valid: bool) -> Tensor:
        text = self._text[1]
        first = len(text) - round(self.valid_fraction * len(text))
        return text[first:] if valid else text[:first]

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows at random places of the training part, with nothing between them."""
        text = self._part(valid=False)
        starts = torch.randint(len(text) - self.length, (batch_size,), generator=generator)
        return self._windows(text, starts)

    def training_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        text = self._part(valid=False)
        windows, spacing, spare = self._stretches(len(text), batch_size)
        times, window = divmod(step - 1, windows)
        aside = torch.randint(spare + 1, (), generator=training_generator(seed, times))
        starts = aside + window * self.length + spacing * torch.arange(batch_size)
        return Batch(*self._windows(text, starts), continues=window > 0)

    def evaluation_batch(self, index: int, batch_size: int) -> Batch:
        text = self._part(valid=True)
        # the last batch may be smaller: the first of the same readers
        windows, spacing, _ = self._stretches(len(text), max(batch_size, EVALUATION_CHUNK))
        starts = index % windows * self.length + spacing * torch.arange(batch_size)
        return Batch(*self._windows(text, starts), continues=index % windows > 0)

    def _stretches(self, size: int, readers: int) -> tuple[int, int, int]:
        """Windows of each reader, characters from one's start to the next's, and those left over.

        All readers may start later by as many as are left over, at least ``length`` if there are
        enough: so seeds differ.
        """
        windows = max(1, (size - 1 - self.length) // (readers * self.length))
        room = size - 1 - windows * self.length
        spacing = min(windows * self.length, room // max(readers - 1, 1))
        return windows, spacing, room - (readers - 1) * spacing

    def _windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        shown = text[starts + torch.arange(self.length + 1).unsqueeze(1)].long()
        return one_hot(shown[:-1], self.input_size).float(), shown[1:]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in bits per character."""
        return cross_entropy(outputs.flatten(0, 1), targets.flatten()) / math.log(2)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of characters that are foretold."""
        return (outputs.argmax(-1) == targets).float().mean()

    @property
    def chance_loss(self) -> float:
        frequencies = self._frequencies()
        return abs(float(torch.special.xlogy(frequencies, frequencies).sum() / math.log(2)))

    def memoryless(self, targets: Tensor) -> Tensor:
        logits = self._frequencies().log().clamp(min=-50).float()
        return logits.expand(*targets.shape, self.output_size)

    def _frequencies(self) -> Tensor:
        text = self._part(valid=True)
        return torch.bincount(text, minlength=self.output_size).double() / len(text)

    def solved(self, loss: float, accuracy: float) -> bool:
        """99 % of the characters foretold, which no natural text allows; there is no usual rule."""
        return accuracy >= 0.99


@lru_cache(maxsize=2)
def _read(file: Path, size: int, changed: int) -> tuple[str, Tensor, str]:
    """The characters of a text, sorted, the text as their numbers, and its SHA-256.

    A run makes the task several times over: one file of one ``size``, ``changed`` at one time, is
    read once.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file, too large, not UTF-8, or has one character only.
    """
    data = bytes_of(file, MAX_BYTES)
    try:
        text = data.decode("utf-8-sig")  # a mark that says so is no character
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    occurs = np.zeros(0x110000, bool)
    occurs[codes] = True
    characters = np.flatnonzero(occurs)
    if len(characters) < 2:
        raise ValueError("with at least 2 different characters")
    kind = np.uint8 if len(characters) <= 256 else np.int32
    number = np.zeros(0x110000, kind)
    number[characters] = np.arange(len(characters))
    digest = sha256(data).hexdigest()
    return "".join(map(chr, characters)), torch.from_numpy(number[codes]), digest
