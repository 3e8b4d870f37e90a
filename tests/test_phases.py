"""When a cache takes a call for decoding: through mlx-lm's own loops, for any prefill chunk size and any turn."""

import mlx.core as mx
import pytest
from conftest import decode, tokens
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import trim_prompt_cache

from mlx_turboquant import TurboQuantKVCache, make_prompt_cache


@pytest.fixture
def log(monkeypatch):
    """(offset before the call, tokens in the call, whether it was taken for decoding) for each call of layer 0."""
    calls = []
    original = TurboQuantKVCache._is_decode

    def spy(self, count):
        answer = original(self, count)
        if self.layer == 0:
            calls.append((self.offset, count, answer))
        return answer

    monkeypatch.setattr(TurboQuantKVCache, "_is_decode", spy)
    return calls


@pytest.mark.parametrize("chunk", [1, 2, 7, 512, 2048])
@pytest.mark.parametrize("length", [1, 2, 9, 100, 113])
def test_no_prompt_token_is_taken_for_decoding(model, log, chunk, length):
    cache = make_prompt_cache(model, kv_scheme="turbo4:block=16,window=4")
    list(generate_step(tokens(length)[0], model, prompt_cache=cache, prefill_step_size=chunk, max_tokens=5))
    assert log and all(answer == (offset >= length) for offset, _, answer in log)
    assert cache[0].block_tokens == max(cache[0].offset - 8, 0) // 16 * 16


@pytest.mark.parametrize("chunk", [1, 2, 7, 512, 2048])
def test_a_second_turn_is_prompt_again(model, log, chunk):
    cache = make_prompt_cache(model, kv_scheme="turbo4:block=16,window=4")
    list(generate_step(tokens(90)[0], model, prompt_cache=cache, max_tokens=5))
    log.clear()
    start = cache[0].offset
    list(generate_step(tokens(60)[0], model, prompt_cache=cache, prefill_step_size=chunk, max_tokens=5))
    prompt = [answer for offset, _, answer in log if offset < start + 60]
    # The very first call of a one-token chunk looks like another decode step, and being one is harmless.
    assert not any(prompt[1:]) and (chunk == 1 or not prompt[0])
    assert all(answer for offset, _, answer in log if offset >= start + 60)
    assert cache[0].block_tokens == (cache[0].offset - 8) // 16 * 16


def test_a_plain_loop_without_evaluating_states(model, log):
    ids = tokens(120)
    cache = make_prompt_cache(model, kv_scheme="turbo4")
    for start, stop in ((0, 50), (50, 57), (57, 100)):
        model(ids[:, start:stop], cache=cache)
    decode(model, ids, cache, 100, 103)
    assert [answer for *_, answer in log] == [False, False, False, True]  # plain steps, behind it, ask no more


def test_a_loop_that_evaluates_states_at_every_step_still_compresses(model):
    ids = tokens(120)
    cache = make_prompt_cache(model, kv_scheme="turbo4")
    model(ids[:, :110], cache=cache)
    for i in range(110, 113):
        model(ids[:, i : i + 1], cache=cache)
        mx.eval([c.state for c in cache])
    assert cache[0].block_tokens == 64


@pytest.mark.parametrize("chunk", [7, 30])
def test_each_query_of_a_prompt_weighs_once_whatever_the_chunks(model, chunk):
    sums = []
    for size in (chunk, 512):
        cache = make_prompt_cache(model, kv_scheme="turbo4")
        list(generate_step(tokens(100)[0], model, prompt_cache=cache, prefill_step_size=size, max_tokens=1))
        sums.append(cache[0]._queries.sums)
    assert mx.allclose(*sums, rtol=1e-4) and mx.all(sums[0] > 0)


@pytest.mark.parametrize(("after", "encoded"), [("chunk", 0), ("trim", 64)])
def test_a_restored_cache_takes_its_next_call_for_what_it_is(random_rows, after, encoded):
    cache = TurboQuantKVCache("turbo4")
    cache.update_and_fetch(*random_rows(T=100))
    cache.end_chunk() if after == "chunk" else cache.trim(2)
    for each in (cache, TurboQuantKVCache.from_state(cache.state)):
        each.update_and_fetch(*random_rows(T=3))
        assert each.block_tokens == encoded


def test_verifying_a_draft_is_decoding(model, log):
    ids = tokens(200)
    cache = make_prompt_cache(model, kv_scheme="turbo4")
    model(ids[:, :150], cache=cache)
    trim_prompt_cache(cache, 0)
    model(ids[:, 150:154], cache=cache)
    assert log[-1] == (150, 4, True) and cache[0].block_tokens == 128


def test_speculative_generation_compresses_both_caches(model, log):
    cache = make_prompt_cache(model, kv_scheme="turbo4") + make_prompt_cache(model, kv_scheme="turbo4")
    out = speculative_generate_step(tokens(120)[0], model, model, prompt_cache=cache, num_draft_tokens=3, max_tokens=24)
    assert len(list(out)) == 24
    assert all(layer.block_tokens == 64 for layer in cache)


def test_compress_does_it_at_once(model):
    cache = make_prompt_cache(model, kv_scheme="turbo4")
    model(tokens(150), cache=cache)
    assert [layer.compress() for layer in cache] == [128, 128]
    assert [layer.compress() for layer in cache] == [0, 0]
