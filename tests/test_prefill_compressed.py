"""prefill=compressed: each chunk of a prompt is encoded once it was read, so that a long prompt never lies raw."""

import copy
import gc

import mlx.core as mx
import numpy as np
import pytest
from conftest import LET_GO_BY_OTHERS, decode, kld, log_softmax, memory_in_use, tiny_llama, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache as raw_prompt_cache

from mlx_turboquant import TurboQuantKVCache, hook, make_prompt_cache, unhook
from mlx_turboquant.evaluation import evaluate
from mlx_turboquant.tensor import CompressedRows

LEAN = "turbo4:prefill=compressed"


def read(model, ids, cache, chunk, start=0):
    """The logits of a prompt read in chunks by a plain loop."""
    steps = [model(ids[:, i : i + chunk], cache=cache) for i in range(start, ids.shape[1], chunk)]
    return mx.concatenate(steps, axis=1)


def test_a_chunk_is_encoded_when_the_next_one_comes(random_rows):
    cache = TurboQuantKVCache(LEAN)
    keys, _ = cache.update_and_fetch(*random_rows(T=200))
    assert isinstance(keys, mx.array) and cache.tail_tokens == 200  # its own queries read it raw
    keys, values = cache.update_and_fetch(*random_rows(T=100, seed=5))
    assert isinstance(keys, CompressedRows) and keys.shape == values.shape == (1, 2, 300, 64)
    # 200 - 4 sinks - 16 of the window leave 180: two whole blocks.
    assert (cache.sink_tokens, cache.block_tokens, cache.tail_tokens) == (4, 128, 168)


def test_only_a_prefill_loop_that_reads_the_state_encodes_at_once(random_rows):
    cache = TurboQuantKVCache(LEAN)
    cache.update_and_fetch(*random_rows(T=200))
    mx.eval(cache.state)
    assert cache.block_tokens == 0
    loop = {"__name__": "mlx_lm.generate", "cache": cache, "mx": mx}
    exec("mx.eval(cache.state)", loop)
    assert cache.block_tokens == 128 and cache.tail_tokens == 68
    raw = TurboQuantKVCache("turbo4")
    raw.update_and_fetch(*random_rows(T=200))
    exec("mx.eval(cache.state)", loop | {"cache": raw})
    assert raw.block_tokens == 0


def test_after_each_chunk_of_mlx_lms_loop_only_the_compressed_cache_is_alive(model):
    ids, seen = tokens(1200)[0], []
    # Constants that are made once and kept: codebooks, signs.
    list(generate_step(ids[:200], model, prompt_cache=make_prompt_cache(model, kv_scheme=LEAN), max_tokens=1))
    empty = memory_in_use()
    cache = make_prompt_cache(model, kv_scheme=LEAN)

    def look(done, total):
        if 0 < done < total:
            seen.append((cache[0].tail_tokens, sum(c.nbytes for c in cache), memory_in_use() - empty))

    list(
        generate_step(
            ids, model, prompt_cache=cache, prefill_step_size=200, max_tokens=2, prompt_progress_callback=look
        )
    )
    assert len(seen) == 6
    for tail, nbytes, alive in seen:
        assert tail < 64 + 16 and nbytes - LET_GO_BY_OTHERS <= alive <= nbytes * 1.05 + 65536
    assert cache[0].block_tokens == (1201 - 4 - 16) // 64 * 64


def test_the_peak_of_a_long_prompt_is_far_below_the_raw_cache():
    model, ids = tiny_llama(layers=12, seed=7), tokens(2048)[0]
    peaks = {}
    for scheme in ("turbo4", LEAN):
        cache = make_prompt_cache(model, kv_scheme=scheme)
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        list(generate_step(ids, model, prompt_cache=cache, prefill_step_size=64, max_tokens=2))
        peaks[scheme] = mx.get_peak_memory() - before
        raw_bytes = sum(c.raw_nbytes for c in cache)
        del cache
    assert peaks["turbo4"] > raw_bytes
    assert peaks[LEAN] < 0.6 * raw_bytes < 0.6 * peaks["turbo4"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 512])
def test_raw_rows_through_the_same_bookkeeping_generate_the_same_tokens(model, chunk):
    cache = make_prompt_cache(model, kv_scheme="turbo0v0:prefill=compressed")
    ids = tokens(230)[0]
    ours = [t for t, _ in generate_step(ids, model, prompt_cache=cache, prefill_step_size=chunk, max_tokens=20)]
    theirs = [t for t, _ in generate_step(ids, model, prefill_step_size=chunk, max_tokens=20)]
    assert ours == theirs and cache[0].block_tokens == 192


def test_it_is_what_compressing_by_hand_after_each_chunk_gives(model):
    ids = tokens(330)
    lean, by_hand = (make_prompt_cache(model, kv_scheme=scheme) for scheme in (LEAN, "turbo4"))
    for start in range(0, 300, 100):
        one = model(ids[:, start : start + 100], cache=lean)
        two = model(ids[:, start : start + 100], cache=by_hand)
        assert mx.array_equal(one, two)
        for layer in by_hand:
            layer.compress()
    assert mx.array_equal(decode(model, ids, lean, 300, 330), decode(model, ids, by_hand, 300, 330))


def test_one_chunk_is_read_as_with_a_raw_prefill(model):
    ids = tokens(230)
    runs = []
    for scheme in (LEAN, "turbo4"):
        cache = make_prompt_cache(model, kv_scheme=scheme)
        runs.append(
            mx.concatenate([read(model, ids[:, :200], cache, 200), decode(model, ids, cache, 200, 230)], axis=1)
        )
    assert mx.array_equal(*runs)


def test_the_balance_is_fitted_once_to_the_first_chunk(model):
    ids = tokens(400)
    cache = make_prompt_cache(model, kv_scheme=LEAN)
    read(model, ids[:, :200], cache, 100)
    balance, squares = cache[0].quantizers[0].balance, cache[0]._queries.sums
    first = make_prompt_cache(model, kv_scheme="turbo4")
    model(ids[:, :100], cache=first)
    first[0].compress()
    assert mx.array_equal(balance, first[0].quantizers[0].balance) and mx.array_equal(squares, first[0]._queries.sums)
    read(model, ids[:, 200:], cache, 100)
    decode(model, ids, cache, 390, 400)
    assert mx.array_equal(balance, cache[0].quantizers[0].balance) and mx.abs(balance - 1).max() > 0.01


def test_later_chunks_attend_to_compressed_earlier_ones_and_stay_close(model):
    ids = tokens(330)
    exact = read(model, ids[:, :300], raw_prompt_cache(model), 100)
    lean = read(model, ids[:, :300], make_prompt_cache(model, kv_scheme=LEAN), 100)
    assert mx.array_equal(exact[:, :100], lean[:, :100])
    assert 0 < kld(exact[:, 100:], lean[:, 100:]) < 0.05


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.sampled_from([0, 3, 16]), st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_any_chunks_leave_every_token_in_its_place(sinks, window, chunks):
    cache = TurboQuantKVCache(f"turbo0v0:block=16,sinks={sinks},window={window},prefill=compressed")
    start = 0
    for count in chunks:
        rows = mx.broadcast_to(mx.arange(start, start + count, dtype=mx.float32)[:, None], (count, 8))[None, None]
        cache.update_and_fetch(rows, -rows)
        assert cache.block_tokens == max(start - sinks - window, 0) // 16 * 16
        start += count
        keys, values = (r.dense() if isinstance(r, CompressedRows) else r for r in cache.keys_and_values())
        assert keys[0, 0, :, 0].tolist() == list(range(start)) and mx.array_equal(values, -keys)
    assert cache.offset == cache.size() == start


def test_a_copy_and_a_restored_state_in_the_middle_of_a_prompt_go_on_alike(model):
    ids = tokens(320)
    cache = make_prompt_cache(model, kv_scheme=LEAN)
    read(model, ids[:, :200], cache, 100)
    others = [copy.deepcopy(cache), [TurboQuantKVCache.from_state(c.state) for c in cache]]
    runs = [
        mx.concatenate([read(model, ids[:, :300], c, 50, 200), decode(model, ids, c, 300, 320)], axis=1)
        for c in (cache, *others)
    ]
    assert mx.array_equal(runs[0], runs[1]) and mx.array_equal(runs[0], runs[2])


def test_a_later_turn_is_encoded_chunk_by_chunk_too(model):
    ids = tokens(500)
    cache = make_prompt_cache(model, kv_scheme=LEAN)
    list(generate_step(ids[0, :150], model, prompt_cache=cache, max_tokens=5))
    start = cache[0].offset
    list(generate_step(ids[0, 150:], model, prompt_cache=cache, prefill_step_size=100, max_tokens=1))
    assert cache[0].offset > start + 340 and cache[0].tail_tokens < 64 + 16 + 2


def test_an_unhooked_model_is_told_before_anything_is_encoded(model):
    cache = make_prompt_cache(model, kv_scheme=LEAN)
    ids = tokens(220)
    model(ids[:, :200], cache=cache)
    unhook(model)
    assert not hasattr(llama.scaled_dot_product_attention, "mlx_turboquant_original")
    with pytest.raises(RuntimeError, match=r"layer 0.*Call mlx_turboquant.hook"):
        model(ids[:, 200:], cache=cache)
    assert cache[0].offset == 200 and cache[0].block_tokens == 0
    hook(model)
    model(ids[:, 200:], cache=cache)
    assert cache[0].offset == 220 and cache[0].block_tokens == 128


def test_bounded_and_lean_together_hold_the_bound_between_chunks(model):
    cache = make_prompt_cache(model, 160, kv_scheme=f"{LEAN},block=16,window=4")
    held = []
    look = lambda done, total: held.append(cache[0].size())  # noqa: E731
    list(generate_step(tokens(700)[0], model, prompt_cache=cache, prefill_step_size=200, max_tokens=30,
                       prompt_progress_callback=look))  # fmt: skip
    assert max(held) <= 160 and cache[0].size() <= 160 and cache[0].offset >= 728


def test_evaluation_reads_the_prompt_as_the_scheme_does(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids = tokens(250)
    results = evaluate(model, ids[0].tolist(), [LEAN, "turbo4"], 220, prefill_chunk=80)
    logs = []
    for cache in (raw_prompt_cache(model), make_prompt_cache(model, kv_scheme=LEAN)):
        read(model, ids[:, :220], cache, 80)
        logs.append(np.array(log_softmax(decode(model, ids, cache, 220, 249)[0]), dtype=np.float64))
    assert np.allclose(results[0].kld, (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1), atol=2e-5)
    assert not np.array_equal(results[0].kld, results[1].kld)
    assert not list(tmp_path.rglob("*.safetensors"))  # logits after other chunks are not kept for the usual ones
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        evaluate(model, ids[0].tolist(), [LEAN], 220, prefill_chunk=0)
