"""Decode steps whose newest rows lie beside their tail: a kernel reads them there and puts the new one behind them."""

import copy
from dataclasses import replace
from unittest import mock

import kernel_emulator
import mlx.core as mx
import pytest
from attend_cases import BACKEND, ON_GPU, UNSUPPORTED, Case, assert_right, build, in_every_schedule, make, run

from mlx_turboquant import attention
from mlx_turboquant.cache import TurboQuantKVCache, saved_state
from mlx_turboquant.cache.buffers import RowBuffer
from mlx_turboquant.cache.plain_steps import PlainSteps
from mlx_turboquant.ops import attend as ops
from mlx_turboquant.ops import attend_plan
from mlx_turboquant.tail_parts import FEW, TailParts

pytestmark = pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)
HKV, D = 2, 64
CASES = [
    Case(beside=1),
    Case(beside=16, D=128, G=4, passes=2),
    Case(3, 2, beside=2, D=80, G=7, dtype="bfloat16", passes=2, lengths=((4, 2, 17), (4, 2, 17))),
    Case(8, 0, beside=3, D=96, G=2, dtype="float32", mask="boolean", logits=True, lengths=((0, 1, 3),)),
    Case(0, 4, beside=7, D=256, passes=2, mask="additive", lengths=((2, 1, 9), (2, 1, 9))),
    Case(2, 8, beside=5, G=16, dtype="bfloat16", lengths=((4, 1, 40),)),
    Case(2, 3, beside=4, D=128, signs=True, block=32, G=2, passes=2),
]


@pytest.fixture(scope="module")
def built(request):
    """The kernels of all cases, compiled."""
    build(request)


@pytest.mark.parametrize("case", CASES[:3] if ON_GPU else CASES, ids=str)
def test_rows_beside_the_tail_are_read_and_handed_back(case, built):
    out = in_every_schedule(lambda: run(case))
    assert_right(out, case)
    assert mx.array_equal(out, run(replace(case, beside=0)))  # to the bit as where they lie in it


def test_several_queries_read_them_as_a_tail():
    case = Case(L=3, beside=0, causal=True)
    made = make(case)
    lengths = case.token_lengths[0][2] - 1
    parts = [
        TailParts(side.tail, lengths, None, 0, mx.contiguous(side.tail[:, :, lengths : lengths + 1]))
        for side in (made.keys, made.values)
    ]
    reader = ops.Reader(made.keys, made.values, block=case.block, balance=made.options["balance"], backend=BACKEND)
    out = reader(made.queries, *parts, case.token_lengths, scale=case.scale, causal=True)
    assert mx.array_equal(out, run(case)) and parts[0].next is None and not reader.joins


def new_rows(count, seed):
    """Keys and values of so many tokens, as a projection gives them: (B, L, Hkv, D), the middle axes exchanged."""
    both = (mx.random.normal((1, count, HKV, D), key=mx.random.key(2 * seed + i)) for i in range(2))
    return [rows.astype(mx.float16).swapaxes(1, 2) for rows in both]


def written():
    """A context in which every token is written into its tail."""
    joins = property(lambda self: False, lambda self, value: None)
    return mock.patch.object(ops.Reader, "joins", joins, create=True)


def step(cache, seed, backend=BACKEND):
    """Attention of one more token."""
    queries = mx.random.normal((1, 4, 1, D), key=mx.random.key(seed)).astype(mx.float16)
    with kernel_emulator.options(typecheck=False):
        out = attention.attend(queries, *cache.update_and_fetch(*new_rows(1, seed)), 0.1, backend=backend)
        mx.eval(out)
    return out


def filled(scheme="turbo4:sinks=2,window=4,block=16", tokens=40, **how):
    cache = TurboQuantKVCache(scheme, **how)
    cache.update_and_fetch(*new_rows(tokens, 1))
    return cache


def waiting(cache):
    """How many rows of its keys lie beside them."""
    parts = cache._tail[0]._parts
    return 0 if parts is None else parts.count + 1


@pytest.mark.parametrize("max_size", [None, 60])
def test_a_generation_is_the_same_to_the_bit(max_size):
    mine, theirs = filled(max_size=max_size), filled(max_size=max_size)
    most, trimmed = 0, False
    for i in range(70):
        out = step(mine, 10 + i)
        most = max(most, waiting(mine))
        with written():
            assert mx.array_equal(out, step(theirs, 10 + i)) and waiting(theirs) == 0
        assert mine.offset == theirs.offset and mine.size() == theirs.size()
        if i > 30 and waiting(mine) == 3 and not trimmed:
            with written():
                count = theirs.trim(2 if max_size is None else 0)
            trimmed = mine.trim(count) == count
    assert trimmed and most >= FEW // 2
    for one, other in zip(saved_state.pack(mine)[8:10], saved_state.pack(theirs)[8:10], strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)


def steps_until(cache, count, seed=100):
    """Decode until so many rows lie beside the tail."""
    for i in range(60):
        if waiting(cache) == count:
            return
        step(cache, seed + i)
    raise AssertionError(f"never {count} rows beside the tail")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["state", "nbytes", "rows", "copy", "keys", "reference"])
def test_whoever_looks_sees_all_rows(how, count):
    cache = filled()
    steps_until(cache, count)
    tail = copy.deepcopy(cache)._tail[0]
    parts = cache._tail[0]._parts
    wanted = mx.concatenate([tail._array[:, :, : parts.joined], parts.loose()], axis=2)
    if how == "state":
        seen = cache.state[8][4]
    elif how == "nbytes":
        before = mx.array(cache._tail[0]._array)
        assert cache.nbytes and not mx.array_equal(before, cache._tail[0]._array)
        seen = cache._tail[0].view()
    elif how == "rows":
        seen = cache.keys_and_values()[0].tail
    elif how == "copy":
        other = copy.deepcopy(cache)
        step(other, 999)
        assert waiting(cache) == count
        seen = other._tail[0].view()[:, :, :-1]
    elif how == "keys":
        seen = cache.keys[:, :, : cache.tail_tokens]
    else:  # attention without kernels, of rows that were fetched for one with them
        rows = cache.update_and_fetch(*new_rows(1, 5))
        assert isinstance(rows[0].newest, TailParts)
        seen = rows[0].tail[:, :, :-1]
        queries = mx.ones((1, 4, 1, D), mx.float16)
        plain = attention.attend(queries, *rows, 0.1, backend="reference")
        assert rows[0].newest.next is None
        fused = attention.attend(queries, *rows, 0.1, backend=BACKEND)
        assert mx.allclose(plain, fused, atol=2e-3) and rows[0].newest.next is not None
    assert mx.array_equal(seen, wanted)


def test_rows_that_no_kernel_read_are_not_lost():
    cache, other = filled(), filled()
    for one in (cache, other):
        steps_until(one, 2)
    for i in range(12):
        cache.update_and_fetch(*new_rows(1, 300 + i))
        with mock.patch.object(PlainSteps, "take", lambda *_: None):
            other.update_and_fetch(*new_rows(1, 300 + i))
    pairs = zip(cache.keys_and_values(), other.keys_and_values(), strict=True)
    assert all(mx.array_equal(mine.dense(), theirs.dense()) for mine, theirs in pairs)


def test_a_row_is_asked_for_once_and_written_with_others():
    """Of sixteen tokens fifteen cost no dispatch of their own."""
    cache, writes = filled("turbo4:sinks=2,window=4,block=64", 80), []
    join = RowBuffer._join
    for i in range(5):
        step(cache, 10 + i)
    with mock.patch.object(RowBuffer, "_join", lambda self: (writes.append(1), join(self))):
        for i in range(40):
            step(cache, 20 + i)
    assert len(writes) == 2 * (40 // FEW)


@pytest.mark.skipif(BACKEND != "cuda", reason="tensor cores are CUDA's")
def test_tensor_cores_read_a_tail_that_is_written():
    cache = filled()
    with attend_plan.tensor_cores_for_any_length():
        ops.forget_calls()
        for i in range(12):
            step(cache, 10 + i)
            assert waiting(cache) == 0
    ops.forget_calls()
