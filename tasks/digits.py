"""Handwritten digits, one pixel a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rnngrad.parts import InputError
from rnngrad.task import EVALUATION_CHUNK, TASKS, Batch, Task


@TASKS.register("digits")
@dataclass(frozen=True)
class Digits(Task):
    """Classify a handwritten digit of 8 x 8 pixels that is read pixel by pixel.

    One pixel a step, row after row, its grey from 0 to 1, or all pixels in an order that is random
    but the same for every image; after the 64th step the digit is asked for::

        0 0 .31 .81 .56 .06 0 0 0 0 .81 .94 ...  ->  0

    It is the small sister of sequential MNIST, with the 1797 images that scikit-learn brings along:
    360 of them are held out for evaluation, always the same, and training draws from the rest. An
    evaluation of 360 sees each of them once.

    A predictor that has seen nothing knows how frequent the digits are; it gets the entropy of the
    held-out digits, 2.2911 (``ln 10`` is 2.3026).

    Args:
        permuted: Whether the pixels come in the random order. ``trainer.eval_size=360`` evaluates
            on each held-out digit once.

    Reference:
        Le, Jaitly & Hinton, "A simple way to initialize recurrent networks of rectified linear
        units", 2015, with MNIST; the images are of Alpaydin & Kaynak, "Optical
        recognition of handwritten digits", UCI Machine Learning Repository, 1998.
    """

    HELD_OUT: ClassVar[int] = 360

    input_size: ClassVar[int] = 1
    output_size: ClassVar[int] = 10
    last_step_only: ClassVar[bool] = True
    time_steps: ClassVar[int] = 64

    permuted: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _digits()
        except ImportError:
            need = "needs scikit-learn; pip install 'rnngrad[digits]'"
            raise InputError("name", "digits", need) from None

    def batch(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Of the training part, drawn with replacement."""
        size = len(_digits()[1]) - self.HELD_OUT
        return self._rows(self.HELD_OUT + torch.randint(size, (batch_size,), generator=generator))

    def evaluation_batch(self, index: int, batch_size: int) -> Batch:
        """Of the held-out part, one after the other, and after the last the first again."""
        start = index * max(batch_size, EVALUATION_CHUNK)  # the last batch may be a smaller one
        return Batch(*self._rows(torch.arange(start, start + batch_size) % self.HELD_OUT))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = _digits()
        pixels = images[rows]
        if self.permuted:
            pixels = pixels[:, torch.from_numpy(np.random.RandomState(1).permutation(64))]
        return pixels.T.unsqueeze(-1).contiguous(), labels[rows]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return cross_entropy(outputs, targets)

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fraction of digits that are recognised."""
        return (outputs.argmax(-1) == targets).float().mean()

    @property
    def chance_loss(self) -> float:
        frequencies = self._frequencies()
        return float(-(frequencies * frequencies.log()).sum())

    def memoryless(self, targets: Tensor) -> Tensor:
        return self._frequencies().log().float().expand(len(targets), 10)

    def _frequencies(self) -> Tensor:
        return torch.bincount(_digits()[1][: self.HELD_OUT]).double() / self.HELD_OUT

    def solved(self, loss: float, accuracy: float) -> bool:
        """95 % of the held-out digits recognised; no paper states a rule."""
        return accuracy >= 0.95


@lru_cache
def _digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 64]`` in [0, 1] and labels, those held out first.

    Raises:
        ImportError: There is no scikit-learn.
    """
    data = import_module("sklearn.datasets").load_digits()
    # numpy's old generator: its numbers stay the same in all versions to come
    order = np.random.RandomState(0).permutation(len(data.target))
    images = torch.from_numpy(data.data[order] / 16).float()
    return images, torch.from_numpy(data.target[order]).long()
