"""Arithmetic, comparison and selection (PTX ISA, "Integer Arithmetic", "Floating-Point", "Half Precision",
"Comparison").

fma multiplies and adds in float64 and rounds to float32 after that: now and then not as a fused operation
would.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .binding import Binding, Execute, builds
from .state import Selection
from .types import FLOATS, NUMPY, PAIRS, UNSIGNED, Array, flushed, narrow, pack_pair, unpack_pair, widen

Function = Callable[..., Array]
_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _divide(a: Array, b: Array) -> Array:
    """Truncated; all ones by zero, as GPUs do."""
    a, b = np.broadcast_arrays(a, b)
    unsigned = UNSIGNED[a.dtype.itemsize]
    if a.dtype.kind == "u":
        return np.where(b == 0, unsigned(np.iinfo(unsigned).max), a // np.where(b == 0, unsigned(1), b))
    above, below = (
        np.abs(a).view(unsigned),
        np.abs(b).view(unsigned),
    )  # the most negative has no magnitude but this
    quotient = (above // np.where(below == 0, unsigned(1), below)).view(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), np.where((a < 0) != (b < 0), -quotient, quotient))


def _high_product(a: Array, b: Array) -> Array:
    a, b = np.broadcast_arrays(a, b)
    dtype, bits = a.dtype, 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{dtype.kind}8").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    ua, ub = np.ascontiguousarray(a).view(np.uint64), np.ascontiguousarray(b).view(np.uint64)
    a_low, a_high, b_low, b_high = ua & low, ua >> half, ub & low, ub >> half
    middle = a_high * b_low + (a_low * b_low >> half)
    high = a_high * b_high + (middle >> half) + ((a_low * b_high + (middle & low)) >> half)
    if dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(dtype)


_INTEGER: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "neg": lambda a: -a,
    "abs": np.abs,
}
_FLOAT: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": np.fmin,  # the number, if the other is NaN
    "max": np.fmax,
    "copysign": lambda a, b: np.copysign(b, a),
    "neg": lambda a: -a,
    "abs": np.abs,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
_PROPAGATES_NAN = {"min": np.minimum, "max": np.maximum}


def _clipped(function: Function, most: float) -> Function:
    return lambda *operands: np.clip(function(*operands), 0, most)


def _float_function(binding: Binding, function: Function, sources: int) -> Execute:
    """16-bit floats are computed in float32 and rounded once."""
    kind, modifiers = binding.type, binding.modifiers
    if "relu" in modifiers:
        function = _clipped(function, np.inf)
    if "sat" in modifiers:
        function = _clipped(function, 1)
    if kind in PAIRS:

        def by_halves(*pairs: Array) -> Array:
            halves = zip(*(unpack_pair(pair, kind) for pair in pairs), strict=True)
            return pack_pair(*(function(*half) for half in halves), kind)

        return binding.compute(by_halves, *[kind] * sources)
    if kind in ("f16", "bf16"):
        return binding.compute(
            lambda *x: narrow(function(*(widen(value, kind) for value in x)), kind), *[kind] * sources
        )
    dtype = NUMPY[kind]
    if "ftz" in modifiers and kind == "f32":
        return binding.compute(flushed(lambda *x: function(*x).astype(dtype)), *[kind] * sources)
    return binding.compute(lambda *x: function(*x).astype(dtype), *[kind] * sources)


@builds(*_INTEGER.keys() | _FLOAT.keys())
def build_arithmetic(binding: Binding) -> Execute:
    sources = len(binding.operands) - 1
    if binding.type not in FLOATS + PAIRS:
        if binding.opcode == "mul":
            return _build_integer_product(binding)
        if "cc" in binding.modifiers:
            return build_extended(binding)
        return binding.compute(_INTEGER[binding.opcode], *[binding.type] * sources)
    function = _FLOAT[binding.opcode]
    if "NaN" in binding.modifiers:
        function = _PROPAGATES_NAN[binding.opcode]
    return _float_function(binding, function, sources)


@builds("fma", "mad")
def build_multiply_add(binding: Binding) -> Execute:
    if binding.type not in FLOATS + PAIRS:
        return _build_integer_product(binding)
    wide = np.longdouble if binding.type == "f64" else np.float64
    return _float_function(binding, lambda a, b, c: np.asarray(a).astype(wide) * b + c, 3)


def _build_integer_product(binding: Binding) -> Execute:
    kind, adds = binding.type, binding.opcode == "mad"
    if "wide" in binding.modifiers:
        wide = NUMPY[_WIDE[kind]]
        kinds = (kind, kind, _WIDE[kind])[: 3 if adds else 2]
        return binding.compute(
            lambda a, b, c=0: a.astype(wide) * b.astype(wide) + wide(c), *kinds, result=_WIDE[kind]
        )
    product = _high_product if "hi" in binding.modifiers else lambda a, b: a * b
    if adds:
        return binding.compute(lambda a, b, c: product(a, b) + c, kind, kind, kind)
    return binding.compute(product, kind, kind)


@builds("addc", "subc")
def build_extended(binding: Binding) -> Execute:
    """With a carry in, a carry out, or both (PTX ISA, "Extended-Precision Integer Arithmetic")."""
    kind, state = binding.type, binding.state
    unsigned = f"u{kind[1:]}"
    first, second = (
        binding.broadcast(binding.operands[1], unsigned),
        binding.broadcast(binding.operands[2], unsigned),
    )
    write = binding.write(binding.operands[0], unsigned)
    subtracts, takes, gives = (
        binding.opcode[:3] == "sub",
        binding.opcode.endswith("c"),
        "cc" in binding.modifiers,
    )
    dtype = NUMPY[unsigned]

    def execute(selection: Selection) -> None:
        a, b, threads = first(selection), second(selection), state.threads(selection)
        carry = state.carry[threads].astype(dtype) if takes else np.zeros(len(a), dtype)
        if subtracts:
            result = a - b - carry
            overflow = (a < b) | ((a == b) & (carry > 0))
        else:
            result = a + b + carry
            overflow = (result < a) | ((result == a) & (carry > 0))
        if gives:
            state.carry[threads] = overflow
        write(result, selection)

    return execute


_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def _comparison(name: str, is_float: bool) -> Function:
    if name == "nan":
        return _unordered
    if name == "num":
        return lambda a, b: ~_unordered(a, b)
    if is_float and name == "ne":
        return lambda a, b: (a != b) & ~_unordered(a, b)
    if is_float and name.endswith("u"):
        ordered = _COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | _unordered(a, b)
    return _COMPARISONS[name]


@builds("setp")
def build_setp(binding: Binding) -> Execute:
    kind = binding.type
    if kind in PAIRS:
        raise binding.unsupported()
    compare = _comparison(binding.modifiers[0], kind in FLOATS)
    combines = next((name for name in binding.modifiers if name in ("and", "or", "xor")), None)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(combines)
    first, second = binding.read(binding.operands[1], kind), binding.read(binding.operands[2], kind)
    third = binding.read(binding.operands[3], "pred") if combine else None
    destinations = binding.operands[0]
    destinations = destinations.value if destinations.kind == "either" else [destinations]
    writes = [binding.write(operand, "pred") for operand in destinations]

    def execute(selection: Selection) -> None:
        holds = np.asarray(compare(widen(first(selection), kind), widen(second(selection), kind)))
        results = (holds, ~holds)[: len(writes)]
        for write, result in zip(writes, results, strict=True):
            write(combine(result, third(selection)) if combine else result, selection)

    return execute


@builds("selp")
def build_selp(binding: Binding) -> Execute:
    kind = binding.type
    return binding.compute(lambda a, b, chosen: np.where(chosen, a, b), kind, kind, "pred")
