"""Several sequences in one batch: the same tokens as alone, whatever joins and leaves."""

import copy
from unittest import mock

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from attend_cases import BACKEND, UNSUPPORTED
from conftest import memory_in_use, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator, generate_step

from mlx_turboquant import KVScheme, attention, make_prompt_cache, report
from mlx_turboquant.cache import BatchTurboQuantKVCache, RawLayerCache, SingleKVCache, TurboQuantKVCache
from mlx_turboquant.ops import attend as kernel
from mlx_turboquant.scheme_file import LayerSchemes

# With these, a sequence that is not long is raw for a while and then gets a new block each 16 tokens.
SHORT = "turbo4:block=16,window=4,sinks=2"


def ids(count: int, seed: int) -> list[int]:
    return mx.random.randint(0, 96, (count,), key=mx.random.key(seed)).tolist()


def alone(model, prompt: list[int], count: int, cache) -> list[int]:
    steps = generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=count, prefill_step_size=32)
    return [token for token, _ in steps]


@given(
    st.sampled_from(
        [SHORT, "turbo3", "turbo0v4:window=0", "turbo8v2:balance=0,block=32", SHORT + ",prefill=compressed"]
    ),
    st.sampled_from([None, None, 60]),
    st.lists(
        st.tuples(
            st.sampled_from([1, 2, 15, 16, 21, 22, 23, 32, 33, 64, 83, 84, 85, 120]),  # tokens of a prompt
            st.integers(1, 40),  # tokens to generate
            st.integers(0, 5),  # steps until the next one comes
            st.booleans(),  # removed before it is done
        ),
        min_size=2,
        max_size=8,
    ),
)
@settings(max_examples=16, deadline=None)
def test_any_schedule_gives_each_sequence_the_tokens_it_has_alone(model, scheme, bound, plan):
    bound = bound if scheme.startswith(SHORT) else None  # the others need more room
    generator = BatchGenerator(model, prefill_step_size=32, completion_batch_size=8, prefill_batch_size=3)
    prompts = [ids(length, seed=i) for i, (length, *_) in enumerate(plan)]
    got: dict[int, list[int]] = {}
    leaving = {}

    def step() -> bool:
        prompt_responses, responses = generator.next()
        for response in responses:
            got[response.uid].append(response.token)
        for uid in [uid for uid, left in leaving.items() if len(got[uid]) >= left]:
            generator.remove([uid])
            del leaving[uid]
        return bool(prompt_responses or responses)

    for prompt, (_, count, wait, removed) in zip(prompts, plan, strict=True):
        (uid,) = generator.insert([prompt], [count], caches=[make_prompt_cache(model, bound, kv_scheme=scheme)])
        got[uid] = []
        if removed:
            leaving[uid] = count // 2
        for _ in range(wait):
            step()
    while step():
        pass
    for (uid, tokens), prompt, (_, count, _, removed) in zip(got.items(), prompts, plan, strict=True):
        expected = alone(model, prompt, count, make_prompt_cache(model, bound, kv_scheme=scheme))
        assert tokens == (expected[: len(tokens)] if removed else expected), uid
        assert not removed or len(tokens) >= count // 2


def filled(scheme: str, lengths: list[int], steps: int = 0, max_size: int | None = None) -> list[TurboQuantKVCache]:
    """Caches with random prompts, and so many decode steps after them; rows depend on the sequence and the position."""
    caches = [TurboQuantKVCache(scheme, max_size=max_size) for _ in lengths]
    for i, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        if length:
            cache.update_and_fetch(*rows(i, 0, length))
            for n in range(length, length + steps):
                cache.update_and_fetch(*rows(i, n, n + 1))
    return caches


def rows(sequence: int, start: int, stop: int) -> tuple[mx.array, mx.array]:
    both = mx.random.normal((2, 1, 2, 512, 64), key=mx.random.key(sequence))[:, :, :, start:stop]
    return both[0].astype(mx.float16), both[1].astype(mx.float16)


def flat(cache) -> list:
    """The state of a single cache as a flat list of numbers, text and numpy arrays."""

    def walk(part):
        if isinstance(part, (list, tuple)):
            return [item for inner in part for item in walk(inner)]
        return (
            [np.array(part.astype(mx.float32) if part.dtype == mx.bfloat16 else part)]
            if isinstance(part, mx.array)
            else [part]
        )

    return walk(cache.state)


def same(a, b) -> bool:
    pairs = zip(flat(a), flat(b), strict=True)
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in pairs)


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [
        (SHORT, None),
        ("turbo4:sinks=0", None),
        ("turbo0v2", None),
        ("turbo8v0:center=0", None),
        (SHORT, 60),
        (SHORT, 100),
    ],
)
def test_a_sequence_taken_out_is_the_cache_it_would_have_been(scheme, bound):
    lengths = [0, 1, 22, 90, 170]
    batch = TurboQuantKVCache.merge(filled(scheme, lengths, max_size=bound))
    for n in range(30):
        new = [rows(i, length + n, length + n + 1) for i, length in enumerate(lengths)]
        batch.update_and_fetch(*(mx.concatenate(side) for side in zip(*new, strict=True)))
    singles = filled(scheme, lengths, steps=30, max_size=bound)
    singles[0].update_and_fetch(*rows(0, 0, 1))  # its first token is a prompt
    for n in range(1, 30):
        singles[0].update_and_fetch(*rows(0, n, n + 1))
    assert any(single.block_tokens for single in singles)
    assert all(same(batch.extract(i), single) for i, single in enumerate(singles))
    assert batch.offset.tolist() == [single.offset for single in singles] == [30, 31, 52, 120, 200]
    assert batch.size() == max(single.size() for single in singles) <= (bound or 200)
    assert batch.is_trimmable() == all(single.is_trimmable() for single in singles)
    assert batch.raw_nbytes == sum(single.raw_nbytes for single in singles)


@pytest.mark.parametrize(
    ("scheme", "bound"), [(SHORT, None), (SHORT + ",balance=0,prefill=compressed", None), (SHORT + ",balance=0", 60)]
)
def test_prompts_that_are_padded_on_the_right_leave_no_trace(scheme, bound):
    lengths, longest = [5, 37, 96], 96
    singles = filled(scheme, [0, 0, 0], max_size=bound)
    batch = TurboQuantKVCache.merge(singles)
    batch.prepare(lengths=lengths, right_padding=[longest - n for n in lengths])
    for start in range(0, longest, 16):
        new = [rows(i, start, start + 16) for i in range(3)]
        batch.update_and_fetch(*(mx.concatenate(side) for side in zip(*new, strict=True)))
        batch.observe_queries(mx.concatenate([keys for keys, _ in new]))
        for single, length, (keys, values) in zip(singles, lengths, new, strict=True):
            if n := min(max(length - start, 0), 16):
                single.update_and_fetch(keys[:, :, :n], values[:, :, :n])
                single.observe_queries(keys[:, :, :n])
                single._queries.count_newest()  # few queries are held back otherwise, until a loop says what they were
    batch.finalize()
    assert batch.offset.tolist() == lengths
    for cache in (batch, *singles):
        cache.compress()
    for i, single in enumerate(singles):
        taken = batch.extract(i)
        if scheme == SHORT:  # sums in another order round otherwise, and with them the balance
            np.testing.assert_allclose(taken._queries.sums, single._queries.sums, rtol=1e-4)
        else:
            assert same(taken, single)
    batch.prepare(left_padding=[0, 0, 0])
    with pytest.raises(ValueError, match="Left padding is not supported"):
        batch.prepare(left_padding=[0, 1, 0])


@pytest.mark.parametrize("n", [1, 3, 20, 60, 150, 500])
def test_trimming_a_batch_trims_each_sequence(n):
    lengths = [1, 22, 90, 170]
    batch = TurboQuantKVCache.merge(filled(SHORT, lengths, steps=2))
    singles = filled(SHORT, lengths, steps=2)
    assert batch.trim(n) == min(n, 172)
    for single in singles:
        single.trim(n)
    for i, single in enumerate(singles):
        taken = batch.extract(i)
        taken._trimmed = single._trimmed
        assert same(taken, single) or (taken.empty() and single.empty())


def test_those_who_stay_in_a_batch_are_what_they_were():
    lengths = [1, 5, 90, 60]
    batch, singles = TurboQuantKVCache.merge(filled(SHORT, lengths, steps=2)), filled(SHORT, lengths, steps=2)
    batch.filter([3, 1])
    assert singles[3].block_tokens and not singles[1].block_tokens
    assert same(batch.extract(0), singles[3]) and same(batch.extract(1), singles[1])


def test_what_leaves_gives_its_room_back():
    batch = TurboQuantKVCache.merge(filled("turbo4", [100, 500], steps=2))
    before = batch.nbytes
    batch.filter([0])
    assert batch.nbytes < before / 3 and batch.offset.tolist() == [102]
    raw = BatchTurboQuantKVCache.merge(filled("turbo4", [10, 500]))
    raw.filter([0])
    assert raw.nbytes < 2 * 2 * 64 * 2 * 256  # one step of 256 rows at most


def decoding(scheme: str, lengths: list[int]) -> BatchTurboQuantKVCache:
    """A batch as mlx-lm hands it over to decoding: prompts read in chunks, then one token of each."""
    batch = TurboQuantKVCache.merge([TurboQuantKVCache(scheme) for _ in lengths])
    padding = [max(lengths) - n for n in lengths]
    batch.prepare(lengths=lengths, right_padding=padding)
    for start in range(0, max(lengths), 512):
        both = mx.random.normal((2, len(lengths), 2, min(512, max(lengths) - start), 64), key=mx.random.key(start))
        batch.update_and_fetch(*both.astype(mx.float16))
        exec("mx.eval(batch.state)", {"__name__": "mlx_lm.generate", "mx": mx, "batch": batch})
    batch.finalize()
    batch.update_and_fetch(*mx.ones((2, len(lengths), 2, 1, 64), mx.float16))
    mx.eval(batch._rows.tail)
    return batch


def test_a_long_prompt_that_joins_takes_no_raw_room_from_the_others():
    """The most bytes at once while 4,000 tokens join 7 sequences, and in the step after it.

    All 8 had the room of the raw prompt until that step, which took 46 MB over what was there before, and 14 now. In
    8 layers of a model in `BatchGenerator` it was 52 and is 14 MB; with turbo4 62 and 40, which encoding the prompt of
    one layer takes on a CPU.
    """
    batch, joining = decoding("affine2", [100] * 7), decoding("affine2", [4000])
    batch.update_and_fetch(*mx.ones((2, 7, 2, 1, 64), mx.float16))
    mx.eval(batch._rows.tail)
    raw_bytes, before = joining.raw_nbytes, memory_in_use()
    mx.reset_peak_memory()
    batch.extend(joining)
    del joining
    assert batch._rows.tail[0].shape[2] == 64 + 16 + 8
    for _ in range(2):
        mx.eval(list(batch._rows.arrays().values()))
        batch.update_and_fetch(*mx.ones((2, 8, 2, 1, 64), mx.float16))
    assert mx.get_peak_memory() - before < 8 * raw_bytes  # what a tail with that room would take by itself


def test_what_joins_in_mlx_lm_is_encoded_first(model):
    """In `BatchGenerator` outside of our server: its own class for that is not asked."""
    generator = BatchGenerator(model, prefill_step_size=64, completion_batch_size=4)
    prompts = [ids(n, seed=n) for n in (20, 40, 300)]
    got: dict[int, list[int]] = {}
    for prompt in prompts:
        (uid,) = generator.insert([prompt], [20], caches=[make_prompt_cache(model, kv_scheme=SHORT)])
        got[uid] = []
        rooms = []
        while len(got[uid]) < 3:
            for response in generator.next()[1]:
                got[response.uid].append(response.token)
            rooms += [layer._rows.tail[0].shape[2] for layer in generator._generation_batch.prompt_cache]
    assert len(generator._generation_batch) == 3 and max(rooms) <= 256
    while responses := generator.next()[1]:
        for response in responses:
            got[response.uid].append(response.token)
    for tokens, prompt in zip(got.values(), prompts, strict=True):
        assert tokens == alone(model, prompt, 20, make_prompt_cache(model, kv_scheme=SHORT))


def test_while_a_prompt_is_read_nothing_is_encoded_by_joining():
    batch = TurboQuantKVCache.merge(filled("turbo4", [200]))
    batch.extend(TurboQuantKVCache.merge(filled("turbo4", [300], steps=2)))
    assert [length.packed for length in batch._rows.lengths] == [0, 256]


def test_a_copy_shares_nothing_that_changes():
    batch = TurboQuantKVCache.merge(filled(SHORT, [30, 50], steps=2))
    kept = copy.deepcopy(batch)
    before = [flat(kept.extract(i)) for i in range(2)]
    for n in range(20):
        batch.update_and_fetch(*(mx.concatenate([new] * 2) for new in rows(5, n, n + 1)))
    batch.filter([1])
    after = [flat(kept.extract(i)) for i in range(2)]
    assert all(np.array_equal(x, y) for a, b in zip(before, after, strict=True) for x, y in zip(a, b, strict=True))


def test_the_state_holds_all_of_it():
    batch = TurboQuantKVCache.merge(filled(SHORT, [1, 30, 150], steps=2))
    again = BatchTurboQuantKVCache("turbo4")
    again.state = batch.state
    new = [mx.concatenate([part] * 3) for part in rows(7, 0, 1)]
    before = [flat(batch.extract(i)) for i in range(3)]
    for _ in range(20):
        again.update_and_fetch(*new)
    after = [flat(batch.extract(i)) for i in range(3)]
    assert all(np.array_equal(x, y) for a, b in zip(before, after, strict=True) for x, y in zip(a, b, strict=True))
    for _ in range(20):
        batch.update_and_fetch(*new)
    assert all(same(batch.extract(i), again.extract(i)) for i in range(3))


def test_an_offset_that_is_changed_in_place_changes_no_cache():
    batch, other = (TurboQuantKVCache.merge(filled(SHORT, [3, 5])) for _ in range(2))
    offset = batch.offset
    offset += 7
    assert offset.tolist() == [10, 12]
    assert batch.offset.tolist() == other.offset.tolist() == [3, 5]


@pytest.mark.parametrize("lengths", [[0, 0], [7, 7], [1, 30, 150]])
def test_mlx_lm_saves_and_loads_a_batch(tmp_path, lengths):
    batch = TurboQuantKVCache.merge(filled(SHORT, lengths, steps=2))
    padding = [3, 1, 0][: len(lengths)]
    batch.prepare(lengths=[40 - n for n in padding], right_padding=padding)
    path = str(tmp_path / "batch.safetensors")
    mlx_lm.models.cache.save_prompt_cache(path, [batch])
    (again,) = mlx_lm.models.cache.load_prompt_cache(path)
    for cache in (batch, again):
        for _ in range(2):
            cache.update_and_fetch(*(mx.concatenate([new] * len(lengths)) for new in rows(7, 0, 20)))
        cache.finalize()
        for n in range(20, 40):
            cache.update_and_fetch(*(mx.concatenate([new] * len(lengths)) for new in rows(7, n, n + 1)))
    assert all(same(batch.extract(i), again.extract(i)) for i in range(len(lengths)))


def test_a_pipeline_ties_what_it_sends_to_the_keys():
    single = filled(SHORT, [40, 70], steps=1)
    plain, tied = (TurboQuantKVCache.merge(single) for _ in range(2))
    assert BatchTurboQuantKVCache(SHORT, sequences=2).keys is None
    assert tied.keys.shape[:2] == tied.values.shape[:2] == (2, 2) and tied.keys.dtype == mx.float16
    for n in range(30):
        new = [mx.concatenate([part] * 2) for part in rows(5, n, n + 1)]
        plain.update_and_fetch(*new)
        tied.update_and_fetch(*new)
        tied.keys = mx.depends(tied.keys, mx.array(n))
    assert all(same(plain.extract(i), tied.extract(i)) for i in range(2))


def test_what_does_not_belong_together_is_refused(random_rows):
    one, two = filled("turbo4", [20, 30])
    for other, words in (
        (TurboQuantKVCache("turbo3"), "same scheme, got turbo4:.* and turbo3:"),
        (TurboQuantKVCache("turbo4", layer=3), "same layer, got 0 and 3"),
        (TurboQuantKVCache("turbo4", fingerprint="a"), None),
        (mlx_lm.models.cache.RotatingKVCache(8), "Only a TurboQuantKVCache can be merged, got RotatingKVCache"),
    ):
        if words is None:
            one.fingerprint, words = "b", "same model, got b and a"
        with pytest.raises(ValueError, match=words):
            TurboQuantKVCache.merge([one, other])
    wide = TurboQuantKVCache("turbo4", fingerprint="b")
    wide.update_and_fetch(*random_rows(H=4))
    with pytest.raises(ValueError, match="same shape"):
        TurboQuantKVCache.merge([one, wide])
    several = TurboQuantKVCache("turbo4")
    several.update_and_fetch(*random_rows(B=3))
    with pytest.raises(ValueError, match="must hold one sequence, got one of 3"):
        TurboQuantKVCache.merge([several])
    with pytest.raises(ValueError, match="holds 1 sequences, got keys of 2"):
        TurboQuantKVCache.merge([two]).update_and_fetch(*random_rows(B=2, T=1))


def test_the_mask_of_unequal_lengths():
    batch = TurboQuantKVCache.merge(filled("turbo4", [2, 5]))
    assert batch.make_mask(1) is None and batch.make_mask(3) == "causal"
    mask = np.array(batch.make_mask(2, return_array=True))
    assert mask.shape == (2, 1, 2, 7)
    for sequence, length in enumerate([2, 5]):
        for query in range(2):
            assert mask[sequence, 0, query].tolist() == [token <= length + query for token in range(7)]
    window = np.array(batch.make_mask(2, window_size=2))
    assert window.sum(axis=-1).tolist() == [[[2, 2]], [[2, 2]]]
    bounded = TurboQuantKVCache.merge(filled(SHORT, [50, 90], steps=2, max_size=60))
    for window in (None, 20, 55):  # the last reaches back to what is behind the sinks
        together = np.array(bounded.make_mask(2, return_array=True, window_size=window))
        for i in range(2):
            one = np.array(bounded.extract(i).make_mask(2, return_array=True, window_size=window))
            assert (
                np.array_equal(together[i, 0, :, : one.shape[1]], one) and not together[i, 0, :, one.shape[1] :].any()
            )
    equal = TurboQuantKVCache.merge(filled("turbo4", [3, 3]))
    assert mx.array_equal(equal.make_mask(2, return_array=True), mlx_lm.models.base.create_causal_mask(2, 3))


@pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)
@pytest.mark.parametrize("L", [1, 3])
def test_unequal_lengths_are_read_in_one_call_of_the_kernel(L):
    batch = TurboQuantKVCache.merge(filled(SHORT, [3, 25, 60], steps=2))
    keys, values = batch.update_and_fetch(
        *(mx.concatenate(s) for s in zip(*(rows(9, i, i + L) for i in range(3)), strict=True))
    )
    assert len({length.packed for length in batch._rows.lengths}) == 3
    queries = mx.random.normal((3, 4, L, 64), key=mx.random.key(1)).astype(mx.float16)
    mask = "causal" if L > 1 else None
    call = kernel.Reader.__call__
    with mock.patch.object(kernel.Reader, "__call__", autospec=True, side_effect=call) as calls:
        fused = attention.attend(queries, keys, values, 0.125, mask, backend=BACKEND)
    assert calls.call_count == 1
    one_by_one = attention.attend(queries, keys, values, 0.125, mask, backend="reference")
    assert mx.allclose(fused, one_by_one, atol=2e-3, rtol=2e-2)
    shown = attention.attend(
        queries, keys, values, 0.125, mx.zeros((3, 1, L, keys.shape[2]), mx.float16), backend="reference"
    )
    assert mx.allclose(shown, attention.attend(queries, keys, values, 0.125, None, backend="reference"), atol=2e-3)


def test_a_second_turn_continues_what_was_taken_out(model):
    prompts, turn = [ids(n, seed=n) for n in (30, 90, 200)], ids(25, seed=1)
    caches = [make_prompt_cache(model, kv_scheme=SHORT) for _ in prompts]
    tokenizer = mock.Mock(eos_token_ids=[], decode=str)
    first = mlx_lm.batch_generate(
        model, tokenizer, prompts, caches, max_tokens=20, return_prompt_caches=True, return_token_ids=True
    )
    second = mlx_lm.batch_generate(
        model, tokenizer, [turn] * 3, first.caches, max_tokens=20, return_token_ids=True, prefill_step_size=16
    )
    for i, prompt in enumerate(prompts):
        cache = make_prompt_cache(model, kv_scheme=SHORT)
        assert alone(model, prompt, 20, cache) == first.token_ids[i]
        assert alone(model, turn, 20, cache) == second.token_ids[i]


def test_raw_layers_of_a_compressed_model_lie_like_the_others():
    model = tiny_llama(layers=3, seed=4)
    prompts = [ids(n, seed=n) for n in (7, 40, 60)]

    schemes = LayerSchemes(tuple(map(KVScheme.parse, (SHORT, "fp16", SHORT))))

    def mixed():
        return make_prompt_cache(model, kv_scheme=schemes)

    tokenizer = mock.Mock(eos_token_ids=[], decode=str)
    got = mlx_lm.batch_generate(
        model,
        tokenizer,
        prompts,
        [mixed() for _ in prompts],
        max_tokens=30,
        return_token_ids=True,
        return_prompt_caches=True,
    )
    assert [type(cache) for cache in got.caches[0]] == [TurboQuantKVCache, RawLayerCache, TurboQuantKVCache]
    assert got.token_ids == [alone(model, prompt, 30, mixed()) for prompt in prompts]
    assert report(got.caches[0]).layers[1].why_raw == "the scheme file keeps this layer raw"


def test_a_layer_that_cannot_read_ragged_rows_has_no_batches(model):
    single = SingleKVCache.like(mlx_lm.models.cache.KVCache())
    assert single.empty() and not hasattr(single, "merge")
    with pytest.raises(ValueError, match=r"SingleKVCache'> does not yet support batching"):
        mlx_lm.batch_generate(model, mock.Mock(eos_token_ids=[], decode=str), [[1, 2]], [[single, single]])


def test_what_was_looked_at_is_let_go_of_where_every_step_encodes():
    """Sequences a step apart, with blocks of 16: some sequence encodes in nearly every step."""
    singles = [TurboQuantKVCache("turbo4:block=16,window=4,sinks=2") for _ in range(16)]
    for i, single in enumerate(singles):
        single.update_and_fetch(*mx.random.normal((2, 1, 2, 40 + i, 64), key=mx.random.key(i)))
    batch, most = BatchTurboQuantKVCache.merge(singles), 0
    for step in range(60):
        batch.update_and_fetch(*mx.random.normal((2, 16, 2, 1, 64), key=mx.random.key(99 + step)))
        mx.eval(batch.state)
        most = max(most, len(batch._nonfinite._seen))
    assert 1 < most < 8 * 16
    assert len(batch._nonfinite._seen) < 8
