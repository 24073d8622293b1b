"""The way through time and back that all cells share, compiled: forward, backward and recording.

Rows of a batch do not meet in the recurrence. So a batch is cut into slices, and one thread takes a
slice through all time steps with no barrier on the way: its weights stay in that core's cache. Per
step there is one small product and one pass over the cell's equations; going back, a block of steps
at a time is turned into weight gradients while it is still in the cache.

A cell gives ``ahead`` and ``back``, its equations on one vector of units (the latter also as
``Phases``, between which rows can be clipped), and two numbers: of its ``gates``, and of the
``blocks`` ``[rows, H]`` that a step has. These differ in a GRU, where input and state meet in the
last gate with a factor between them, and each has a block of its own: going forward the state's
share of that gate is in the last block, going back the input's.

A kernel has one argument, ``p``, which points to the integers named below: sizes, strides and
addresses, in bytes; 0 is no address. ``R`` counts runs, ``S`` slices. A slice keeps what it saves
in the order of its visits, ``s`` (time ``t``, or from the end), so that it passes over memory in
sequence.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import njit
from numba.extending import register_jitable

from rnngrad.kernels.product import pack, packed_size, product
from rnngrad.kernels.vector import (
    add_square,
    beyond,
    clamped,
    double_zero,
    field,
    get,
    integer,
    itemsize,
    lanes,
    load,
    put,
    put_double,
    real,
    scaled,
    store,
    take,
    total,
)

(
    PRODUCT,  # the first: `product` looks for it there
    # the slices: how many, (run, first row, row after the last) of each; counts those begun
    SLICES, BOUNDS, NEXT,
    # T, B, I, H; whether the last step comes first; lengths of the sequences [B], longest first
    STEPS, BATCH, INPUT, HIDDEN, REVERSE, LENGTHS,
    # scratch memory: address, and size for a slice
    SCRATCH, SCRATCH_SIZE,
    # x [R, T, B, I] with its strides; h_0, c_0 [R, B, H]; weights [R, gH, I], [R, gH, H], [R, gH]
    X, X_RUN, X_STEP, X_ROW, H_0, C_0, W_IH, W_HH, B_IH, B_HH,
    # what is kept: gates, and T + 1 states; KEPT is 0 if the gates need only last a step
    GATES, HS, CS, KEPT,
    # results [R, T, B, H], [R, B, H]
    OUTPUT, H_N, C_N,
    # what comes back [R, T, B, H], [R, B, H]: from outside, and carried from later steps
    GRAD_OUTPUT, GRAD_H_N, GRAD_C_N, CARRY_H, CARRY_C,
    # gradients: [R, T, B, I], [R, B, H]; of the weights per slice [S, gH, H], [S, gbH, I + 1] with
    # the biases' in the last column
    GRAD_X, GRAD_H_0, GRAD_C_0, GRAD_HH, GRAD_IH,
    # the recording: norms [R, T, B] in float64; in full [R, T, B, .]
    HIDDEN_NORM, DIRECT_NORM, CELL_NORM, HIDDEN_GRAD, CELL_GRAD, ALPHA, BEFORE,
    # clipping: one of SITES; whether by norm; the threshold, a float64; clipped fraction [R, T, B]
    CLIP_SITE, CLIP_BY_NORM, CLIP_AT, CLIPPED,
    COUNT,
) = range(51)  # fmt: skip

SITES = ("preact", "state", "carry")
PREACT, STATE, CARRY = range(3)
ALIGN = 64


@register_jitable
def _aligned(size):
    return (size + ALIGN - 1) // ALIGN * ALIGN


@register_jitable
def _together(rows):
    """Steps whose weight gradients are one product: enough rows for it, few enough for a cache."""
    return max(1, 128 // rows)


def forward_scratch(
    gates: int, blocks: int, inputs: int, hidden: int, width: int, size: int
) -> int:
    """Bytes of scratch memory that the way there needs for a slice."""
    return (
        _aligned(gates * packed_size(inputs, hidden, width, size))
        + _aligned(gates * packed_size(hidden, hidden, width, size))
        + _aligned(blocks * hidden * size)
    )


def backward_scratch(
    gates: int, blocks: int, rows: int, inputs: int, hidden: int, width: int, size: int
) -> int:
    """Bytes of scratch memory that the way back needs for a slice."""
    span = rows * hidden * size
    steps = _together(rows)
    return (
        _aligned(gates * packed_size(hidden, inputs, width, size))
        + _aligned(packed_size(gates * hidden, hidden, width, size))
        + _aligned(steps * blocks * span)
        + _aligned(steps * rows * (inputs + 1) * size + ALIGN)
        + 5 * _aligned(span + ALIGN)
        + _aligned(max(span, inputs * size) + ALIGN)
    )


@njit
def _clear(p, address, count):
    for j in range(count):
        put(p, address + j * itemsize(p), 0.0)


@njit
def _copy(p, target, source, count):
    step = lanes(p)
    for j in range(0, count, step):
        store(target + j * itemsize(p), count - j, load(p, source + j * itemsize(p), count - j))


@njit
def _add(p, target, source, count):
    for j in range(0, count * itemsize(p), itemsize(p)):
        put(p, target + j, get(p, target + j) + get(p, source + j))


@njit
def _active(p, n, t, rows, first):
    """How many of a slice's rows have a step ``t``; ``n`` had one a step before or after."""
    lengths = field(p, LENGTHS)
    if lengths == 0:
        return rows
    while n > 0 and integer(lengths + (first + n - 1) * 8) <= t:
        n -= 1
    while n < rows and integer(lengths + (first + n) * 8) > t:
        n += 1
    return n


@njit
def norm_of(p, address, count):
    """``‖v‖₂`` in float64, without under- or overflow on the way; NaN and infinity come through."""
    size, step = itemsize(p), lanes(p)
    pairs, full = count - count % (2 * step), count - count % step
    even, odd = double_zero(p), double_zero(p)  # two sums, so that one need not wait for the other
    for j in range(0, pairs, 2 * step):
        even = add_square(even, load(p, address + j * size, step))
        odd = add_square(odd, load(p, address + (j + step) * size, step))
    if pairs < full:
        even = add_square(even, load(p, address + pairs * size, step))
    if full < count:
        odd = add_square(odd, load(p, address + full * size, count - full))
    squares = total(even + odd)
    # the square of any float32 fits into a float64
    if size == 4 or 1e-280 < squares < math.inf or squares != squares:
        return math.sqrt(squares)
    largest = 0.0
    for j in range(count):
        largest = max(largest, abs(get(p, address + j * size)))
    if largest == 0 or largest == math.inf:
        return largest
    squares = 0.0
    for j in range(count):
        ratio = get(p, address + j * size) / largest
        squares += ratio * ratio
    return math.sqrt(squares) * largest


@njit
def _bounds(p, index):
    bounds = field(p, BOUNDS) + index * 24
    return integer(bounds), integer(bounds + 8), integer(bounds + 16)


@njit
def _add_weight_gradients(p, gates, blocks, index, low, high, n, alphas, stride, hs, xs):
    """``Σ α ⊗ h_{t-1}`` and ``Σ α ⊗ (x_t, 1)`` of ``n`` rows, steps from ``low`` to ``high``."""
    size = itemsize(p)
    steps, inputs, hidden = field(p, STEPS), field(p, INPUT), field(p, HIDDEN)
    run, first, last = _bounds(p, index)
    row, span, wide = hidden * size, (last - first) * hidden * size, (inputs + 1) * size
    if field(p, GRAD_HH) != 0:
        for q in range(gates):
            c = field(p, GRAD_HH) + (index * gates + q) * hidden * row
            product(
                p, hidden, hidden, n, high - low, alphas + q * span, size, row, stride,
                hs, row, span, 0, c, row, c, row,
            )  # fmt: skip
    if field(p, GRAD_IH) != 0:
        for s in range(low, high):
            t = steps - 1 - s if field(p, REVERSE) != 0 else s
            x = field(p, X) + run * field(p, X_RUN) + t * field(p, X_STEP) + first * field(p, X_ROW)
            target = xs + (s - low) * n * wide
            for b in range(n):
                _copy(p, target + b * wide, x + b * field(p, X_ROW), inputs)
                put(p, target + b * wide + inputs * size, 1.0)
        for q in range(blocks):
            c = field(p, GRAD_IH) + (index * blocks + q) * hidden * wide
            product(
                p, hidden, inputs + 1, n, high - low, alphas + q * span, size, row, stride,
                xs, wide, n * wide, 0, c, wide, c, wide,
            )  # fmt: skip


def named_after(equations: Any) -> Any:
    """Decorator: a name of its own for a function made for a cell.

    Numba makes a linker's symbol of a function's name and of a number that it counts up in every
    process. Code kept by two processes would have one symbol for two cells' functions, and of the
    two loaded together the one would run in the other's place.
    """

    def rename(function: Any) -> Any:
        function.__qualname__ += f".{equations.__qualname__}"
        return function

    return rename


def _over_slices(run_slice: Any) -> Any:
    """Slices one after the other, until none is left that another thread has not begun."""

    @njit
    @named_after(run_slice)
    def every_slice(p):
        index = take(p, NEXT)
        while index < field(p, SLICES):
            run_slice(p, index)
            index = take(p, NEXT)

    return every_slice


def forward(gates: int, blocks: int, ahead: Any) -> Any:
    """The way there of a cell."""

    @njit
    @named_after(ahead)
    def run_slice(p, index):
        size = itemsize(p)
        steps, batch = field(p, STEPS), field(p, BATCH)
        inputs, hidden = field(p, INPUT), field(p, HIDDEN)
        run, first, last = _bounds(p, index)
        rows = last - first
        row, span = hidden * size, rows * hidden * size  # bytes of a row, and of a step's block

        # weights as the product reads them, biases as the sums begin
        part = (
            packed_size(inputs, hidden, lanes(p), size),
            packed_size(hidden, hidden, lanes(p), size),
        )
        w_ih = field(p, SCRATCH) + index * field(p, SCRATCH_SIZE)
        w_hh = w_ih + _aligned(gates * part[0])
        bias = w_hh + _aligned(gates * part[1])
        _clear(p, bias, blocks * hidden)
        for q in range(gates):
            block = q if q < gates - 1 else blocks - 1
            weights = field(p, W_IH) + (run * gates + q) * hidden * inputs * size
            pack(p, w_ih + q * part[0], weights, inputs, size, hidden, inputs * size)
            weights = field(p, W_HH) + (run * gates + q) * hidden * row
            pack(p, w_hh + q * part[1], weights, hidden, size, hidden, row)
            if field(p, B_IH) != 0:
                _add(p, bias + q * row, field(p, B_IH) + (run * gates + q) * row, hidden)
                _add(p, bias + block * row, field(p, B_HH) + (run * gates + q) * row, hidden)

        state = (run * batch + first) * row
        start = (run * batch + first) * row * (steps + 1)
        hs = field(p, HS) + start
        cs = field(p, CS) + (start if field(p, KEPT) != 0 else state)
        has_cell = field(p, CS) != 0
        cell_step = span if field(p, KEPT) != 0 else 0
        kept = field(p, GATES) + (steps if field(p, KEPT) != 0 else 1) * state * blocks
        gate_step = blocks * span if field(p, KEPT) != 0 else 0
        n = 0
        for s in range(steps):
            t = steps - 1 - s if field(p, REVERSE) != 0 else s
            before = n
            n = _active(p, rows if s == 0 else n, t, rows, first)
            h_prev, h = hs + s * span, hs + (s + 1) * span
            c_prev, c = cs + s * cell_step, cs + (s + 1) * cell_step
            if s == 0:
                _copy(p, h_prev, field(p, H_0) + state, rows * hidden)
                if has_cell:
                    _copy(p, c_prev, field(p, C_0) + state, rows * hidden)
            elif n > before:
                skip = before * row
                _copy(p, h_prev + skip, field(p, H_0) + state + skip, (n - before) * hidden)
                if has_cell:
                    _copy(p, c_prev + skip, field(p, C_0) + state + skip, (n - before) * hidden)
            x = field(p, X) + run * field(p, X_RUN) + t * field(p, X_STEP) + first * field(p, X_ROW)
            # a cell with no gates kept is activated where its next state will stand
            a = h if field(p, GATES) == 0 else kept + s * gate_step
            for q in range(gates):
                product(
                    p, n, hidden, inputs, 1, x, field(p, X_ROW), size, 0,
                    w_ih + q * part[0], 0, 0, 1, bias + q * row, 0, a + q * span, row,
                )  # fmt: skip
            for q in range(gates):
                block = q if q < gates - 1 else blocks - 1
                target = a + block * span
                begin, begin_row = (target, row) if block == q else (bias + block * row, 0)
                product(
                    p, n, hidden, hidden, 1, h_prev, row, size, 0,
                    w_hh + q * part[1], 0, 0, 1, begin, begin_row, target, row,
                )  # fmt: skip
            output = field(p, OUTPUT) + ((run * steps + t) * batch + first) * row
            units, step = n * hidden, lanes(p)
            full = units - units % step
            for j in range(0, full, step):
                ahead(p, step, j * size, span, a, h_prev, h, c_prev, c, output)
            if full < units:
                ahead(p, units - full, full * size, span, a, h_prev, h, c_prev, c, output)
            _clear(p, output + n * row, (rows - n) * hidden)
        for b in range(rows):
            own = steps
            if field(p, LENGTHS) != 0:
                own = integer(field(p, LENGTHS) + (first + b) * 8)
            end = steps if field(p, REVERSE) != 0 else own
            source = hs + end * span + b * row
            c_source = cs + end * cell_step + b * row
            if own == 0:
                source, c_source = field(p, H_0) + state + b * row, field(p, C_0) + state + b * row
            _copy(p, field(p, H_N) + state + b * row, source, hidden)
            if has_cell:
                _copy(p, field(p, C_N) + state + b * row, c_source, hidden)

    return _over_slices(run_slice)


class Phases(NamedTuple):
    """A cell's equations on the way back, in the order in which its gradients arise.

    What one of them leaves in memory may be clipped before the next one reads it there. Each has
    the arguments of ``back``.

    Args:
        cell: From ``∂L/∂h_t`` to ``∂L/∂c_t``.
        gates: From these two to the gates.
        rest: To the gates that others lie behind.
        first: Blocks that ``gates`` completes, ``(first, after the last)``.
        second: Blocks that ``rest`` completes.
    """

    cell: Any
    gates: Any
    rest: Any
    first: tuple[int, int]
    second: tuple[int, int] = (0, 0)


@njit(forceinline=True)
def total_gradient(p, count, j, e, carry_h):
    """``∂L/∂h_t``: what arrives from outside and what is carried."""
    return load(p, e + j, count) + load(p, carry_h + j, count)


@njit(forceinline=True)
def nothing(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    """A phase that a cell does not have."""


@njit(forceinline=True)
def _arrive(p, count, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha):
    store(delta + j, count, total_gradient(p, count, j, e, carry_h))


def _over_units(equations: Any) -> Any:
    """Equations on ``units`` units, ``j`` bytes from the beginning of every block."""

    @njit(forceinline=True)
    @named_after(equations)
    def every_unit(
        p, units, j, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha
    ):  # fmt: skip
        size, step = itemsize(p), lanes(p)
        full = units - units % step
        for k in range(0, full, step):
            equations(
                p, step, j + k * size, span, a, h_prev, h, c_prev, c,
                e, carry_h, carry_c, delta, cell, alpha,
            )  # fmt: skip
        if full < units:
            equations(
                p, units - full, j + full * size, span, a, h_prev, h, c_prev, c,
                e, carry_h, carry_c, delta, cell, alpha,
            )  # fmt: skip

    return every_unit


@njit
def _clip(p, row):
    """Clips a row in place; see ``rowclip``. How many entries were clipped, or 1 for the row."""
    size, step, count, limit = itemsize(p), lanes(p), field(p, HIDDEN), real(p, CLIP_AT)
    if field(p, CLIP_BY_NORM) != 0:
        norm = norm_of(p, row, count)
        if not limit < norm < math.inf:
            return 0
        for j in range(0, count, step):
            x = load(p, row + j * size, count - j)
            store(row + j * size, count - j, scaled(x, norm, limit))
        return 1
    clipped = 0
    for j in range(0, count, step):
        x = load(p, row + j * size, count - j)
        clipped += beyond(x, limit)
        store(row + j * size, count - j, clamped(x, limit))
    return clipped


@njit
def _report(p, spot, clipped, rows):
    """Records what fraction was clipped of so many rows."""
    if field(p, CLIPPED) != 0:
        things = rows if field(p, CLIP_BY_NORM) != 0 else rows * field(p, HIDDEN)
        put_double(field(p, CLIPPED) + spot, clipped / things)


def backward(gates: int, blocks: int, back: Any) -> Any:
    """The way back of a cell."""
    every_unit = _over_units(back)

    @njit(forceinline=True)
    @named_after(back)
    def step_back(
        p, n, spots, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha
    ):  # fmt: skip
        every_unit(
            p, n * field(p, HIDDEN), 0, span, a, h_prev, h, c_prev, c,
            e, carry_h, carry_c, delta, cell, alpha,
        )  # fmt: skip

    @njit(forceinline=True)
    def leave(p, n, spots, carry_h, carry_c):
        return

    return _through_time(gates, blocks, step_back, leave)


def clipped_backward(gates: int, blocks: int, phases: Phases) -> Any:
    """The way back of a cell whose rows are clipped as they arise."""
    to_state, to_cell = _over_units(_arrive), _over_units(phases.cell)
    to_gates, to_rest = _over_units(phases.gates), _over_units(phases.rest)
    first, after_first = phases.first
    second, after_second = phases.second

    @njit
    @named_after(phases.gates)
    def step_back(
        p, n, spots, span, a, h_prev, h, c_prev, c, e, carry_h, carry_c, delta, cell, alpha
    ):  # fmt: skip
        hidden, site, has_cell = field(p, HIDDEN), field(p, CLIP_SITE), field(p, CS) != 0
        for b in range(n):
            j, clipped = b * hidden * itemsize(p), 0
            to_state(
                p, hidden, j, span, a, h_prev, h, c_prev, c,
                e, carry_h, carry_c, delta, cell, alpha,
            )  # fmt: skip
            if site == STATE:
                clipped += _clip(p, delta + j)
            to_cell(
                p, hidden, j, span, a, h_prev, h, c_prev, c,
                e, carry_h, carry_c, delta, cell, alpha,
            )  # fmt: skip
            if site == STATE and has_cell:
                clipped += _clip(p, cell + j)
            to_gates(
                p, hidden, j, span, a, h_prev, h, c_prev, c,
                e, carry_h, carry_c, delta, cell, alpha,
            )  # fmt: skip
            if site == PREACT:
                for block in range(first, after_first):
                    clipped += _clip(p, alpha + block * span + j)
            to_rest(
                p, hidden, j, span, a, h_prev, h, c_prev, c,
                e, carry_h, carry_c, delta, cell, alpha,
            )  # fmt: skip
            if site == PREACT:
                for block in range(second, after_second):
                    clipped += _clip(p, alpha + block * span + j)
                _report(p, spots + b * 8, clipped, gates)
            elif site == STATE:
                _report(p, spots + b * 8, clipped, 2 if has_cell else 1)

    @njit
    def leave(p, n, spots, carry_h, carry_c):
        if field(p, CLIP_SITE) == CARRY:
            row, has_cell = field(p, HIDDEN) * itemsize(p), field(p, CS) != 0
            for b in range(n):
                clipped = _clip(p, carry_h + b * row)
                if has_cell:
                    clipped += _clip(p, carry_c + b * row)
                _report(p, spots + b * 8, clipped, 2 if has_cell else 1)

    return _through_time(gates, blocks, step_back, leave)


def _through_time(gates: int, blocks: int, step_back: Any, leave: Any) -> Any:
    """The way back, given a step's equations and what is done to that which leaves the step."""

    @njit
    @named_after(step_back)
    def run_slice(p, index):
        size = itemsize(p)
        steps, batch = field(p, STEPS), field(p, BATCH)
        inputs, hidden = field(p, INPUT), field(p, HIDDEN)
        run, first, last = _bounds(p, index)
        rows = last - first
        row, span = hidden * size, rows * hidden * size
        together = _together(rows)
        has_cell = field(p, CS) != 0

        part = packed_size(hidden, inputs, lanes(p), size)
        w_ih = field(p, SCRATCH) + index * field(p, SCRATCH_SIZE)
        w_hh = w_ih + _aligned(gates * part)
        alphas = w_hh + _aligned(packed_size(gates * hidden, hidden, lanes(p), size))
        xs = alphas + _aligned(together * blocks * span)
        delta = xs + _aligned(together * rows * (inputs + 1) * size + ALIGN)
        padded = _aligned(span + ALIGN)
        cell, carry_h, carry_c = delta + padded, delta + 2 * padded, delta + 3 * padded
        direct, zeros = delta + 4 * padded, delta + 5 * padded

        weights = field(p, W_HH) + run * gates * hidden * row
        pack(p, w_hh, weights, gates * hidden, row, hidden, size)
        if field(p, GRAD_X) != 0:
            for q in range(gates):
                weights = field(p, W_IH) + (run * gates + q) * hidden * inputs * size
                pack(p, w_ih + q * part, weights, hidden, inputs * size, inputs, size)

        state = (run * batch + first) * row
        start = state * (steps + 1)
        hs, cs = field(p, HS) + start, field(p, CS) + start
        kept = field(p, GATES) + state * steps * blocks
        _clear(p, zeros, max(rows * hidden, inputs))
        _clear(p, carry_h, rows * hidden)
        _clear(p, carry_c, rows * hidden)
        for source, carry in (
            (field(p, CARRY_H), carry_h),
            (field(p, CARRY_C), carry_c),
            (field(p, GRAD_C_N), carry_c),
        ):
            if source != 0:
                _add(p, carry, source + state, rows * hidden)

        n = 0
        high = steps
        while high > 0:
            low, fewest = max(0, high - together), rows
            for s in range(high - 1, low - 1, -1):
                t = steps - 1 - s if field(p, REVERSE) != 0 else s
                before = n
                n = _active(p, n, t, rows, first)
                here = ((run * steps + t) * batch + first) * row
                e = zeros if field(p, GRAD_OUTPUT) == 0 else field(p, GRAD_OUTPUT) + here
                if n > before and field(p, GRAD_H_N) != 0:
                    _copy(p, direct, e, n * hidden)
                    skip = before * row
                    _add(p, direct + skip, field(p, GRAD_H_N) + state + skip, (n - before) * hidden)
                    e = direct
                h_prev, h = hs + s * span, hs + (s + 1) * span
                c_prev, c = cs + s * span, cs + (s + 1) * span
                a = kept + s * blocks * span
                alpha = alphas + (s - low) * blocks * span
                spots = ((run * steps + t) * batch + first) * 8
                step_back(
                    p, n, spots, span, a, h_prev, h, c_prev, c,
                    e, carry_h, carry_c, delta, cell, alpha,
                )  # fmt: skip
                # the state's own share, as a GRU has, is waiting in the carry
                begin, begin_row = (zeros, 0) if blocks == gates else (carry_h, row)
                product(
                    p, n, hidden, hidden, gates, alpha, row, size, span,
                    w_hh, 0, 0, 1, begin, begin_row, carry_h, row,
                )  # fmt: skip
                leave(p, n, spots, carry_h, carry_c)
                if field(p, GRAD_X) != 0:
                    grad_x = field(p, GRAD_X) + ((run * steps + t) * batch + first) * inputs * size
                    for q in range(gates):
                        block = q if q < gates - 1 else blocks - 1
                        begin, begin_row = (zeros, 0) if q == 0 else (grad_x, inputs * size)
                        product(
                            p, n, inputs, hidden, 1, alpha + block * span, row, size, 0,
                            w_ih + q * part, 0, 0, 1, begin, begin_row, grad_x, inputs * size,
                        )  # fmt: skip
                if field(p, HIDDEN_NORM) != 0:
                    for b in range(n):
                        spot = spots + b * 8
                        put_double(
                            field(p, HIDDEN_NORM) + spot, norm_of(p, delta + b * row, hidden)
                        )
                        arrived = 0.0 if e == zeros else norm_of(p, e + b * row, hidden)
                        put_double(field(p, DIRECT_NORM) + spot, arrived)
                        if has_cell:
                            put_double(
                                field(p, CELL_NORM) + spot, norm_of(p, cell + b * row, hidden)
                            )
                if field(p, HIDDEN_GRAD) != 0:
                    _copy(p, field(p, HIDDEN_GRAD) + here, delta, n * hidden)
                    if has_cell:
                        _copy(p, field(p, CELL_GRAD) + here, cell, n * hidden)
                if field(p, ALPHA) != 0:
                    _copy(p, field(p, BEFORE) + here, h_prev, n * hidden)
                    for b in range(n):
                        for q in range(gates):
                            target = field(p, ALPHA) + (here + b * row) * gates + q * row
                            _copy(p, target, alpha + q * span + b * row, hidden)
                fewest = min(fewest, n)
            stride = blocks * span
            if fewest == rows:
                _add_weight_gradients(
                    p, gates, blocks, index, low, high, rows, alphas, stride, hs + low * span, xs
                )
            else:
                # step by step, active rows only: with 0 for the others, 0 · inf would be NaN
                for s in range(low, high):
                    t = steps - 1 - s if field(p, REVERSE) != 0 else s
                    m = _active(p, 0, t, rows, first)
                    if m > 0:
                        alpha = alphas + (s - low) * stride
                        _add_weight_gradients(
                            p, gates, blocks, index, s, s + 1, m, alpha, stride, hs + s * span, xs
                        )
            high = low
        _copy(p, field(p, GRAD_H_0) + state, carry_h, rows * hidden)
        if has_cell:
            _copy(p, field(p, GRAD_C_0) + state, carry_c, rows * hidden)

    return _over_slices(run_slice)
