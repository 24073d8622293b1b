"""The equations of the cells on one vector of units, there and back; see ``loops``.

``count`` units are worked on, ``j`` bytes from the beginning of every block ``[rows, H]``; the
blocks of one step lie ``span`` bytes apart. Equations and names as in ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import njit

from rnngrad.kernels.loops import backward, forward
from rnngrad.kernels.vector import load, sigmoid, store, tanh, unless_negative


@njit(forceinline=True)
def _tanh_ahead(p, count, j, span, a, h_prev, h, c_prev, c, output):
    state = tanh(load(p, a + j, count))
    store(h + j, count, state)
    store(output + j, count, state)


@njit(forceinline=True)
def _tanh_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    state = load(p, h + j, count)
    d = load(p, e + j, count) + load(p, carry_h + j, count)
    store(delta + j, count, d)
    store(alpha + j, count, d * (1.0 - state * state))


@njit(forceinline=True)
def _relu_ahead(p, count, j, span, a, h_prev, h, c_prev, c, output):
    sums = load(p, a + j, count)
    state = unless_negative(sums, sums)
    store(h + j, count, state)
    store(output + j, count, state)


@njit(forceinline=True)
def _relu_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    d = load(p, e + j, count) + load(p, carry_h + j, count)
    store(delta + j, count, d)
    # chosen, not multiplied: 0 · inf would be NaN where torch's gradient is 0
    store(alpha + j, count, unless_negative(load(p, h + j, count), d))


@njit(forceinline=True)
def _lstm_ahead(p, count, j, span, a, h_prev, h, c_prev, c, output):
    i = sigmoid(load(p, a + j, count))
    f = sigmoid(load(p, a + span + j, count))
    g = tanh(load(p, a + 2 * span + j, count))
    o = sigmoid(load(p, a + 3 * span + j, count))
    memory = f * load(p, c_prev + j, count) + i * g
    state = o * tanh(memory)
    store(a + j, count, i)
    store(a + span + j, count, f)
    store(a + 2 * span + j, count, g)
    store(a + 3 * span + j, count, o)
    store(c + j, count, memory)
    store(h + j, count, state)
    store(output + j, count, state)


@njit(forceinline=True)
def _lstm_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    i, f = load(p, a + j, count), load(p, a + span + j, count)
    g, o = load(p, a + 2 * span + j, count), load(p, a + 3 * span + j, count)
    tanh_c = tanh(load(p, c + j, count))
    d = load(p, e + j, count) + load(p, carry_h + j, count)
    dc = load(p, carry_c + j, count) + d * o * (1.0 - tanh_c * tanh_c)
    store(delta + j, count, d)
    store(cell + j, count, dc)
    store(carry_c + j, count, dc * f)
    store(alpha + j, count, dc * (g * i * (1.0 - i)))
    store(alpha + span + j, count, dc * (load(p, c_prev + j, count) * f * (1.0 - f)))
    store(alpha + 2 * span + j, count, dc * (i * (1.0 - g * g)))
    store(alpha + 3 * span + j, count, d * (tanh_c * o * (1.0 - o)))


# blocks of the GRU: r, z, what the input gives to n, what the state gives to n


@njit(forceinline=True)
def _gru_ahead(p, count, j, span, a, h_prev, h, c_prev, c, output):
    r, z = sigmoid(load(p, a + j, count)), sigmoid(load(p, a + span + j, count))
    n = tanh(load(p, a + 2 * span + j, count) + r * load(p, a + 3 * span + j, count))
    state = (load(p, h_prev + j, count) - n) * z + n
    store(a + j, count, r)
    store(a + span + j, count, z)
    store(a + 2 * span + j, count, n)
    store(h + j, count, state)
    store(output + j, count, state)


@njit(forceinline=True)
def _gru_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    r, z = load(p, a + j, count), load(p, a + span + j, count)
    n, before_reset = load(p, a + 2 * span + j, count), load(p, a + 3 * span + j, count)
    d = load(p, e + j, count) + load(p, carry_h + j, count)
    to_n = (1.0 - z) * (1.0 - n * n)
    store(delta + j, count, d)
    store(carry_h + j, count, d * z)
    store(alpha + j, count, d * (to_n * before_reset * r * (1.0 - r)))
    store(alpha + span + j, count, d * ((load(p, h_prev + j, count) - n) * z * (1.0 - z)))
    store(alpha + 2 * span + j, count, d * (to_n * r))
    store(alpha + 3 * span + j, count, d * to_n)


# Numba's cache knows a function by its code and by what it closes over, which in a dispatcher made
# here is new in every process: what is compiled and kept must be a plain function of the module.

_rnn_tanh_ahead_in_slices = forward(1, 1, _tanh_ahead)
_rnn_tanh_back_in_slices = backward(1, 1, _tanh_back)


def _rnn_tanh_forward(p):
    _rnn_tanh_ahead_in_slices(p)


def _rnn_tanh_backward(p):
    _rnn_tanh_back_in_slices(p)


_rnn_relu_ahead_in_slices = forward(1, 1, _relu_ahead)
_rnn_relu_back_in_slices = backward(1, 1, _relu_back)


def _rnn_relu_forward(p):
    _rnn_relu_ahead_in_slices(p)


def _rnn_relu_backward(p):
    _rnn_relu_back_in_slices(p)


_lstm_ahead_in_slices = forward(4, 4, _lstm_ahead)
_lstm_back_in_slices = backward(4, 4, _lstm_back)


def _lstm_forward(p):
    _lstm_ahead_in_slices(p)


def _lstm_backward(p):
    _lstm_back_in_slices(p)


_gru_ahead_in_slices = forward(3, 4, _gru_ahead)
_gru_back_in_slices = backward(3, 4, _gru_back)


def _gru_forward(p):
    _gru_ahead_in_slices(p)


def _gru_backward(p):
    _gru_back_in_slices(p)


class Cell(NamedTuple):
    """A cell's kernels, to be compiled: ``(p) -> None``.

    Args:
        gates: Rows of its weights over the hidden size.
        kept: Blocks that are kept of a step; 0 if the state is all that the way back needs.
        forward: The way there.
        backward: The way back.
    """

    gates: int
    kept: int
    forward: Callable[[Any], None]
    backward: Callable[[Any], None]

    @property
    def blocks(self) -> int:
        """Blocks of gradients that a step has on the way back."""
        return self.kept or self.gates


CELLS = {
    "RNN_TANH": Cell(1, 0, _rnn_tanh_forward, _rnn_tanh_backward),
    "RNN_RELU": Cell(1, 0, _rnn_relu_forward, _rnn_relu_backward),
    "LSTM": Cell(4, 4, _lstm_forward, _lstm_backward),
    "GRU": Cell(3, 4, _gru_forward, _gru_backward),
}
"""By torch.nn's ``mode``."""
