"""PTX fundamental types as numpy dtypes, and the 16-bit floats as numbers (PTX ISA, "Fundamental Types")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray

NUMPY: dict[str, type] = {
    "pred": np.bool_,
    **dict.fromkeys(("u8", "b8"), np.uint8),
    **dict.fromkeys(("u16", "b16", "bf16"), np.uint16),  # numpy has no bfloat16: its bits
    **dict.fromkeys(("u32", "b32", "f16x2", "bf16x2"), np.uint32),
    **dict.fromkeys(("u64", "b64"), np.uint64),
    **{f"s{8 * size}": getattr(np, f"int{8 * size}") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": getattr(np, f"float{8 * size}") for size in (2, 4, 8)},
}
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in NUMPY.items()}
UNSIGNED: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

FLOATS = ("f16", "bf16", "f32", "f64")
PAIRS = ("f16x2", "bf16x2")

_SMALLEST_NORMAL = np.float32(2.0**-126)


def bfloat16_value(bits: Array) -> Array:
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_bits(value: Array, towards_zero: bool = False) -> Array:
    """Rounded to nearest even unless `towards_zero`."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    if not towards_zero:
        upper = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FFF), upper).astype(np.uint16)


def widen(value: Array, kind: str) -> Array:
    """A 16-bit float as float32; other types as they are."""
    if kind == "bf16":
        return bfloat16_value(value)
    return value.astype(np.float32) if kind == "f16" else value


def narrow(value: Array, kind: str) -> Array:
    """The inverse of `widen`, rounded once."""
    if kind == "bf16":
        return bfloat16_bits(value)
    return np.asarray(value).astype(np.float16) if kind == "f16" else value


def unpack_pair(pair: Array, kind: str) -> tuple[Array, Array]:
    """Lower and upper half of f16x2 or bf16x2 as float32."""
    pair = np.asarray(pair, np.uint32)
    halves = pair.astype(np.uint16), (pair >> np.uint32(16)).astype(np.uint16)
    if kind == "bf16x2":
        return bfloat16_value(halves[0]), bfloat16_value(halves[1])
    return halves[0].view(np.float16).astype(np.float32), halves[1].view(np.float16).astype(np.float32)


def pack_pair(lower: Array, upper: Array, kind: str) -> Array:
    def bits(value: Array) -> Array:
        half = (
            bfloat16_bits(value) if kind == "bf16x2" else np.asarray(value).astype(np.float16).view(np.uint16)
        )
        return half.astype(np.uint32)

    return bits(lower) | bits(upper) << np.uint32(16)


def flush(value: Array) -> Array:
    """What `.ftz` does to subnormal numbers."""
    return np.where(np.abs(value) < _SMALLEST_NORMAL, np.copysign(np.float32(0), value), value)


def flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` between flushed operands and a flushed result."""
    return lambda *operands: flush(function(*map(flush, operands)))
