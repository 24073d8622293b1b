"""The error surface of task=cliff over weight and bias, by its formula, without autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Surface(NamedTuple):
    """``(s_T - 0.7)²`` and its derivatives, where it was asked for."""

    error: Floats
    by_weight: Floats
    by_bias: Floats

    @property
    def norm(self) -> Floats:
        """Of the gradient to ``(w, b)``."""
        return np.hypot(self.by_weight, self.by_bias)


def surface(weight: Any, bias: Any, steps: int = 50) -> Surface:
    """Of ``s_t = σ(w s_{t-1} + b)`` from ``σ(1/2)``.

    Args:
        weight: ``w``, of any shape.
        bias: ``b``, of a shape that goes with it.
        steps: ``T``.

    Reference:
        Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML
        2013, section 2.3 and figure 6.
    """
    w, b = np.broadcast_arrays(np.asarray(weight, np.float64), np.asarray(bias, np.float64))
    s, by_w, by_b = sigmoid(np.full_like(b, 0.5)), np.zeros_like(b), np.zeros_like(b)
    for _ in range(steps):
        after = sigmoid(w * s + b)
        slope = after * (1 - after)
        by_w, by_b, s = slope * (w * by_w + s), slope * (w * by_b + 1), after
    error = s - 0.7
    return Surface(error**2, 2 * error * by_w, 2 * error * by_b)


def sigmoid(a: Floats) -> Floats:
    """``1 / (1 + e^-a)``, by way of tanh, which does not overflow."""
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * a), dtype=np.float64)
