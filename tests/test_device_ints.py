"""Integers that a GPU reads: right, made once, and never in an array that MLX's CUDA backend would have to wait for."""

import threading
from unittest import mock

import kernel_emulator  # noqa: F401  (registers the backend)
import mlx.core as mx
import numpy as np
import pytest

from mlx_turboquant import attention
from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cache.query_moments import _sums_over
from mlx_turboquant.ops import attend as ops
from mlx_turboquant.ops import device_ints as module
from mlx_turboquant.ops.attend_plan import Shape
from mlx_turboquant.ops.device_ints import advancing_ints, device_ints, ints
from mlx_turboquant.tail_parts import FEW

SMALL = 8  # bytes of MLX's pool


@pytest.mark.parametrize("numbers", [(7,), (1, -2), (1, 2, 3), tuple(range(-3, 14)), (2**31 - 1, -1)])
def test_numbers_are_as_given(numbers):
    for made in (device_ints(numbers), device_ints(list(numbers))):
        assert made.dtype == mx.int32 and made.tolist() == list(numbers)
    assert ints(*numbers).tolist() == [*numbers, *[0] * (8 - len(numbers))]
    assert advancing_ints(numbers[:3]).tolist() == list(numbers[:3])


@pytest.fixture
def written():
    """Bytes of every array that is made of the CPU's numbers."""
    seen, real = [], mx.array

    class Noting:
        """mx.array, which is a type as well."""

        def __call__(self, values, *rest):
            made = real(values, *rest)
            if not isinstance(values, real):
                seen.append(made.nbytes)
            return made

        def __instancecheck__(self, other):
            return isinstance(other, real)

    for kept in (module._joined, module._advanced, ops._sizes_of_steps, ops._growth, ops._prepare):
        kept.cache_clear()
    with mock.patch.object(mx, "array", Noting()):
        yield seen


def test_no_array_is_larger_than_the_pool_takes(written):
    device_ints(range(100))
    ints(1, 2, 3)
    advancing_ints((5, 9, 11))
    assert written and max(written) <= SMALL


def test_a_batch_of_unequal_lengths_writes_none_either(written):
    """Masks of raw steps, what is learned from padded prompts, sequences that leave."""
    cache = TurboQuantKVCache("turbo4").merge([TurboQuantKVCache("turbo4") for _ in range(4)])
    cache.prepare(lengths=[90, 80, 70, 60], right_padding=[0, 10, 20, 30])
    keys = mx.random.normal((4, 1, 90, 64), key=mx.random.key(0)).astype(mx.float16)
    rows = cache.update_and_fetch(keys, keys)
    attention._within_lengths.cache_clear()
    written.clear()  # the tables of the quantizers
    sums = _sums_over(keys, 1, "squares", [90, 80, 70, 60])
    mask = attention._within_lengths((90, 80, 70, 60), 1, causal=False)
    cache.finalize()
    cache.filter([3, 0, 2])
    assert cache.offset.tolist() == [60, 90, 70] and rows[0].shape[2] == 90
    assert mask.sum(axis=(1, 2, 3)).tolist() == [90, 80, 70, 60]
    wanted = [np.square(np.array(keys[b, 0, :n], np.float64)).sum(axis=0) for b, n in enumerate((90, 80, 70, 60))]
    assert np.allclose(np.array(sums)[:, 0], wanted, rtol=1e-5)
    assert written and max(written) <= SMALL


def prepared(tail, beside, sequences=((4, 128),), queries=1):
    shape = Shape("emulator", 0, 0, 0, 0, 2, 64, mx.float16, 4, 4, 1, 1, True, True, 0, False, False)
    lengths = tuple((sinks, packed, tail + 3 * i) for i, (sinks, packed) in enumerate(sequences))
    kind = ops._kind(shape, 192, 4)
    return ops._prepare(kind, (len(lengths), 4, queries, 64), 96, lengths, None, False, False, beside)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("sequences", [((4, 128),), ((4, 128), (2, 64), (4, 0))])
def test_sizes_of_every_step_are_its_own(sequences, queries, written):
    """Whatever the steps before it were: rows beside the tail, or none, from any length on."""
    for first in (16, 21, 63):
        for step in range(70):
            beside = 0 if queries > 1 else (first + step) % (FEW + 1)
            for count in {0, beside}:
                sizes = prepared(first + step, count, sequences, queries)[1]
                numbers = [n for i, (s, p) in enumerate(sequences) for n in (s, p, first + step + 3 * i, count)]
                assert np.array(sizes)[:3].tolist() == [192, 96, 4] and np.array(sizes)[8:].tolist() == numbers
    assert max(written) <= SMALL


def test_steps_share_what_is_written(written):
    """Tokens that are put beside a tail one after the other, as a cache does it."""
    for step in range(64):
        prepared(16 + step, step % FEW + 1)
    assert len(written) <= 3 * 8 * 2  # at most 3 runs of steps (32 each, and the plan changes), of 12 numbers
    assert ops._sizes_of_steps.cache_info().misses <= 5


def test_another_thread_makes_its_own():
    """What is not evaluated yet can only be evaluated where it was made."""
    mine, theirs = advancing_ints((3, 4)), []
    thread = threading.Thread(target=lambda: theirs.append(advancing_ints((3, 4)).tolist()))
    thread.start()
    thread.join()
    assert theirs == [[3, 4]] and mine.tolist() == [3, 4]


def test_positions_may_be_added_to_in_place():
    """A model may do it to what it takes for its own; layers of a step share the numbers."""
    cache = TurboQuantKVCache("turbo4").merge([TurboQuantKVCache("turbo4") for _ in range(3)])
    cache.update_and_fetch(*(mx.zeros((3, 1, 5, 64), mx.float16) for _ in range(2)))
    position = cache.offset
    position += 7
    assert cache.offset.tolist() == [5, 5, 5]
