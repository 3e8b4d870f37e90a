"""Decode steps of a batch that only add a token to each tail: see `plain_steps`, which does it for one sequence."""

from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlx_turboquant.cache.plain_steps import Steps
from mlx_turboquant.cache.ragged_store import Length
from mlx_turboquant.cache.schedule import until_due
from mlx_turboquant.ops.device_ints import advancing_ints
from mlx_turboquant.tensor import RaggedRows


class PlainBatchSteps(Steps):
    """The next steps of a `BatchTurboQuantKVCache` in which nothing is encoded, dropped or undone.

    With 8 sequences a step takes 30 to 50 us of Python for each layer instead of 200.
    """

    def stop(self) -> None:
        """Forget everything, see `Steps`."""
        super().stop()
        self._lengths: list[Length] | None = None  # the store's list after the last step: every change makes a new one

    def start(self, batch: Any) -> None:
        """Find out how many plain steps follow, after a decode step that was not."""
        rows, scheme = batch._rows, batch.scheme
        if rows.blocks is None or not batch._decoding or batch._padding is not None:
            return
        left = min(until_due(scheme, length.tail, length.packed == 0) for length in rows.lengths)
        left = min(left, rows.tail[0].shape[2] - max(length.tail for length in rows.lengths))
        if batch.max_size is not None:
            left = min(left, batch.max_size - max(rows.tokens))
        if left <= 0:
            return
        self._lengths = rows.lengths
        self._begin(left, rows.tail, zip(rows.sinks or (None, None), rows.blocks, batch._quantizers, strict=True))

    def take(self, batch: Any, keys: mx.array, values: mx.array) -> tuple[RaggedRows, RaggedRows] | None:
        """All rows after one more token of each sequence; None if this is no plain step, and nothing was done."""
        rows = batch._rows
        if rows.lengths is not self._lengths or not self._is_next(batch, keys, values):
            return None
        self._left -= 1
        batch._queries.forget_newest()
        self._report(batch)
        where, lengths, listed = _one_more(tuple(rows.lengths))
        rows.tail = [_with_token(tail, new, where) for tail, new in zip(rows.tail, (keys, values), strict=True)]
        rows.lengths = self._lengths = listed
        return tuple(
            RaggedRows(sinks, blocks, tail, lengths, quantizer, batch.scheme.block, self.readers)
            for (sinks, blocks, quantizer), tail in zip(self._sides, rows.tail, strict=True)
        )


@lru_cache(maxsize=16)  # all layers of a step share it
def _one_more(lengths: tuple[Length, ...]) -> tuple[int | mx.array, tuple[Length, ...], list[Length]]:
    """The rows of the next tokens, one number if all are alike or (B, 1, 1, 1); the lengths with them, twice."""
    starts = [length.tail for length in lengths]
    longer = tuple(Length(sinks, packed, tail + 1) for sinks, packed, tail in lengths)
    if len(set(starts)) == 1:
        return starts[0], longer, list(longer)
    return advancing_ints(starts).reshape(-1, 1, 1, 1), longer, list(longer)


def _with_token(tail: mx.array, new: mx.array, where: int | mx.array) -> mx.array:
    if isinstance(where, mx.array):
        return mx.put_along_axis(tail, where, new, axis=2)
    tail[:, :, where : where + 1] = new
    return tail
