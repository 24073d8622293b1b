"""The equations of the cells on one vector of units, there and back; see ``loops``.

``count`` units are worked on, ``j`` bytes from the beginning of every block ``[rows, H]``; the
blocks of one step lie ``span`` bytes apart. Equations and names as in ``reference``. A cell's
``back`` takes all of them at once, its phases one after the other through memory.

A vanilla RNN needs two equations, at the end: its activation, and the way back through that.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from numba import njit

from rnngrad.kernels.activations import ALPHA, NEGATIVE_SLOPE, mode_of
from rnngrad.kernels.loops import (
    Phases,
    backward,
    clipped_backward,
    forward,
    named_after,
    nothing,
    total_gradient,
)
from rnngrad.kernels.vector import (
    expm1,
    if_positive,
    load,
    sigmoid,
    store,
    tanh,
    unless_negative,
)


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


def _all_slices(p):
    every_slice(p)  # noqa: F821, a global of the functions that are made of this one


def _kernel(name: str, every_slice: Any) -> Any:
    """What is compiled and kept: a function with a name of its own that closes over nothing.

    Numba's cache knows a function by its name, its code and what it closes over. In a dispatcher
    made here the last is new in every process, so that the function has it as a global instead.
    """
    made = FunctionType(
        _all_slices.__code__, {"__name__": __name__, "every_slice": every_slice}, name
    )
    made.__qualname__ = name
    return made


def _cell(mode: str, gates: int, kept: int, ahead: Any, back: Any, phases: Phases) -> Cell:
    blocks = kept or gates
    return Cell(
        gates,
        kept,
        _kernel(f"{mode}_forward", forward(gates, blocks, ahead)),
        _kernel(f"{mode}_backward", backward(gates, blocks, back)),
        _kernel(f"{mode}_clipped", clipped_backward(gates, blocks, phases)),
    )


def _rnn(mode: str, activation: Any, through: Any) -> Cell:
    """A vanilla RNN.

    Args:
        mode: Its name.
        activation: From the pre-activations to the state.
        through: From ``∂L/∂h_t`` and the state to ``α``.
    """

    @njit(forceinline=True)
    @named_after(activation)
    def ahead(p, count, j, span, a, h_prev, h, c_prev, c, output):
        state = activation(load(p, a + j, count))
        store(h + j, count, state)
        store(output + j, count, state)

    @njit(forceinline=True)
    @named_after(through)
    def back(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
        state = load(p, h + j, count)
        d = total_gradient(p, count, j, e, carry_h)
        store(delta + j, count, d)
        store(alpha + j, count, through(d, state))

    @njit(forceinline=True)
    @named_after(through)
    def gates(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
        store(alpha + j, count, through(load(p, delta + j, count), load(p, h + j, count)))

    return _cell(mode, 1, 0, ahead, back, Phases(nothing, gates, nothing, (0, 1)))


@njit(forceinline=True)
def _tanh(a):
    return tanh(a)


@njit(forceinline=True)
def _through_tanh(d, h):
    return d * (1.0 - h * h)


@njit(forceinline=True)
def _relu(a):
    return unless_negative(a, a)


@njit(forceinline=True)
def _through_relu(d, h):
    # chosen, not multiplied: 0 · inf would be NaN where torch's gradient is 0
    return unless_negative(h, d)


@njit(forceinline=True)
def _sigmoid(a):
    return sigmoid(a)


@njit(forceinline=True)
def _through_sigmoid(d, h):
    return d * (h * (1.0 - h))


@njit(forceinline=True)
def _linear(a):
    return a


@njit(forceinline=True)
def _through_linear(d, h):
    return d


@njit(forceinline=True)
def _leaky_relu(a):
    return if_positive(a, a, NEGATIVE_SLOPE * a)


@njit(forceinline=True)
def _through_leaky_relu(d, h):
    return if_positive(h, d, NEGATIVE_SLOPE * d)


@njit(forceinline=True)
def _elu(a):
    return if_positive(a, a, ALPHA * expm1(a))


@njit(forceinline=True)
def _through_elu(d, h):
    return if_positive(h, d, d * (h + ALPHA))


_ACTIVATIONS = {
    "tanh": (_tanh, _through_tanh),
    "relu": (_relu, _through_relu),
    "sigmoid": (_sigmoid, _through_sigmoid),
    "linear": (_linear, _through_linear),
    "leaky_relu": (_leaky_relu, _through_leaky_relu),
    "elu": (_elu, _through_elu),
}

CELLS = {
    **{mode_of(name): _rnn(mode_of(name), *both) for name, both in _ACTIVATIONS.items()},
    "LSTM": _cell(
        "LSTM", 4, 4, _lstm_ahead, _lstm_back, Phases(_lstm_to_cell, _lstm_gates, nothing, (0, 4))
    ),
    "GRU": _cell(
        "GRU", 3, 4, _gru_ahead, _gru_back, Phases(nothing, _gru_gates, _gru_rest, (3, 4), (0, 2))
    ),
}
"""By torch.nn's ``mode``."""
