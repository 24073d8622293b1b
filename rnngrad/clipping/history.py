"""Statistics of the norms that an adaptive rule remembers, as plain numbers and lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def quantile(ordered: Sequence[float], q: float) -> float:
    """The ``q`` quantile of numbers in ascending order, by linear interpolation (numpy's default).

    >>> quantile([1.0, 2.0, 4.0], 0.75)
    3.0
    """
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def mean_std(numbers: Sequence[float], ddof: int) -> tuple[float, float]:
    """Mean and standard deviation of positive numbers, in any range that float64 has.

    Args:
        numbers: More than ``ddof``.
        ddof: Taken off their count in the variance: 0 of a population, 1 of a sample.
    """
    largest = max(numbers)
    scaled = [number / largest for number in numbers]
    mean = math.fsum(scaled) / len(scaled)
    squares = math.fsum([(number - mean) * (number - mean) for number in scaled])
    return mean * largest, math.sqrt(squares / (len(scaled) - ddof)) * largest


def empty_window() -> dict[str, Any]:
    """The state of a rule that remembers the last norms: a ring, and where it is cut."""
    return {"history": [], "oldest": 0}


def remember(state: dict[str, Any], norm: float, length: int) -> float | None:
    """Adds a norm to a window of the last ``length``; returns the one that it displaces."""
    history: list[float] = state["history"]
    if len(history) < length:
        history.append(norm)
        return None
    oldest: int = state["oldest"]
    displaced, history[oldest] = history[oldest], norm
    state["oldest"] = (oldest + 1) % length
    return displaced
