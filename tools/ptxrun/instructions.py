"""All instructions that are executed: importing a file registers its opcodes."""

from __future__ import annotations

from . import arithmetic, async_copy, bits, conversion, matrix, memory_access, warp
from .binding import OPCODES

__all__ = ["OPCODES", "arithmetic", "async_copy", "bits", "conversion", "matrix", "memory_access", "warp"]
