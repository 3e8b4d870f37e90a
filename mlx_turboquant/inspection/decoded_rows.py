"""The keys and values that a cache's rows stand for, decoded a piece at a time."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.tensor import CompressedRows

PIECE_NUMBERS = 1 << 22  # decoded at a time: 16 MiB in float32


class _Run(NamedTuple):
    """Neighbouring tokens: how many, how many are decoded together, numbers per token, and rows from start to stop."""

    tokens: int
    step: int
    numbers: int
    take: Callable[[int, int], mx.array]


def has_plain_rows(cache: Any) -> bool:
    """Whether an mlx-lm cache holds keys and values as two arrays, without padding."""
    plain = isinstance(cache, (KVCache, RotatingKVCache, ConcatenateKVCache))
    return plain and isinstance(cache.keys, mx.array) and cache.keys.ndim == 4


def decoded_rows(cache: Any) -> tuple[Iterator[mx.array], Iterator[mx.array]] | None:
    """The keys and the values of one layer, (B, Hkv, t, D) each in the model's dtype, in pieces of 4 million numbers.

    The order of the tokens is the order in which they are stored. None for a cache that is empty or of another kind:
    recurrent states, lists of caches, padded batches.
    """
    if isinstance(cache, TurboQuantKVCache):
        sides = None if cache.empty() else [_runs(rows) for rows in cache.keys_and_values()]
    elif isinstance(cache, QuantizedKVCache):
        sides = None if cache.empty() else [[_of_mlx_lm(cache, side)] for side in (cache.keys, cache.values)]
    else:
        sides = [_runs(rows) for rows in cache.keys_and_values()] if has_plain_rows(cache) else None
    return None if sides is None else tuple(map(_pieces, sides))


def _runs(rows: mx.array | CompressedRows) -> list[_Run]:
    B, H, T, D = rows.shape
    if isinstance(rows, mx.array):
        return [_Run(T, 1, B * H * D, lambda start, stop: rows[:, :, start:stop])]

    def decode(start: int, stop: int) -> mx.array:
        return rows.quantizer.decode(rows.stored, start, stop)

    raw = [_runs(part)[0] for part in (rows.sinks, rows.tail) if part is not None]
    return [*raw, _Run(rows.stored_length, rows.block, B * H * D, decode)]


def _of_mlx_lm(cache: QuantizedKVCache, side: list[mx.array]) -> _Run:
    def decode(start: int, stop: int) -> mx.array:
        return mx.dequantize(*(part[:, :, start:stop] for part in side), cache.group_size, cache.bits)

    B, H, _, groups = side[1].shape
    return _Run(cache.offset, 1, B * H * groups * cache.group_size, decode)


def _pieces(runs: list[_Run]) -> Iterator[mx.array]:
    for tokens, step, numbers, take in runs:
        piece = max(PIECE_NUMBERS // (numbers * step), 1) * step
        for start in range(0, tokens, piece):
            yield take(start, min(start + piece, tokens))
