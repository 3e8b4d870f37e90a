"""Caches under random sequences of calls: every row, length, mask, sum and byte is the slow model's, after each one.

In CI each scheme runs a few sequences of calls that are the same every time. MLX_TURBOQUANT_STATEFUL=200 runs 200
longer ones for each scheme, others every time; ``--hypothesis-seed`` repeats some. What fails is printed as a program,
not shrunk: shrinking takes long, and the last call is what failed.
"""

import copy
import os
import zlib

import mlx_lm
import pytest
from cache_machine import STEPS
from cache_phases import Batch, Single
from cache_singles import MOST_SINGLES, MOST_TOKENS, Singles
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from schemes import SCHEMES

from mlx_turboquant.cache import BatchTurboQuantKVCache, TurboQuantKVCache

EXAMPLES = int(os.environ.get("MLX_TURBOQUANT_STATEFUL", "0"))
MOST_SEQUENCES = 4


class Caches(Singles):
    """The same, and everything that may be done with several sequences."""

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
