"""Rewinds that went wrong: what is held afterwards is every token in its place, once, and what was seen is told."""

import mlx.core as mx
import pytest
from cache_machine import parts_of

from mlx_turboquant.cache import TurboQuantKVCache

RAW = "turbo0v0:block=16,window=4,sinks=2"


def rows(start, stop):
    """Keys and values (1, 1, stop - start, 16) that say which position they are of."""
    keys = mx.broadcast_to(mx.arange(start, stop, dtype=mx.float32)[:, None], (stop - start, 16))[None, None]
    return keys, -keys


def positions(cache):
    """The positions that a cache of such rows holds, the same for keys and values."""
    keys, values = ([int(k) for k in side[0, :, 0]] for side in parts_of(cache))
    assert keys == [-v for v in values]
    return keys


@pytest.mark.parametrize("back", [1, 5, 23, 24, 25, 40, 60])
def test_a_rewind_to_long_before_an_encoding_inside_the_last_call(back):
    """It left a tail of less than no rows, and the blocks as they were."""
    cache = TurboQuantKVCache(RAW)
    cache.update_and_fetch(*rows(0, 68))
    cache.update_and_fetch(*rows(68, 69))
    cache.trim(0)
    cache.update_and_fetch(*rows(69, 75))
    assert len(cache._undo) == 1 and cache.block_tokens == 64
    cache.trim(back)
    assert (cache.offset, cache.size(), positions(cache)) == (75 - back, 75 - back, list(range(75 - back)))
    assert cache.tail_tokens >= 0


def test_what_a_bound_dropped_since_is_not_brought_back_by_a_rewind():
    """Compressed by hand after a call that crossed a block's end, and trimmed: tokens stood there twice."""
    cache = TurboQuantKVCache(RAW, max_size=55)
    cache.update_and_fetch(*rows(0, 46))
    cache.update_and_fetch(*rows(46, 47))
    cache.trim(0)
    cache.update_and_fetch(*rows(47, 55))
    assert len(cache._undo) == 1
    cache.compress()
    assert cache._dropped == 16
    cache.trim(2)
    assert cache.offset == 53 and positions(cache) == [0, 1, *range(18, 53)]


def test_a_batch_that_is_trimmed_to_nothing_forgets_what_its_queries_weighed():
    """As a single cache does: another prompt's queries weighed on the balance of the next."""
    batch = TurboQuantKVCache.merge([TurboQuantKVCache("turbo4"), TurboQuantKVCache("turbo4")])
    batch.update_and_fetch(*(mx.concatenate([side] * 2) for side in rows(0, 20)))
    batch.observe_queries(mx.ones((2, 1, 20, 16)))
    assert mx.all(batch._queries.sums == 20)
    assert batch.trim(20) == 20 and batch.empty()
    assert batch._queries.sums is None or not mx.any(batch._queries.sums)


def test_a_batch_does_not_go_back_to_what_a_bound_dropped():
    """A raw sequence's tail is as long as all that it holds, its sinks included."""
    single = TurboQuantKVCache(RAW, max_size=48)
    for start in range(0, 90, 30):
        single.update_and_fetch(*rows(start, start + 30))
    assert single._dropped and not single.block_tokens
    batch = TurboQuantKVCache.merge([single])
    held = batch.size()
    for cache in (single, batch):
        with pytest.raises(ValueError, match="cannot go back to"):
            cache.trim(held - 2)
    assert batch.size() == held and batch.trim(held - 3) == held - 3 and batch.extract(0).offset == single._dropped + 3


def with_nan(start, stop, bad, sequences=1):
    """Rows of which some tokens have a NaN, in the last of so many sequences."""
    keys, values = (mx.concatenate([side] * sequences) for side in rows(start, stop))
    keys[-1, :, mx.array(bad) - start, 3] = mx.nan
    return keys, values


def steps(cache, start, stop, sequences):
    for n in range(start, stop):
        cache.update_and_fetch(*(mx.concatenate([side] * sequences) for side in rows(n, n + 1)))


@pytest.mark.parametrize("n", [1, 12, 30])
def test_a_batch_that_is_trimmed_still_warns_of_what_it_encoded(n):
    """By 12 a block is cut: sequences are trimmed one by one and joined again, and the warning was lost on the way."""
    batch = TurboQuantKVCache.merge([TurboQuantKVCache("turbo4:block=16,window=4,sinks=2", layer=5) for _ in range(2)])
    batch.update_and_fetch(*with_nan(0, 40, [5, 9], sequences=2))
    steps(batch, 40, 41, 2)
    assert batch._rows.lengths[0].packed == 32
    batch.trim(n)
    assert batch.offset.tolist() == [41 - n] * 2
    with pytest.warns(RuntimeWarning, match="layer 5: 2 tokens had NaN or Inf"):
        steps(batch, 41 - n, 44 - n, 2)


@pytest.mark.parametrize("joined", ["merged", "joining", "joined"])
def test_what_joins_a_batch_still_warns_of_what_it_encoded(joined):
    """Encoded on its own just before it was merged, and as the part of a batch that another joins or that joins."""
    single, other = (TurboQuantKVCache("turbo4:block=16,window=4,sinks=2", layer=5) for _ in range(2))
    single.update_and_fetch(*with_nan(0, 40, [5, 9]))
    assert single.compress() == 32
    if joined == "merged":
        batch = TurboQuantKVCache.merge([other, single])
    else:
        parts = [TurboQuantKVCache.merge([cache]) for cache in (single, other)]
        batch, joining = parts if joined == "joined" else parts[::-1]
        batch.extend(joining)
    with pytest.warns(RuntimeWarning, match="layer 5: 2 tokens had NaN or Inf") as told:
        steps(batch, 40, 43, 2)
    assert len(told) == 1


def test_a_batch_taken_apart_by_a_rewind_still_decodes():
    """What joins after it is encoded before the next step, as beside a batch that was not taken apart."""
    batch = TurboQuantKVCache.merge([TurboQuantKVCache(RAW) for _ in range(2)])
    batch.update_and_fetch(*(mx.concatenate([side] * 2) for side in rows(0, 40)))
    steps(batch, 40, 41, 2)
    batch.trim(12)
    joining = TurboQuantKVCache.merge([TurboQuantKVCache(RAW)])
    joining.update_and_fetch(*rows(0, 40))
    exec("joining.state", {"__name__": "mlx_lm.generate", "joining": joining})  # so its next token is the prompt's last
    steps(joining, 40, 41, 1)
    assert batch._rows.lengths[0].packed == 16 and joining._rows.lengths[0].packed == 0
    batch.extend(joining)
    assert [length.packed for length in batch._rows.lengths] == [16, 16, 32]


def test_what_is_unread_leaves_no_trace_even_if_it_was_all():
    """Its queries were counted at the end of the chunk before it, and an emptied cache said that a chunk had ended."""
    cache = TurboQuantKVCache("turbo4")
    for start, stop in ((0, 9), (9, 17)):
        cache.update_and_fetch(*rows(start, stop))
        cache.observe_queries(mx.ones((1, 1, stop - start, 16)))
    cache.unread(8)
    cache.end_chunk()
    assert cache.offset == 9 and positions(cache) == list(range(9)) and mx.all(cache._queries.sums == 9)
    cache.unread(9)
    assert cache.empty() and not cache._chunk_ended and cache._queries.sums is None
