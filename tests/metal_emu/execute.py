"""Loads a built kernel, runs it once, and turns what the runtime found into reports."""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, Structure, c_char, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .build import runtime
from .elf import read_elf
from .errors import Report
from .lines import source_lines
from .sources import ENTRY

KINDS = {
    1: "out-of-bounds",
    2: "race",
    3: "uninitialised",
    4: "simd-divergence",
    5: "misaligned",
    6: "write-to-input",
    7: "simd-shuffle",
    8: "barrier",
    9: "undefined-behaviour",
}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
MAX_REPORTS, MAX_REGIONS, THREADGROUP_VARIABLE = 64, 250, 1000


# The structures of runtime/abi.h.
class _Buffer(Structure):
    _fields_ = [
        *((name, kind) for name, kind in (("data", c_void_p), ("bytes", c_uint64), ("offset", c_uint64))),
        *(("unwritten", c_uint64), ("is_output", c_int32), ("is_initialised", c_int32)),
    ]


class _Report(Structure):
    _fields_ = [
        *((name, c_int32 if name == "kind" else c_uint32) for name in ("kind", "thread", "other", "threadgroup")),
        *(("pc", c_uint64), ("other_pc", c_uint64), ("offset", c_int64)),
        *((name, c_int32) for name in ("buffer", "line", "column", "other_line", "other_column", "pad")),
        ("text", c_char * 160),
    ]


class _Run(Structure):
    _fields_ = [
        ("entry", c_void_p),
        *((name, c_uint64) for name in ("image_lo", "image_hi", "threadgroup_lo", "threadgroup_hi")),
        *(("buffers", POINTER(_Buffer)), ("variables", POINTER(c_uint64)), ("reports", POINTER(_Report))),
        *((name, c_int32) for name in ("n_buffers", "n_variables", "max_reports", "n_reports")),
        *(("grid", c_uint32 * 3), ("threadgroup", c_uint32 * 3)),
        *((name, c_int32) for name in ("checked", "strict", "order")),
        *(("seed", c_uint32), ("flush_denormals", c_int32), ("pad", c_int32)),
        *((name, c_uint64) for name in ("switches", "collectives", "barriers", "accesses")),
    ]


@dataclass(frozen=True)
class Loaded:
    """A kernel in memory: its entry, where it lies, and its threadgroup variables (name, address, bytes)."""

    path: Path
    library: ctypes.CDLL
    entry: int
    image: tuple[int, int]
    threadgroup: tuple[int, int]
    variables: list[tuple[str, int, int]]

    @property
    def threadgroup_bytes(self) -> int:
        """Threadgroup memory that Metal would allocate, each variable on 16 bytes."""
        return sum((size + 15) & ~15 for _, _, size in self.variables)


@cache
def load(path: Path) -> Loaded:
    """Load a shared object that ``build.shared_object`` made."""
    runtime()
    library, elf = ctypes.CDLL(str(path)), read_elf(path)
    entry = ctypes.cast(getattr(library, ENTRY), c_void_p).value
    base = entry - next(s.address for s in elf.symbols if s.name == ENTRY)
    number, start, size = elf.sections.get("emu_threadgroup", (-1, 0, 0))
    variables = [
        (_plain_name(s.name), base + s.address, s.size)
        for s in elf.symbols
        if s.section == number and s.size and "emu_red_zone_" not in s.name
    ]
    threadgroup = (base + start, base + start + size) if size else (0, 0)
    return Loaded(path, library, entry, (base, base + elf.end), threadgroup, variables)


def _plain_name(symbol: str) -> str:
    """The variable's own name out of a mangled static local: ``_ZZ...E3red_0`` is ``red``."""
    found = re.search(r"E(\d+)([A-Za-z_]\w*)$", symbol)
    return found[2][: int(found[1])] if found else symbol


@dataclass(frozen=True)
class Argument:
    """One buffer of a run: its name, its storage, and how the kernel may use it."""

    name: str
    storage: np.ndarray
    is_output: bool = False
    is_initialised: bool = False
    offset: int = 0


@dataclass(frozen=True)
class Options:
    """How one run is scheduled and judged; the fields are the options of ``metal_kernel``."""

    check: bool = False
    strict: bool = True
    order: str = "forward"
    seed: int = 1
    typecheck: bool = True
    misalign: int = 0
    ftz: bool = False
    max_threadgroup_memory: int = 32768
    unwritten: bool = True
    raise_errors: bool = True

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"[metal_kernel] order must be one of {', '.join(ORDERS)}, got {self.order!r}.")


def execute(kernel: Loaded, name: str, arguments: list[Argument], grid, threadgroup, options: Options):
    """Run a kernel: outputs are written in place. Returns (reports, counts of what happened)."""
    if len(arguments) + len(kernel.variables) > MAX_REGIONS:
        raise ValueError(f"[{name}] wanted at most {MAX_REGIONS} buffers and threadgroup variables together.")
    buffers = (_Buffer * len(arguments))(
        *(
            _Buffer(a.storage.ctypes.data, a.storage.nbytes, a.offset, 0, a.is_output, a.is_initialised)
            for a in arguments
        )
    )
    variables = [number for _, address, size in kernel.variables for number in (address, size)]
    reports = (_Report * MAX_REPORTS)()
    run = _Run(
        entry=kernel.entry,
        image_lo=kernel.image[0],
        image_hi=kernel.image[1],
        threadgroup_lo=kernel.threadgroup[0],
        threadgroup_hi=kernel.threadgroup[1],
        buffers=buffers,
        variables=(c_uint64 * max(1, len(variables)))(*variables),
        reports=reports,
        n_buffers=len(arguments),
        n_variables=len(kernel.variables),
        max_reports=MAX_REPORTS,
        grid=(c_uint32 * 3)(*grid),
        threadgroup=(c_uint32 * 3)(*threadgroup),
        checked=options.check,
        strict=options.strict,
        order=ORDERS[options.order],
        seed=options.seed,
        flush_denormals=options.ftz,
    )
    runtime().emu_run(ctypes.byref(run))
    found = _reports(kernel, name, [a.name for a in arguments], reports[: run.n_reports])
    if options.check and options.unwritten:
        for argument, buffer in zip(arguments, buffers, strict=True):
            if buffer.unwritten:
                text = f"{argument.name}: {buffer.unwritten} of {buffer.bytes} bytes were never written"
                found.append(Report("unwritten-output", text))
    counts = {what: getattr(run, what) for what in ("switches", "collectives", "barriers", "accesses")}
    return found, counts | {"threadgroup_bytes": kernel.threadgroup_bytes}


def _reports(kernel: Loaded, name: str, buffers: list[str], reports: list[_Report]) -> list[Report]:
    lines = source_lines(kernel.path, {pc for r in reports for pc in (r.pc, r.other_pc) if pc})

    def place(pc: int, line: int, column: int) -> str:
        file = (f"{name}.metal", f"{name}.header", "library header")[line >> 24]
        return lines.get(pc) or (f"{file}:{line & 0xFFFFFF}:{column}" if line else "unknown line")

    out = []
    for r in reports:
        text = f"{place(r.pc, r.line, r.column)}: {r.text.decode()}"
        if r.buffer >= THREADGROUP_VARIABLE:
            text += f" `{kernel.variables[r.buffer - THREADGROUP_VARIABLE][0]}` byte offset {r.offset}"
        elif r.buffer >= 0:
            text += f" `{buffers[r.buffer]}` byte offset {r.offset}"
        simdgroup, lane = divmod(r.thread, 32)
        text += f" (threadgroup {r.threadgroup}, thread {r.thread}, simdgroup {simdgroup} lane {lane}"
        if r.other_pc or r.other_line:
            text += f"; other: thread {r.other} at {place(r.other_pc, r.other_line, r.other_column)}"
        out.append(Report(KINDS[r.kind], text + ")"))
    return out
