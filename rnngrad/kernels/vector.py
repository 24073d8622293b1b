"""Vectors as wide as the processor's registers, as a type that compiled code can compute with.

Numba compiles scalars and leaves vectors to LLVM's guesses. Here they are explicit: ``load`` gives
a ``Vector`` of ``lanes(p)`` elements, ``+ - * /`` and the functions below work on all of them at
once, ``store`` puts back the first ``count``. Memory is addressed by integers, in bytes; every
function takes ``p``, a pointer whose element type says whether the kernel computes in float32 or
float64.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model


def _features() -> dict[str, bool]:
    """What the processor that the code is compiled for can do; NUMBA_CPU_FEATURES overrides it."""
    if config.CPU_FEATURES is None:
        return dict(llvm.get_host_cpu_features())
    return {name[1:]: name[0] == "+" for name in config.CPU_FEATURES.split(",") if name}


_HAS = _features()
REGISTER_BYTES = 64 if _HAS.get("avx512f") else 32 if _HAS.get("avx") else 16
REGISTERS = 32 if _HAS.get("avx512f") or _HAS.get("neon") else 16

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """``lanes`` numbers of one type."""

    def __init__(self, dtype: Any, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"vector({lanes} x {dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(element(kind.dtype), kind.lanes))


def element(dtype: Any) -> ir.Type:
    """LLVM's type of a number."""
    return {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: I1}[dtype]


def size_of(p: types.CPointer) -> int:
    """Bytes of an element."""
    return int(p.dtype.bitwidth // 8)


def lanes_of(p: types.CPointer) -> int:
    """Elements in a vector."""
    return REGISTER_BYTES // size_of(p)


_EXP_TAIL = (0.49999993, 0.16666521, 0.041668388, 0.0083687169, 0.0013814598)
"""``(e^r - 1 - r) / r²``, minimax for ``|r| <= ln 2 / 2``: relative error of ``e^r`` 3e-9."""


class Emitter:
    """LLVM instructions on vectors of one type."""

    def __init__(self, builder: Any, dtype: Any, lanes: int) -> None:
        self.builder, self.dtype, self.lanes = builder, dtype, lanes
        self.type = ir.VectorType(element(dtype), lanes)
        self.integers = ir.VectorType(I32, lanes)
        self.size = dtype.bitwidth // 8
        self.name = f"v{lanes}f{dtype.bitwidth}"

    def function(self, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
        """A function of LLVM's or libm's, declared once in the module."""
        declared = self.builder.module.globals
        kind = ir.FunctionType(result, arguments)
        return declared[name] if name in declared else ir.Function(self.builder.module, kind, name)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.type, [value] * self.lanes)

    def splat(self, scalar: Any, kind: ir.VectorType | None = None) -> Any:
        """The scalar in every lane."""
        kind = kind or self.type
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(self.integers, None)
        )

    def first(self, count: Any) -> Any:
        """Mask of the first ``count`` lanes; all if it is larger, none if it is negative."""
        kind = ir.VectorType(I64, self.lanes)
        numbers = ir.Constant(kind, list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, self.splat(count, kind))

    def load(self, address: Any, mask: Any = None) -> Any:
        """The elements from ``address`` on, 0 where the mask is false."""
        pointer = self.builder.inttoptr(address, self.type.as_pointer())
        if mask is None:
            return self.builder.load(pointer, align=self.size)
        load = self.function(
            f"llvm.masked.load.{self.name}.p0",
            self.type,
            *(pointer.type, I32, mask.type, self.type),
        )
        zero = ir.Constant(self.type, None)
        return self.builder.call(load, [pointer, I32(self.size), mask, zero])

    def store(self, value: Any, address: Any, mask: Any) -> None:
        pointer = self.builder.inttoptr(address, self.type.as_pointer())
        store = self.function(
            f"llvm.masked.store.{self.name}.p0",
            ir.VoidType(),
            *(self.type, pointer.type, I32, mask.type),
        )
        self.builder.call(store, [value, pointer, I32(self.size), mask])

    def broadcast(self, address: Any) -> Any:
        """The one number at ``address`` in every lane."""
        pointer = self.builder.inttoptr(address, self.type.element.as_pointer())
        return self.splat(self.builder.load(pointer, align=self.size))

    # "contract" allows a product and a sum to be rounded once, and nothing else: no fast-math,
    # which would assume that there are no NaN
    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=("contract",))

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def div(self, a: Any, b: Any) -> Any:
        return self.builder.fdiv(a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        fma = self.function(f"llvm.fma.{self.name}", self.type, *[self.type] * 3)
        return self.builder.call(fma, [a, b, c])

    def polynomial(self, x: Any, coefficients: list[float]) -> Any:
        """Horner's scheme; the constant comes first."""
        *rest, value = (self.constant(c) for c in coefficients)
        for c in reversed(rest):
            value = self.fma(value, x, c)
        return value

    def at_most(self, x: Any, high: float) -> Any:
        """``min(x, high)``; NaN stays NaN."""
        limit = self.constant(high)
        return self.builder.select(self.builder.fcmp_ordered(">", x, limit), limit, x)

    def at_least(self, x: Any, low: float) -> Any:
        limit = self.constant(low)
        return self.builder.select(self.builder.fcmp_ordered("<", x, limit), limit, x)

    def lane_by_lane(self, name: str, x: Any) -> Any:
        """The function of the C library, of each lane."""
        scalar = self.type.element
        function = self.function(name, scalar, scalar)
        value = ir.Constant(self.type, ir.Undefined)
        for lane in range(self.lanes):
            one = self.builder.call(function, [self.builder.extract_element(x, I32(lane))])
            value = self.builder.insert_element(value, one, I32(lane))
        return value

    def exp(self, x: Any) -> Any:
        """``e^x``; float32 to 2 ulp, subnormal results included."""
        if self.dtype is types.float64:
            return self.lane_by_lane("exp", x)
        n, r = self.reduced(self.at_most(self.at_least(x, -110.0), 90.0))
        value = self.polynomial(r, [1.0, 1.0, *_EXP_TAIL])
        # 2^n as two factors, neither of which leaves the range when the result does not
        half = self.builder.ashr(n, ir.Constant(self.integers, [1] * self.lanes))
        for part in (half, self.builder.sub(n, half)):
            value = self.builder.fmul(value, self.power_of_two(part))
        return value

    def expm1(self, x: Any) -> Any:
        """``e^x - 1`` of ``x <= 0``; float32 to 2 ulp, the zeros' signs included."""
        if self.dtype is types.float64:
            return self.lane_by_lane("expm1", x)
        n, r = self.reduced(self.at_most(self.at_least(x, -20.0), 0.0))
        # 2^n (e^r - 1) + (2^n - 1): the two have one sign, or n is 0
        value = self.fma(self.builder.fmul(r, r), self.polynomial(r, list(_EXP_TAIL)), r)
        power = self.power_of_two(n)
        value = self.fma(power, value, self.builder.fsub(power, self.constant(1.0)))
        copysign = self.function(f"llvm.copysign.{self.name}", self.type, self.type, self.type)
        return self.builder.call(copysign, [value, x])

    def reduced(self, x: Any) -> tuple[Any, Any]:
        """``x = n ln 2 + r`` in float32: the integer ``n``, and ``r``, at most ``ln 2 / 2``."""
        shift = 12582912.0  # adding 1.5 · 2^23 rounds to an integer in the low bits
        shifted = self.fma(x, self.constant(1.44269504), self.constant(shift))
        n = self.builder.fsub(shifted, self.constant(shift))
        r = self.fma(n, self.constant(-0.693359375), x)
        r = self.fma(n, self.constant(2.12194440e-4), r)
        integer = self.builder.sub(
            self.builder.bitcast(shifted, self.integers),
            ir.Constant(self.integers, [0x4B400000] * self.lanes),
        )
        return integer, r

    def power_of_two(self, n: Any) -> Any:
        """``2^n`` in float32, of integers whose power is no subnormal number."""
        biased = self.builder.add(n, ir.Constant(self.integers, [127] * self.lanes))
        bits = self.builder.shl(biased, ir.Constant(self.integers, [23] * self.lanes))
        return self.builder.bitcast(bits, self.type)

    def sigmoid(self, x: Any) -> Any:
        """``1 / (1 + e^-x)``: accurate where it is small, as a nearly closed gate is."""
        one = self.constant(1.0)
        return self.div(one, self.add(one, self.exp(self.builder.fneg(x))))

    def tanh(self, x: Any) -> Any:
        """float32 to 4e-7 relative; exactly ±1 from where float32 has nothing nearer."""
        if self.dtype is types.float64:
            return self.lane_by_lane("tanh", x)
        # x P(x²) / Q(x²), minimax for the relative error on [-9.02, 9.02]
        bounded = self.at_most(self.at_least(x, -9.02), 9.02)
        square = self.builder.fmul(bounded, bounded)
        p = [1.0, 0.1337972072, 3.494037776e-3, 2.058353093e-5, 1.331913458e-8]
        q = [1.0, 0.4671303596, 2.587108565e-2, 3.283097889e-4, 7.762046391e-7]
        ratio = self.div(
            self.builder.fmul(bounded, self.polynomial(square, p)), self.polynomial(square, q)
        )
        one, saturated = self.constant(1.0), self.constant(9.01)
        minus = self.builder.fneg
        above = self.builder.fcmp_ordered(">", x, saturated)
        below = self.builder.fcmp_ordered("<", x, minus(saturated))
        ratio = self.at_most(self.at_least(ratio, -1.0), 1.0)
        return self.builder.select(above, one, self.builder.select(below, minus(one), ratio))


def _emitter(builder: Any, kind: Vector) -> Emitter:
    return Emitter(builder, kind.dtype, kind.lanes)


def _vector(p: types.CPointer) -> Vector:
    return Vector(p.dtype, lanes_of(p))


_NAMES: dict[Any, str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
}


class _Arithmetic(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        vectors = [a for a in args if isinstance(a, Vector)]
        if len(args) == 2 and vectors and not kws:
            return signature(vectors[0], *args)
        return None


def _register(function: Callable[..., Any], name: str) -> None:
    infer_global(function)(type(f"Vector_{name}", (_Arithmetic,), {"key": function}))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = _emitter(builder, sig.return_type)
        operands = [
            value
            if isinstance(kind, Vector)
            else emit.splat(context.cast(builder, value, kind, sig.return_type.dtype))
            for value, kind in zip(args, sig.args, strict=True)
        ]
        return getattr(emit, name)(*operands)

    lower_builtin(function, Vector, Vector)(lower)
    lower_builtin(function, Vector, types.Number)(lower)
    lower_builtin(function, types.Number, Vector)(lower)


for _function, _name in _NAMES.items():
    _register(_function, _name)


@intrinsic
def lanes(typing: Any, p: Any) -> Any:
    """Elements in a vector."""
    return types.int64(p), lambda context, builder, sig, args: I64(lanes_of(p))


@intrinsic
def itemsize(typing: Any, p: Any) -> Any:
    """Bytes of an element."""
    return types.int64(p), lambda context, builder, sig, args: I64(size_of(p))


@intrinsic
def field(typing: Any, p: Any, index: Any) -> Any:
    """Number ``index`` of the 64-bit integers that ``p`` points to: a kernel's arguments."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, number = args
        integers = builder.bitcast(pointer, I64.as_pointer())
        return builder.load(
            builder.gep(integers, [context.cast(builder, number, index, types.int64)])
        )

    return types.int64(p, index), lower


@intrinsic
def real(typing: Any, p: Any, index: Any) -> Any:
    """Field number ``index``, read as a float64."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        numbers = builder.bitcast(args[0], ir.DoubleType().as_pointer())
        number = context.cast(builder, args[1], index, types.int64)
        return builder.load(builder.gep(numbers, [number]))

    return types.float64(p, index), lower


@intrinsic
def integer(typing: Any, address: Any) -> Any:
    """The 64-bit integer at ``address``."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], I64.as_pointer()))

    return types.int64(types.int64), lower


@intrinsic
def take(typing: Any, p: Any, index: Any) -> Any:
    """Adds 1 to a field and returns what it was, in one step for all threads."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integers = builder.bitcast(args[0], I64.as_pointer())
        number = context.cast(builder, args[1], index, types.int64)
        return builder.atomic_rmw("add", builder.gep(integers, [number]), I64(1), "monotonic")

    return types.int64(p, index), lower


@intrinsic
def get(typing: Any, p: Any, address: Any) -> Any:
    """The number at ``address``."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[1], element(p.dtype).as_pointer())
        return builder.load(pointer, align=size_of(p))

    return p.dtype(p, types.int64), lower


@intrinsic
def put(typing: Any, p: Any, address: Any, value: Any) -> Any:
    """Writes a number to ``address``."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[1], element(p.dtype).as_pointer())
        builder.store(context.cast(builder, args[2], value, p.dtype), pointer, align=size_of(p))
        return context.get_dummy_value()

    return types.void(p, types.int64, value), lower


@intrinsic
def put_double(typing: Any, address: Any, value: Any) -> Any:
    """Writes a float64 to ``address``, whatever the kernel computes in."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.DoubleType().as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.float64), lower


@intrinsic
def load(typing: Any, p: Any, address: Any, count: Any) -> Any:
    """The first ``count`` elements from ``address`` on, and zeros."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = _emitter(builder, sig.return_type)
        return emit.load(args[1], emit.first(args[2]))

    return _vector(p)(p, types.int64, types.int64), lower


@intrinsic
def store(typing: Any, address: Any, count: Any, value: Any) -> Any:
    """Writes the first ``count`` elements of ``value`` from ``address`` on."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = _emitter(builder, value)
        emit.store(args[2], args[0], emit.first(args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), lower


def _of_one(name: str) -> Any:
    @intrinsic
    def function(typing: Any, x: Any) -> Any:
        return x(x), lambda context, builder, sig, args: getattr(_emitter(builder, x), name)(*args)

    return function


sigmoid, tanh, expm1 = _of_one("sigmoid"), _of_one("tanh"), _of_one("expm1")


@intrinsic
def unless_negative(typing: Any, x: Any, value: Any) -> Any:
    """``value``, but 0 where ``x <= 0``: where ``x`` is NaN, ``value`` as well, as in torch."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return value(x, value), lower


@intrinsic
def if_positive(typing: Any, x: Any, value: Any, other: Any) -> Any:
    """``value`` where ``x > 0``; ``other`` where it is not, or is NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_ordered(">", args[0], zero), args[1], args[2])

    return value(x, value, other), lower


@intrinsic
def clamped(typing: Any, x: Any, limit: Any) -> Any:
    """``x`` in ``[-limit, limit]``, which is rounded to the type of ``x``; NaN stays NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = _emitter(builder, x)
        high = emit.splat(context.cast(builder, args[1], limit, x.dtype))
        low = builder.fneg(high)
        value = builder.select(builder.fcmp_ordered(">", args[0], high), high, args[0])
        return builder.select(builder.fcmp_ordered("<", value, low), low, value)

    return x(x, limit), lower


@intrinsic
def beyond(typing: Any, x: Any, limit: Any) -> Any:
    """How many entries ``clamped`` would change."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = _emitter(builder, x)
        high = emit.splat(context.cast(builder, args[1], limit, x.dtype))
        magnitude = builder.call(
            emit.function(f"llvm.fabs.{emit.name}", emit.type, emit.type), [args[0]]
        )
        mask = builder.fcmp_ordered(">", magnitude, high)
        return builder.zext(builder.ctpop(builder.bitcast(mask, ir.IntType(x.lanes))), I64)

    return types.int64(x, limit), lower


@intrinsic
def scaled(typing: Any, x: Any, norm: Any, to: Any) -> Any:
    """``x / norm · to`` in float64, rounded to the type of ``x`` at the end."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = Emitter(builder, types.float64, x.lanes)
        narrow = x.dtype is not types.float64
        value = builder.fpext(args[0], wide.type) if narrow else args[0]
        value = builder.fmul(builder.fdiv(value, wide.splat(args[1])), wide.splat(args[2]))
        return builder.fptrunc(value, _emitter(builder, x).type) if narrow else value

    return x(x, types.float64, types.float64), lower


@intrinsic
def double_zero(typing: Any, p: Any) -> Any:
    """A float64 vector of zeros with as many lanes as a vector of ``p``'s."""
    kind = Vector(types.float64, lanes_of(p))
    return kind(p), lambda context, builder, sig, args: ir.Constant(
        context.get_value_type(kind), None
    )


@intrinsic
def add_square(typing: Any, total: Any, x: Any) -> Any:
    """``total + x²`` in float64."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = _emitter(builder, total)
        value = args[1] if x == total else builder.fpext(args[1], emit.type)
        return emit.fma(value, value, args[0])

    return total(total, x), lower


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum over the lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        emit = _emitter(builder, x)
        scalar = emit.type.element
        add = emit.function(f"llvm.vector.reduce.fadd.{emit.name}", scalar, scalar, emit.type)
        # in any order: pairs of halves instead of one lane after the other
        return builder.call(add, [ir.Constant(scalar, 0.0), args[0]], fastmath=("reassoc",))

    return x.dtype(x), lower
