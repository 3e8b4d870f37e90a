"""Counts the instructions in one turn of a kernel's loop, in the LLVM code that clang makes of its text.

Nothing runs: the text that the emulator compiles is compiled once more, optimised and not vectorised, and read. What
hides behind the runtime's calls is counted as the instruction that a GPU has for it (an exchange, a vote, a barrier).
Free are whatever only names or moves values (phi, casts between widths and types of the same bits, private memory) and
addresses at a constant distance. Registers, spills and the order of instructions are not seen.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from . import cache as disk
from .build import toolchain_key, use_precompiled
from .compiler import FAST, clang, include_flags
from .errors import CompileError
from .instance import Instance
from .llvm_text import Function
from .signature import kernel_name
from .sources import run_source

# Every kind that is counted. load and store: of device and of threadgroup memory, constants among device's.
KINDS = (
    *("fma", "float", "compare", "exp2", "convert", "add", "address", "multiply", "bitwise", "shift", "extract"),
    *("lookup", "exchange", "vote", "barrier", "branch", "load", "store", "threadgroup_load", "threadgroup_store"),
)
_OPERATIONS = {
    **dict.fromkeys(("fadd", "fsub", "fmul", "fneg"), "float"),
    **dict.fromkeys(("icmp", "fcmp", "select"), "compare"),
    **dict.fromkeys(("fpext", "fptrunc", "uitofp", "sitofp", "fptoui", "fptosi"), "convert"),
    **dict.fromkeys(("add", "sub"), "add"),
    **dict.fromkeys(("and", "or", "xor"), "bitwise"),
    **dict.fromkeys(("shl", "lshr", "ashr"), "shift"),
    "mul": "multiply",
}
_FREE = {"phi", "bitcast", "trunc", "zext", "sext", "extractelement", "insertelement", "shufflevector", "freeze"}
_FREE |= {"ret", "unreachable", "alloca", "insertvalue", "extractvalue"}
_CALLS = {
    **dict.fromkeys(("llvm.fma.f32", "llvm.fmuladd.f32"), "fma"),
    **dict.fromkeys(("llvm.maxnum.f32", "llvm.minnum.f32", "llvm.umin.i32", "llvm.umax.i32"), "compare"),
    **dict.fromkeys(("llvm.smin.i32", "llvm.smax.i32"), "compare"),
    **dict.fromkeys(("exp2f", "llvm.exp2.f32"), "exp2"),
    **dict.fromkeys(("emu_threadgroup_barrier", "emu_simdgroup_barrier"), "barrier"),
    "emu_reduce": "vote",
    "llvm.fshl.i32": "shift",
    "llvm.fabs.f32": "float",
}
_VARIED = 0  # EMU_LANE of context.h: each lane names the lane it reads
_MAKES_FLOAT = r"(load|phi|f\w+( \w+)*) float\b|select i1 \S+ float\b|(tail )?call [^@]*float @"
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "half": 2, "bfloat": 2, "float": 4, "ptr": 8}


@dataclass(frozen=True)
class Loop:
    """The counted loop.

    Attributes:
        parts: first what runs in every turn, then each part that runs in some.
        kept: numbers of 4 bytes that a lane carries from turn to turn or needs in every turn and cannot compute again:
            what enters the next turn, and floats from before the loop. A lane has at least so many registers or spills.
    """

    parts: list[Part]
    kept: int


@dataclass
class Part:
    """Instructions of the loop that run together: those of every turn, or those behind one condition.

    Attributes:
        counts: instructions of a simdgroup, by kind.
        bytes_read: of one lane, by input.
        threadgroup_bytes: read from threadgroup memory by one lane.
        conditional: whether it runs only in some turns.
        voted: whether a vote of the simdgroup decides that.
    """

    counts: Counter = field(default_factory=Counter)
    bytes_read: Counter = field(default_factory=Counter)
    threadgroup_bytes: int = 0
    conditional: bool = False
    voted: bool = False


def count_loop(instance: Instance, reads: tuple[str, ...]) -> Loop:
    """The innermost loop that loads from all of the inputs `reads`.

    Raises:
        CompileError: if the text does not compile.
        ValueError: if there is not exactly one such loop, or an instruction in it has no kind.
    """
    function = _Counted(_llvm(instance), kernel_name(instance))
    loops = function.loops()
    fitting = [
        (header, body)
        for header, body in loops.items()
        if set(reads) <= {base for block in body for base in function.read_by(block)}
    ]
    inner = [one for one in fitting if not any(other[1] < one[1] for other in fitting)]
    if len(inner) != 1:
        raise ValueError(
            f"[count_loop] wanted one innermost loop of {instance.name} that loads from {', '.join(reads)}, got "
            f"{len(inner)} of {len(loops)}. Name inputs that one loop alone reads."
        )
    return Loop(function.parts(*inner[0]), function.kept(*inner[0]))


def _llvm(instance: Instance) -> str:
    # Loops are unrolled where the text asks for it, and nowhere else.
    flags = [*FAST, "-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops", "-fno-discard-value-names", "-g0"]
    source = run_source(instance)

    def make(path: Path) -> None:
        text = path.with_suffix(".cpp")
        try:
            text.write_text(source)
            done = clang(*flags, *include_flags(), *use_precompiled(FAST), "-S", "-emit-llvm", text, "-o", path)
        finally:
            text.unlink(missing_ok=True)
        if done.returncode:
            raise CompileError(f"[{instance.name}] wanted a body that compiles for the CPU, got:\n{done.stderr}")

    return disk.get(f"counted_{disk.key(toolchain_key(), flags, source)}.ll", make).read_text()


class _Counted(Function):
    """Counts by part of a loop."""

    def kept(self, header: str, body: set[str]) -> int:
        """See `Loop`."""
        lines = [line for block in body for line in self.blocks[block]]
        inside = {line.split(" = ")[0][1:] for line in lines if line.startswith("%")}
        outside = set(re.findall(r"%([\w.]+)", " ".join(lines))) - inside & set(self.defined)
        floats = sum(re.match(_MAKES_FLOAT, self.defined[name]) is not None for name in outside & set(self.defined))
        phis = [line.split(" = phi ")[1].split()[0] for line in self.blocks[header] if " = phi " in line]
        return floats + sum(max(_BYTES[kind] // 4, 1) for kind in phis)

    def parts(self, header: str, body: set[str]) -> list[Part]:
        """The loop's parts: a block that every turn passes dominates all blocks from which the loop starts again."""
        ends = [label for label in body if header in self.next[label]]
        always = {block for block in body if all(block in self.dominators[end] for end in ends)}
        found = {"": Part()}
        for block in sorted(body, key=lambda b: len(self.dominators[b])):
            # The first block on the way here that not every turn passes names the part.
            above = [b for b in self.dominators[block] & body - always if b != block or block not in always]
            first = min(above, key=lambda b: len(self.dominators[b]), default="")
            if first and first not in found:
                before = max(self.dominators[first] - {first}, key=lambda b: len(self.dominators[b]))
                found[first] = Part(conditional=True, voted=self._voted(self.blocks[before]))
            self._count(block, found[first], self._stepped(header))
        return list(found.values())

    def _voted(self, lines: list[str]) -> bool:
        """Whether a block's branch asks for what a vote left behind."""
        asked = re.search(r"br i1 %([\w.]+)", lines[-1])
        compared = re.findall(r"%([\w.]+)", self.defined[asked[1]]) if asked else []
        places = re.findall(r"load i32, ptr (%[\w.]+)", " ".join(self.defined.get(name, "") for name in compared))
        return any("@emu_reduce" in line and re.search(rf"{place}\b", line) for place in places for line in lines)

    def _stepped(self, header: str) -> set[str]:
        """Values that enter the next turn."""
        return {n for line in self.blocks[header] if " = phi " in line for n in re.findall(r"\[ %([\w.]+),", line)}

    def _count(self, block: str, part: Part, stepped: set[str]) -> None:
        wide = 0  # bytes that are left of a vector
        for line in self.blocks[block]:
            name, _, text = line.partition(" = ")
            text = text if name.startswith("%") else line
            operation = text.split()[0]
            if operation in ("tail", "call"):
                self._count_call(text, part.counts)
            elif operation == "load":
                base = self.base_of(re.search(r"ptr (\S+?),", text)[1])
                if base == "private":
                    continue
                size, align = self._size(text.split()[1:]), int(re.search(r"align (\d+)", text)[1])
                # Clang splits a vector whose elements are used one by one; the first tells the vector's alignment.
                whole = wide <= 0
                wide = align - size if whole else wide - size
                if base == "threadgroup":
                    part.threadgroup_bytes += size
                    part.counts["threadgroup_load"] += whole
                else:
                    part.bytes_read[base] += size
                    part.counts["load"] += whole
            elif operation == "store":
                base = self.base_of(re.search(r", ptr (\S+?),", text)[1])
                if base != "private":
                    part.counts["threadgroup_store" if base == "threadgroup" else "store"] += 1
            elif operation == "getelementptr":
                indices = re.findall(r"i\d+ (\S+?)(?:,|$)", text.split("ptr ", 1)[1])
                varied = any(index.startswith("%") for index in indices)
                if varied or name[1:] in stepped:
                    # Threadgroup memory has short addresses, device memory addresses of 64 bits.
                    part.counts["add" if self.base_of(name) == "threadgroup" else "address"] += 1
            elif operation == "br":
                if " i1 " in text:
                    part.counts["branch"] += 1
            elif operation in _OPERATIONS:
                part.counts[self._kind(text)] += 1
                if self._kind(text) == "extract":  # its shift was counted before
                    part.counts["shift"] -= 1
            elif operation not in _FREE:
                raise ValueError(f"[count_loop] wanted an instruction with a kind, got `{text}`. Give it one.")

    def _kind(self, text: str) -> str:
        """A mask of a shifted value that nothing else uses is one extraction of bits."""
        kind = _OPERATIONS[text.split()[0]]
        found = re.fullmatch(r"and i32 %([\w.]+), (\d+)", text)
        if found and int(found[2]) & (int(found[2]) + 1) == 0 and self.uses[found[1]] == 2:
            return "extract" if self.defined.get(found[1], "").startswith("lshr") else kind
        return kind

    def _count_call(self, text: str, counts: Counter) -> None:
        called, arguments = re.search(r"@([\w.]+)\((.*)\)", text).groups()
        if called == "emu_exchange":
            lane, how = (word.split()[-1] for word in arguments.split(", ")[2:4])
            varied = lane.startswith("%") and int(how) == _VARIED
            if varied and self._in_quad(lane[1:]):
                counts.update({"exchange": 1, "bitwise": -2})  # how the emulator names a lane of the own quad
            else:
                counts["lookup" if varied else "exchange"] += 1
        elif called in _CALLS:
            counts[_CALLS[called]] += 1
        elif called != "emu_lane" and not called.startswith("llvm.lifetime"):
            raise ValueError(f"[count_loop] wanted a call with a kind, got @{called}. Give it one.")

    def _in_quad(self, lane: str) -> bool:
        """Whether a lane is named as simdgroup.h names those of quad_shuffle."""
        parts = re.findall(r"%([\w.]+)", self.defined.get(lane, "")) if "or " in self.defined.get(lane, "") else []
        starts = [re.fullmatch(r"and i32 %([\w.]+), -4", self.defined.get(part, "")) for part in parts]
        return any(found and "@emu_lane" in self.defined.get(found[1], "") for found in starts)

    @staticmethod
    def _size(words: list[str]) -> int:
        if words[0].startswith("<"):
            return int(words[0][1:]) * _BYTES[words[2].rstrip(">,")]
        return _BYTES[words[0].rstrip(",")]
