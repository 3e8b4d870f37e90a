"""Decode steps that only add a token to a tail: what is the same in all of them until the next encoding, made once."""

from typing import Any

import mlx.core as mx

from mlx_turboquant.binding import is_bound
from mlx_turboquant.cache.schedule import until_due
from mlx_turboquant.tensor import CompressedRows


class PlainSteps:
    """The next steps of a `TurboQuantKVCache` in which nothing is encoded, dropped, undone or reported.

    A GPU that decodes with a short cache waits for Python: everything that a cache asks itself in a step took 60 us,
    for each layer, and in these steps the answers are known.

    Attributes:
        readers: of the stored rows, see `CompressedRows`.
    """

    def __init__(self) -> None:
        self.stop()

    def __deepcopy__(self, memo: dict) -> "PlainSteps":
        return PlainSteps()  # a copy of the cache has arrays of its own

    def stop(self) -> None:
        """Forget everything: what the cache holds changes in another way than by a token."""
        self.readers: dict[str | None, Any] = {}
        self._left = 0
        self._form: tuple = ()
        self._sides: list[tuple] = []

    def start(self, cache: Any) -> None:
        """Find out how many plain steps follow, after one that was not."""
        if cache._blocks is None or cache._undo or cache._nonfinite.is_open:
            return
        tails = cache._tail
        left = min(until_due(cache.scheme, tails[0].length, False), tails[0].array.shape[2] - tails[0].length)
        if cache.max_size is not None:
            left = min(left, cache.max_size - cache.size())
        if left <= 0:
            return
        shapes = [(*rows.array.shape[:2], 1, rows.array.shape[3]) for rows in tails]
        self._left, self._form = left, (*shapes, tails[0].array.dtype, tails[1].array.dtype)
        sinks = cache._sinks or (None, None)
        self._sides = [
            (rows, first, blocks.stored(), blocks.length, quantizer, cache.scheme.block)
            for rows, first, blocks, quantizer in zip(tails, sinks, cache._blocks, cache._quantizers, strict=True)
        ]

    def take(self, cache: Any, keys: mx.array, values: mx.array) -> tuple[CompressedRows, CompressedRows] | None:
        """All rows after one more token; None if this is no plain step, and nothing was done."""
        if self._left == 0 or (keys.shape, values.shape, keys.dtype, values.dtype) != self._form:
            return None
        if cache._chunk_ended or cache._trimmed or (cache.module and not is_bound(cache.module)):
            return None
        self._left -= 1
        return tuple(
            _with_token(new, *side, self.readers) for new, side in zip((keys, values), self._sides, strict=True)
        )


def _with_token(new, tail, sinks, stored, length, quantizer, block, readers) -> CompressedRows:
    n = tail.length
    tail.array[:, :, n : n + 1] = new
    tail.length = n + 1
    return CompressedRows(sinks, stored, length, tail.array, n + 1, quantizer, block, readers)
