"""PTX text to kernels (PTX ISA, "Syntax", "State Spaces, Types, and Variables").

Covers what nvcc emits: entries with parameters, registers, variables of all state spaces, nested scopes (of
inline assembly), labels, source lines.  Operands of an instruction are parsed when it is first executed.
"""

from __future__ import annotations

import bisect
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from .errors import PtxError
from .types import SIZES


@dataclass(frozen=True)
class Operand:
    """kind and value: name (of a register or variable), symbol (a name; offset in bytes), immediate, float,
    memory (Operand; offset in bytes), vector (Operands), either (the two of ``a|b``), negated (Operand), sink
    (``_``).
    """

    kind: str
    value: Any = None
    offset: int = 0


@dataclass(eq=False)
class Register:
    name: str
    type: str


@dataclass
class Scope:
    """What braces enclose: registers and labels, hidden from outside."""

    parent: Scope | None
    registers: dict[str, Register] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)

    def register(self, name: str) -> Register | None:
        return self.registers.get(name) or (self.parent.register(name) if self.parent else None)

    def target(self, label: str) -> int:
        """Index in the code of the instruction behind a label."""
        if label in self.labels:
            return self.labels[label]
        if self.parent is None:
            raise PtxError(f"there is no label {label}")
        return self.parent.target(label)


@dataclass(eq=False)
class Instruction:
    """``modifiers`` holds the opcode and what follows it: ``ld.global.f32`` is ("ld", "global", "f32")."""

    modifiers: tuple[str, ...]
    arguments: str
    guard: tuple[Register, bool] | None  # the predicate, and whether it must be false
    scope: Scope
    line: int
    source: tuple[int, ...]  # file and line, then file and line of where that was inlined, if it was
    text: str

    @property
    def opcode(self) -> str:
        return self.modifiers[0]

    @property
    def operands(self) -> list[Operand]:
        return [_operand(text) for text in _split(self.arguments)]


@dataclass
class Variable:
    name: str
    size: int
    align: int
    type: str
    initial: bytes


@dataclass
class Kernel:
    name: str
    parameters: list[Variable] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    max_threads: int = 0  # 0: not said


@dataclass
class Module:
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    globals: list[Variable] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)  # outside kernels
    dynamic_shared: list[Variable] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)


_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_STATEMENT = re.compile(
    r"""\s*(?:
      (?P<section>\.section\b[^{]*\{[^}]*\})
    | (?P<line>\.(?:version|target|address_size|file|loc)\b[^\n]*)
    | (?P<header>(?:\.(?:visible|weak|extern)\s+)?\.(?:entry|func)\b[^{;]*;?)
    | (?P<open>\{)
    | (?P<close>\})
    | (?P<label>[\w$%]+)\s*:(?!:)
    | (?P<statement>(?:[^;{}"]|\{[^{}]*\}|"[^"]*")*);
    )""",
    re.VERBOSE,
)
_INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_VARIABLE = re.compile(r"(?:\.(?:visible|weak|extern)\s+)?\.(shared|global|const|local)\b")


def parse(text: str) -> Module:
    """The kernels and variables of a PTX module.

    Raises:
        PtxError: text that is no PTX.
    """
    return _Parser(text).module


class _Parser:
    def __init__(self, text: str) -> None:
        text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n") or " ", text)
        self.module = Module()
        self.kernel: Kernel | None = None
        self.scope: Scope | None = None
        self.source: tuple[int, ...] = ()
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        for kind, statement, position in self._statements(text):
            getattr(self, f"_on_{kind}")(statement, position)

    def _statements(self, text: str) -> Iterator[tuple[str, str, int]]:
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _STATEMENT.match(text, position)
            if match is None:
                position = end - len(text[position:end].lstrip())
                raise PtxError(
                    f"no PTX at line {self._line(position)}: {text[position:end].splitlines()[0]!r}"
                )
            kind = match.lastgroup
            yield kind, match.group(kind), match.start(kind)
            position = match.end()

    def _line(self, position: int) -> int:
        return bisect.bisect_left(self.newlines, position) + 1

    def _on_section(self, statement: str, position: int) -> None:
        pass  # debugging information

    def _on_line(self, statement: str, position: int) -> None:
        directive, *words = statement.replace(",", " ").split()
        if directive == ".loc":
            inlined = words.index("inlined_at") if "inlined_at" in words else 0
            outer = words[inlined + 1 : inlined + 3] if inlined else []
            self.source = tuple(map(int, words[:2] + outer))
        elif directive == ".file":
            self.module.files[int(words[0])] = words[1].strip('"').rsplit("/", 1)[-1]
        elif directive == ".target":
            self.module.target = words[0]

    def _on_header(self, statement: str, position: int) -> None:
        if ".entry" not in statement:
            self.kernel = None if statement.endswith(";") else Kernel("")  # a call of it is reported
            return
        match = re.search(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?", statement, re.DOTALL)
        limit = re.search(r"\.maxntid\s+([\d, ]+)", statement)
        self.kernel = self.module.kernels[match.group(1)] = Kernel(match.group(1))
        parameters = re.sub(r"\.ptr\s*(\.\w+\s*)?(\.align\s+\d+)?", "", match.group(2) or "")
        self.kernel.parameters = [_variable(declaration) for declaration in _split(parameters)]
        if limit:
            self.kernel.max_threads = math.prod(map(int, limit.group(1).split(",")))

    def _on_open(self, statement: str, position: int) -> None:
        self.scope = Scope(self.scope)

    def _on_close(self, statement: str, position: int) -> None:
        self.scope = self.scope.parent
        if self.scope is None:
            self.kernel = None

    def _on_label(self, label: str, position: int) -> None:
        self.scope.labels[label] = len(self.kernel.code)

    def _on_statement(self, statement: str, position: int) -> None:
        if not statement.startswith("."):
            self._instruction(statement, position)
        elif statement.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()
            for name in _split(names):
                several = re.fullmatch(r"(\S+?)<(\d+)>", name)
                names_here = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
                self.scope.registers |= {each: Register(each, kind) for each in names_here}
        elif space := _VARIABLE.match(statement):
            declaration, _, initial = statement.partition("=")
            variable = _variable(declaration, initial)
            if space.group(1) == "local":
                self.kernel.local.append(variable)
            elif space.group(1) != "shared":
                self.module.globals.append(variable)
            elif ".extern" in space.group():
                self.module.dynamic_shared.append(variable)
            else:
                (self.kernel or self.module).shared.append(variable)

    def _instruction(self, statement: str, position: int) -> None:
        negated, guard, opcode, arguments = _INSTRUCTION.match(statement).groups()
        self.kernel.code.append(
            Instruction(
                tuple(opcode.replace("::", "__").split(".")),
                arguments,
                (self.scope.register(guard), bool(negated)) if guard else None,
                self.scope,
                self._line(position),
                self.source,
                " ".join(statement.split()),
            )
        )


def _variable(declaration: str, initial: str = "") -> Variable:
    align = re.search(r"\.align\s+(\d+)", declaration)
    kind, name, dimensions = re.search(
        r"\.(\w+)\s+([\w$]+)\s*((?:\[[^\]]*\])*)\s*$", re.sub(r"\.align\s+\d+", "", declaration)
    ).groups()
    size = SIZES[kind]
    count = math.prod(int(dimension or 0) for dimension in re.findall(r"\[\s*(\d*)\s*\]", dimensions))
    numbers = re.findall(r"-?\b(?:0x)?[0-9a-fA-F]+\b", initial)
    data = b"".join((int(number, 0) % 256**size).to_bytes(size, "little") for number in numbers)
    return Variable(
        name, size * count, int(align.group(1)) if align else size, kind, data.ljust(size * count, b"\0")
    )


@cache
def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts = re.findall(r"(?:[^,{}\[\]()]|\{[^{}]*\}|\[(?:[^\[\]{}]|\{[^}]*\})*\]|\([^()]*\))+", text)
    return [part.strip() for part in parts if part.strip()]


@cache
def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Operand("vector", [_operand(part) for part in _split(text[1:-1])])
    if text[0] == "[":
        place = text[1:-1].strip()
        offset = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", place)
        base = offset.group(1) if offset else place
        return Operand("memory", _operand(base), int(offset.group(2), 0) if offset else 0)
    if text[0] == "!":
        return Operand("negated", _operand(text[1:]))
    if "|" in text:
        return Operand("either", [_operand(part) for part in text.split("|")])
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Operand("float", struct.unpack(">f", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Operand("float", struct.unpack(">d", bytes.fromhex(text[2:]))[0])
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        digits = text.rstrip("U")
        return Operand("immediate", int(digits, 8 if re.fullmatch(r"-?0[0-7]+", digits) else 0))
    if re.fullmatch(r"-?\d*\.\d*([eE][-+]?\d+)?", text):
        return Operand("float", float(text))
    if text == "WARP_SZ":
        return Operand("immediate", 32)
    if text == "_":
        return Operand("sink")
    offset = re.fullmatch(r"(\S+?)\+(\d+)", text)
    if offset:
        return Operand("symbol", offset.group(1), int(offset.group(2)))
    return Operand("name", text)
