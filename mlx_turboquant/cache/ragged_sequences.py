"""Single caches into a batch and out of it again; whether two batches may be one, and what they learned, joined."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_turboquant.cache.buffers import PackedBuffer
from mlx_turboquant.cache.ragged_store import Length
from mlx_turboquant.cache.raw_layer import RawLayerCache
from mlx_turboquant.cache.schedule import tail_room
from mlx_turboquant.cache.two_phase import TurboQuantKVCache
from mlx_turboquant.quantizers import make_quantizers


def batch_of_one(kind: type, cache: Any) -> Any:
    """A batch of class `kind` with the one sequence of a single cache.

    Raises:
        ValueError: if the cache is of another kind, or holds several sequences.
    """
    if isinstance(cache, RawLayerCache):
        batch = kind("fp16", getattr(cache, "layer", None), sequences=1)
        rows = None if cache.empty() else [mx.array(array[:, :, : cache.offset]) for array in cache.keys_and_values()]
        if rows is not None:
            _one_sequence(rows[0])
            batch._rows.lengths = [Length(0, 0, cache.offset)]
            batch._rows.tail = rows
            batch._make_quantizers(*rows)
        return batch
    if not isinstance(cache, TurboQuantKVCache):
        raise ValueError(
            f"[BatchTurboQuantKVCache] Only a TurboQuantKVCache can be merged, got {type(cache).__name__}. Make all "
            "caches of a batch with make_prompt_cache and the same kv_scheme."
        )
    batch = kind(cache.scheme, cache.layer, cache.module, cache.fingerprint, cache.max_size, sequences=1)
    batch._chunk_ended = cache._chunk_ended
    batch._nonfinite.take_in([cache._nonfinite])
    batch._rows.dropped = [cache._dropped]
    if cache._tail[0].array is None:
        return batch
    _one_sequence(cache._tail[0].array)
    batch._rows.lengths = [Length(cache.sink_tokens, cache.block_tokens, cache.tail_tokens)]
    batch._rows.tail = [mx.array(rows.array) for rows in cache._tail]
    batch._rows.sinks = None if cache._sinks is None else [mx.array(rows) for rows in cache._sinks]
    if cache._blocks is not None:
        batch._rows.blocks = [blocks.stored().map(mx.array) for blocks in cache._blocks]
    batch._quantizers = cache._quantizers
    batch._fitted = [cache._blocks is not None]
    batch._queries.sums = cache._queries.sums
    return batch


def extracted(batch: Any, index: int) -> Any:
    """The single cache of one sequence of a batch, with arrays of its own."""
    one = slice(index, index + 1)
    sinks, packed, tail = batch._rows.lengths[index]
    if batch.scheme.method == "fp16":
        return _raw_layer(batch, one, tail)
    cache = TurboQuantKVCache(batch.scheme, batch.layer, batch.module, batch.fingerprint, batch.max_size)
    if batch._rows.tail is None or sinks + packed + tail == 0:
        return cache
    keys, values = batch._rows.tail
    cache._quantizers = make_quantizers(batch.scheme, keys.shape[3], values.shape[3], keys.dtype)
    if batch._fitted[index]:
        for quantizer, held in zip(cache._quantizers, batch._quantizers, strict=True):
            quantizer.learned = held.sequences(one).learned
    cache._chunk_ended, cache._dropped = batch._chunk_ended, batch._rows.dropped[index]
    if batch._queries.sums is not None:
        cache._queries.sums = batch._queries.sums[one]
    room = tail_room(batch.scheme) if packed else 0
    for rows, held in zip(cache._tail, batch._rows.tail, strict=True):
        rows.append(held[one, :, :tail], room)
    if packed:
        if sinks:
            cache._sinks = tuple(mx.contiguous(held[one, :, :sinks]) for held in batch._rows.sinks)
        cache._blocks = tuple(PackedBuffer(batch.scheme.block) for _ in range(2))
        for blocks, held in zip(cache._blocks, batch._rows.blocks, strict=True):
            blocks.append(held.map(lambda array: array[one]).rows(0, packed, batch.scheme.block))
    return cache


def same_kind(first: Any, other: Any) -> None:
    """Refuse to put two batches together that store different things.

    Raises:
        ValueError: naming both schemes, models, layers or shapes.
    """
    for what, a, b in (
        ("scheme", first.scheme.full_text(), other.scheme.full_text()),
        ("model", first.fingerprint or None, other.fingerprint or None),
        ("layer", first.layer, other.layer),
        ("max_kv_size", str(first.max_size), str(other.max_size)),
        ("shape", _shape(first), _shape(other)),
    ):
        if a != b and None not in (a, b):
            raise ValueError(
                f"[BatchTurboQuantKVCache] Caches of one batch must have the same {what}, got {a} and {b}. Make them "
                "with the same model and kv_scheme."
            )


def all_learned(parts: Sequence[Any], counts: Sequence[int], side: int) -> list[mx.array] | None:
    """What the quantizers of one side of several batches learned, one below the other."""
    held = [None if part._quantizers is None else part._quantizers[side].learned for part in parts]
    some = next((arrays for arrays in held if arrays is not None), None)
    if some is None:
        return None
    return [joined(counts, [arrays and arrays[i] for arrays in held], 1) for i in range(len(some))]


def joined(counts: Sequence[int], arrays: Sequence[mx.array | None], missing: int) -> mx.array | None:
    """Arrays (count, Hkv, ..) one below the other, with a number where one is missing; None if all are."""
    some = next((array for array in arrays if array is not None), None)
    if some is None:
        return None
    filled = [
        mx.full((n, *some.shape[1:]), missing, some.dtype) if a is None else a
        for n, a in zip(counts, arrays, strict=True)
    ]
    return mx.concatenate(filled)


def _shape(batch: Any) -> tuple | None:
    if batch._rows.tail is None:
        return None
    keys, values = batch._rows.tail
    return keys.shape[1], keys.shape[3], values.shape[3], str(keys.dtype)


def _raw_layer(batch: Any, one: slice, tokens: int) -> RawLayerCache:
    cache = RawLayerCache(batch.layer)
    if batch._rows.tail is not None and tokens:
        cache.keys, cache.values = (mx.contiguous(rows[one, :, :tokens]) for rows in batch._rows.tail)
        cache.offset = tokens
    return cache


def _one_sequence(rows: mx.array) -> None:
    if rows.shape[0] != 1:
        raise ValueError(
            f"[BatchTurboQuantKVCache] Each cache to merge must hold one sequence, got one of {rows.shape[0]}."
        )
