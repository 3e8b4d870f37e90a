"""Which kind of file of this package a file is, by its content and not by its name; and what it then holds."""

import os
from pathlib import Path
from typing import Any

from mlx_turboquant import scheme_file
from mlx_turboquant.files import open_regular
from mlx_turboquant.files.safetensors import Entry, read_header, shown, strict_json
from mlx_turboquant.index import file as index_file
from mlx_turboquant.index.settings import row_bytes
from mlx_turboquant.inspection.prompt_caches import prompt_cache_facts

_MAX_JSON_BYTES = 1 << 20  # as scheme files have it
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
    kind, content = _look(path)
    tell = {
        "prompt cache": lambda: prompt_cache_facts(path, content, norms),
        "index": lambda: _index(path),
        "scheme file": lambda: _schemes(path, content),
        "reference logits": lambda: _logits(content.arrays),
    }
    return {"kind": kind, "file": str(path), "file_nbytes": path.stat().st_size, **tell[kind]()}


def _look(path: Path) -> tuple[str, Any]:
    """The kind of a file; with it the object of a scheme file, the `Header` of the others."""
    with open_regular(path, "inspect") as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(9)
        file.seek(0)
        try:
            if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size:
                header = read_header(file)
            elif head.lstrip().startswith(b"{"):
                found = strict_json(file.read(_MAX_JSON_BYTES))
                if {"format", "layers"} <= found.keys():
                    return "scheme file", found
                raise ValueError("wanted JSON with 'format' and 'layers', got other")
            else:
                raise ValueError(f"got one that begins with {shown(head.decode('latin-1'))}" if head else "got none")
        except ValueError as error:
            raise _unknown(path, str(error)) from error
    if header.metadata.get("format") == index_file.FORMAT:
        return "index", header
    if "1.0" in header.metadata:
        return "prompt cache", header
    if not header.metadata and _are_logits(header.arrays):
        return "reference logits", header
    raise _unknown(path, "got arrays with the names and metadata of none of these")


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


def _logits(arrays: dict[str, Entry]) -> dict[str, Any]:
    return {
        "calls": len(arrays),
        "tokens": sum(entry.shape[0] for entry in arrays.values()),
        "vocabulary": max(entry.shape[1] for entry in arrays.values()),
        "dtype": "/".join(sorted({entry.dtype for entry in arrays.values()})),
        "nbytes": sum(entry.stop - entry.start for entry in arrays.values()),
    }


def _are_logits(arrays: dict[str, Entry]) -> bool:
    """Whether each array is named by the token that a call begins at, and holds (step, vocabulary)."""
    return bool(arrays) and all(name.isdecimal() and len(entry.shape) == 2 for name, entry in arrays.items())


def _unknown(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"[inspect] {path} is no prompt cache, index, scheme file or kept logits that can be read: {reason}. Give a "
        "file that this package wrote, and write a damaged one again."
    )
