"""Steps that only add a token: the same rows as the long way gives, and everything that must end them does."""

import copy
import math
from unittest import mock

import mlx.core as mx
import pytest
from attend_cases import BACKEND, UNSUPPORTED
from conftest import memory_in_use
from mlx_lm.models import llama

import mlx_turboquant
from mlx_turboquant import attention
from mlx_turboquant.binding import bind, unbind
from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cache.nonfinite import _Glance
from mlx_turboquant.cache.plain_steps import PlainSteps
from mlx_turboquant.ops import attend as ops

SCHEME = "turbo4:sinks=2,window=4,block=16"
HKV, D = 2, 64


def rows(count, seed):
    """Keys and values of so many tokens."""
    return [mx.random.normal((1, HKV, count, D), key=mx.random.key(2 * seed + i)).astype(mx.float16) for i in range(2)]


def the_long_way():
    """A context in which no step is a plain one."""
    return mock.patch.object(PlainSteps, "take", lambda *_: None)


def filled(tokens=40, steps=1, **how):
    """A cache after a prompt and some decode steps, of which the first one encodes."""
    cache = TurboQuantKVCache(SCHEME, **how)
    cache.update_and_fetch(*rows(tokens, 1))
    for step in range(steps):
        cache.update_and_fetch(*rows(1, 100 + step))
    return cache


def counted(kind, calls):
    """How many of so many calls, functions of nothing, were plain steps of a kind."""
    taken, take = [], kind.take

    def noted(self, *args):
        taken.append(take(self, *args))
        return taken[-1]

    with mock.patch.object(kind, "take", noted):
        for call in calls:
            call()
    return sum(found is not None for found in taken)


def plain_steps(cache, steps, seed=200):
    """How many of so many steps were plain from their start on: after others it is found out how many follow."""
    others, start = set(), PlainSteps.start
    for step in range(steps):
        with mock.patch.object(PlainSteps, "start", lambda *args, step=step: (others.add(step), start(*args))):
            cache.update_and_fetch(*rows(1, seed + step))
    return steps - len(others)


def same(a, b):
    """Whether two caches hold the same, bit for bit."""
    flat = [mlx_turboquant.cache.saved_state.pack(cache) for cache in (a, b)]
    arrays = [[x for part in state for x in leaves(part)] for state in flat]
    return len(arrays[0]) == len(arrays[1]) and all(
        mx.array_equal(x, y).item() if isinstance(x, mx.array) else x == y for x, y in zip(*arrays, strict=True)
    )


def leaves(part):
    if isinstance(part, (tuple, list)):
        for one in part:
            yield from leaves(one)
    else:
        yield part


@pytest.mark.parametrize("max_size", [None, 60])
def test_steps_leave_the_same_cache_and_the_same_rows(max_size):
    quick, slow = (filled(max_size=max_size) for _ in range(2))
    for step in range(90):
        new = rows(1, 300 + step)
        mine = quick.update_and_fetch(*new)
        with the_long_way():
            theirs = slow.update_and_fetch(*new)
        assert quick.offset == slow.offset and mine[0].lengths == theirs[0].lengths
        if step % 7 == 0:
            assert all(mx.array_equal(a.dense(), b.dense()) for a, b in zip(mine, theirs, strict=True))
        if step in (20, 55):
            for cache in (quick, slow):
                cache.trim(3 if max_size is None else 0)
    assert same(quick, slow)


def test_most_steps_are_plain():
    assert plain_steps(filled(), 160) == 160 * 15 // 16  # of 16 steps all but that which encodes


@pytest.mark.parametrize("ended_by", ["trim", "chunk", "tokens", "shape", "dtype"])
def test_what_ends_plain_steps(ended_by):
    cache = filled(steps=6)
    assert plain_steps(cache, 1) == 1
    if ended_by == "trim":
        cache.trim(1)
        assert plain_steps(cache, 1) == 0
    elif ended_by == "chunk":
        cache._chunk_ended = True  # what a prefill loop's reading of `state` does
        before = cache.block_tokens
        assert plain_steps(cache, 1) == 0 and cache.block_tokens == before
    elif ended_by == "tokens":
        cache.update_and_fetch(*rows(3, 5))
        assert cache.tail_tokens and plain_steps(cache, 1) == 1  # the next one is plain again
    else:
        keys, values = rows(1, 5)
        wrong = keys.astype(mx.float32) if ended_by == "dtype" else keys[..., :32]
        with pytest.raises(ValueError, match=r"holds keys of batch|must both be"):
            cache.update_and_fetch(wrong, values)


def test_an_unhooked_model_is_still_noticed():
    bind(llama)
    cache = filled(steps=6, module=llama.__name__)
    assert plain_steps(cache, 1) == 1
    unbind(llama)
    with pytest.raises(RuntimeError, match="cannot read compressed rows"):
        cache.update_and_fetch(*rows(1, 9))


def test_a_copy_goes_its_own_way():
    cache = filled(steps=6)
    other = copy.deepcopy(cache)
    first = rows(1, 7)
    cache.update_and_fetch(*first)
    other.update_and_fetch(*rows(1, 8))
    assert not same(cache, other)
    assert mx.array_equal(cache._tail[0].view()[:, :, -1:], first[0])


def test_nothing_of_a_forgotten_cache_stays():
    before = memory_in_use()
    cache = filled(tokens=4000, steps=6)
    attention.attend(mx.zeros((1, 4, 1, D), mx.float16), *cache.update_and_fetch(*rows(1, 1)), 0.1)
    mx.eval(cache.state)
    assert memory_in_use() - before > 400_000
    cache.trim(cache.offset)
    assert memory_in_use() - before < 100_000


@pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)
def test_a_reader_serves_until_the_blocks_change():
    cache = filled(steps=6)
    queries = mx.random.normal((1, 4, 1, D), key=mx.random.key(3)).astype(mx.float16)
    made, init = [], ops.Reader.__init__

    def noted(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    with mock.patch.object(ops.Reader, "__init__", noted):
        for step in range(40):
            keys, values = cache.update_and_fetch(*rows(1, 400 + step))
            fused = attention.attend(queries, keys, values, 0.125, backend=BACKEND)
            if step % 5 == 0:
                plain = attention.attend(queries, keys, values, 0.125, backend="reference")
                assert mx.allclose(fused, plain, atol=2e-3, rtol=2e-2)
    assert len(made) <= 3 * (40 // 16 + 1)


def strides(array):
    return memoryview(array).strides


@pytest.mark.parametrize("tokens", [19, 40, 300])
def test_every_array_that_a_kernel_reads_is_row_contiguous(tokens):
    """MLX copies any other layout before each call of a kernel: twice for each layer and step, it was for sinks."""
    cache = TurboQuantKVCache(SCHEME)
    cache.update_and_fetch(*rows(tokens, 1))
    for step in range(40):
        for side in cache.update_and_fetch(*rows(1, step)):
            if isinstance(side, mx.array):
                continue
            mx.eval(side.sinks, side.newest, *(array for array in side.stored if array is not None))
            for array in (side.sinks, side.newest, *side.stored):
                if array is not None:
                    sizes = [*array.shape[1:], 1]
                    wanted = [array.itemsize * math.prod(sizes[i:]) for i in range(4)]
                    assert all(a == b or n == 1 for a, b, n in zip(strides(array), wanted, array.shape, strict=True))


def test_layers_that_encode_in_one_step_are_read_once():
    layers = [TurboQuantKVCache(SCHEME, i) for i in range(5)]
    bad = rows(40, 1)
    bad[0][0, 1, 7, 3] = mx.nan
    bad[1][0, 0, 9, 5] = mx.inf
    reads, found = [], _Glance.found

    def counted(self):
        reads.append(self._answer is None)
        return found(self)

    with mock.patch.object(_Glance, "found", counted), pytest.warns(RuntimeWarning) as seen:
        for step in range(5):
            for i, cache in enumerate(layers):
                cache.update_and_fetch(*((bad if i == 3 else rows(40, i)) if step == 0 else rows(1, step)))
    assert [str(w.message).split(" tokens")[0] for w in seen] == ["[TurboQuantKVCache] layer 3: 2"]
    assert len(reads) == 5 and sum(reads) == 1
