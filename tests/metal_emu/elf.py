"""Reads sections, symbols and extent of a 64-bit little-endian ELF shared object."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_SYMBOL_TABLE, _LOADED, _ALLOCATED = 2, 1, 2


@dataclass(frozen=True)
class Symbol:
    """A symbol: its address from the object's base, its size, and the number of its section."""

    name: str
    address: int
    size: int
    section: int


@dataclass(frozen=True)
class Elf:
    """``sections``: name -> (number, address, size); ``unloaded``: name -> (number, offset in the file, size);
    ``end``: one past the last address. Addresses count from the base.
    """

    sections: dict[str, tuple[int, int, int]]
    unloaded: dict[str, tuple[int, int, int]]
    symbols: list[Symbol]
    end: int


def read_elf(path: Path) -> Elf:
    """What the loader and the checker need to know of a shared object."""
    data = path.read_bytes()

    def text(at: int) -> str:
        return data[at : data.index(b"\0", at)].decode()

    program_at, section_at = struct.unpack_from("<QQ", data, 0x20)
    program_size, programs, section_size, count, names = struct.unpack_from("<HHHHH", data, 0x36)
    segments = [struct.unpack_from("<IIQQQQQQ", data, program_at + i * program_size) for i in range(programs)]
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, section_at + i * section_size) for i in range(count)]
    symbols = []
    for header in headers:
        if header[1] == _SYMBOL_TABLE:
            for at in range(header[4], header[4] + header[5], 24):
                name, _, _, section, address, size = struct.unpack_from("<IBBHQQ", data, at)
                symbols.append(Symbol(text(headers[header[6]][4] + name), address, size, section))
    named = [(text(headers[names][4] + h[0]), i, h) for i, h in enumerate(headers)]
    sections = {name: (i, h[3], h[5]) for name, i, h in named if h[2] & _ALLOCATED}
    unloaded = {name: (i, h[4], h[5]) for name, i, h in named if not h[2] & _ALLOCATED}
    return Elf(sections, unloaded, symbols, max(s[3] + s[6] for s in segments if s[0] == _LOADED))
