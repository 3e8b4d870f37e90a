"""Decode steps that only add a token to a tail: what is the same in all of them until the next encoding, made once."""

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx

from mlx_turboquant.binding import is_bound
from mlx_turboquant.cache.schedule import until_due
from mlx_turboquant.tensor import CompressedRows


class Steps:
    """How many plain steps follow, and what they have in common.

    Attributes:
        readers: of the stored rows, see `CompressedRows`.
    """

    def __init__(self) -> None:
        self.readers: dict[str | None, Any] = {}
        self._joined = False  # whether what read the rows last would have taken another token beside the tail
        self.stop()

    def __deepcopy__(self, memo: dict) -> "Steps":
        return type(self)()  # a copy of the cache has arrays of its own

    def stop(self) -> None:
        """Forget everything: what the cache holds changes in another way than by a token of each sequence."""
        if self.readers:
            self._joined = all(reader.joins for reader in self.readers.values())
        self.readers = {}
        self._left = 0
        self._form: tuple = ()
        self._sides: list[tuple] = []

    def _begin(self, left: int, tails: Sequence[mx.array], sides: Iterable[tuple]) -> None:
        """So many steps follow, each with a row for both tails."""
        shapes = [(*tail.shape[:2], 1, tail.shape[3]) for tail in tails]
        self._left, self._form, self._sides = left, (*shapes, *(tail.dtype for tail in tails)), list(sides)

    def _is_next(self, cache: Any, keys: mx.array, values: mx.array) -> bool:
        """Whether the next plain step is this one, of a cache whose prompt is read and that was not trimmed."""
        if self._left == 0 or (keys.shape, values.shape, keys.dtype, values.dtype) != self._form:
            return False
        return not (cache._chunk_ended or cache._trimmed)

    @staticmethod
    def _report(cache: Any) -> None:
        """Warn of what an encoding before found, once its time has come."""
        if cache._nonfinite.is_open:
            cache._nonfinite.step(cache.layer)


class PlainSteps(Steps):
    """The next steps of a `TurboQuantKVCache` in which nothing is encoded, dropped or undone.

    A GPU that decodes with a short cache waits for Python: everything that a cache asks itself in a step took 60 us,
    for each layer, and in these steps the answers are known.
    """

    def start(self, cache: Any) -> None:
        """Find out how many plain steps follow."""
        if cache._blocks is None or cache._undo:
            return
        tails = cache._tail
        arrays = [rows.array for rows in tails]
        left = min(until_due(cache.scheme, tails[0].length, False), arrays[0].shape[2] - tails[0].length)
        if cache.max_size is not None:
            left = min(left, cache.max_size - cache.size())
        if left <= 0:
            return
        sinks = cache._sinks or (None, None)
        sides = (
            (rows, first, blocks.stored(), blocks.length, quantizer, cache.scheme.block)
            for rows, first, blocks, quantizer in zip(tails, sinks, cache._blocks, cache._quantizers, strict=True)
        )
        self._begin(left, arrays, sides)

    def take(self, cache: Any, keys: mx.array, values: mx.array) -> tuple[CompressedRows, CompressedRows] | None:
        """All rows after one more token; None if this is no plain step, and nothing was done."""
        if not self._is_next(cache, keys, values) or (cache.module and not is_bound(cache.module)):
            return None
        self._left -= 1
        self._report(cache)
        readers = self.readers
        joins = all(reader.joins for reader in readers.values()) if readers else self._joined
        add = _put_beside if joins else _write
        return tuple(add(new, *side, readers) for new, side in zip((keys, values), self._sides, strict=True))


def _write(new, tail, sinks, stored, length, quantizer, block, readers) -> CompressedRows:
    n = tail.length
    tail.array[:, :, n : n + 1] = new
    tail.length = n + 1
    return CompressedRows(sinks, stored, length, tail.array, n + 1, quantizer, block, readers)


def _put_beside(new, tail, sinks, stored, length, quantizer, block, readers) -> CompressedRows:
    """The same where what reads the rows also adds the new one to them."""
    return CompressedRows(sinks, stored, length, tail.beside(new), tail.length, quantizer, block, readers)
