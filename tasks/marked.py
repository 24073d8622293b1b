"""Sequences with two marked numbers, for the adding and the multiplication problem."""

from __future__ import annotations

import torch
from torch import Tensor


def pascanu2013(length: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers from U[0, 1), the first marked in the first tenth, the second in the next four.

    Args:
        length: ``T`` is drawn from ``length`` to under ``1.1 length``; at least 10.
        batch_size: ``B``.
        generator: Of all that is drawn.

    Returns:
        Inputs ``[T, B, 2]``, number and marker, and the two marked numbers ``[2, B]``.

    Reference:
        The code of Pascanu, Mikolov & Bengio, ICML 2013 (pascanu/trainingRNNs, addition.py).
    """
    steps = length + int(torch.randint(length // 10, (), generator=generator))
    numbers = torch.rand(steps, batch_size, generator=generator)
    first = torch.randint(steps // 10, (1, batch_size), generator=generator)
    second = torch.randint(4 * steps // 10, (1, batch_size), generator=generator) + steps // 10
    marked = torch.cat([first, second])
    marker = torch.zeros(steps, batch_size).scatter_(0, marked, 1)
    return torch.stack([numbers, marker], -1), numbers.gather(0, marked)


def hochreiter1997(
    length: int, batch_size: int, generator: torch.Generator, *, low: float, neutral: float
) -> tuple[Tensor, Tensor]:
    """Numbers from U[low, 1) with markers 1 at two of them, -1 at both ends, and else 0.

    The first is marked among the first ten, then another among the first ``length / 2 - 1``. The
    first step's marker is -1 all the same; its number is ``neutral`` if it was one of the two.

    Args:
        length: ``T`` is drawn from ``length`` to ``1.1 length``; at least 6. Under 22, the first is
            one of the first ``length / 2 - 1`` as well.
        batch_size: ``B``.
        generator: Of all that is drawn.
        low: The least number there is.
        neutral: What changes neither a sum, or neither a product.

    Returns:
        Inputs ``[T, B, 2]``, number and marker, and the two marked numbers ``[2, B]``.

    Reference:
        Hochreiter & Schmidhuber, "Long short-term memory", 1997, experiments 4 and 5; there every
        sequence has its own length, here every batch.
    """
    steps = length + int(torch.randint(length // 10 + 1, (), generator=generator))
    numbers = low + (1 - low) * torch.rand(steps, batch_size, generator=generator)
    ten, half = _ranges(length)
    first = torch.randint(ten, (1, batch_size), generator=generator)
    second = torch.randint(half - 1, (1, batch_size), generator=generator)
    marked = torch.cat([first, second + (second >= first)])
    marker = torch.zeros(steps, batch_size).scatter_(0, marked, 1)
    numbers[0, marker[0] == 1] = neutral
    marker[[0, -1]] = -1
    return torch.stack([numbers, marker], -1), numbers.gather(0, marked)


def first_step_is_marked(length: int) -> float:
    """How probable it is that ``hochreiter1997`` chooses the first step as one of its two."""
    ten, half = _ranges(length)
    return 1 / ten + (1 - 1 / ten) / (half - 1)


def _ranges(length: int) -> tuple[int, int]:
    half = length // 2 - 1
    return min(10, half), half
