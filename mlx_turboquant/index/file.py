"""The file of an index: a safetensors file whose arrays can be mapped into memory as they are.

Layout: 8 bytes with the length of the header, the header in JSON, filled with spaces to a multiple of 64 bytes, and
the arrays, each at a multiple of 64 bytes. safetensors allows no gaps, so arrays named "padding" fill them. The header
follows from the settings and the number of vectors: `load` makes it again and takes a file only if it has exactly that
one, so that no offset, shape or dtype of a file is trusted.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_turboquant.files import open_regular, written_whole
from mlx_turboquant.files.safetensors import strict_json
from mlx_turboquant.index.settings import Settings
from mlx_turboquant.index.top import MAX_ROWS

FORMAT, VERSION = "mlx_turboquant_index", "2"
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 16  # ours are below 2 KiB
_TYPES = {np.uint32: "U32", np.float32: "F32", np.int64: "I64", np.float16: "F16", np.int8: "I8", np.uint8: "U8"}


def save(
    path: Path, settings: Settings, count: int, next_id: int, pieces: Callable[[str], Iterator[np.ndarray]]
) -> None:
    """Write an index, a few rows of a column at a time.

    Args:
        path: appears whole or not at all; an older file of this name stays until then.
        settings: of the index.
        count: vectors.
        next_id: the id of the next vector that comes without one.
        pieces: gives the rows of a column, in order.

    Raises:
        OSError: if the file cannot be written; an older one is then untouched.
    """
    header = _header(settings, count, next_id)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with written_whole(path) as aside, open(aside, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, entry in header.items():
            if name.startswith("padding"):
                out.write(bytes(entry["shape"][0]))
            elif name != "__metadata__":
                for piece in pieces(name):
                    out.write(np.ascontiguousarray(piece).data.cast("B") if piece.size else b"")


def load(path: Path) -> tuple[Settings, int, dict[str, np.ndarray]]:
    """The settings, the next id and the arrays of an index, mapped into memory, read-only.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is cut short or longer than its header says, of another version, or no index or no file.
    """
    with open_regular(path, "TurboQuantIndex.load") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise _error(path, f"wanted a header of at most {_MAX_HEADER_BYTES} bytes, got {size} bytes in all")
        text = file.read(length)
    try:
        header = strict_json(text)
        metadata = header["__metadata__"]
        found = metadata["format"], metadata["version"]
    except (ValueError, KeyError, TypeError):
        raise _error(path, "wanted the header of an index, got another") from None
    if found[0] != FORMAT:
        raise _error(path, f"wanted the format {FORMAT!r}, got {_short(found[0])}")
    if found[1] != VERSION:
        raise ValueError(
            f"[TurboQuantIndex.load] wanted version {VERSION} of the format, got {_short(found[1])} in {path}: before, "
            "2 bits were other codes. Load it with the version of mlx_turboquant that saved it, or build the index "
            "again."
        )
    try:
        settings, count, next_id = _parse(metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise _error(path, f"wanted the settings of an index, got others ({_short(error)})") from None
    expected = _header(settings, count, next_id)
    if header != expected:
        names = [name for name in {**expected, **header} if header.get(name) != expected.get(name)]
        raise _error(path, f"wanted the arrays of {count} vectors, got another {_short(names[0])} in the header")
    offsets = {name: expected[name]["data_offsets"] for name in settings.columns}
    start = 8 + length
    end = start + max(last for _, last in offsets.values())
    if start % _ALIGNMENT or end != size:
        raise _error(path, f"wanted {end} bytes, as its header says, got {size}")
    mapped = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays = {}
    for name, (shape, dtype) in settings.columns.items():
        first, last = offsets[name]
        arrays[name] = mapped[start + first : start + last].view(dtype).reshape(count, *shape)
    return settings, next_id, arrays


def _header(settings: Settings, count: int, next_id: int) -> dict[str, Any]:
    metadata = {
        "format": FORMAT, "version": VERSION, "d": str(settings.d), "bits": str(settings.bits),
        "metric": settings.metric, "seed": str(settings.seed), "keep": settings.keep or "", "ntotal": str(count),
        "next_id": str(next_id),
    }  # fmt: skip
    header, end = {"__metadata__": metadata}, 0
    for name, (shape, dtype) in settings.columns.items():
        if gap := -end % _ALIGNMENT:
            header[f"padding_before_{name}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        start = end + gap
        end = start + count * int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": [count, *shape], "data_offsets": [start, end]}
    return header


def _parse(metadata: dict[str, str]) -> tuple[Settings, int, int]:
    numbers = {name: int(metadata[name]) for name in ("d", "seed", "ntotal", "next_id")}
    settings = Settings(
        numbers["d"], float(metadata["bits"]), metadata["metric"], numbers["seed"], metadata["keep"] or None
    )
    if not (0 <= numbers["ntotal"] <= MAX_ROWS and numbers["ntotal"] <= numbers["next_id"] <= 1 << 63):
        raise ValueError("ntotal or next_id")
    return settings, numbers["ntotal"], numbers["next_id"]


def _short(text: Any) -> str:
    text = repr(text) if isinstance(text, str) else str(text)
    return text if len(text) <= 120 else text[:120] + "..."


def _error(path: Path, what: str) -> ValueError:
    return ValueError(f"[TurboQuantIndex.load] {what}: {path} is cut short, damaged or no index. Save it again.")
