"""The header of a safetensors file, read and checked to the last byte before anything else reads the file.

MLX (0.32.4) looks for arrays that reach beyond the file, but loads overlapping ones, takes the last of two equal names,
and parses a header of up to 100 MB in gigabytes: a million entries took 21 s and 1.4 GB. Here every array has the
bytes that its shape and dtype take, they follow each other without a gap, and the last one ends where the file does, as
the format demands (https://github.com/huggingface/safetensors).
"""

import json
import math
import os
from typing import Any, BinaryIO, NamedTuple

# Reading a header of 4 MiB with this many marks takes below 64 MiB and a second. 200 layers of 27 arrays each have
# 92,000 marks in 1 MB.
MAX_HEADER_BYTES = 4 << 20
MAX_MARKS = 400_000
_MARKS = ("{", "[", ",", ":")
_MAX_AXES = 8
_MAX_ELEMENTS = 1 << 47  # counted with empty axes as 1, so that no product of axes overflows in MLX
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8,
    "I64": 8,
}  # fmt: skip


class Entry(NamedTuple):
    """One array of a header: dtype as safetensors calls it, shape, and its bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a safetensors file says it holds.

    Attributes:
        metadata: text by name.
        arrays: by name, in the order of the header.
    """

    metadata: dict[str, str]
    arrays: dict[str, Entry]


def read_header(file: BinaryIO) -> Header:
    """The header of an open file, at its beginning.

    Raises:
        ValueError: if it is no safetensors file of arrays that MLX writes, whole and without a gap. The message is a
            reason alone: the caller says where it arose and in which file.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"wanted a safetensors header of at most {MAX_HEADER_BYTES:,} bytes, got none in a file of {size:,} bytes"
        )
    header = _parse(file.read(length))
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("wanted metadata that is text by name, got other")
    arrays = {name: _entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, entry in sorted(arrays.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"wanted array {shown(name)} to begin at byte {end:,} of the arrays, got {entry.start:,}")
        end = entry.stop
    if end != size - 8 - length:
        raise ValueError(f"wanted {end:,} bytes of arrays, as its header says, got {size - 8 - length:,}")
    return Header(metadata, arrays)


def strict_json(raw: bytes, max_marks: int = MAX_MARKS) -> dict[str, Any]:
    """An object of JSON in UTF-8: no name twice in an object, no NaN or Infinity, and of bounded size in memory.

    Raises:
        ValueError: with the reason, as `read_header`.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"wanted text in UTF-8, got byte {raw[error.start]:#04x} at {error.start:,}") from None
    if sum(map(text.count, _MARKS)) > max_marks:
        raise ValueError(f"wanted JSON with at most {max_marks:,} of the marks {' '.join(_MARKS)}, got more")
    try:
        found = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"wanted JSON, got other ({shown(str(error))})") from None
    if not isinstance(found, dict):
        raise ValueError(f"wanted an object of JSON, got {type(found).__name__}")
    return found


def shown(value: Any, most: int = 80) -> str:
    """A value from a file as it may stand in a message: one line, short, printable."""
    if isinstance(value, (list, tuple)):
        plain = all(item is None or isinstance(item, (str, int, float)) for item in value)
        value = value[:most] if plain else f"a list of {type(value[0]).__name__} and others"
    elif isinstance(value, dict):
        value = "an object with " + ", ".join(list(value)[:5])
    text = ascii(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else text[:most] + "..."


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        return strict_json(raw)
    except ValueError as error:
        raise ValueError(f"its header does not describe arrays: {error}") from None


def _entry(name: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"wanted dtype, shape and data_offsets of array {shown(name)}, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"wanted array {shown(name)} in one of {', '.join(_ITEM_BYTES)}, got {shown(dtype)}")
    if (
        not _whole_numbers(shape, 1 << 31)
        or len(shape) > _MAX_AXES
        or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS
    ):
        raise ValueError(f"wanted a shape of at most {_MAX_AXES} axes of array {shown(name)}, got {shown(shape)}")
    if not _whole_numbers(offsets, 1 << 63) or len(offsets) != 2:
        raise ValueError(f"wanted two data_offsets of array {shown(name)}, got {shown(offsets)}")
    wanted = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(f"wanted {wanted:,} bytes of array {shown(name)}, got data_offsets {shown(offsets)}")
    return Entry(dtype, tuple(shape), *offsets)


def _whole_numbers(numbers: Any, below: int) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < below for n in numbers)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
