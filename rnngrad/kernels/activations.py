"""The activations of the vanilla RNN that have kernels, and their constants.

Each of them has a derivative that follows from its value: the way back needs the states only.
"""

from __future__ import annotations

ACTIVATIONS = ("tanh", "relu", "sigmoid", "linear", "leaky_relu", "elu")
"""torch.nn.RNN has the first two."""

NEGATIVE_SLOPE = 0.01
"""What leaky_relu multiplies negative values with; torch.nn.LeakyReLU's default."""

ALPHA = 1.0
"""elu is ``α (e^a - 1)`` of negative values; torch.nn.ELU's default."""


def mode_of(activation: str) -> str:
    """The ``mode`` of a layer, as torch.nn names it: ``RNN_TANH``."""
    return f"RNN_{activation.upper()}"
