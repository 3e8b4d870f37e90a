"""A block of a tail in one compiled call: the same cache as without, traced once for all layers and blocks."""

import copy

import mlx.core as mx
import pytest

from mlx_turboquant.cache import TurboQuantKVCache, block_encoding, saved_state
from mlx_turboquant.ops.keep_rows import keep_rows
from mlx_turboquant.ops.kernel import register_builder

D, STEPS = 32, 70
calls = []


def stand_ins(kernel, template):
    """A builder whose kernels are operations of MLX that round nothing, so that compiling them changes no bit."""
    constants = dict(template)

    def call(inputs, grid, threadgroup, output_shapes, output_dtypes):
        calls.append(kernel.name)
        if kernel.name == "encode":
            rows, _, balance, *_, sizes = inputs
            start, (*_, count, words) = sizes.tolist()[0], output_shapes[0]
            rows = rows[:, :, start : start + count]
            scaled = rows * balance[:, :, None].astype(rows.dtype) if constants["BALANCE"] else rows
            centers = rows[:, :, :: constants["BLOCK"]] if constants["CENTER"] else mx.zeros(8, rows.dtype)
            bad = mx.isnan(rows[:, :, :: constants["BLOCK"], :1]).astype(mx.uint32)
            return [rows.view(mx.uint32)[..., :words], scaled[..., : output_shapes[1][3]], centers, bad]
        if kernel.name == "keep_rows":
            start, count = inputs[-1].tolist()[2:4]
            how = {"first": constants["SINKS"], "start": start, "stop": start + count, "room": constants["ROOM"]}
            newest, first = keep_rows(*inputs[:2], **how, backend="reference")
            return [*newest, *(first or (mx.zeros(8), mx.zeros(8)))]
        # `survey` and `balance`: any numbers that are not 0, and no bad rows.
        fill = (0 if dtype == mx.uint32 else 1.5 for dtype in output_dtypes)
        return [mx.full(*each) for each in zip(output_shapes, fill, output_dtypes, strict=True)]

    return call


@pytest.fixture(autouse=True)
def traceable(monkeypatch):
    register_builder("traceable", stand_ins)
    monkeypatch.setattr(block_encoding, "BACKENDS", ("traceable",))
    monkeypatch.setenv("MLX_TURBOQUANT_BACKEND", "traceable")
    block_encoding._one_call.cache_clear()
    calls.clear()


def decoded(scheme, layers=3):
    """Caches of some layers after a prompt and steps enough for some blocks; one of them is copied on the way."""
    caches = [TurboQuantKVCache(scheme, layer) for layer in range(layers)]
    for step in range(-1, STEPS):
        for cache in caches:
            keys = mx.random.split(mx.random.key(100 * cache.layer + step + 1), 3)
            rows = [mx.random.normal((2, 2, 45 if step < 0 else 1, D), key=key).astype(mx.float16) for key in keys[:2]]
            cache.update_and_fetch(*rows)
            if step < 0:
                cache.observe_queries(mx.random.normal((2, 4, 45, D), key=keys[2]))
        if step == STEPS // 2:
            caches[0] = copy.deepcopy(caches[0])
    return caches


@pytest.mark.parametrize("scheme", ["turbo4", "turbo3v2:center=0", "turbo4:balance=0", "turbo0v4", "turbo8v0"])
def test_a_compiled_block_is_the_same_to_the_bit(scheme, monkeypatch):
    scheme += ("," if ":" in scheme else ":") + "block=16,window=4,sinks=2"
    mine = decoded(scheme)
    monkeypatch.setattr(block_encoding, "BACKENDS", ())
    block_encoding._one_call.cache_clear()
    plain = decoded(scheme)
    assert mine[0].block_tokens >= 6 * 16
    for one, other in zip(mine, plain, strict=True):
        leaves = [flat(saved_state.pack(cache)[8:12]) for cache in (one, other)]
        assert all(mx.array_equal(x, y, equal_nan=True) for x, y in zip(*leaves, strict=True))


def flat(part):
    """The arrays of nested tuples."""
    if isinstance(part, mx.array):
        return [part]
    return [array for one in part or () for array in flat(one)]


def test_all_layers_and_blocks_share_one_trace():
    caches = decoded("turbo4:block=16,window=4,sinks=2", layers=4)
    blocks = sum(cache.block_tokens // 16 for cache in caches)
    assert blocks >= 24 and calls.count("survey") == 8 and calls.count("balance") == 4
    # Of prompts each layer has its own calls; of blocks two sides are traced once, for tails as the prompt and as an
    # encoding leaves them.
    assert calls.count("encode") <= 2 * (4 + 2) and calls.count("keep_rows") <= 4 + 2


def test_what_is_not_one_block_is_not_compiled():
    caches = decoded("turbo4:block=16,window=4,sinks=0", layers=1)
    before = block_encoding._one_call.cache_info().misses
    rows = [mx.random.normal((2, 2, 100, D), key=mx.random.key(i)).astype(mx.float16) for i in range(2)]
    caches[0].update_and_fetch(*rows)
    assert caches[0].compress() > 16 and block_encoding._one_call.cache_info().misses == before
