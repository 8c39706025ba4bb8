"""What the interpreter reports."""

from __future__ import annotations


class PtxError(Exception):
    """The kernel did what it must not, or what is not modelled."""


class MemoryAccessError(PtxError):
    """An access that a kernel must not make; becomes a PtxError that names the instruction."""
