"""Which line of the kernel an address belongs to, read from the shared object's DWARF 4 line table."""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path

from .elf import read_elf

_OWN = re.compile(r"\.(metal|header)$")
_SET_ADDRESS, _END_SEQUENCE = 2, 1


class _Reader:
    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at

    def unsigned(self, size: int) -> int:
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "little")

    def leb(self, signed: bool = False) -> int:
        value, shift, byte = 0, 0, 0x80
        while byte & 0x80:
            byte = self.unsigned(1)
            value |= (byte & 0x7F) << shift
            shift += 7
        return value - (1 << shift) if signed and byte & 0x40 else value

    def text(self) -> str:
        end = self.data.index(b"\0", self.at)
        value, self.at = self.data[self.at : end].decode(), end + 1
        return value


def _rows(data: bytes, at: int, end: int) -> list[tuple[int, str, int]]:
    """(address, file, line) of every row of the line programs between two offsets."""
    rows = []
    while at < end:
        r = _Reader(data, at)
        at += 4 + r.unsigned(4)
        if r.unsigned(2) != 4:
            continue
        program = r.unsigned(4) + r.at
        step, _, _, base, span, first_special = (r.unsigned(1) for _ in range(6))
        base -= 256 if base > 127 else 0
        lengths = [r.unsigned(1) for _ in range(first_special - 1)]
        while r.text():  # folders
            pass
        files = [""]
        while name := r.text():
            files.append(name)
            for _ in range(3):
                r.leb()
        r.at, address, file, line = program, 0, 1, 1
        while r.at < at:
            opcode = r.unsigned(1)
            if opcode >= first_special:
                advance, add = divmod(opcode - first_special, span)
                address, line = address + advance * step, line + base + add
                rows.append((address, files[file], line))
            elif opcode == 0:
                size = r.leb()
                following, kind = r.at + size, r.unsigned(1)
                if kind == _SET_ADDRESS:
                    address = r.unsigned(size - 1)
                elif kind == _END_SEQUENCE:
                    rows.append((address, "", 0))
                    address, file, line = 0, 1, 1
                r.at = following
            elif opcode == 1:  # copy
                rows.append((address, files[file], line))
            elif opcode == 2:
                address += r.leb() * step
            elif opcode == 3:
                line += r.leb(signed=True)
            elif opcode == 4:
                file = r.leb()
            elif opcode == 8:
                address += (255 - first_special) // span * step
            elif opcode == 9:
                address += r.unsigned(2)
            else:
                for _ in range(lengths[opcode - 1]):
                    r.leb()
    return sorted(rows, key=lambda row: row[0])


def source_lines(path: Path, addresses: set[int]) -> dict[int, str]:
    """address -> "name.metal:line" for addresses in a built kernel; those inside library functions are left out."""
    if not addresses:
        return {}
    elf, data = read_elf(path), path.read_bytes()
    _, at, size = elf.unloaded.get(".debug_line", (0, 0, 0))
    rows = _rows(data, at, at + size)
    starts, out = [row[0] for row in rows], {}
    for address in addresses:
        # A call returns to the instruction after it, so the byte before is in the call.
        # Line 0 is code that the optimizer made of several lines; the one before it is near enough.
        known = (row for row in reversed(rows[: bisect_right(starts, address - 1)]) if row[2] or not row[1])
        _, file, line = next(known, (0, "", 0))
        if _OWN.search(file):
            out[address] = f"{file.rsplit('/', 1)[-1]}:{line}"
    return out
