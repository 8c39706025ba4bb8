"""Matrix products of a warp: ldmatrix, stmatrix and mma.sync.

Layouts are those of the PTX ISA, "Warp-level matrix instructions": "Matrix Fragments for mma.m16n8k8" (16-bit
types and tf32), "for mma.m16n8k16" and "for mma.m16n8k32"; "ldmatrix" and "stmatrix" for 8x8 matrices.  Lane
l is of group g = l / 4 and has place t = l % 4 in it.  Sums are exact in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .binding import Binding, Execute, builds
from .memory import WINDOWS
from .state import WARP, Selection
from .types import SIZES, Array, bfloat16_value
from .warp import LANE

_GROUP, _PLACE = LANE // 4, LANE % 4


def _float8_values(exponent_bits: int) -> Array:
    """Of all 256 codes: e4m3 has no infinity and one NaN, e5m2 is IEEE's."""
    code = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    bias = (1 << exponent_bits - 1) - 1
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (code & (1 << mantissa_bits) - 1) / 2**mantissa_bits
    value = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if exponent_bits == 4:
        value[code & 0x7F == 0x7F] = np.nan
    else:
        value[exponent == 31] = np.where(fraction[exponent == 31] > 0, np.nan, np.inf)
    return np.where(code >> 7, -value, value)


_FLOAT8 = {"e4m3": _float8_values(4), "e5m2": _float8_values(5)}
_DECODE: dict[str, Callable[[Array], Array]] = {
    "bf16": bfloat16_value,
    "f16": lambda bits: bits.view(np.float16),
    "tf32": lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32),
    "s8": lambda bits: bits.view(np.int8),
    "u8": lambda bits: bits,
    "e4m3": lambda bits: _FLOAT8["e4m3"][bits],
    "e5m2": lambda bits: _FLOAT8["e5m2"][bits],
}
_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}


def _operand_places(k: int, size: int) -> tuple[Array, Array]:
    """For each lane and each of its elements of A and of B, the place in A (16 x k) and in B (k x 8), both by
    rows.

    A register holds 4 / size neighbours along k; those of place t start at t * 4 / size.  The registers of A
    are (row g, first half of k), (g + 8, first), (g, second), (g + 8, second); those of B the halves of k of
    column g.  A half is 16 bytes.
    """
    a, b = [], []
    in_register, in_half = 4 // size, 16 // size
    for half in range(k // in_half):
        along_k = [half * in_half + _PLACE * in_register + i for i in range(in_register)]
        a += [(_GROUP + 8 * row) * k + column for row in range(2) for column in along_k]
        b += [row * 8 + _GROUP for row in along_k]
    return np.stack(a, 1), np.stack(b, 1)


# Of the accumulator, 16 x 8 by rows: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
_ACCUMULATOR = np.stack([(_GROUP + 8 * (i // 2)) * 8 + 2 * _PLACE + i % 2 for i in range(4)], 1)


def _gather(places: Array, elements: int) -> Array:
    """Of each matrix element, which of the lanes' elements it is."""
    order = np.empty(elements, np.int64)
    order[places.reshape(-1)] = np.arange(places.size)
    return order


@builds("mma", together=True)
def build_mma(binding: Binding) -> Execute:
    state = binding.state
    shape = next((name for name in binding.modifiers if name.startswith("m16n8k")), None)
    d_type, a_type, b_type, c_type = [
        name for name in binding.modifiers if name in _ELEMENT_BYTES or name in SIZES
    ][:4]
    if shape is None or a_type not in _ELEMENT_BYTES or d_type != c_type or "satfinite" in binding.modifiers:
        raise binding.unsupported()
    k, size = int(shape[6:]), _ELEMENT_BYTES[a_type]
    if k * size not in (16, 32):  # one half of k or two
        raise binding.unsupported()
    d, a, b, c = (operand.value for operand in binding.operands)
    a_places, b_places = _operand_places(k, size)
    read_a = _fragment(binding, a, _DECODE[a_type], f"u{size}", _gather(a_places, 16 * k))
    read_b = _fragment(binding, b, _DECODE[b_type], f"u{size}", _gather(b_places, 8 * k))
    dtype = np.dtype({"f16": np.float16, "f32": np.float32, "s32": np.int32}[d_type])
    read_c = _fragment(
        binding, c, lambda bits: bits.view(dtype), f"u{dtype.itemsize}", _gather(_ACCUMULATOR, 128)
    )
    writes = [binding.write(register, "b32") for register in d]

    def execute(selection: Selection) -> None:
        left, right = read_a(selection).reshape(-1, 16, k), read_b(selection).reshape(-1, k, 8)
        total = (left @ right).reshape(-1, 128) + read_c(selection)
        registers = total.astype(dtype).take(_ACCUMULATOR, axis=1).view(np.uint32)
        for i, write in enumerate(writes):
            write(registers[:, :, i].reshape(-1), selection)
        state.counters["mma"] += len(total)

    return execute


def _fragment(binding: Binding, operands: list, decode: Callable, bits: str, order: Array) -> Callable:
    """Reads a matrix out of the lanes' registers, as float64, one row of elements a warp."""
    reads = [binding.read(operand, "b32") for operand in operands]

    def fragment(selection: Selection) -> Array:
        registers = np.empty((binding.state.count(selection), len(reads)), np.uint32)
        for i, read in enumerate(reads):
            registers[:, i] = read(selection)
        elements = registers.view(bits).reshape(-1, len(order))
        return decode(elements.take(order, axis=1)).astype(np.float64)

    return fragment


@builds("ldmatrix", "stmatrix", together=True)
def build_matrix_move(binding: Binding) -> Execute:
    """Lane l points to row l % 8 of matrix l / 8; register i of a lane holds elements (g, 2t), (g, 2t + 1) of
    matrix i, or (2t, g), (2t + 1, g) if transposed."""
    state, stores = binding.state, binding.opcode == "stmatrix"
    count = int(binding.one_of("x1", "x2", "x4")[1])
    if "b16" not in binding.modifiers:
        raise binding.unsupported()
    place, registers = binding.operands if stores else binding.operands[::-1]
    address = binding.address(place)
    window = np.uint64(0 if binding.space == "shared" else WINDOWS["shared"])
    reads = [binding.broadcast(operand, "b32") for operand in registers.value] if stores else []
    writes = [] if stores else [binding.write(operand, "b32") for operand in registers.value]
    along = 2 * _PLACE[:, None] + np.arange(2)
    row, column = (along, _GROUP[:, None]) if "trans" in binding.modifiers else (_GROUP[:, None], along)
    element = row * 8 + column  # [lane, half of the register] of a matrix of 64

    def execute(selection: Selection) -> None:
        pointing = state.threads(selection).reshape(-1, WARP)[:, : 8 * count].reshape(-1)
        positions = state.shared.positions(address(pointing) - window, 16, pointing)
        if state.statistics:
            state.statistics.access("shared", positions, 16, pointing)
        rows = state.shared.bytes.view(np.uint16).reshape(-1, 8)
        if stores:
            state.shared.check_write(positions, 16, pointing)
            values = np.empty((len(pointing) // (8 * count), count, 64), np.uint16)
            for i, read in enumerate(reads):
                values[:, i, element] = (
                    read(selection).reshape(-1, WARP).copy().view(np.uint16).reshape(-1, WARP, 2)
                )
            rows[positions // 16] = values.reshape(-1, 8)
        else:
            state.shared.check_read(positions, 16, pointing, whole_warp=True)
            values = rows[positions // 16].reshape(-1, count, 64).take(element, axis=2).view(np.uint32)
            for i, write in enumerate(writes):
                write(values[:, i].reshape(-1), selection)
        state.counters[binding.opcode] += len(pointing) // (8 * count)

    return execute
