"""Moves, logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions", "prmt", "bfe", "lop3")."""

from __future__ import annotations

import numpy as np

from .binding import Binding, Execute, builds
from .state import Selection
from .types import NUMPY, SIZES, Array

_U32, _U64 = np.uint32, np.uint64


def shift(value: Array, amount: Array, left: bool) -> Array:
    """Amounts past the width shift everything out."""
    value, amount = np.broadcast_arrays(value, amount)
    dtype, bits = value.dtype, 8 * value.dtype.itemsize
    within = np.minimum(amount, bits - 1).astype(dtype)
    if left:
        return np.where(amount >= bits, dtype.type(0), value << within)
    emptied = value >> dtype.type(bits - 1) if dtype.kind == "i" else dtype.type(0)
    return np.where(amount >= bits, emptied, value >> within)


@builds("mov")
def build_mov(binding: Binding) -> Execute:
    destination, source = binding.operands
    if source.kind == "vector":
        return _build_join(binding)
    if destination.kind == "vector":
        return _build_split(binding)
    return binding.compute(lambda value: value, binding.type)


def _build_join(binding: Binding) -> Execute:
    destination, source = binding.operands
    whole, parts = NUMPY[binding.type], len(source.value)
    bits = 8 * SIZES[binding.type] // parts
    reads = [binding.read(part, f"b{bits}") for part in source.value]
    write = binding.write(destination, binding.type)

    def execute(selection: Selection) -> None:
        value = whole(0)
        for i, read in enumerate(reads):
            value = value | read(selection).astype(whole) << whole(bits * i)
        write(value, selection)

    return execute


def _build_split(binding: Binding) -> Execute:
    destination, source = binding.operands
    whole, parts = NUMPY[binding.type], len(destination.value)
    bits = 8 * SIZES[binding.type] // parts
    read = binding.read(source, binding.type)
    writes = [binding.write(part, f"b{bits}") for part in destination.value]

    def execute(selection: Selection) -> None:
        value = read(selection)
        for i, write in enumerate(writes):
            write((value >> whole(bits * i)).astype(NUMPY[f"b{bits}"]), selection)

    return execute


@builds("and", "or", "xor", "not")
def build_logic(binding: Binding) -> Execute:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    sources = len(binding.operands) - 1
    return binding.compute(function[binding.opcode], *[binding.type] * sources)


@builds("shl", "shr")
def build_shift(binding: Binding) -> Execute:
    left = binding.opcode == "shl"
    return binding.compute(lambda value, amount: shift(value, amount, left), binding.type, "u32")


@builds("shf")
def build_funnel_shift(binding: Binding) -> Execute:
    left, wraps = "l" in binding.modifiers, "wrap" in binding.modifiers

    def funnel(low: Array, high: Array, amount: Array) -> Array:
        amount = amount & _U32(31) if wraps else np.minimum(amount, _U32(32))
        value = low.astype(_U64) | high.astype(_U64) << _U64(32)
        shifted = (value << amount.astype(_U64)) >> _U64(32) if left else value >> amount.astype(_U64)
        return shifted.astype(_U32)

    return binding.compute(funnel, "u32", "u32", "u32", result="b32")


@builds("bfi")
def build_insert(binding: Binding) -> Execute:
    dtype = NUMPY[binding.type]

    def insert(field: Array, base: Array, position: Array, length: Array) -> Array:
        position = position.astype(_U64) & _U64(255)
        ones = shift(_U64(1), np.minimum(length.astype(_U64) & _U64(255), _U64(64)), left=True) - _U64(1)
        mask = shift(ones, position, left=True).astype(dtype)
        return (base & ~mask) | (shift(field.astype(_U64), position, left=True).astype(dtype) & mask)

    return binding.compute(insert, binding.type, binding.type, "u32", "u32")


@builds("bfe")
def build_extract(binding: Binding) -> Execute:
    bits = 8 * SIZES[binding.type]

    def extract(value: Array, position: Array, length: Array) -> Array:
        position = (position & _U32(255)).astype(np.int64)
        length = np.minimum((length & _U32(255)).astype(np.int64), bits)
        above = np.maximum(bits - position - length, 0)  # past its end, a field is filled with the top bit
        field = shift(shift(value, above, left=True), above + position, left=False)
        return np.where(length == 0, value.dtype.type(0), field)

    return binding.compute(extract, binding.type, "u32", "u32")


@builds("popc", "clz", "brev", "bfind")
def build_bit_count(binding: Binding) -> Execute:
    bits = 8 * SIZES[binding.type]
    dtype = NUMPY[binding.type]

    def leading_zeros(value: Array) -> Array:
        for power in range(bits.bit_length() - 1):  # ones from the leading bit down
            value = value | value >> dtype(1 << power)
        return (bits - np.bitwise_count(value)).astype(_U32)

    def reversed_bits(value: Array) -> Array:
        result = dtype(0)
        for i in range(bits):
            result = result | ((value >> dtype(i)) & dtype(1)) << dtype(bits - 1 - i)
        return result

    def highest_one(value: Array) -> Array:
        """Its position, or how far to shift left until it is the top bit; all ones if there is none."""
        zeros = leading_zeros(value)
        found = zeros if "shiftamt" in binding.modifiers else _U32(bits - 1) - zeros
        return np.where(value == 0, _U32(0xFFFFFFFF), found)

    if binding.opcode == "brev":
        return binding.compute(reversed_bits, binding.type)
    if binding.opcode == "bfind" and binding.type[0] == "s":
        raise binding.unsupported()
    count = {
        "clz": leading_zeros,
        "bfind": highest_one,
        "popc": lambda value: np.bitwise_count(value).astype(_U32),
    }[binding.opcode]
    return binding.compute(count, binding.type, result="u32")


@builds("lop3")
def build_lop3(binding: Binding) -> Execute:
    """Bit 4a + 2b + c of the table is the result for bits a, b and c."""
    table = binding.operands[4].value

    def look_up(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros_like(a | b | c)
        for entry in range(8):
            if table >> entry & 1:
                result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
        return result

    return binding.compute(look_up, "b32", "b32", "b32")


@builds("prmt")
def build_prmt(binding: Binding) -> Execute:
    """Each byte of the result is one of eight, or eight times its sign."""
    if len(binding.modifiers) > 1:
        raise binding.unsupported()

    def permute(a: Array, b: Array, selector: Array) -> Array:
        pool, selector = a.astype(_U64) | b.astype(_U64) << _U64(32), selector.astype(_U64)
        result = _U64(0)
        for i in range(4):
            chosen = selector >> _U64(4 * i)
            byte = (pool >> (_U64(8) * (chosen & _U64(7)))) & _U64(255)
            sign = np.where(byte & _U64(128), _U64(255), _U64(0))
            result = result | np.where(chosen & _U64(8), sign, byte) << _U64(8 * i)
        return result.astype(_U32)

    return binding.compute(permute, "b32", "b32", "b32")
