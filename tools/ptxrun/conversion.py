"""cvt and cvta (PTX ISA, "Data Movement and Conversion Instructions")."""

from __future__ import annotations

import numpy as np

from .binding import Binding, Execute, builds
from .memory import WINDOWS
from .types import FLOATS, NUMPY, PAIRS, Array, bfloat16_bits, flush, narrow, pack_pair, widen

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@builds("cvt")
def build_cvt(binding: Binding) -> Execute:
    if "tf32" in binding.modifiers:
        return binding.compute(_to_tf32, "f32", result="b32")
    destination, source = binding.types[0], binding.types[-1]
    if len(binding.operands) == 3:
        return _build_pack(binding, destination)
    if source not in FLOATS:
        return _build_from_integer(binding, destination, source)
    if destination not in FLOATS:
        return _build_to_integer(binding, destination, source)
    rounding = next((_TO_INTEGER[name] for name in binding.modifiers if name in _TO_INTEGER), None)
    towards_zero, flushes = "rz" in binding.modifiers, "ftz" in binding.modifiers

    def convert(value: Array) -> Array:
        value = widen(value, source)
        if flushes and value.dtype == np.float32:
            value = flush(value)
        if rounding:
            value = rounding(value)
        if "sat" in binding.modifiers:
            value = np.clip(value, 0, 1)
        if destination == "bf16":
            return bfloat16_bits(value, towards_zero)
        return value.astype(NUMPY[destination])

    return binding.compute(convert, source, result=destination)


def _to_tf32(value: Array) -> Array:
    """Rounded to nearest, ties away from zero."""
    return (value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def _build_pack(binding: Binding, destination: str) -> Execute:
    """Two numbers into a pair; the first becomes the upper half."""
    if destination not in PAIRS or "rz" in binding.modifiers:
        raise binding.unsupported()
    relu = "relu" in binding.modifiers

    def pack(upper: Array, lower: Array) -> Array:
        if relu:
            upper, lower = np.maximum(upper, 0), np.maximum(lower, 0)
        return pack_pair(lower, upper, destination)

    return binding.compute(pack, "f32", "f32", result=destination)


def _build_from_integer(binding: Binding, destination: str, source: str) -> Execute:
    saturates = "sat" in binding.modifiers

    def convert(value: Array) -> Array:
        if destination in FLOATS:
            value = value.astype(np.float32) if destination == "bf16" else value
            return narrow(value, destination).astype(NUMPY[destination])
        if saturates:
            limits = np.iinfo(NUMPY[destination])
            value = np.clip(value, limits.min, limits.max)
        return value.astype(NUMPY[destination])

    return binding.compute(convert, source, result=destination)


def _build_to_integer(binding: Binding, destination: str, source: str) -> Execute:
    """Saturates; NaN becomes 0."""
    rounding = _TO_INTEGER[binding.one_of(*_TO_INTEGER)]
    dtype = NUMPY[destination]
    limits = np.iinfo(dtype)

    def convert(value: Array) -> Array:
        value = np.nan_to_num(rounding(widen(value, source)).astype(np.float64), nan=0.0)
        above, below = value >= float(limits.max), value <= float(limits.min)
        within = np.where(above | below, 0, value).astype(dtype)
        return np.where(above, dtype(limits.max), np.where(below, dtype(limits.min), within))

    return binding.compute(convert, source, result=destination)


@builds("cvta")
def build_cvta(binding: Binding) -> Execute:
    """Between addresses of a state space and generic ones; global addresses are both."""
    window = WINDOWS.get(binding.space, 0) if binding.space != "global" else 0
    dtype = NUMPY[binding.type]
    distance = dtype((-window if "to" in binding.modifiers else window) % 256 ** np.dtype(dtype).itemsize)
    return binding.compute(lambda address: address + distance, binding.type)


@builds("isspacep")
def build_isspacep(binding: Binding) -> Execute:
    window = np.uint64(WINDOWS[binding.space] >> 40)
    return binding.compute(lambda address: address >> np.uint64(40) == window, "b64", result="pred")
