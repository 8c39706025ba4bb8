"""How many blocks of a kernel a streaming multiprocessor holds.

Limits are those of the CUDA C++ Programming Guide, "Compute Capabilities".
"""

from __future__ import annotations

from typing import NamedTuple

WARP = 32


class Multiprocessor(NamedTuple):
    """Limits; bytes of shared memory, of which each block takes `reserved_shared` for the system."""

    shared: int
    warps: int
    blocks: int
    reserved_shared: int = 1024
    registers: int = 65536


MULTIPROCESSORS = {
    "75": Multiprocessor(64 << 10, 32, 16, reserved_shared=0),
    "80": Multiprocessor(164 << 10, 64, 32),
    "86": Multiprocessor(100 << 10, 48, 16),
    "87": Multiprocessor(164 << 10, 48, 16),
    "89": Multiprocessor(100 << 10, 48, 24),
    "90": Multiprocessor(228 << 10, 64, 32),
    "100": Multiprocessor(228 << 10, 64, 32),
    "103": Multiprocessor(228 << 10, 64, 32),
    "120": Multiprocessor(100 << 10, 48, 24),
}
_REGISTER_UNIT, _SHARED_UNIT = 256, 128  # registers come by 256 a warp, shared memory by 128 bytes
_WARP_UNIT = 4  # each of as many parts of a multiprocessor has its own registers


def resident_blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks that run on a multiprocessor at a time.

    Args:
        arch: compute capability without the point, such as ``"80"``.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.

    Raises:
        ValueError: an architecture whose limits are not known.
    """
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch must be one of {', '.join(MULTIPROCESSORS)}; got {arch!r}")
    limits = MULTIPROCESSORS[arch]
    warps = -(-threads // WARP)
    registers_of_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    shared_of_block = -(-(shared + limits.reserved_shared) // _SHARED_UNIT) * _SHARED_UNIT
    warps_with_registers = limits.registers // registers_of_warp // _WARP_UNIT * _WARP_UNIT
    by_registers = warps_with_registers // warps
    by_shared = limits.shared // shared_of_block if shared_of_block else limits.blocks
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """The share of the warps that a multiprocessor could hold."""
    warps = resident_blocks(arch, threads, registers, shared) * -(-threads // WARP)
    return warps / MULTIPROCESSORS[arch].warps
