"""Arrays that hold rows of several sequences, each from row 0 on, whatever the others' lengths."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_turboquant.ops.device_ints import device_ints
from mlx_turboquant.ops.keep_rows import resized


def write(array: mx.array, rows: mx.array, starts: Sequence[int], first: int = 0) -> None:
    """Write rows (b, H, L, D) into (B, H, T, D), each sequence's from its own start; the sequences from `first` on."""
    b, L = rows.shape[0], rows.shape[2]
    if len(set(starts)) == 1:
        array[first : first + b, :, starts[0] : starts[0] + L] = rows
        return
    sequence = mx.arange(first, first + b)[:, None]
    array[sequence, :, device_ints(starts)[:, None] + mx.arange(L)] = rows.swapaxes(1, 2)


def moved_up(array: mx.array, starts: Sequence[int], room: int) -> mx.array:
    """A new array (B, H, room, D) of each sequence's rows from its start on; what is read beyond the end is no row."""
    rows = device_ints(starts)[:, None] + mx.arange(room)
    rows = mx.minimum(rows, array.shape[2] - 1)
    return mx.take_along_axis(array, rows[:, None, :, None], axis=2)


def without(array: mx.array, first: int, counts: Sequence[int]) -> mx.array:
    """A new array of the same size in which so many rows of each sequence from row `first` on are left out."""
    rows = mx.arange(array.shape[2])
    rows = mx.where(rows < first, rows, rows + device_ints(counts)[:, None])
    return mx.take_along_axis(array, mx.minimum(rows, array.shape[2] - 1)[:, None, :, None], axis=2)


def chosen(array: mx.array, sequences: Sequence[int], room: int) -> mx.array:
    """A new array with the first `room` rows of some sequences."""
    return mx.take(array[:, :, :room], device_ints(sequences), axis=0)


def stacked(parts: Sequence[tuple[int, mx.array | None]], room: int) -> mx.array | None:
    """(sequences, their array or None) one below the other, all with `room` rows; None if no part has an array."""
    some = next((array for _, array in parts if array is not None), None)
    if some is None:
        return None
    _, H, _, D = some.shape
    return mx.concatenate(
        [mx.zeros((count, H, room, D), some.dtype) if array is None else resized(array, room) for count, array in parts]
    )
