"""Vectors, ids and truth in files: .npy, and the .fvecs and .ivecs of the public benchmarks, all memory-mapped."""

import math
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_turboquant.files import open_regular

_MAX_NPY_HEADER = 10_000  # as numpy's
_NPY_PARTS = (
    rb"['\"]descr['\"]\s*:\s*['\"]([<>|=]?[a-zA-Z]\d{0,3})['\"]",
    rb"['\"]fortran_order['\"]\s*:\s*(True|False)\b",
    rb"['\"]shape['\"]\s*:\s*\(((?:\s*\d{1,20}L?\s*,)*\s*(?:\d{1,20}L?\s*)?)\)",
)
_ROWS = 1 << 20


def open_vectors(path: str) -> np.ndarray:
    """The vectors of a .npy (any float dtype) or .fvecs file, mapped into memory and not read.

    Returns:
        (n, d) of the file's dtype.

    Raises:
        OSError: if there is no such file.
        ValueError: for another kind of file, a damaged one, or other shapes and dtypes.
    """
    x = _open(path, {".npy", ".fvecs"})
    if x.ndim != 2 or x.dtype.kind != "f":
        raise ValueError(
            f"[{path}] wanted floats of the shape (vectors, values), got {x.dtype} {x.shape}. "
            "Save them with numpy.save as a matrix of float16, float32 or float64."
        )
    return x


def open_whole_numbers(path: str) -> np.ndarray:
    """Ids or rows of a .npy (any integer dtype) or .ivecs file, mapped into memory.

    Returns:
        (n,) or (n, k) of the file's dtype; .ivecs with one number a row give (n,).

    Raises:
        OSError: if there is no such file.
        ValueError: for another kind of file, a damaged one, or other shapes and dtypes.
    """
    x = _open(path, {".npy", ".ivecs"})
    if x.ndim not in (1, 2) or x.dtype.kind not in "iu":
        raise ValueError(
            f"[{path}] wanted whole numbers of the shape (n,) or (n, k), got {x.dtype} {x.shape}. "
            "Save them with numpy.save as an array of int64."
        )
    return x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x


def _open(path: str, kinds: set[str]) -> np.ndarray:
    kind = Path(path).suffix
    if kind not in kinds:
        raise ValueError(
            f"[{path}] wanted a file that ends with {' or '.join(sorted(kinds))}, got {kind or 'no end'!r}."
        )
    with open_regular(path, path) as file:
        if kind == ".npy":
            return _open_npy(path, file)
        return _open_vecs(path, file, np.dtype("<f4") if kind == ".fvecs" else np.dtype("<i4"))


def _open_npy(path: str, file: BinaryIO) -> np.ndarray:
    """The array of a .npy file of numbers (numpy.lib.format describes it).

    The header is Python's text of a dictionary. numpy has Python parse it, which deep nesting can overwhelm, and reads
    it whole whatever length it claims; here only numbers and their shapes are looked for.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length_bytes = 2 if start[6:7] == b"\1" else 4
    length = int.from_bytes(file.read(length_bytes), "little")
    if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\1", b"\2", b"\3") or length > min(_MAX_NPY_HEADER, size):
        raise _no_npy(path, f"its {size:,} bytes do not begin as one does")
    header = file.read(length)
    parts = [re.findall(pattern, header) for pattern in _NPY_PARTS]
    if [len(found) for found in parts] != [1, 1, 1]:
        raise _no_npy(path, "its header does not name one dtype, one order and one shape of numbers")
    (kind,), (fortran,), (axes,) = parts
    try:
        dtype = np.dtype(kind.decode())
    except TypeError:
        raise _no_npy(path, f"it has the dtype {kind.decode()}") from None
    if dtype.kind not in "biufc":
        raise _no_npy(path, f"it has the dtype {dtype}, no numbers")
    shape = tuple(int(axis) for axis in re.findall(rb"\d+", axes))
    begin, wanted = file.tell(), math.prod(shape) * dtype.itemsize
    # Empty axes count as 1: numpy refuses a product of axes that overflows, of an empty array too.
    if begin + wanted > size or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63 or len(shape) > 32:
        raise _no_npy(path, f"wanted {wanted:,} bytes of {dtype} {shape}, got {size - begin:,}")
    order = "F" if fortran == b"True" else "C"
    if not wanted:
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", begin, shape, order)


def _no_npy(path: str, why: str) -> ValueError:
    return ValueError(f"[{path}] is no whole .npy file of numbers: {why}. Save a matrix with numpy.save.")


def _open_vecs(path: str, file: BinaryIO, dtype: np.dtype) -> np.ndarray:
    """(n, d) of a file in which d as int32 stands before each row of d values of 4 bytes."""
    size = os.fstat(file.fileno()).st_size
    if size < 8 or size % 4:
        raise ValueError(
            f"[{path}] wanted rows of a length and values of 4 bytes each, got {size:,} bytes. Fetch it again."
        )
    words = np.memmap(path, "<i4", "r")
    d = int(words[0])
    if d < 1 or words.size % (d + 1):
        raise ValueError(
            f"[{path}] says its first row has {d:,} values, but {size:,} bytes are no whole number of such. "
            "Fetch it again."
        )
    rows = words.reshape(-1, d + 1)
    for start in range(0, len(rows), _ROWS):  # piece by piece: of short rows, one flag each would be an eighth of them
        if (other := np.flatnonzero(rows[start : start + _ROWS, 0] != d)).size:
            raise ValueError(
                f"[{path}] wanted rows of one length, got {d:,} values in row 0 and another in row "
                f"{start + other[0]:,}. Fetch it again."
            )
    return rows[:, 1:].view(dtype)
