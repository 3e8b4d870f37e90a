"""The rules of caches of one sequence: prompts, decode steps, drafts, rewinds, files, copies; see `test_stateful`."""

import copy
import weakref

import mlx.core as mx
import mlx_lm
import pytest
from cache_machine import Layers, head_sizes, small
from cache_model import Shape
from cache_phases import Single
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from mlx_turboquant import load_prompt_cache, save_prompt_cache
from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cache.bound import least_size

MOST_TOKENS, MOST_SINGLES = 220, 3


class Draft:
    """A draft model's cache, as far as it is asked."""

    def __init__(self, offset):
        self.offset = offset


class Singles(Layers):
    """Everything that may be done with caches of one sequence, in any order.

    Args:
        text: of the scheme; what it does not say is drawn.
        folder: for files.
    """

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

    @rule(
        data=st.data(),
        chunk=st.sampled_from([1, 5, 9, 40]),
        ended=st.booleans(),
        counts=st.lists(st.integers(1, 8), min_size=1, max_size=3),
        more=st.sampled_from([0, 0, 0, 3, 50]),
    )
    def unread(self, data, chunk, ended, counts, more):
        """Tokens are read and taken back, as the guard does: after a prompt's chunk nothing at all has changed then."""
        i = self.pick(data)
        cache, model = self.singles[i]
        self.call(cache, model, 1, chunk)
        if ended:
            cache.end_chunk()
            model.loop_reads_state()
        self.check_single(cache, model)
        for count in counts:
            before = copy.deepcopy(model)
            self.call(cache, model, 1, count)
            if before.chunk_ended and not more and self.shape.max_size is None:
                cache.unread(count)
                model, before.undo = before, []
                self.singles[i] = cache, model
            elif model.sequence.can_trim(count + more):
                cache.unread(count + more)
                model.unread(count + more)
            else:
                with pytest.raises(ValueError, match="cannot go back to"):
                    cache.unread(count + more)
            self.check_single(cache, model)
        if ended and model.sequence.held:  # what was taken back is not counted as prompt
            cache.end_chunk()
            model.loop_reads_state()
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
