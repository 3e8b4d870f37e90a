"""Rewinds that went wrong, each found by `test_stateful`: what is held afterwards is every token in its place, once."""

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
