"""The equations of the cells on one vector of units, there and back; see ``loops``.

``count`` units are worked on, ``j`` bytes from the beginning of every block ``[rows, H]``; the
blocks of one step lie ``span`` bytes apart. Equations and names as in ``reference``. A cell's
``back`` takes all of them at once, its phases one after the other through memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import njit

from rnngrad.kernels.loops import (
    Phases,
    backward,
    clipped_backward,
    forward,
    nothing,
    total_gradient,
)
from rnngrad.kernels.vector import load, sigmoid, store, tanh, unless_negative


@njit(forceinline=True)
def _tanh_ahead(p, count, j, span, a, h_prev, h, c_prev, c, output):
    state = tanh(load(p, a + j, count))
    store(h + j, count, state)
    store(output + j, count, state)


@njit(forceinline=True)
def _tanh_alpha(d, state):
    return d * (1.0 - state * state)


@njit(forceinline=True)
def _tanh_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    state = load(p, h + j, count)
    d = total_gradient(p, count, j, e, carry_h)
    store(delta + j, count, d)
    store(alpha + j, count, _tanh_alpha(d, state))


@njit(forceinline=True)
def _tanh_gates(
    p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha
):
    store(alpha + j, count, _tanh_alpha(load(p, delta + j, count), load(p, h + j, count)))


@njit(forceinline=True)
def _relu_ahead(p, count, j, span, a, h_prev, h, c_prev, c, output):
    sums = load(p, a + j, count)
    state = unless_negative(sums, sums)
    store(h + j, count, state)
    store(output + j, count, state)


@njit(forceinline=True)
def _relu_alpha(d, state):
    # chosen, not multiplied: 0 · inf would be NaN where torch's gradient is 0
    return unless_negative(state, d)


@njit(forceinline=True)
def _relu_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    d = total_gradient(p, count, j, e, carry_h)
    store(delta + j, count, d)
    store(alpha + j, count, _relu_alpha(d, load(p, h + j, count)))


@njit(forceinline=True)
def _relu_gates(
    p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha
):
    store(alpha + j, count, _relu_alpha(load(p, delta + j, count), load(p, h + j, count)))


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
def _lstm_cell(carried, d, o, tanh_c):
    return carried + d * o * (1.0 - tanh_c * tanh_c)


@njit(forceinline=True)
def _lstm_alpha(p, count, j, span, c_prev, carry_c, alpha, i, f, g, o, tanh_c, d, dc):
    store(carry_c + j, count, dc * f)
    store(alpha + j, count, dc * (g * i * (1.0 - i)))
    store(alpha + span + j, count, dc * (load(p, c_prev + j, count) * f * (1.0 - f)))
    store(alpha + 2 * span + j, count, dc * (i * (1.0 - g * g)))
    store(alpha + 3 * span + j, count, d * (tanh_c * o * (1.0 - o)))


@njit(forceinline=True)
def _lstm_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    i, f = load(p, a + j, count), load(p, a + span + j, count)
    g, o = load(p, a + 2 * span + j, count), load(p, a + 3 * span + j, count)
    tanh_c = tanh(load(p, c + j, count))
    d = total_gradient(p, count, j, e, carry_h)
    dc = _lstm_cell(load(p, carry_c + j, count), d, o, tanh_c)
    store(delta + j, count, d)
    store(cell + j, count, dc)
    _lstm_alpha(p, count, j, span, c_prev, carry_c, alpha, i, f, g, o, tanh_c, d, dc)


@njit(forceinline=True)
def _lstm_to_cell(
    p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha
):
    tanh_c = tanh(load(p, c + j, count))
    d, o = load(p, delta + j, count), load(p, a + 3 * span + j, count)
    store(cell + j, count, _lstm_cell(load(p, carry_c + j, count), d, o, tanh_c))
    store(alpha + 3 * span + j, count, tanh_c)  # kept where the output gate's gradient will be


@njit(forceinline=True)
def _lstm_gates(
    p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha
):
    i, f = load(p, a + j, count), load(p, a + span + j, count)
    g, o = load(p, a + 2 * span + j, count), load(p, a + 3 * span + j, count)
    d, dc = load(p, delta + j, count), load(p, cell + j, count)
    tanh_c = load(p, alpha + 3 * span + j, count)
    _lstm_alpha(p, count, j, span, c_prev, carry_c, alpha, i, f, g, o, tanh_c, d, dc)


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
def _gru_to_n(z, n):
    return (1.0 - z) * (1.0 - n * n)


@njit(forceinline=True)
def _gru_to_z(h_prev, z, n):
    return (h_prev - n) * z * (1.0 - z)


@njit(forceinline=True)
def _gru_to_r(to_n, before_reset, r):
    return to_n * before_reset * r * (1.0 - r)


@njit(forceinline=True)
def _gru_back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    r, z = load(p, a + j, count), load(p, a + span + j, count)
    n, before_reset = load(p, a + 2 * span + j, count), load(p, a + 3 * span + j, count)
    d = total_gradient(p, count, j, e, carry_h)
    to_n = _gru_to_n(z, n)
    store(delta + j, count, d)
    store(carry_h + j, count, d * z)
    store(alpha + j, count, d * _gru_to_r(to_n, before_reset, r))
    store(alpha + span + j, count, d * _gru_to_z(load(p, h_prev + j, count), z, n))
    store(alpha + 2 * span + j, count, d * (to_n * r))
    store(alpha + 3 * span + j, count, d * to_n)


@njit(forceinline=True)
def _gru_gates(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    z, n = load(p, a + span + j, count), load(p, a + 2 * span + j, count)
    d = load(p, delta + j, count)
    store(carry_h + j, count, d * z)
    store(alpha + span + j, count, d * _gru_to_z(load(p, h_prev + j, count), z, n))
    store(alpha + 3 * span + j, count, d * _gru_to_n(z, n))


@njit(forceinline=True)
def _gru_rest(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    r, before_reset = load(p, a + j, count), load(p, a + 3 * span + j, count)
    d_n = load(p, alpha + 3 * span + j, count)
    store(alpha + j, count, _gru_to_r(d_n, before_reset, r))
    store(alpha + 2 * span + j, count, d_n * r)


# Numba's cache knows a function by its code and by what it closes over, which in a dispatcher made
# here is new in every process: what is compiled and kept must be a plain function of the module.

_rnn_tanh_ahead_in_slices = forward(1, 1, _tanh_ahead)
_rnn_tanh_back_in_slices = backward(1, 1, _tanh_back)
_rnn_tanh_clipped_in_slices = clipped_backward(1, 1, Phases(nothing, _tanh_gates, nothing, (0, 1)))


def _rnn_tanh_forward(p):
    _rnn_tanh_ahead_in_slices(p)


def _rnn_tanh_backward(p):
    _rnn_tanh_back_in_slices(p)


def _rnn_tanh_clipped(p):
    _rnn_tanh_clipped_in_slices(p)


_rnn_relu_ahead_in_slices = forward(1, 1, _relu_ahead)
_rnn_relu_back_in_slices = backward(1, 1, _relu_back)
_rnn_relu_clipped_in_slices = clipped_backward(1, 1, Phases(nothing, _relu_gates, nothing, (0, 1)))


def _rnn_relu_forward(p):
    _rnn_relu_ahead_in_slices(p)


def _rnn_relu_backward(p):
    _rnn_relu_back_in_slices(p)


def _rnn_relu_clipped(p):
    _rnn_relu_clipped_in_slices(p)


_lstm_ahead_in_slices = forward(4, 4, _lstm_ahead)
_lstm_back_in_slices = backward(4, 4, _lstm_back)
_lstm_clipped_in_slices = clipped_backward(
    4, 4, Phases(_lstm_to_cell, _lstm_gates, nothing, (0, 4))
)


def _lstm_forward(p):
    _lstm_ahead_in_slices(p)


def _lstm_backward(p):
    _lstm_back_in_slices(p)


def _lstm_clipped(p):
    _lstm_clipped_in_slices(p)


_gru_ahead_in_slices = forward(3, 4, _gru_ahead)
_gru_back_in_slices = backward(3, 4, _gru_back)
_gru_clipped_in_slices = clipped_backward(
    3, 4, Phases(nothing, _gru_gates, _gru_rest, (3, 4), (0, 2))
)


def _gru_forward(p):
    _gru_ahead_in_slices(p)


def _gru_backward(p):
    _gru_back_in_slices(p)


def _gru_clipped(p):
    _gru_clipped_in_slices(p)


class Cell(NamedTuple):
    """A cell's kernels, to be compiled: ``(p) -> None``.

    Args:
        gates: Rows of its weights over the hidden size.
        kept: Blocks that are kept of a step; 0 if the state is all that the way back needs.
        forward: The way there.
        backward: The way back.
        clipped: The way back with clipping, apart so that the other one need not ask.
    """

    gates: int
    kept: int
    forward: Callable[[Any], None]
    backward: Callable[[Any], None]
    clipped: Callable[[Any], None]

    @property
    def blocks(self) -> int:
        """Blocks of gradients that a step has on the way back."""
        return self.kept or self.gates


CELLS = {
    "RNN_TANH": Cell(1, 0, _rnn_tanh_forward, _rnn_tanh_backward, _rnn_tanh_clipped),
    "RNN_RELU": Cell(1, 0, _rnn_relu_forward, _rnn_relu_backward, _rnn_relu_clipped),
    "LSTM": Cell(4, 4, _lstm_forward, _lstm_backward, _lstm_clipped),
    "GRU": Cell(3, 4, _gru_forward, _gru_backward, _gru_clipped),
}
"""By torch.nn's ``mode``."""
