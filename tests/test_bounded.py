"""The bounded compressed cache: what it keeps and drops, what a query sees, where mlx-lm's other caches come in."""

import copy
import json
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import LET_GO_BY_OTHERS, decode, kld, memory_in_use, tiny_latent, tiny_llama, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models import gemma3_text, qwen2
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, can_trim_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as raw_prompt_cache

import mlx_turboquant
from mlx_turboquant import KVScheme, TurboQuantKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_turboquant.cache.bound import attention_mask, least_size, tokens_to_drop
from mlx_turboquant.scheme_file import LayerSchemes
from mlx_turboquant.tensor import CompressedRows

SMALL = "block=16,window=4"  # the smallest bound is then 4 + 32 + 4 + 8 = 48 tokens


def numbered(start: int, stop: int):
    """Keys and values (1, 1, stop - start, 16) that say which position they are of."""
    rows = mx.broadcast_to(mx.arange(start, stop, dtype=mx.float32)[:, None], (stop - start, 16))[None, None]
    return rows, -rows


def positions(cache) -> list[int]:
    """The positions that a cache of `numbered` rows holds, the same for keys and values; raw schemes only."""
    sides = [r.dense() if isinstance(r, CompressedRows) else r for r in cache.keys_and_values()]
    keys, values = (side[0, 0, :, 3].tolist() for side in sides)
    assert keys == [-v for v in values]
    return [int(k) for k in keys]


def kept(cache, sinks: int = 4) -> list[int]:
    """The positions that it should hold: the sinks and the newest."""
    newest = cache.size() - sinks
    return [*range(sinks), *range(cache.offset - newest, cache.offset)]


def test_decoding_keeps_the_sinks_and_the_newest_tokens_within_the_bound():
    cache = TurboQuantKVCache(f"turbo0v0:{SMALL}", max_size=64)
    cache.update_and_fetch(*numbered(0, 40))
    sizes = set()
    for i in range(40, 400):
        cache.update_and_fetch(*numbered(i, i + 1))
        assert cache.offset == i + 1 and cache.size() <= 64
        assert positions(cache) == (kept(cache) if cache.offset > 64 else list(range(i + 1)))
        if i >= 64:
            sizes.add(cache.size())
    assert sizes == set(range(64 - 16 + 1, 65))  # a block goes when the next token would not fit
    assert cache.block_tokens % 16 == 0 and cache.sink_tokens == 4


def test_a_large_bound_drops_a_sixteenth_at_once():
    scheme = KVScheme.parse(f"turbo4:{SMALL}")
    assert tokens_to_drop(4096, 1, 4096, scheme) == 256
    assert tokens_to_drop(4096 + 300, 1, 4096, scheme) == 304  # more is over the bound: whole blocks of it
    assert tokens_to_drop(4095, 1, 4096, scheme) == tokens_to_drop(10**6, 1, None, scheme) == 0


def test_the_bytes_stay_where_they_are_and_are_what_is_alive(random_rows):
    empty = memory_in_use()
    cache = TurboQuantKVCache("turbo4", max_size=2048)
    cache.update_and_fetch(*random_rows(T=2040, D=128))
    seen = []
    for step in range(400):
        cache.update_and_fetch(*random_rows(T=1, D=128, seed=step))
        if step % 20 == 19:
            mx.eval(cache.state)
            seen.append(cache.nbytes)
            alive = memory_in_use() - empty
            assert cache.nbytes - LET_GO_BY_OTHERS <= alive <= cache.nbytes * 1.02 + 65536
    assert cache._dropped >= 300
    assert max(seen) == seen[-1] < 0.34 * 2048 * 2 * 2 * 128 * 2
    assert cache.raw_nbytes == cache.size() * 2 * 2 * 128 * 2


@pytest.mark.parametrize("chunk", [1, 7, 30, 64, 200])
@pytest.mark.parametrize("loop", ["mlx-lm", "plain"])
def test_a_long_prompt_drops_before_each_chunk_so_that_its_first_query_sees_as_many_as_a_decoded_token(chunk, loop):
    cache = TurboQuantKVCache(f"turbo0v0:{SMALL}", max_size=64)
    cache.update_and_fetch(*numbered(0, chunk))
    for start in range(chunk, 400, chunk):
        if loop == "mlx-lm":
            cache._chunk_ended = True
        cache.update_and_fetch(*numbered(start, start + chunk))
        before = cache.size() - chunk
        assert min(start, 64 - 16) <= before <= 63
        assert cache._dropped == 0 or positions(cache) == kept(cache)
    assert cache._dropped > 0
    offset = cache.offset
    cache._chunk_ended = False
    cache.update_and_fetch(*numbered(offset, offset + 1))
    assert cache.size() <= 64 and cache.block_tokens >= 16 and positions(cache) == kept(cache)


def test_a_second_turn_longer_than_the_bound_is_encoded_and_dropped():
    cache = TurboQuantKVCache(f"turbo0v0:{SMALL}", max_size=64)
    cache.update_and_fetch(*numbered(0, 50))
    cache.update_and_fetch(*numbered(50, 51))
    cache.update_and_fetch(*numbered(51, 251))
    assert cache.size() == 251 and cache._dropped == 0  # the turn is raw behind the blocks, within one chunk
    cache.update_and_fetch(*numbered(251, 271))
    assert cache.size() - 20 <= 63 and positions(cache) == kept(cache)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 6),
    st.sampled_from([0, 1, 5, 20]),
    st.integers(0, 40),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 3, 8, 9, 25, 70]), st.booleans(), st.integers(0, 4)), max_size=40),
)
def test_any_mixture_of_prompts_steps_and_trims_keeps_the_sinks_and_the_newest(sinks, window, more, eager, calls):
    prefill = "compressed" if eager else "raw"
    scheme = KVScheme.parse(f"turbo0v0:block=16,sinks={sinks},window={window},prefill={prefill}")
    bound = least_size(scheme) + more
    cache = TurboQuantKVCache(scheme, max_size=bound)
    for count, chunk_ended, back in calls:
        if cache.is_trimmable() or back < cache.size() - sinks:
            offset = cache.offset
            assert cache.trim(back) == min(back, offset) and cache.offset == offset - min(back, offset)
        cache._chunk_ended = chunk_ended
        before, offset, decoding = cache.size(), cache.offset, cache._is_decode(count)
        mask = cache.make_mask(count, return_array=True, window_size=10)
        cache.update_and_fetch(*numbered(offset, offset + count))
        assert cache.offset == offset + count
        assert mask.shape == (count, cache.size())
        assert cache.size() <= (bound if decoding else bound - 1 + count)
        held = positions(cache)
        assert held == kept(cache, min(sinks, cache.offset))
        # A window of 10 is over positions, so dropped tokens count as tokens behind it.
        far = mx.array(held)[None] > mx.arange(offset, offset + count)[:, None] - 10
        causal = mx.array(held)[None] <= mx.arange(offset, offset + count)[:, None]
        assert mx.array_equal(mask, far & causal)
        assert cache.block_tokens == 0 or cache.block_tokens >= 16
        assert cache.size() - count >= min(before, bound - max(16, bound // 16 + 16) - 8)


def test_the_mask_is_mlx_lms_where_nothing_was_dropped():
    assert attention_mask(1, 100, 60, 4) is None and attention_mask(5, 100, 60, 4) == "causal"
    assert mx.array_equal(attention_mask(5, 30, 30, 4, True), create_causal_mask(5, 30))
    assert mx.array_equal(attention_mask(5, 30, 30, 4, False, 8), create_causal_mask(5, 30, 8))
    full = create_causal_mask(5, 100, 20)
    assert mx.array_equal(attention_mask(5, 100, 60, 4, False, 20), mx.concatenate([full[:, :4], full[:, 44:]], axis=1))


class DroppingKVCache(KVCache):
    """mlx-lm's raw cache, of which a test removes what a bounded cache dropped."""

    dropped = 0

    def follow(self, other: TurboQuantKVCache) -> None:
        if n := other._dropped - self.dropped:
            sides = (self.keys, self.values)
            self.keys, self.values = (mx.concatenate([a[:, :, :4], a[:, :, 4 + n :]], axis=2) for a in sides)
            self.dropped = other._dropped

    def update_and_fetch(self, keys, values):
        old = () if self.keys is None else ((self.keys, keys), (self.values, values))
        self.keys, self.values = [mx.concatenate(pair, axis=2) for pair in old] or (keys, values)
        self.offset += keys.shape[2]
        return self.keys, self.values


def test_a_model_gets_absolute_positions_and_the_tokens_held(model):
    """Against raw attention over the same tokens, rotated for the same positions."""
    ids = tokens(300)
    ours = make_prompt_cache(model, 64, kv_scheme=f"turbo0v0:{SMALL}")
    theirs = [DroppingKVCache() for _ in ours]
    start = 0
    for stop in (40, 100, *range(101, 180), 210, *range(211, 301)):
        one = model(ids[:, start:stop], cache=ours)
        for layer, raw in zip(ours, theirs, strict=True):
            raw.follow(layer)
        two = model(ids[:, start:stop], cache=theirs)
        assert mx.allclose(one, two, atol=1e-5)
        start = stop
    assert ours[0].offset == 300 and ours[0].size() <= 64 and ours[0]._dropped >= 200


def test_mlx_lms_generate_stays_within_the_bound(model):
    cache = make_prompt_cache(model, 96, kv_scheme=f"turbo4:{SMALL}")
    out = list(generate_step(tokens(300)[0], model, prompt_cache=cache, prefill_step_size=50, max_tokens=80))
    assert len(out) == 80
    for layer in cache:
        assert layer.offset >= 379 and layer.size() <= 96 and layer.block_tokens >= 48


def test_the_newest_tokens_can_be_trimmed_until_something_was_dropped(model):
    cache = make_prompt_cache(model, 64, kv_scheme=f"turbo4:{SMALL}")
    ids = tokens(120)
    model(ids[:, :50], cache=cache)
    decode(model, ids, cache, 50, 60)
    assert can_trim_prompt_cache(cache) and cache[0].trim(20) == 20 and cache[0].offset == 40
    cache = make_prompt_cache(model, 64, kv_scheme=f"turbo4:{SMALL}")
    model(ids[:, :110], cache=cache)
    decode(model, ids, cache, 110, 112)
    assert not can_trim_prompt_cache(cache)
    dropped, size = cache[0]._dropped, cache[0].size()
    with pytest.raises(ValueError, match=rf"layer 0: cannot go back to 30 tokens.*from 4 to {4 + dropped}"):
        cache[0].trim(82)
    assert cache[0].size() == size
    assert cache[0].trim(size - 5) == size - 5 and cache[0].offset == 5 + dropped
    assert cache[0].trim(10**6) == 5 + dropped and cache[0].empty() and cache[0].is_trimmable()


@pytest.mark.parametrize("phase", ["raw", "packed"])
def test_a_restored_bounded_cache_goes_on_bit_for_bit(model, tmp_path, phase):
    ids = tokens(200)
    cache = make_prompt_cache(model, 80, kv_scheme=f"turbo4:{SMALL}")
    for start, stop in ((0, 60), (60, 100), (100, 120)):
        model(ids[:, start:stop], cache=cache)
    if phase == "packed":
        decode(model, ids, cache, 120, 121)
    assert cache[0]._dropped > 0
    loaded = load_prompt_cache(save_prompt_cache(tmp_path / "c", cache))
    assert [(c.max_size, c._dropped, c.offset, c.size()) for c in loaded] == [
        (80, c._dropped, c.offset, c.size()) for c in cache
    ]
    start = cache[0].offset
    copied = copy.deepcopy(cache)
    runs = [decode(model, ids, c, start, 200) for c in (cache, loaded, copied)]
    assert mx.array_equal(runs[0], runs[1]) and mx.array_equal(runs[0], runs[2])
    empty = make_prompt_cache(model, 80, kv_scheme="turbo4:block=16")
    assert load_prompt_cache(save_prompt_cache(tmp_path / "e", empty))[0].max_size == 80


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ((64,), r"the bound must be \[tokens or None, tokens dropped\]"),
        ((None, 16), "the bound must be"),
        ((64, -1), "the bound must be"),
        ((64.0, 0), "the bound must be"),
        ((40, 0), "max_size=40 is too small"),
    ],
)
def test_a_state_with_a_wrong_bound_is_refused(bound, message):
    cache = TurboQuantKVCache(f"turbo4:{SMALL}", max_size=64)
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache.from_state((*cache.state[:-1], bound))


def test_a_state_that_dropped_more_than_it_shows_is_refused():
    cache = TurboQuantKVCache(f"turbo4:{SMALL}", max_size=64)
    cache.update_and_fetch(*numbered(0, 3))
    with pytest.raises(ValueError, match="more than 4 tokens must be held where 16 were dropped"):
        TurboQuantKVCache.from_state((*cache.state[:-1], (64, 16)))


def test_a_bound_that_a_scheme_cannot_keep_is_refused_at_the_door(model):
    with pytest.raises(ValueError, match=r"_cache\] max_kv_size=155 is too small for 'turbo4'.*at least 156"):
        make_prompt_cache(model, 155, kv_scheme="turbo4")
    assert make_prompt_cache(model, 156, kv_scheme="turbo4")[0].max_size == 156
    with pytest.raises(ValueError, match=r"max_size must be a whole number or None, got '64'"):
        TurboQuantKVCache("turbo4", max_size="64")
    with pytest.raises(ValueError, match="at least 48"):
        TurboQuantKVCache(f"turbo4:{SMALL}", max_size=0)


def test_only_a_whole_prompt_is_adopted():
    other = TurboQuantKVCache(f"turbo4:{SMALL}", max_size=64)
    other.update_and_fetch(*numbered(0, 100))
    other.update_and_fetch(*numbered(100, 110))
    with pytest.raises(ValueError, match="a raw and whole one"):
        TurboQuantKVCache("turbo4").adopt(other)


@pytest.fixture
def plain_model():
    """A model whose caches mlx-lm makes; llama makes its own."""
    args = qwen2.ModelArgs(
        model_type="qwen2", hidden_size=32, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
        rms_norm_eps=1e-5, vocab_size=96, num_key_value_heads=1,
    )  # fmt: skip
    return qwen2.Model(args)


def test_layers_that_cannot_be_compressed_are_mlx_lms_rotating_caches():
    with pytest.warns(RuntimeWarning, match="No layer of this model can be stored"):
        cache = make_prompt_cache(tiny_latent(), 200, kv_scheme="turbo4")
    assert [(type(c), c.max_size, c.keep) for c in cache] == [(RotatingKVCache, 200, 4)] * 2
    assert "also reads its keys" in mlx_turboquant.report(cache).layers[1].why_raw


def test_rotating_and_compressed_layers_under_one_mask_are_refused(plain_model):
    schemes = LayerSchemes((KVScheme.parse("fp16"), KVScheme.parse("turbo4")))
    with pytest.raises(ValueError, match=r"cannot bound this mixture: layers 0 stay raw.*Leave out max_kv_size"):
        make_prompt_cache(plain_model, 200, kv_scheme=schemes)


def test_where_the_model_makes_its_caches_the_compressed_layers_are_bounded_and_the_others_named():
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text", hidden_size=32, num_hidden_layers=4, intermediate_size=32, num_attention_heads=2,
        head_dim=32, num_key_value_heads=1, vocab_size=96, sliding_window=16, sliding_window_pattern=2,
    )  # fmt: skip
    model, ids = gemma3_text.Model(args), tokens(140)
    cache = make_prompt_cache(model, 64, kv_scheme=f"turbo4:{SMALL}")
    model(ids[:, :60], cache=cache)
    model(ids[:, 60:120], cache=cache)
    decode(model, ids, cache, 120, 140)
    assert [(c.offset, c.size() <= 64) for c in cache] == [(140, True)] * 4
    fp16, turbo = KVScheme.parse("fp16"), KVScheme.parse(f"turbo4:{SMALL}")
    with pytest.warns(RuntimeWarning, match=r"max_kv_size=64 does not bound layers 3, which stay raw"):
        cache = make_prompt_cache(model, 64, kv_scheme=LayerSchemes((fp16, turbo, fp16, fp16)))
    assert cache[1].max_size == 64 and isinstance(cache[3], KVCache)
    model(ids[:, :60], cache=cache)
    model(ids[:, 60:120], cache=cache)
    assert decode(model, ids, cache, 120, 140).shape == (1, 20, 96)


def test_a_draft_model_beside_a_bound_is_refused(model):
    with pytest.raises(ValueError, match=r"max_kv_size=200 .* does not go with a draft model"):
        mlx_turboquant.generation.prompt_cache_for(model, "turbo4", draft_model=model, max_kv_size=200)


def test_other_schemes_keep_mlx_lms_limit(plain_model):
    assert [type(c) for c in make_prompt_cache(plain_model, 64, kv_scheme="fp16")] == [RotatingKVCache] * 2
    ours = make_prompt_cache(plain_model, 64, kv_scheme=f"turbo4:{SMALL}")
    assert [(type(c), c.max_size) for c in ours] == [(TurboQuantKVCache, 64)] * 2
    assert [c.max_size for c in raw_prompt_cache(plain_model, 64)] == [64, 64]


def test_a_small_head_size_model_decodes_through_many_drops():
    """turbo8 keeps close to the raw bypass although every block is dropped several times over."""
    model, ids = tiny_llama(seed=6), tokens(400)
    logits = []
    for scheme in ("turbo0v0", "turbo8"):
        cache = make_prompt_cache(model, 64, kv_scheme=f"{scheme}:{SMALL}")
        model(ids[:, :100], cache=cache)
        logits.append(decode(model, ids, cache, 100, 260))
    assert mx.abs(logits[0] - logits[1]).max() < 0.3 * mx.abs(logits[0]).max()
    assert 0 < kld(*logits) < 1e-3


def test_the_command_lines_take_the_bound(model_dir, prompt, tmp_path):
    def run(command, *arguments):
        line = [sys.executable, "-m", "mlx_turboquant", command, "--model", model_dir, *arguments]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    bound = ("--kv-scheme", f"turbo4:{SMALL}", "--max-kv-size", "96")
    out = run("generate", "--prompt", prompt, *bound, "--max-tokens", "20", "--kv-report", "json")
    told = json.loads(out.splitlines()[-1])["layers"]
    assert all(0 < layer["sink_tokens"] + layer["block_tokens"] + layer["tail_tokens"] <= 96 for layer in told)
    file = tmp_path / "c.safetensors"
    run("cache_prompt", "--prompt", prompt, *bound, "--prompt-cache-file", file)
    (first, _) = load_prompt_cache(file)
    assert first.max_size == 96 and first.size() <= 96 < first.offset and first.block_tokens > 0
