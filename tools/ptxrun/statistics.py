"""What memory accesses cost: wavefronts of shared memory (bank conflicts) and sectors of global memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .parser import Instruction
from .types import Array

_BANKS, _BANK_BYTES, _SECTOR_BYTES = 32, 4, 32


@dataclass
class Site:
    """The accesses of an instruction to a memory: `units` wavefronts or sectors where `ideal` would do."""

    instruction: Instruction
    space: str
    requests: int = 0
    units: int = 0
    ideal: int = 0


class Statistics:
    def __init__(self) -> None:
        self.instruction: Instruction | None = None  # the one that runs
        self._sites: dict[tuple[int, str], Site] = {}

    @property
    def sites(self) -> list[Site]:
        """In the order of the code."""
        return [self._sites[key] for key in sorted(self._sites)]

    def access(self, space: str, address: Array, size: int, threads: Array) -> None:
        """Counts what `threads` access, `size` bytes each."""
        if not len(address):
            return
        key = self.instruction.line, space
        site = self._sites.setdefault(key, Site(self.instruction, space))
        warp = threads // 32
        site.requests += len(np.unique(warp))
        if space == "shared":
            self._count_wavefronts(site, address.astype(np.int64), size, threads)
        else:
            sectors = (address[:, None] + np.arange(0, size, min(size, _SECTOR_BYTES))).astype(
                np.int64
            ) // _SECTOR_BYTES
            site.units += len(np.unique(warp[:, None] * 2**48 + sectors))
            site.ideal += int((-(-np.bincount(warp) * size // _SECTOR_BYTES)).sum())

    @staticmethod
    def _count_wavefronts(site: Site, address: Array, size: int, threads: Array) -> None:
        """8 lanes of 16 bytes, 16 of 8 or 32 of 4 go together; each bank gives one word a time."""
        together = _BANKS * _BANK_BYTES // max(size, _BANK_BYTES)
        group = threads // together
        words = (address // _BANK_BYTES)[:, None] + np.arange(max(1, size // _BANK_BYTES))
        words = np.unique(group[:, None] * 2**32 + words)
        groups, bank = np.unique(words >> 32, return_inverse=True)[1], words % _BANKS
        in_bank = np.bincount(groups * _BANKS + bank, minlength=(groups.max() + 1) * _BANKS)
        site.units += int(in_bank.reshape(-1, _BANKS).max(1).sum())
        site.ideal += int(groups.max()) + 1

    def report(self) -> str:
        lines = []
        for site in self.sites:
            what = "wavefronts" if site.space == "shared" else "sectors"
            lines.append(
                f"{site.space:6} PTX {site.instruction.line:<6} {site.requests:7} requests "
                f"{site.units:8} {what:10} x{site.units / site.ideal:.2f}  {site.instruction.text[:60]}"
            )
        return "\n".join(lines)
