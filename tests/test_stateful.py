"""Caches under random sequences of calls: every row, length, mask, sum and byte is the slow model's, after each one.

In CI each scheme runs a few sequences of calls that are the same every time. MLX_TURBOQUANT_STATEFUL=200 runs 200
longer ones for each scheme, others every time; ``--hypothesis-seed`` repeats some. What fails is printed as a program,
not shrunk: shrinking takes long, and the last call is what failed.
"""

import copy
import os
import weakref
import zlib

import mlx.core as mx
import mlx_lm
import pytest
from cache_machine import STEPS, Layers, head_sizes, parts_of, small
from cache_model import Shape
from cache_phases import Batch, Single
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from schemes import SCHEMES

from mlx_turboquant import load_prompt_cache, save_prompt_cache
from mlx_turboquant.cache import BatchTurboQuantKVCache, TurboQuantKVCache
from mlx_turboquant.cache.bound import least_size

EXAMPLES = int(os.environ.get("MLX_TURBOQUANT_STATEFUL", "0"))
MOST_TOKENS, MOST_SINGLES, MOST_SEQUENCES = 220, 3, 4


class Draft:
    """A draft model's cache, as far as it is asked."""

    def __init__(self, offset):
        self.offset = offset


class Caches(Layers):
    """Everything that may be done with caches, in any order."""

    def __init__(self, text, folder):
        super().__init__()
        self.text, self.folder = text, folder

    @initialize(data=st.data())
    def begin(self, data):
        scheme = small(self.text, data.draw)
        dims = data.draw(st.sampled_from(head_sizes(scheme)))
        dtype = data.draw(st.sampled_from([mx.float16, mx.bfloat16, mx.float32]))
        bound = data.draw(st.sampled_from([None, None, 0, 7, 40]))
        self.shape = Shape(scheme, dims, dtype, None if bound is None else least_size(scheme) + bound)
        self.tolerance = {mx.float16: 0.02, mx.bfloat16: 0.12, mx.float32: 1e-3}[dtype]
        self.new_single()

    # --- one sequence ---------------------------------------------------------------------------------------------

    def new_single(self):
        self.singles.append((TurboQuantKVCache(self.shape.scheme, max_size=self.shape.max_size), Single(self.shape)))

    def pick(self, data, most=MOST_TOKENS):
        """The index of one of the single caches that is not too long yet."""
        short = [i for i, (_, model) in enumerate(self.singles) if model.sequence.offset <= most]
        if not short:
            self.singles.pop()
            self.new_single()
            short = [len(self.singles) - 1]
        return data.draw(st.sampled_from(short))

    @rule(
        data=st.data(),
        counts=st.lists(st.sampled_from([1, 2, 7, 8, 9, 16, 23, 40, 64]), min_size=1, max_size=3),
        loop=st.booleans(),
        window=st.sampled_from([None, None, 1, 10]),
    )
    def prompt(self, data, counts, loop, window):
        """A prompt, or another turn's, in chunks; by one of mlx-lm's loops or by another."""
        cache, model = self.singles[self.pick(data)]
        for count in counts:
            self.call(cache, model, 1, count, window)
            if loop:
                self.read_by_loop(cache, model)
        self.check_all()

    @rule(data=st.data(), count=st.integers(1, 40))
    def decode(self, data, count):
        cache, model = self.singles[self.pick(data)]
        for _ in range(count):
            self.call(cache, model, 1, 1)
        self.check_all()

    @rule(
        data=st.data(),
        rounds=st.lists(st.tuples(st.integers(2, 8), st.integers(0, 8)), min_size=1, max_size=4),
        last=st.sampled_from(["some", "none", "many"]),
        many=st.integers(0, 100),
    )
    def verify(self, data, rounds, last, many):
        """Drafts are verified, the rejected ones taken back; after the last call more than those, or nothing yet."""
        cache, model = self.singles[self.pick(data)]
        for i, (count, rejected) in enumerate(rounds):
            self.trim_single(cache, model, 0)
            self.call(cache, model, 1, count)
            self.check_single(cache, model)
            if i < len(rounds) - 1 or last == "some":
                self.trim_single(cache, model, min(rejected, count - 1))
            elif last == "many":
                self.trim_single(cache, model, many)
        self.check_all()

    @precondition(lambda self: self.shape.max_size is None)  # a draft model beside a bound is refused
    @rule(
        data=st.data(), count=st.integers(9, 60), loop=st.booleans(), drafts=st.integers(2, 8), back=st.integers(0, 8)
    )
    def verify_after_a_prompt(self, data, count, loop, drafts, back):
        """The first drafts come right after the prompt; a linked draft model tells them from a chunk of it."""
        cache, model = self.singles[self.pick(data)]
        self.call(cache, model, 1, count)
        if loop:
            self.read_by_loop(cache, model)
        draft = Draft(cache.offset + drafts - 1)
        cache._draft = weakref.ref(draft)
        model.drafts = True
        self.call(cache, model, 1, drafts)
        self.check_single(cache, model)
        cache._draft, model.drafts = None, False
        if back:
            self.trim_single(cache, model, min(back, drafts) - 1)
        self.check_all()

    def trim_single(self, cache, model, n):
        if model.sequence.can_trim(n):
            assert cache.trim(n) == min(n, model.sequence.offset)
            model.trim(n)
        else:
            with pytest.raises(ValueError, match="cannot go back to"):
                cache.trim(n)

    @rule(data=st.data(), n=st.one_of(st.integers(0, 30), st.integers(0, 300)))
    def trim(self, data, n):
        cache, model = self.singles[self.pick(data)]
        self.trim_single(cache, model, n)
        self.check_all()

    @rule(data=st.data())
    def compress(self, data):
        cache, model = self.singles[self.pick(data)]
        assert cache.compress() == model.compress()
        self.check_all()

    @rule(data=st.data(), theirs=st.booleans())
    def save_and_load(self, data, theirs):
        i = self.pick(data)
        cache, model = self.singles[i]
        path = self.folder / "one.safetensors"
        if theirs:
            mlx_lm.models.cache.save_prompt_cache(str(path), [cache])
            (again,) = mlx_lm.models.cache.load_prompt_cache(str(path))
        else:
            (again,) = load_prompt_cache(save_prompt_cache(path, [cache]))
        self.singles[i] = again, model.restored()
        self.check_all()

    @precondition(lambda self: len(self.singles) < MOST_SINGLES)
    @rule(data=st.data())
    def copied(self, data):
        self.singles.append(copy.deepcopy(self.singles[self.pick(data)]))
        self.check_all()

    @precondition(lambda self: len(self.singles) < MOST_SINGLES)
    @rule(data=st.data())
    def adopted(self, data):
        """A new cache takes over what another holds raw."""
        other, theirs = self.singles[self.pick(data)]
        self.new_single()
        cache, model = self.singles[-1]
        sequence = theirs.sequence
        if sequence.packed or sequence.dropped:
            with pytest.raises(ValueError, match="only a raw and whole one"):
                cache.adopt(other)
        elif sequence.held:
            cache.adopt(other)
            model.sequence = copy.deepcopy(sequence)
        self.check_all()

    # --- several sequences ----------------------------------------------------------------------------------------

    def pick_batch(self, data, most=MOST_TOKENS):
        short = [i for i, (_, m) in enumerate(self.batches) if max(s.offset for s in m.sequences) <= most]
        if not short:
            self.batches.pop()
            self.make_batch(data)
            short = [len(self.batches) - 1]
        return data.draw(st.sampled_from(short))

    def make_batch(self, data):
        """A batch of copies of single caches, some of them empty."""
        singles = [
            *self.singles,
            (TurboQuantKVCache(self.shape.scheme, max_size=self.shape.max_size), Single(self.shape)),
        ]
        chosen = data.draw(st.lists(st.sampled_from(range(len(singles))), min_size=1, max_size=3))
        cache = TurboQuantKVCache.merge([singles[i][0] for i in chosen])
        self.batches.append((cache, Batch.merged(self.shape, [singles[i][1] for i in chosen])))

    @precondition(lambda self: len(self.batches) < 2)
    @rule(data=st.data())
    def merge(self, data):
        self.make_batch(data)
        self.check_all()

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), step=st.sampled_from([1, 7, 8, 20, 64]), longest=st.integers(1, 64), loop=st.booleans())
    def prompts(self, data, step, longest, loop):
        """Prompts padded on the right, as mlx-lm's batch reads them."""
        cache, model = self.batches[self.pick_batch(data)]
        count = len(model.sequences)
        lengths = data.draw(st.lists(st.integers(1, longest), min_size=count, max_size=count))
        padding = [max(lengths) - n for n in lengths]
        if any(padding):
            cache.prepare(lengths=lengths, right_padding=padding)
            model.prepare(lengths, padding)
        for start in range(0, max(lengths), step):
            self.call(cache, model, count, min(step, max(lengths) - start))
            if loop:
                self.read_by_loop(cache, model)
            self.check_batch(cache, model)
        if any(padding):
            cache.finalize()
            model.finalize()
            if loop:
                self.read_by_loop(cache, model)
        self.check_all()

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), count=st.integers(1, 30))
    def decode_batch(self, data, count):
        cache, model = self.batches[self.pick_batch(data)]
        for _ in range(count):
            self.call(cache, model, len(model.sequences), 1)
        self.check_all()

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), n=st.one_of(st.integers(0, 12), st.integers(0, 200)), more=st.integers(0, 8))
    def trim_batch(self, data, n, more):
        """Forget tokens of each sequence, and add a few, which are then a decode step."""
        cache, model = self.batches[self.pick_batch(data)]
        longest = max(sequence.held for sequence in model.sequences)
        if all(sequence.can_trim(min(n, longest)) for sequence in model.sequences):
            assert cache.trim(n) == min(n, longest)
            model.trim(min(n, longest))
        else:
            with pytest.raises(ValueError, match="cannot go back to"):
                cache.trim(n)
        self.check_all()
        if more:
            self.call(cache, model, len(model.sequences), more)
            self.check_all()

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def extend(self, data):
        """Single caches join as mlx-lm lets them: merged, then added behind the others."""
        i = self.pick_batch(data)
        if len(self.batches) < 2:
            self.make_batch(data)
        j = len(self.batches) - 1
        if i != j and sum(len(model.sequences) for _, model in self.batches) <= MOST_SEQUENCES:
            other, theirs = self.batches.pop(j)
            cache, model = self.batches[i]
            cache.extend(other)
            model.extend(theirs)
        self.check_all()

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def filter(self, data):
        cache, model = self.batches[self.pick_batch(data)]
        keep = data.draw(st.permutations(range(len(model.sequences))))
        keep = keep[: data.draw(st.integers(1, len(keep)))]
        cache.filter(keep)
        model.filter(keep)
        self.check_all()

    @precondition(lambda self: self.batches and len(self.singles) < MOST_SINGLES)
    @rule(data=st.data())
    def extract(self, data):
        cache, model = self.batches[self.pick_batch(data)]
        i = data.draw(st.sampled_from(range(len(model.sequences))))
        self.singles.append((cache.extract(i), model.extract(i)))
        self.check_all()

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), how=st.sampled_from(["file", "state", "copy"]))
    def restore_batch(self, data, how):
        """The batch that goes on is another; the first goes on too if there is room for it."""
        i = self.pick_batch(data)
        cache, model = self.batches[i]
        if how == "file":
            path = str(self.folder / "several.safetensors")
            mlx_lm.models.cache.save_prompt_cache(path, [cache])
            (again,) = mlx_lm.models.cache.load_prompt_cache(path)
        elif how == "state":
            again = BatchTurboQuantKVCache.from_state(cache.state)
        else:
            again = copy.deepcopy(cache)
        if len(self.batches) < 2:
            self.batches.append((again, copy.deepcopy(model)))
        else:
            self.batches[i] = again, model
        self.check_all()

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def compress_batch(self, data):
        cache, model = self.batches[self.pick_batch(data)]
        assert cache.compress() == model.compress()
        self.check_all()


@pytest.mark.parametrize("text", SCHEMES)
def test_any_sequence_of_calls_is_the_models(text, tmp_path):
    def machine():
        return Caches(text, tmp_path)

    if not EXAMPLES:
        machine = with_seed(zlib.crc32(text.encode()))(machine)
    how = settings(
        max_examples=EXAMPLES or 3,
        stateful_step_count=40 if EXAMPLES else 20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    run_state_machine_as_test(machine, settings=how)
    print(f"{STEPS['calls']} calls with {STEPS['tokens']} tokens so far")


def rows(start, stop):
    """Keys and values (1, 1, stop - start, 16) that say which position they are of."""
    keys = mx.broadcast_to(mx.arange(start, stop, dtype=mx.float32)[:, None], (stop - start, 16))[None, None]
    return keys, -keys


def positions(cache):
    """The positions that a cache of such rows holds, the same for keys and values."""
    keys, values = ([int(k) for k in side[0, :, 0]] for side in parts_of(cache))
    assert keys == [-v for v in values]
    return keys


RAW = "turbo0v0:block=16,window=4,sinks=2"


@pytest.mark.parametrize("back", [1, 5, 23, 24, 25, 40, 60])
def test_a_rewind_to_long_before_an_encoding_inside_the_last_call(back):
    """It left a tail of less than no rows, and the blocks as they were."""
    cache = TurboQuantKVCache(RAW)
    cache.update_and_fetch(*rows(0, 68))
    cache.update_and_fetch(*rows(68, 69))
    cache.trim(0)
    cache.update_and_fetch(*rows(69, 75))
    assert len(cache._undo) == 1 and cache.block_tokens == 64
    cache.trim(back)
    assert (cache.offset, cache.size(), positions(cache)) == (75 - back, 75 - back, list(range(75 - back)))
    assert cache.tail_tokens >= 0


def test_what_a_bound_dropped_since_is_not_brought_back_by_a_rewind():
    """Compressed by hand after a call that crossed a block's end, and trimmed: tokens stood there twice."""
    cache = TurboQuantKVCache(RAW, max_size=55)
    cache.update_and_fetch(*rows(0, 46))
    cache.update_and_fetch(*rows(46, 47))
    cache.trim(0)
    cache.update_and_fetch(*rows(47, 55))
    assert len(cache._undo) == 1
    cache.compress()
    assert cache._dropped == 16
    cache.trim(2)
    assert cache.offset == 53 and positions(cache) == [0, 1, *range(18, 53)]


def test_a_batch_that_is_trimmed_to_nothing_forgets_what_its_queries_weighed():
    """As a single cache does: another prompt's queries weighed on the balance of the next."""
    batch = TurboQuantKVCache.merge([TurboQuantKVCache("turbo4"), TurboQuantKVCache("turbo4")])
    batch.update_and_fetch(*(mx.concatenate([side] * 2) for side in rows(0, 20)))
    batch.observe_queries(mx.ones((2, 1, 20, 16)))
    assert mx.all(batch._queries.sums == 20)
    assert batch.trim(20) == 20 and batch.empty()
    assert batch._queries.sums is None or not mx.any(batch._queries.sums)


def test_a_batch_does_not_go_back_to_what_a_bound_dropped():
    """A raw sequence's tail is as long as all that it holds, its sinks included."""
    single = TurboQuantKVCache(RAW, max_size=48)
    for start in range(0, 90, 30):
        single.update_and_fetch(*rows(start, start + 30))
    assert single._dropped and not single.block_tokens
    batch = TurboQuantKVCache.merge([single])
    held = batch.size()
    for cache in (single, batch):
        with pytest.raises(ValueError, match="cannot go back to"):
            cache.trim(held - 2)
    assert batch.size() == held and batch.trim(held - 3) == held - 3 and batch.extract(0).offset == single._dropped + 3
