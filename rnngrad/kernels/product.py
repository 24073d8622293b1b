"""Matrix products small enough to stay in registers and caches: the bulk of a recurrence's work.

torch's product is made for large matrices; per time step it would be called on a few rows, a
thousand times over. Here a tile of the result (up to ``ROWS`` rows by ``WIDTH`` vectors) lives in
registers while the whole sum over ``k`` goes by, as in Goto & van de Geijn, "Anatomy of
high-performance matrix multiplication", ACM TOMS 2008, section 4.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, register_jitable

from rnngrad.kernels.vector import (
    I64,
    REGISTERS,
    Emitter,
    get,
    itemsize,
    lanes,
    lanes_of,
    put,
    size_of,
)

# as many sums as registers hold, beside one vector of B a column and one element of A
ROWS, WIDTH = (8, 3) if REGISTERS == 32 else (6, 2)


@intrinsic
def _tile(
    typing: Any,
    p: Any,
    rows: Any,
    width: Any,
    k: Any,
    outer: Any,
    a: Any,
    a_row: Any,
    a_k: Any,
    a_outer: Any,
    b: Any,
    b_k: Any,
    b_outer: Any,
    start: Any,
    start_row: Any,
    c: Any,
    c_row: Any,
    columns: Any,
) -> Any:
    """One tile of a product, ``rows`` by ``width`` vectors, of which ``columns`` are stored.

    One function of its own, that switches to the code for the tile's size.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        name = f"rnngrad_tile_{p.dtype}"
        module = builder.module
        if name not in module.globals:
            kind = ir.FunctionType(ir.VoidType(), [I64] * len(args[1:]))
            function = ir.Function(module, kind, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            _write_tiles(function, p)
        builder.call(module.globals[name], args[1:])
        return context.get_dummy_value()

    return types.void(p, *[types.int64] * 17), lower


def _write_tiles(function: ir.Function, p: Any) -> None:
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    rows, width, *rest = function.args
    other = function.append_basic_block("no_such_tile")
    number = builder.add(builder.mul(rows, I64(WIDTH + 1)), width)
    switch = builder.switch(number, other)
    builder.position_at_end(other)
    builder.ret_void()
    for m in range(1, ROWS + 1):
        for w in range(1, WIDTH + 1):
            block = function.append_basic_block(f"tile_{m}_{w}")
            switch.add_case(I64(m * (WIDTH + 1) + w), block)
            builder.position_at_end(block)
            _write_tile(builder, p, m, w, *rest)
            builder.ret_void()


def _write_tile(
    builder: Any,
    p: Any,
    rows: int,
    width: int,
    k: Any,
    outer: Any,
    a: Any,
    a_row: Any,
    a_k: Any,
    a_outer: Any,
    b: Any,
    b_k: Any,
    b_outer: Any,
    start: Any,
    start_row: Any,
    c: Any,
    c_row: Any,
    columns: Any,
) -> None:
    size, count = size_of(p), lanes_of(p)
    emit = Emitter(builder, p.dtype, count)
    cells = [(m, v) for m in range(rows) for v in range(width)]
    masks = [emit.first(builder.sub(columns, I64(v * count))) for v in range(width)]

    def at(base: Any, stride: Any, m: int, v: int) -> Any:
        offset = builder.add(builder.mul(stride, I64(m)), I64(v * count * size))
        return builder.add(base, offset)

    sums = [emit.load(at(start, start_row, m, v), masks[v]) for m, v in cells]
    before = builder.block
    heads = [builder.append_basic_block(part) for part in ("outer", "k", "next_outer", "end")]
    outer_head, inner_head, outer_tail, end = heads

    def loop(head: Any, came_from: Any, *values: Any) -> list[Any]:
        """Variables of a loop, with what they are at its beginning."""
        builder.position_at_end(head)
        variables = [builder.phi(value.type) for value in values]
        for variable, value in zip(variables, values, strict=True):
            variable.add_incoming(value, came_from)
        return variables

    def again(tail: Any, variables: list[Any], *values: Any) -> None:
        for variable, value in zip(variables, values, strict=True):
            variable.add_incoming(value, tail)

    builder.branch(outer_head)
    outer_loop = loop(outer_head, before, I64(0), a, b, *sums)
    o, a_o, b_o, *outer_sums = outer_loop
    builder.branch(inner_head)
    inner_loop = loop(inner_head, outer_head, I64(0), a_o, b_o, *outer_sums)
    i, a_i, b_i, *inner_sums = inner_loop
    vectors = [emit.load(builder.add(b_i, I64(v * count * size))) for v in range(width)]
    row, new_sums = a_i, []
    for m in range(rows):
        scalar = emit.broadcast(row)
        new_sums += [emit.fma(scalar, vectors[v], inner_sums[m * width + v]) for v in range(width)]
        row = builder.add(row, a_row)
    i_next = builder.add(i, I64(1))
    again(inner_head, inner_loop, i_next, builder.add(a_i, a_k), builder.add(b_i, b_k), *new_sums)
    builder.cbranch(builder.icmp_signed("<", i_next, k), inner_head, outer_tail)
    builder.position_at_end(outer_tail)
    o_next = builder.add(o, I64(1))
    step_a, step_b = builder.add(a_o, a_outer), builder.add(b_o, b_outer)
    again(outer_tail, outer_loop, o_next, step_a, step_b, *new_sums)
    builder.cbranch(builder.icmp_signed("<", o_next, outer), outer_head, end)
    builder.position_at_end(end)
    for (m, v), value in zip(cells, new_sums, strict=True):
        emit.store(value, at(c, c_row, m, v), masks[v])


def product_kernel(
    p, m, n, k, outer, a, a_row, a_k, a_outer, b, b_k, b_outer, packed, start, start_row, c, c_row
):
    """``C = start + Σ_o Σ_k A[:, o, k] B[o, k, :]``, ``C [m, n]``; addresses and strides in bytes.

    ``B`` is ``packed`` by ``pack``, or lies as its strides say, its rows in memory that may be read
    a vector beyond their end.
    """
    if m == 0 or n == 0:
        return
    size, width = itemsize(p), lanes(p)
    vectors = (n + width - 1) // width
    parts = (vectors + WIDTH - 1) // WIDTH
    blocks = (m + ROWS - 1) // ROWS
    for part in range(parts):
        first, last = part * vectors // parts, (part + 1) * vectors // parts
        panel = b + first * width * size * (k * outer if packed else 1)
        step = (last - first) * width * size if packed else b_k
        outer_step = k * step if packed else b_outer
        column = first * width * size
        for block in range(blocks):
            top, bottom = block * m // blocks, (block + 1) * m // blocks
            _tile(
                p,
                bottom - top,
                last - first,
                k,
                outer,
                a + top * a_row,
                a_row,
                a_k,
                a_outer,
                panel,
                step,
                outer_step,
                start + top * start_row + column,
                start_row,
                c + top * c_row + column,
                c_row,
                n - first * width,
            )


@intrinsic
def product(
    typing, p, m, n, k, outer, a, a_row, a_k, a_outer, b, b_k, b_outer, packed, start, start_row,
    c, c_row,
):  # fmt: skip
    """``product_kernel``, compiled once for all kernels; ``p`` begins with its address."""

    def lower(context, builder, sig, args):
        address = builder.load(builder.bitcast(args[0], I64.as_pointer()))
        kind = ir.FunctionType(ir.VoidType(), [args[0].type, *[I64] * 16])
        builder.call(builder.inttoptr(address, kind.as_pointer()), args)
        return context.get_dummy_value()

    return types.void(p, *[types.int64] * 16), lower


@register_jitable
def packed_size(k, n, width, size):
    """Bytes of a packed matrix ``[k, n]`` in vectors of ``width`` elements of ``size`` bytes."""
    return (n + width - 1) // width * width * k * size


@njit
def pack(p, target, source, k, k_stride, n, n_stride):
    """Copies ``B [k, n]`` panel by panel, as the tiles read it, zeros beyond its last column."""
    size, width = itemsize(p), lanes(p)
    vectors = (n + width - 1) // width
    parts = (vectors + WIDTH - 1) // WIDTH
    for part in range(parts):
        first = part * vectors // parts * width
        columns = (part + 1) * vectors // parts * width - first
        real = min(columns, n - first)
        for i in range(k):
            row = source + i * k_stride + first * n_stride
            for j in range(real):
                put(p, target + j * size, get(p, row + j * n_stride))
            for j in range(real, columns):
                put(p, target + j * size, 0.0)
            target += columns * size
