"""Steps of a batch that only add tokens: the same rows as the long way gives; and what must end them does."""

import copy
from unittest import mock

import mlx.core as mx
import pytest
from attend_cases import BACKEND, UNSUPPORTED
from conftest import memory_in_use
from test_plain_steps import HKV, SCHEME, D, counted, rows

from mlx_turboquant import attention
from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cache.plain_batch_steps import PlainBatchSteps
from mlx_turboquant.ops import attend as ops


def the_long_way():
    """A context in which no step is a plain one."""
    return mock.patch.object(PlainBatchSteps, "take", lambda *_: None)


def tokens(count, seed):
    """Keys and values of one token for each of so many sequences."""
    return [mx.concatenate(side) for side in zip(*(rows(1, 50 * seed + i) for i in range(count)), strict=True)]


def batch_of(lengths, **how):
    singles = []
    for i, length in enumerate(lengths):
        cache = TurboQuantKVCache(SCHEME, **how)
        cache.update_and_fetch(*rows(length, i))
        cache.update_and_fetch(*rows(1, 90 + i))
        singles.append(cache)
    return TurboQuantKVCache.merge(singles)


def plain_steps(batch, steps, seed=20):
    """How many of so many steps were plain."""
    count = len(batch._rows.lengths)
    return counted(
        PlainBatchSteps, [lambda i=i: batch.update_and_fetch(*tokens(count, seed + i)) for i in range(steps)]
    )


def same(a, b):
    """Whether two batches hold the same rows, bit for bit, as far as they are valid."""
    if a._rows.lengths != b._rows.lengths or a._rows.dropped != b._rows.dropped:
        return False
    for i in range(len(a._rows.lengths)):
        pair = [batch.extract(i).keys_and_values() for batch in (a, b)]
        for mine, theirs in zip(*pair, strict=True):
            mine, theirs = (x if isinstance(x, mx.array) else x.dense() for x in (mine, theirs))
            if not mx.array_equal(mine, theirs):
                return False
    return True


@pytest.mark.parametrize("lengths", [(40, 40, 40), (3, 25, 60, 17)])
@pytest.mark.parametrize("max_size", [None, 64])
def test_steps_leave_the_same_batch_and_the_same_rows(lengths, max_size):
    quick, slow = (batch_of(lengths, max_size=max_size) for _ in range(2))
    for step in range(60):
        new = tokens(len(quick._rows.lengths), step)
        mine = quick.update_and_fetch(*new)
        with the_long_way():
            theirs = slow.update_and_fetch(*new)
        assert mine[0].lengths == theirs[0].lengths and mine[0].shape == theirs[0].shape
        if step == 25:
            for batch in (quick, slow):
                batch.filter([2, 0])
        if step == 40:
            for batch in (quick, slow):
                batch.extend(batch_of((31,), max_size=max_size))
        if step == 50 and max_size is None:
            for batch in (quick, slow):
                batch.trim(2)
        if step % 10 == 9:
            assert same(quick, slow)
    assert same(quick, slow)


def test_most_steps_are_plain_where_all_are_alike_and_some_where_not():
    assert plain_steps(batch_of((40, 40, 40)), 96) >= 96 * 12 // 16
    assert plain_steps(batch_of((40, 44, 48)), 96) >= 96 * 5 // 16


@pytest.mark.parametrize("ended_by", ["filter", "chunk", "shape", "count"])
def test_what_ends_plain_steps(ended_by):
    batch = batch_of((40, 30))
    plain_steps(batch, 3)
    assert plain_steps(batch, 1) == 1
    if ended_by == "filter":
        batch.filter([1])
        assert plain_steps(batch, 1) == 0 and plain_steps(batch, 1) == 1
    elif ended_by == "chunk":
        batch._chunk_ended = True  # what a prefill loop's reading of `state` does
        assert plain_steps(batch, 1) == 0
    else:
        keys, values = tokens(3 if ended_by == "count" else 2, 1)
        with pytest.raises(ValueError, match="holds"):
            batch.update_and_fetch(keys, values if ended_by == "count" else values[..., :32])


def test_a_copy_goes_its_own_way():
    batch = batch_of((40, 30))
    plain_steps(batch, 4)
    other = copy.deepcopy(batch)
    batch.update_and_fetch(*tokens(2, 1))
    other.update_and_fetch(*tokens(2, 2))
    assert not same(batch, other) and batch._rows.lengths == other._rows.lengths


def test_nothing_of_sequences_that_left_stays():
    before = memory_in_use()
    batch = batch_of((3000, 2000))
    for step in range(5):
        attention.attend(mx.zeros((2, 4, 1, D), mx.float16), *batch.update_and_fetch(*tokens(2, step)), 0.1)
    mx.eval(batch.state)
    held = memory_in_use() - before
    batch.filter([1])
    mx.eval(batch.state)
    assert held > 400_000 and memory_in_use() - before < 0.6 * held


@pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)
def test_a_reader_serves_until_the_blocks_change():
    batch = batch_of((40, 25))
    queries = mx.random.normal((2, 2 * HKV, 1, D), key=mx.random.key(3)).astype(mx.float16)
    made, init = [], ops.Reader.__init__

    def noted(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    with mock.patch.object(ops.Reader, "__init__", noted):
        for step in range(20):
            keys, values = batch.update_and_fetch(*tokens(2, step))
            fused = attention.attend(queries, keys, values, 0.125, backend=BACKEND)
            if step % 5 == 0:
                plain = attention.attend(queries, keys, values, 0.125, backend="reference")
                assert mx.allclose(fused, plain, atol=2e-3, rtol=2e-2)
    assert len(made) < 15
