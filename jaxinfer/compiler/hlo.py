"""Reads HLO modules: what their instructions do, and which of them become kernels; and StableHLO, what comes before."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

# Instructions that name, group or alias values: nothing is computed.
NAMING = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
                    "replica-id", "domain", "opt-barrier"})
FREE_OF_INPUT = frozenset({"constant", "iota"})
SPREADING = frozenset({"broadcast", "reshape"})  # of a constant; no compiler writes out what they would give
CONTROL = {"while": ("body", "condition"), "call": ("to_apply",), "async-start": ("calls",),
           "conditional": ("branch_computations", "true_computation", "false_computation")}
EFFECTS = frozenset({"custom-call", "rng", "rng-bit-generator", "infeed", "outfeed", "send", "recv"})
HEADER = re.compile(r"^(?!HloModule)(ENTRY )?%?([\w.\-]+) .*\{\s*$")
NAME = re.compile(r"%?([\w.\-]+)$")


@dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`; `operands` are names of instructions."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def computations(self, *keys: str) -> list[str]:
        """The names of the computations that stand under these attributes."""
        found = (re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes) for key in keys)
        return [name for match in found if match for name in re.findall(r"[\w.\-]+", match[1])]

    @property
    def inlined(self) -> list[str]:
        """The computations that run where this instruction stands, once for each call (a loop's: once)."""
        return self.computations(*CONTROL.get(self.opcode, ("calls",) if self.opcode == "fusion" else ()))

    @property
    def kernel(self) -> str:
        """What kind of kernel this is: "loop fusion", "custom-call __onednn$matmul", or just its opcode."""
        if self.opcode == "fusion":
            kind = re.search(r"\bkind=k(\w+)", self.attributes)
            return f"{kind[1].lower()} fusion" if kind else "fusion"
        if self.opcode == "custom-call":
            target = re.search(r'\bcustom_call_target="([^"]*)"', self.attributes)
            return f"custom-call {target[1]}" if target else "custom-call"
        return self.opcode


@dataclass(frozen=True)
class Module:
    """A module's computations, by name, and which of them is entered first."""

    computations: dict[str, list[Instruction]]
    entry: str
    _memo: dict = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def ops(self) -> Counter[str]:
        """Operations by opcode: fusions, calls and loops opened, the scalar functions of reductions left out. A
        computation counts as often as it is called, a loop's body once."""
        return self._opened(self.entry)

    def _opened(self, name: str) -> Counter[str]:
        if name not in self._memo:
            found: Counter[str] = Counter()
            for instruction in self.computations.get(name, ()):
                if instruction.opcode not in NAMING | {"call", "fusion"}:
                    found[instruction.opcode] += 1
                for inner in instruction.inlined:
                    found += self._opened(inner)
            self._memo[name] = found
        return self._memo[name]

    @cached_property
    def kernels(self) -> Counter[str]:
        """What is launched, by kind: each instruction of the entry, and of the loops and branches in it, that
        computes. A fusion is one kernel; the second half of an asynchronous pair is none."""
        return Counter(i.kernel for i in self._launched(self.entry) if not i.opcode.endswith(("-done", "-update")))

    def _launched(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations.get(name, ()):
            if instruction.opcode in CONTROL:
                for inner in instruction.inlined:
                    yield from self._launched(inner)
            elif instruction.opcode not in NAMING:
                yield instruction

    @cached_property
    def constant(self) -> int:
        """Operations that depend on constants alone, so that a compiler can carry them out. Calls are not opened:
        what a function does to its arguments depends on the caller."""
        return sum(self._constant(instructions) for instructions in self.computations.values())

    @staticmethod
    def _constant(instructions: list[Instruction]) -> int:
        known: set[str] = set()
        count = 0
        for i in instructions:
            if i.opcode in FREE_OF_INPUT:
                known.add(i.name)
            elif i.operands and i.opcode not in EFFECTS and known.issuperset(i.operands):
                known.add(i.name)
                count += i.opcode not in NAMING | SPREADING | CONTROL.keys()
        return count


def parse(text: str) -> Module:
    """The Module in the text that `as_text()` of a compiled function, or of its HLO, gives.

    >>> module = parse('''ENTRY main {
    ...   x = f32[4]{0} parameter(0)
    ...   one = f32[] constant(1)
    ...   ones = f32[4]{0} broadcast(one), dimensions={}
    ...   ROOT y = f32[4]{0} add(x, ones)
    ... }''')
    >>> module.ops, module.constant
    (Counter({'broadcast': 1, 'add': 1}), 0)
    """
    computations: dict[str, list[Instruction]] = {}
    entry, inside = "", ""
    for line in text.splitlines():
        if header := HEADER.match(line):
            inside = str(header[2])
            computations[inside] = []
            entry = inside if header[1] else entry
        elif inside and (instruction := _instruction(line)):
            computations[inside].append(instruction)
    return Module(computations, entry)


# StableHLO's words for what HLO calls otherwise, and operations whose regions are scalar functions.
RENAMED = {"broadcast_in_dim": "broadcast", "dot_general": "dot", "case": "conditional", "if": "conditional",
           "real_dynamic_slice": "dynamic-slice"}
SCALAR = frozenset({"reduce", "reduce_window", "scatter", "select_and_scatter", "sort", "map", "all_reduce",
                    "reduce_scatter"})
SILENT = frozenset({"return", "constant", "tuple", "get_tuple_element", "optimization_barrier"})


def stablehlo_ops(module: Any) -> Counter[str]:
    """`Module.ops` of a StableHLO module, before anything has simplified it: JAX's own way to HLO drops `x * 1`.

    `module` is what `lowered.compiler_ir()` gives; opcodes go by HLO's names.
    """
    functions = {op.attributes["sym_name"].value: op for op in module.body.operations}

    def count(op: Any) -> Counter[str]:
        dialect, _, name = op.operation.name.partition(".")
        found: Counter[str] = Counter()
        if dialect in ("stablehlo", "chlo") and name not in SILENT:
            found[RENAMED.get(name) or str(name).replace("_", "-")] += 1
        if name == "call":
            return called(op.attributes["callee"].value)
        if name not in SCALAR:
            inner = (op for region in op.operation.regions for block in region.blocks for op in block.operations)
            for child in inner:
                found += count(child)
        return found

    called = cache(lambda name: count(functions[name]))
    return called("main")


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    name = NAME.search(left)
    at = _closing(right) if right.startswith("(") else right.find(" ")  # past the shape
    opcode = re.match(r"\s*([a-z][\w\-]*)(?=\()", right[at:])
    if name is None or opcode is None:
        return None
    rest = right[at + opcode.end():]
    end = _closing(rest)
    operands = [NAME.search(part.strip()) for part in _split(rest[1 : end - 1])] if opcode[1] != "constant" else []
    if opcode[1] == "parameter":
        operands = []
    return Instruction(name[1], opcode[1], tuple(match[1] for match in operands if match), rest[end:])


def _closing(text: str) -> int:
    """Just past the bracket that closes the one that `text` begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return i + 1
    return len(text)


def _split(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
