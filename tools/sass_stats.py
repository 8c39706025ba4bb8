"""``python -m tools.sass_stats kernels.cubin [--log ptxas.log]``: what a compiled kernel is made of, without
running it.

Counts the machine instructions of each kernel and of each of its loops that hold tensor-core instructions,
and reads the registers, spills and shared memory that ``ptxas -v`` reports.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import cuda_toolkit

KernelKey = tuple[str, str]  # architecture and mangled name

# By the beginning of the opcode; the first that fits.
_CLASSES = {
    "HMMA": r"HMMA|IMMA|HGMMA|UTC\w*MMA",
    "LDSM": r"LDSM",
    "STSM": r"STSM",
    "LDGSTS": r"LDGSTS|UTMALDG",
    "wait": r"LDGDEPBAR|DEPBAR|SYNCS|WARPGROUP",
    "MUFU.EX2": r"MUFU\.EX2",
    "MUFU": r"MUFU",
    "FFMA": r"FFMA",
    "FMUL": r"FMUL",
    "FADD": r"FADD",
    "FMNMX": r"FMNMX",
    "FSEL/FSETP": r"FSEL|FSETP",
    "convert": r"F2F|F2I|I2F|I2FP",
    "half": r"H(FMA|MUL|ADD|SET|MNMX)",
    "SHFL/VOTE": r"SHFL|VOTE|REDUX",
    "BAR": r"BAR|WARPSYNC",
    "LDG": r"LDG|LD\b",
    "STG": r"STG|ST\b",
    "LDS": r"LDS",
    "STS": r"STS",
    "LDL/STL": r"LDL|STL",
    "LDC": r"LDC|ULDC|LDCU",
    "ATOM/RED": r"RED|ATOM",
    "MOV": r"MOV|IMAD\.MOV|UMOV|CS2R|S2R|R2UR|S2UR",
    "integer": r"U?(IMAD|IADD|LEA|LOP|SHF|ISETP|PRMT|SEL|PLOP|IMNMX|VIMNMX|VIADD|SGXT|POPC|FLO|BMSK|IABS)",
    "branch": r"BRA|BSYNC|BSSY|CALL|RET|EXIT|BREAK|WARPSYNC|NANOSLEEP",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in _CLASSES.items()}
_BYTES = 16  # of an instruction
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")


@dataclass(frozen=True)
class SassInstruction:
    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """A class of instructions; "padding" for what ptxas puts in that never executes (@!PT)."""
        if self.guard == "@!PT" or self.opcode == "NOP":
            return "padding"
        return next((name for name, pattern in _COMPILED.items() if pattern.match(self.opcode)), "other")

    @property
    def branches(self) -> bool:
        return self.opcode.split(".")[0] in ("BRA", "JMP", "UBRA")

    @property
    def target(self) -> int | None:
        addresses = re.findall(r"0x([0-9a-f]+)", self.operands) if self.branches else []
        return int(addresses[-1], 16) if addresses else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow; a branch may carry its condition as an operand."""
        conditional = self.guard or "," in self.operands or ".DIV" in self.opcode or ".CONV" in self.opcode
        return bool(conditional) or not (self.branches or self.opcode.split(".")[0] in ("EXIT", "RET", "BRX"))


@dataclass(frozen=True)
class Loop:
    """A natural loop: where it starts, and what is in it, out-of-line blocks too."""

    head: int
    instructions: tuple[SassInstruction, ...]

    @property
    def counts(self) -> Counter[str]:
        return count(self.instructions)

    def within(self, other: Loop) -> bool:
        return self is not other and set(self.instructions) < set(other.instructions)

    def turns(self) -> dict[int, int]:
        """The fewest instructions of a way around the loop, by the number of cp.async on it.

        A way that copies a whole tile and takes no rare branch is what a usual turn executes, if there is no
        loop inside.
        """
        blocks = _basic_blocks(list(self.instructions))
        starts = {block[0].address: number for number, block in enumerate(blocks)}
        head = starts[self.head]
        successors = [
            [following for following in _following(block, starts) if following != head] for block in blocks
        ]
        closes = [head in _following(block, starts) for block in blocks]
        ways: dict[int, dict[int, int]] = {}
        for number in reversed(_reverse_postorder(successors, head)):  # successors first
            kinds = count(blocks[number])
            copies, cost = kinds["LDGSTS"], kinds.total() - kinds["padding"]
            best: dict[int, int] = {copies: cost} if closes[number] else {}
            for following in successors[number]:
                for more, further in ways.get(following, {}).items():
                    best[copies + more] = min(best.get(copies + more, cost + further), cost + further)
            ways[number] = best
        return dict(sorted(ways[head].items()))


@dataclass
class Resources:
    """Of a kernel, as ptxas reports them: registers a thread, bytes otherwise."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    static_shared: int = 0


def disassemble(path: Path, arch: str = "") -> dict[KernelKey, list[SassInstruction]]:
    """The kernels of a cubin, object or shared library.

    Args:
        path: the file.
        arch: only this architecture, such as ``"sm_80"``.

    Raises:
        FileNotFoundError: there is no cuobjdump; says what to install.
        subprocess.CalledProcessError: cuobjdump does not take the file.
    """
    command = [cuda_toolkit.binary("cuobjdump"), "-sass", *(["-arch", arch] if arch else []), path]
    return parse_sass(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse_sass(text: str) -> dict[KernelKey, list[SassInstruction]]:
    """What ``cuobjdump -sass`` prints."""
    kernels: dict[KernelKey, list[SassInstruction]] = {}
    arch, instructions = "", []
    for line in text.splitlines():
        if match := re.search(r"\.target\s+(sm_\w+)|^arch = (sm_\w+)|code for (sm_\w+)", line):
            arch = next(filter(None, match.groups()))
        elif match := re.search(r"Function\s*:\s*(\S+)", line):
            instructions = kernels.setdefault((arch, match.group(1)), [])
        elif match := _LINE.match(line):
            address, guard, opcode, operands = match.groups()
            instructions.append(SassInstruction(int(address, 16), guard or "", opcode, operands))
    return kernels


def count(instructions: Iterable[SassInstruction]) -> Counter[str]:
    """Instructions by class."""
    return Counter(instruction.kind for instruction in instructions)


def tensor_core_loops(instructions: list[SassInstruction], *also: str) -> list[Loop]:
    """The innermost loops that hold tensor-core instructions, and those of the classes `also`."""
    wanted = "HMMA", *also
    holding = [loop for loop in natural_loops(instructions) if all(loop.counts[kind] for kind in wanted)]
    return [loop for loop in holding if not any(other.within(loop) for other in holding)]


def natural_loops(instructions: list[SassInstruction]) -> list[Loop]:
    """All loops, by dominators of the control flow graph (Cooper, Harvey, Kennedy 2001)."""
    if not instructions:
        return []
    blocks = _basic_blocks(instructions)
    successors = _successors(blocks)
    predecessors = defaultdict(list)
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(block)
    order = _reverse_postorder(successors)
    dominators = _immediate_dominators(order, predecessors)
    members: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            if _dominates(dominators, head, block):
                body = members.setdefault(head, {head})
                _collect(body, block, predecessors, set(order))
    return [
        Loop(blocks[head][0].address, tuple(i for block in sorted(body) for i in blocks[block]))
        for head, body in sorted(members.items())
    ]


def _basic_blocks(instructions: list[SassInstruction]) -> list[list[SassInstruction]]:
    targets = {instruction.target for instruction in instructions}
    blocks: list[list[SassInstruction]] = [[]]
    for instruction in instructions:
        if instruction.address in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append(instruction)
        if instruction.branches or not instruction.falls_through:
            blocks.append([])
    return [block for block in blocks if block]


def _following(block: list[SassInstruction], starts: dict[int, int]) -> list[int]:
    """The blocks that may come after a block; starts: of all blocks, by address."""
    last = block[-1]
    following = [starts[last.target]] if last.target in starts else []
    if last.falls_through and last.address + _BYTES in starts:
        following.append(starts[last.address + _BYTES])
    return following


def _successors(blocks: list[list[SassInstruction]]) -> list[list[int]]:
    starts = {block[0].address: number for number, block in enumerate(blocks)}
    return [_following(block, starts) for block in blocks]


def _reverse_postorder(successors: list[list[int]], first: int = 0) -> list[int]:
    order, seen, stack = [], {first}, [(first, iter(successors[first]))]
    while stack:
        block, remaining = stack[-1]
        following = next((successor for successor in remaining if successor not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return order[::-1]


def _immediate_dominators(order: list[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    position = {block: i for i, block in enumerate(order)}
    dominators = {0: 0}

    def common(a: int, b: int) -> int:
        while a != b:
            if position[a] > position[b]:
                a = dominators[a]
            else:
                b = dominators[b]
        return a

    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [predecessor for predecessor in predecessors[block] if predecessor in dominators]
            dominator = known[0]
            for predecessor in known[1:]:
                dominator = common(dominator, predecessor)
            changed |= dominators.get(block) != dominator
            dominators[block] = dominator
    return dominators


def _dominates(dominators: dict[int, int], a: int, b: int) -> bool:
    while b != a and b != 0:
        b = dominators[b]
    return a == b


def _collect(body: set[int], latch: int, predecessors: dict[int, list[int]], reachable: set[int]) -> None:
    """Adds to a loop what reaches its latch without passing its head."""
    waiting = [latch]
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += [predecessor for predecessor in predecessors[block] if predecessor in reachable]


def parse_ptxas_log(text: str) -> dict[KernelKey, Resources]:
    """What ``nvcc -Xptxas -v`` prints."""
    kernels: dict[KernelKey, Resources] = {}
    resources = Resources()
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(sm_\w+)'", line):
            resources = kernels.setdefault((match.group(2), match.group(1)), Resources())
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            resources.stack, resources.spill_stores, resources.spill_loads = map(int, match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            resources.registers = int(match.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            resources.static_shared = int(shared.group(1)) if shared else 0
    return kernels


def _describe(counts: Counter[str]) -> str:
    return f"{sum(counts.values())} instructions: " + ", ".join(
        f"{n} {kind}" for kind, n in counts.most_common()
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sass_stats", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a cubin, object or shared library")
    parser.add_argument("--arch", default="", help="only this one, such as sm_80")
    parser.add_argument("--log", type=Path, help="what nvcc -Xptxas -v printed")
    parser.add_argument("--only", default="", metavar="TEXT", help="only kernels whose name contains TEXT")
    options = parser.parse_args(argv)
    log = parse_ptxas_log(options.log.read_text()) if options.log else {}
    for (arch, name), instructions in disassemble(options.file, options.arch).items():
        if options.only not in name:
            continue
        print(f"{arch} {name}")
        if (arch, name) in log:
            print(f"  {log[arch, name]}")
        print(f"  {_describe(count(instructions))}")
        for loop in tensor_core_loops(instructions):
            print(f"  loop at 0x{loop.head:x}: {_describe(loop.counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
