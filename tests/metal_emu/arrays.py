"""mx and numpy arrays in and out: plain numpy storage plus a dtype name, bfloat16 held as its 16 bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def dtype_name(dtype) -> str:
    """The name ("float16", "bfloat16", "bool", ...) of an mx dtype, a numpy dtype or a name.

    Raises ``ValueError`` for what Metal has no type for.
    """
    if isinstance(dtype, mx.Dtype):
        name = str(dtype).rsplit(".", 1)[-1]
    else:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    name = name.rstrip("_")
    if name == "float64":
        raise ValueError("[metal_kernel] Metal has no double, got float64. Cast to float32.")
    return name


def _storage_dtype(name: str):
    return np.uint16 if name == "bfloat16" else np.dtype(name)


def shape_and_dtype(value) -> tuple[tuple[int, ...], str]:
    """Shape and dtype name of an array or a Python number, as MLX would see it."""
    if isinstance(value, mx.array):
        return tuple(value.shape), dtype_name(value.dtype)
    if isinstance(value, bool):
        return (), "bool"
    if isinstance(value, int):
        return (), "int32"
    if isinstance(value, float):
        return (), "float32"
    return np.shape(value), dtype_name(np.asarray(value).dtype)


def to_storage(value) -> np.ndarray:
    """A row-contiguous numpy array with the bytes of an mx array, a numpy array or a Python number."""
    shape, name = shape_and_dtype(value)
    if isinstance(value, mx.array):
        value = value.view(mx.uint16) if name == "bfloat16" else value
        return np.ascontiguousarray(np.array(value)).reshape(shape)
    if name == "bfloat16":
        return np.ascontiguousarray(value).view(np.uint16).reshape(shape)
    return np.ascontiguousarray(value, dtype=_storage_dtype(name)).reshape(shape)


def new_storage(shape, name: str, init_value=None) -> np.ndarray:
    """Storage for an output of this shape, filled with ``init_value`` if there is one."""
    if init_value is None:
        return np.empty(tuple(shape), _storage_dtype(name))
    if name == "bfloat16":
        init_value = to_storage(mx.array(init_value, dtype=mx.bfloat16))
    return np.full(tuple(shape), init_value, _storage_dtype(name))


def from_storage(storage: np.ndarray, name: str, as_mx: bool):
    """An mx array if ``as_mx``, else the numpy array; bfloat16 is always an mx array, since numpy has none."""
    if name == "bfloat16":
        return mx.array(storage).view(mx.bfloat16)
    return mx.array(storage) if as_mx else storage
