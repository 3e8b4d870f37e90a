"""Which kind of file of this package a file is, by its content and not by its name; and what it then holds."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from mlx_turboquant import scheme_file
from mlx_turboquant.index import file as index_file
from mlx_turboquant.index.settings import row_bytes
from mlx_turboquant.inspection.prompt_caches import prompt_cache_facts

_MAX_HEADER_BYTES, _MAX_JSON_BYTES = 64 << 20, 1 << 20  # as `load_prompt_cache` and scheme files have them
_SCHEME_KEYS = ("format", "model", "layers")


def inspect_file(path: str | os.PathLike, norms: bool = True) -> dict[str, Any]:
    """What a file holds, as a dictionary that JSON takes; its keys are listed in docs/format.md.

    Args:
        path: a prompt cache, an index of vectors, a scheme file (a plan), or kept fp16 logits of `evaluate`.
        norms: of a prompt cache, whether its rows are decoded for histograms of their norms.

    Returns:
        ``kind`` ("prompt cache", "index", "scheme file", "reference logits"), ``file``, ``file_nbytes``, and what there
        is to say of that kind.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is of no such kind, damaged, or of a version that does not load.

    Example:
        >>> inspect_file("notes.safetensors")["ratio"]  # doctest: +SKIP
        3.62
    """
    path = Path(path)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"[inspect] wanted a file, got a folder, a pipe or a device: {path}. Name a file.")
    kind, header = _look(path)
    common = {"kind": kind, "file": str(path), "file_nbytes": path.stat().st_size}
    if kind == "prompt cache":
        return prompt_cache_facts(path, norms)
    if kind == "index":
        return common | _index(path)
    return common | (_schemes(path, header) if kind == "scheme file" else _logits(path, header))


def _look(path: Path) -> tuple[str, dict[str, Any]]:
    """The kind of a file, and the JSON that it begins with."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(9)
        length = int.from_bytes(head[:8], "little")
        arrays = head[8:] == b"{" and 2 <= length <= min(size - 8, _MAX_HEADER_BYTES)
        if not arrays and not head.lstrip().startswith(b"{"):
            raise _unknown(path, f"one that begins with {head!r}" if head else "an empty one")
        file.seek(8 if arrays else 0)
        text = file.read(length if arrays else _MAX_JSON_BYTES)
    try:
        header = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _unknown(path, f"one that begins like JSON and is none ({error})") from error
    if not isinstance(header, dict):
        raise _unknown(path, "another")
    if not arrays:
        if not {"format", "layers"} <= header.keys():
            raise _unknown(path, "JSON without 'format' and 'layers'")
        return "scheme file", header
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and metadata.get("format") == index_file.FORMAT:
        return "index", header
    if isinstance(metadata, dict) and any(str(key).startswith("1.") for key in metadata):
        return "prompt cache", header
    if not metadata and _logit_shapes(header):
        return "reference logits", header
    raise _unknown(path, "safetensors with the metadata of none of these")


def _index(path: Path) -> dict[str, Any]:
    settings, next_id, arrays = index_file.load(path)
    count = len(arrays["ids"])
    fp16 = 2 * settings.d * count
    nbytes = {name: array.nbytes for name, array in arrays.items()}
    return {
        "format": int(index_file.VERSION),
        "ntotal": count,
        "d": settings.d,
        "bits": settings.bits,
        "metric": settings.metric,
        "seed": settings.seed,
        "keep": settings.keep,
        "next_id": next_id,
        "code_size": row_bytes(settings.searched),
        "nbytes": nbytes,
        "fp16_nbytes": fp16,
        "ratio": fp16 / sum(nbytes.values()) if count else None,
    }


def _schemes(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    schemes = scheme_file.load(path)
    return {
        "format": scheme_file.FORMAT,
        "model": schemes.model or None,
        "layers": [str(scheme) for scheme in schemes.layers],
        "notes": {key: value for key, value in data.items() if key not in _SCHEME_KEYS},
    }


def _logits(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    shapes = _logit_shapes(header)
    end = max(entry["data_offsets"][1] for entry in header.values() if entry)
    if path.stat().st_size < end:
        raise _unknown(path, "kept logits that are cut short")
    return {
        "calls": len(shapes),
        "tokens": sum(step for step, _ in shapes.values()),
        "vocabulary": max(vocabulary for _, vocabulary in shapes.values()),
        "dtype": "/".join(sorted({entry["dtype"] for entry in header.values() if entry})),
        "nbytes": end,
    }


def _logit_shapes(header: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(step, vocabulary) by the name of each array, if they are what `reference_logits` writes; else nothing."""
    shapes = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            step, vocabulary = entry["shape"]
            end = entry["data_offsets"][1]
        except (ValueError, KeyError, TypeError, IndexError):
            return {}
        right = name.isdecimal() and all(type(n) is int and n > 0 for n in (step, vocabulary, end))
        if not right or not isinstance(entry.get("dtype"), str):
            return {}
        shapes[name] = (step, vocabulary)
    return shapes


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _unknown(path: Path, got: str) -> ValueError:
    return ValueError(
        f"[inspect] wanted a prompt cache, an index, a scheme file or kept logits, got {got}: {path}. Give a file that "
        "this package wrote; another's may be cut short or damaged."
    )
