"""The rows that stay raw when blocks are encoded, in arrays of their own, in one dispatch or in plain MLX."""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import ints
from mlx_turboquant.ops.kernel import Kernel

_THREADS = 256
_PART = 64  # rows for a threadgroup
_KEEP = Kernel("keep_rows", ("keys", "values", "sizes"), ("new_k", "new_v", "first_k", "first_v"))

Pair = tuple[mx.array, mx.array]


class Kept(NamedTuple):
    """Keys and values.

    Attributes:
        newest: (B, Hkv, room, D) and (B, Hkv, room, Dv), the newest rows and zeros behind them.
        first: (B, Hkv, n, D) and (B, Hkv, n, Dv), the first ones; None if there are none.
    """

    newest: Pair
    first: Pair | None


def keep_rows(
    keys: mx.array, values: mx.array, *, first: int, start: int, stop: int, room: int, backend: str | None = None
) -> Kept:
    """Copy the first rows, and those from start to stop, so that nothing holds on to the others.

    Args:
        keys, values: (B, Hkv, capacity, D) and (B, Hkv, capacity, Dv), each with a capacity of its own: whole buffers,
            since a kernel would copy a slice.
        first: how many at the front.
        start, stop: the newest ones.
        room: rows of the new arrays, at least; as many as there are if that is more.
        backend: see `choose_backend`. A kernel takes head sizes that are multiples of 8.
    """
    backend, room = choose_backend(backend), max(room, stop - start)
    D, Dv = keys.shape[3], values.shape[3]
    if backend == "reference" or D % 8 or Dv % 8 or keys.dtype != values.dtype:
        newest = tuple(resized(rows[:, :, start:stop], room) for rows in (keys, values))
        return Kept(newest, tuple(mx.contiguous(rows[:, :, :first]) for rows in (keys, values)) if first else None)
    run = _prepared(_KEEP, backend, keys.dtype, *keys.shape[:2], D, Dv, room, first)
    new_k, new_v, *rest = run([keys, values, ints(keys.shape[2], values.shape[2], start, stop - start)])
    return Kept((new_k, new_v), tuple(rest) if first else None)


def resized(array: mx.array, room: int) -> mx.array:
    """A new array (B, H, room, D) with the first rows of (B, H, T, D), zeros behind them if it is longer."""
    B, H, T, D = array.shape
    if room > T:
        return mx.concatenate([array, mx.zeros((B, H, room - T, D), array.dtype)], axis=2)
    return mx.contiguous(array[:, :, :room])  # a slice would keep all of the array alive


@lru_cache(maxsize=256)
def _prepared(kernel, backend, dtype, B, H, D, Dv, room, first):
    return kernel.prepare(
        backend,
        template=[
            *(("T", dtype), ("D", D), ("DV", Dv), ("ROOM", room), ("SINKS", first), ("PART", _PART)),
            ("THREADS", _THREADS),
        ],
        groups=(2 * -(-room // _PART), H, B),
        threads=_THREADS,
        output_shapes=[
            *((B, H, room, D), (B, H, room, Dv)),
            *(((B, H, first, D), (B, H, first, Dv)) if first else ((8,), (8,))),
        ],
        output_dtypes=[dtype] * 4,
    )
