"""The two-phase cache: what it keeps, when it compresses, what it weighs, and what it refuses."""

import copy
import threading
import warnings

import mlx.core as mx
import pytest
from conftest import LET_GO_BY_OTHERS, decode, kld, memory_in_use, tiny_llama, tokens
from mlx_lm.models.cache import make_prompt_cache as raw_prompt_cache
from schemes import SCHEMES

from mlx_turboquant import KVScheme, TurboQuantKVCache, make_prompt_cache, settling
from mlx_turboquant.tensor import CompressedRows


def compressed(rows, scheme="turbo4", layer=0):
    """A cache that has read all rows as a prompt and been compressed."""
    cache = TurboQuantKVCache(scheme, layer)
    cache.update_and_fetch(*rows)
    cache.compress()
    return cache


def dense(cache):
    """The keys and values that a cache stands for."""
    return [r.dense(256) if isinstance(r, CompressedRows) else r for r in cache.keys_and_values()]


@pytest.fixture(scope="module")
def exact(model):
    ids = tokens(232)
    cache = raw_prompt_cache(model)
    return mx.concatenate([model(ids[:, :150], cache=cache)[:, -1:], decode(model, ids, cache, 150, 232)], axis=1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoding_stays_close_to_the_raw_cache(model, exact, scheme):
    ids = tokens(232)
    cache = make_prompt_cache(model, kv_scheme=scheme)
    first = model(ids[:, :150], cache=cache)[:, -1:]
    logits = mx.concatenate([first, decode(model, ids, cache, 150, 232)], axis=1)
    assert cache[0].block_tokens >= 128  # two or more blocks of 64: the last was encoded while decoding
    assert kld(exact, logits) <= SCHEMES[scheme]


def test_raw_bypass_is_bit_for_bit_the_raw_cache(model, exact):
    ids = tokens(232)
    cache = make_prompt_cache(model, kv_scheme="turbo0v0")
    first = model(ids[:, :150], cache=cache)[:, -1:]
    logits = mx.concatenate([first, decode(model, ids, cache, 150, 232)], axis=1)
    assert cache[0].block_tokens > 0
    assert mx.array_equal(exact, logits)


def test_a_prompt_stays_raw_and_the_first_decode_step_compresses(random_rows):
    cache = TurboQuantKVCache("turbo4:sinks=4,window=16,block=64")
    keys, _ = cache.update_and_fetch(*random_rows(T=300))
    assert isinstance(keys, mx.array) and cache.tail_tokens == 300
    keys, values = cache.update_and_fetch(*random_rows(T=1))
    assert isinstance(keys, CompressedRows) and keys.shape == values.shape == (1, 2, 301, 64)
    # 301 - 4 sinks - 16 of the window leave 281: four whole blocks.
    assert (cache.sink_tokens, cache.block_tokens, cache.tail_tokens) == (4, 256, 41)


def test_one_block_is_encoded_each_time_the_tail_holds_block_and_window(random_rows):
    cache = compressed(random_rows(T=4 + 64 + 16))
    assert cache.block_tokens == 64 and cache.tail_tokens == 16
    for step in range(1, 131):
        cache.update_and_fetch(*random_rows(T=1, seed=step))
        assert 16 < cache.tail_tokens <= 64 + 16
    assert cache.block_tokens == 64 * 3


def test_raw_parts_are_exact_and_packed_blocks_are_encoded_once(random_rows):
    rows = random_rows(T=150)
    cache = compressed(rows)
    before = dense(cache)
    for original, held in zip(rows, before, strict=True):
        assert mx.array_equal(original[:, :, :4], held[:, :, :4])
        assert mx.array_equal(original[:, :, 132:], held[:, :, 132:])
        error = mx.abs(original - held)[:, :, 4:132].astype(mx.float32)
        assert 0 < mx.square(error).mean() < 0.02
    for step in range(100):
        cache.update_and_fetch(*random_rows(T=1, seed=step))
    for old, new in zip(before, dense(cache), strict=True):
        assert mx.array_equal(old[:, :, :132], new[:, :, :132])


def test_a_shorter_prompt_than_one_block_stays_raw(random_rows):
    cache = compressed(random_rows(T=70))
    assert cache.block_tokens == cache.sink_tokens == 0
    assert isinstance(cache.update_and_fetch(*random_rows(T=1))[0], mx.array)


@pytest.mark.parametrize("tokens_held", [4096, 32768])
def test_turbo4_bytes_at_head_size_128(random_rows, tokens_held):
    rows = random_rows(H=1, T=tokens_held - 1, D=128)
    cache = TurboQuantKVCache("turbo4")
    cache.update_and_fetch(*rows)
    del rows
    mx.eval(cache.state)
    cache.update_and_fetch(*random_rows(H=1, T=1, D=128))
    mx.eval(cache.state)
    assert cache.offset == tokens_held and cache.raw_nbytes == tokens_held * 2 * 128 * 2
    assert cache.nbytes / cache.raw_nbytes <= {4096: 0.29, 32768: 0.273}[tokens_held]
    # Through 200 more steps the room for new blocks is counted too.
    for step in range(200):
        cache.update_and_fetch(*random_rows(H=1, T=1, D=128, seed=step))
    assert cache.nbytes / cache.raw_nbytes <= {4096: 0.30, 32768: 0.28}[tokens_held]


def test_nbytes_is_what_is_alive(random_rows):
    empty = memory_in_use()
    cache = TurboQuantKVCache("turbo4")
    cache.update_and_fetch(*random_rows(T=8192, D=128))
    cache.update_and_fetch(*random_rows(T=1, D=128))
    mx.eval(cache.state)
    alive = memory_in_use() - empty
    # Small constants (rotation signs, codebook) and page rounding are all that may come on top.
    assert cache.nbytes - LET_GO_BY_OTHERS <= alive <= cache.nbytes * 1.02 + 65536
    assert cache.nbytes < 0.30 * cache.raw_nbytes


def test_the_prompts_queries_are_summed_without_being_kept(model):
    cache = make_prompt_cache(model, kv_scheme="turbo4")
    seen = []
    original = cache[0].observe_queries
    cache[0].observe_queries = lambda queries: (seen.append(queries), original(queries))[1]
    ids = tokens(90)
    model(ids[:, :50], cache=cache)
    model(ids[:, 50:], cache=cache)
    queries = mx.concatenate(seen, axis=2).astype(mx.float32)
    expected = mx.square(queries).reshape(1, 2, 2, 90, 64).sum(axis=(2, 3))
    assert mx.allclose(cache[0]._queries.sums, expected, rtol=1e-4)


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 67, 68, 69, 100, 131, 132, 133, 149, 150])
def test_trim_to_any_length_keeps_the_tokens_before_it(random_rows, kept):
    rows = random_rows(T=150)
    cache = compressed(rows)
    before = dense(cache)
    assert cache.trim(150 - kept) == 150 - kept
    assert cache.offset == cache.size() == kept and cache.empty() == (kept == 0)
    if kept:
        for old, new in zip(before, dense(cache), strict=True):
            assert mx.array_equal(old[:, :, :kept], new)
    more = random_rows(T=100, seed=9)
    cache.update_and_fetch(*more)
    cache.compress()
    assert cache.offset == kept + 100
    assert mx.array_equal(dense(cache)[0][:, :, -16:], more[0][:, :, -16:])


def test_trim_never_forgets_more_than_there_is(random_rows):
    cache = compressed(random_rows(T=100))
    assert cache.is_trimmable() and cache.trim(1000) == 100 and cache.empty()
    assert cache.nbytes == 0


def test_trimming_a_few_tokens_touches_no_packed_block(random_rows):
    cache = compressed(random_rows(T=150))
    blocks = cache._blocks[0].view().codes
    cache.update_and_fetch(*random_rows(T=8))
    cache.trim(8)
    assert cache.block_tokens == 128 and mx.array_equal(blocks, cache._blocks[0].view().codes)


def test_a_deep_copy_goes_its_own_way(model):
    ids = tokens(200)
    cache = make_prompt_cache(model, kv_scheme="turbo4")
    model(ids[:, :150], cache=cache)
    decode(model, ids, cache, 150, 151)
    copied = copy.deepcopy(cache)
    first = decode(model, ids, cache, 151, 190)
    for layer in copied:
        assert layer.offset == 151
    assert mx.array_equal(first, decode(model, ids, copied, 151, 190))


def test_stale_rows_beyond_the_length_do_not_leak(random_rows):
    cache = compressed(random_rows(T=150))
    for buffer in cache._tail:
        buffer.array[:, :, buffer.length :] = 6e4
    held = dense(cache)
    assert all(mx.abs(rows).max() < 100 for rows in held)


@pytest.mark.parametrize("bad", [mx.nan, mx.inf, -mx.inf])
def test_a_bad_key_harms_only_its_own_entries_and_is_reported_with_its_layer(random_rows, bad):
    keys, values = random_rows(T=150)
    clean = compressed((keys, values), "turbo4", layer=7)
    keys[0, 1, 70, 5] = bad
    values[0, 0, 75, 3] = bad
    cache = compressed((keys, values), "turbo4", layer=7)
    held = dense(cache)
    assert all(mx.isfinite(rows).all() for rows in held)
    # Head 0's keys never saw the bad one. Head 1's differ by no more than another rounding of the balance and centre.
    assert mx.array_equal(held[0][:, 0], dense(clean)[0][:, 0])
    others = mx.array([t for t in range(150) if t != 70])
    error = mx.abs(held[0][:, 1] - keys[:, 1])[:, others].astype(mx.float32)
    usual = mx.abs(dense(clean)[0][:, 1] - keys[:, 1])[:, others].astype(mx.float32)
    assert error.max() < 2 * usual.max()
    with pytest.warns(RuntimeWarning, match="layer 7: 2 tokens had NaN or Inf"):
        for step in range(3):
            cache.update_and_fetch(*random_rows(T=1, seed=step))
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        cache.update_and_fetch(*random_rows(T=1, seed=3))


def test_finite_rows_are_not_reported(random_rows):
    cache = compressed(random_rows(T=150))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            cache.update_and_fetch(*random_rows(T=1, seed=step))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda k, v: (k[0], v[0]), r"layer 3: keys and values must be \(B, Hkv, L, D\)"),
        (lambda k, v: (k[:, :, :0], v[:, :, :0]), "L > 0"),
        (lambda k, v: (k, v[:, :, :-1]), "equal B, Hkv and L"),
        (lambda k, v: (k.astype(mx.int32), v.astype(mx.int32)), "must both be float16, bfloat16 or float32"),
        (lambda k, v: (k, v.astype(mx.float32)), "must both be"),
        (lambda k, v: (mx.repeat(k, 2, axis=0), mx.repeat(v, 2, axis=0)), r"batch 1, 2 heads.*got \(2, 2, 5, 64\)"),
        (lambda k, v: (k[:, :1], v[:, :1]), "Make a new cache for another batch or model"),
        (lambda k, v: (k[..., :32], v[..., :32]), "head size 64"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_changes(random_rows, make, message):
    cache = compressed(random_rows(T=150), layer=3)
    before = dense(cache)
    with pytest.raises(ValueError, match=message):
        cache.update_and_fetch(*make(*random_rows(T=5)))
    assert cache.offset == 150
    assert all(mx.array_equal(a, b) for a, b in zip(before, dense(cache), strict=True))


def test_a_group_that_does_not_divide_the_head_size_is_refused(random_rows):
    with pytest.raises(ValueError, match="group=32 does not divide the head size 80"):
        TurboQuantKVCache("turbo4:group=32").update_and_fetch(*random_rows(D=80))


def test_kv_bits_on_top_of_a_scheme_is_refused():
    with pytest.raises(ValueError, match="already has the scheme 'turbo4'"):
        TurboQuantKVCache("turbo4").to_quantized(64, 4)


def test_other_methods_have_other_caches():
    with pytest.raises(ValueError, match="'mlx4' is a cache of mlx-lm's own"):
        TurboQuantKVCache("mlx4")


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_every_head_size_and_dtype_round_trips(random_rows, dim, dtype):
    rows = random_rows(T=84, D=dim, dtype=dtype)
    cache = compressed(rows, "turbo4")
    for original, held in zip(rows, dense(cache), strict=True):
        assert held.dtype == dtype and held.shape == original.shape
        assert mx.square((original - held)[:, :, 4:68].astype(mx.float32)).mean() < 0.013


def test_keys_and_values_may_have_different_head_sizes():
    keys, values = mx.random.normal((1, 2, 100, 96)), mx.random.normal((1, 2, 100, 64))
    cache = compressed((keys, values))
    assert [rows.shape for rows in cache.keys_and_values()] == [keys.shape, values.shape]


def test_offsets_of_qwen_size_do_not_spoil_keys():
    keys = mx.random.normal((1, 1, 150, 64), key=mx.random.key(0))
    keys[..., 3] += 60.0
    errors = {}
    for scheme in ("turbo4", "turbo4:center=0,balance=0"):
        held = dense(compressed((keys, keys), scheme))[0]
        errors[scheme] = mx.square(held - keys)[:, :, 4:132].mean().item()
    assert errors["turbo4"] < 0.02 < 0.3 < errors["turbo4:center=0,balance=0"]


def test_second_turns_read_a_compressed_cache_and_grow_it():
    model = tiny_llama(seed=4)
    ids = tokens(400)
    logits = {}
    for name, cache in (
        ("raw", raw_prompt_cache(model)),
        ("turbo8", make_prompt_cache(model, kv_scheme="turbo8")),
    ):
        model(ids[:, :150], cache=cache)
        decode(model, ids, cache, 150, 170)
        turn = model(ids[:, 170:300], cache=cache)  # 130 queries over compressed rows
        logits[name] = mx.concatenate([turn, decode(model, ids, cache, 300, 320)], axis=1)
    assert cache[0].block_tokens == (320 - 4 - 16) // 64 * 64
    assert kld(logits["raw"], logits["turbo8"]) < 3e-4


def test_schemes_are_kept_by_the_cache():
    assert TurboQuantKVCache("turbo4v2").scheme == KVScheme.parse("turbo4v2")


def test_layers_encoded_in_kernels_are_started_together_up_to_a_part_of_the_memory(monkeypatch):
    started, array = [], mx.zeros(8)
    monkeypatch.setattr(settling.mx, "async_eval", lambda *arrays: started.append(len(arrays)))
    monkeypatch.setattr(settling.mx, "get_memory_limit", lambda: 256 * 100 * 2**20)
    monkeypatch.setattr(settling, "_started", threading.local())
    for _ in range(7):
        settling.start_settling(40 * 2**20, lambda: [array], lean=True)
    assert started == [1, 1]  # after 120 MiB, twice
    for _ in range(3):
        settling.start_settling(40 * 2**20, lambda: [array])  # plain operations: each layer
    settling.start_settling(4 * 2**20, lambda: [array])
    assert started == [1] * 5


@pytest.mark.parametrize("batched", [False, True])
def test_layers_of_a_chunk_are_started_as_they_are_read(batched, monkeypatch):
    cache, started = TurboQuantKVCache("turbo4"), []
    if batched:
        cache = cache.merge([cache, TurboQuantKVCache("turbo4")])
    monkeypatch.setattr(settling.mx, "async_eval", started.append)
    sequences = 1 + batched
    for n, count in ((settling.CHUNK, 1), (settling.CHUNK - 1, 1), (3 * settling.CHUNK, 2)):
        cache.update_and_fetch(*(mx.ones((sequences, 1, n, 64), mx.float16) for _ in range(2)))
        assert len(started) == count
        cache.state  # noqa: B018  (a chunk has ended)
    assert started[-1].shape == (sequences, 1, 768, 64)  # keys with their room


def test_a_chunk_may_be_read_inside_a_transformation():
    """There nothing can be started."""

    @mx.compile
    def read(keys):
        cache = TurboQuantKVCache("turbo4")
        return cache.update_and_fetch(keys, keys)[0]

    keys = mx.random.normal((1, 1, 2 * settling.CHUNK, 64)).astype(mx.float16)
    assert mx.array_equal(read(keys), keys)
