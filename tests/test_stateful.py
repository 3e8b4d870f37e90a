"""Caches under random sequences of calls: every row, length, mask, sum and byte is the slow model's, after each one.

In CI each scheme runs a few sequences of calls that are the same every time. MLX_TURBOQUANT_STATEFUL=200 runs 200
ones for each scheme, others every time; what fails is printed as a program. Leave out ``-x`` then, and choose schemes
with ``-k``.
"""

import copy
import os
import types
import weakref
import zlib
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from cache_model import Batch, Shape, Single, in_float32
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from mlx_lm.models.base import scaled_dot_product_attention
from schemes import SCHEMES

from mlx_turboquant import KVScheme, load_prompt_cache, save_prompt_cache
from mlx_turboquant.binding import ATTENTION, bind
from mlx_turboquant.cache import BatchTurboQuantKVCache, TurboQuantKVCache
from mlx_turboquant.cache.bound import least_size
from mlx_turboquant.tensor import CompressedRows, RaggedRows

EXAMPLES = int(os.environ.get("MLX_TURBOQUANT_STATEFUL", "0"))
MOST_TOKENS, MOST_SINGLES, MOST_SEQUENCES = 220, 3, 4
NOTES = []
STEPS = {"calls": 0, "tokens": 0}  # how much was run, for whoever asks

# What a block may lose, as a part of its energy (for centred keys, of what is left): twice the distortion for Gaussian
# rows of a Lloyd-Max codebook, or twice step^2 / 12 of a uniform one over the range of 16 to 64 Gaussian numbers.
LLOYD_MAX = {2: 0.1175, 2.5: 0.08, 3: 0.0345, 3.5: 0.022, 4: 0.0095, 8: 5e-5}
UNIFORM = {2: 0.2, 3: 0.04, 4: 0.009, 6: 5e-4, 8: 4e-5}

module = types.ModuleType("some_model")
setattr(module, ATTENTION, scaled_dot_product_attention)
bind(module)


def most_lost(scheme, bits, keys):
    """The largest part of a block's energy that its codes may miss."""
    if bits == 0:
        return 0.0
    if scheme.method == "qjl" and keys:  # codes of one bit less, and their residual's sketch, pi / 2 times as large
        return 2 * np.pi / 2 * LLOYD_MAX[bits - 1]
    table = UNIFORM if scheme.method in ("squat", "int", "affine") else LLOYD_MAX
    return 2 * table[bits]


def small(text, draw):
    """A scheme with few sinks and small blocks, where its text does not say how many."""
    scheme, given = KVScheme.parse(text), text.partition(":")[2]
    choices = {"sinks": [0, 1, 3], "window": [0, 4, 9], "block": [16, 16, 32], "prefill": ["raw", "raw", "compressed"]}
    if scheme.method == "squat" and "block" not in given:
        choices["group"] = [16]
    return replace(scheme, **{name: draw(st.sampled_from(few)) for name, few in choices.items() if name not in given})


def head_sizes(scheme):
    """Of keys and values, such as the scheme takes."""
    if scheme.method == "affine":
        return [(scheme.group, scheme.group), (2 * scheme.group, scheme.group)]
    return [(16, 16), (32, 32), (64, 32), (32, 64), (48, 48)]


def parts_of(cache, index=None):
    """The rows (H, T, D) float32 of keys and values that a cache, or a sequence of a batch, stands for."""
    out = []
    for side in cache.keys_and_values():
        if isinstance(side, RaggedRows):
            lengths = side.lengths[index]
            side = side.sequence(index) if lengths[1] else side.newest[index : index + 1, :, : lengths[2]]
        elif isinstance(side, mx.array):
            side = side if index is None else side[index : index + 1]
        rows = side.dense(side.block) if isinstance(side, CompressedRows) else side
        out.append(in_float32(rows)[0])
    return out


def all_arrays(thing, found):
    """Every array that a cache holds, but not what all caches share (rotations, codebooks) nor what readers keep."""
    if isinstance(thing, mx.array):
        found.append(thing)
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            all_arrays(part, found)
    elif type(thing).__name__ in ("RowBuffer", "PackedBuffer", "RaggedStore"):
        all_arrays(list(vars(thing).values()), found)
    return found


class Draft:
    """A draft model's cache, as far as it is asked."""

    def __init__(self, offset):
        self.offset = offset


class Caches(RuleBasedStateMachine):
    """Some caches of one sequence and some batches, each beside its model."""

    def __init__(self, text, folder):
        super().__init__()
        self.text, self.folder = text, folder
        self.singles, self.batches = [], []
        self.random = np.random.default_rng(0)

    @initialize(data=st.data())
    def begin(self, data):
        scheme = small(self.text, data.draw)
        dims = data.draw(st.sampled_from(head_sizes(scheme)))
        dtype = data.draw(st.sampled_from([mx.float16, mx.bfloat16, mx.float32]))
        bound = data.draw(st.sampled_from([None, None, 0, 7, 40]))
        self.shape = Shape(scheme, dims, dtype, None if bound is None else least_size(scheme) + bound)
        self.tolerance = {mx.float16: 0.02, mx.bfloat16: 0.12, mx.float32: 1e-3}[dtype]
        self.new_single()

    # --- what a model does ----------------------------------------------------------------------------------------

    def rows(self, B, L):
        """Keys, with a large constant channel, and values of L tokens, as the dtype holds them."""
        H = self.shape.heads
        sides = [self.random.standard_normal((B, H, L, dim)).astype(np.float32) for dim in self.shape.dims]
        sides[0][..., 1] += 4
        return [in_float32(self.shape.array(side)) for side in sides]

    def call(self, cache, model, B, L, window=None):
        """One call of a layer: mask, update, attention. All that its queries see is checked."""
        rows, D = self.rows(B, L), self.shape.dims[0]
        queries = in_float32(self.shape.array(self.random.standard_normal((B, self.shape.queries, L, D))))
        shown = cache.make_mask(L, return_array=True, window_size=window)
        mask = cache.make_mask(L) if window is None else shown
        keys, values = cache.update_and_fetch(*map(self.shape.array, rows))
        arguments = self.shape.array(queries), keys, values, cache
        out = in_float32(getattr(module, ATTENTION)(*arguments, scale=D**-0.5, mask=mask))
        single = isinstance(model, Single)
        seen = [model.update([side[0] for side in rows])] if single else model.update(rows)
        sequences = [model.sequence] if single else model.sequences
        self.observe(cache, model, sequences, queries, keys)
        for i, sequence in enumerate(sequences):
            valid = L if single or model.padding is None else model.valid[i]
            mine = shown if shown is None or shown.ndim == 2 else shown[i, 0]
            self.check_mask(mine, sequence.positions, L, window)
            for token in {0, L // 2, L - 1} if L > 8 else range(L):
                if token < valid:
                    visible = sequence.positions[: sequence.held - L + token + 1]
                    self.check_attention(queries[i, :, token], seen[i][token], visible, window, out[i, :, token])
        STEPS["calls"] += 1
        STEPS["tokens"] += B * L

    def observe(self, cache, model, sequences, queries, keys):
        """What the prompt's queries weigh: those of sequences that were read raw. Compared, then kept as it was rounded."""
        wanted, compressed = cache._quantizers[0].queries_wanted, not isinstance(keys, (mx.array, RaggedRows))
        for i, sequence in enumerate(sequences):
            valid = queries.shape[2] if isinstance(model, Single) else model.valid[i]
            if not sequence.packed and not compressed and wanted:
                sequence.observe(queries[i, :, :valid], wanted)
                if queries.shape[2] > 8:
                    sequence.count_newest()
                else:
                    sequence.newest = self.near(cache._queries._newest[i], sequence.newest)
            self.check_sums(cache, sequence, i)

    def near(self, got, expected):
        got = np.array(got)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        return got

    def check_sums(self, cache, sequence, index):
        sums = cache._queries.sums
        if sequence.sums is None:
            assert sums is None or not mx.any(sums[index]).item()
        else:
            sequence.sums = self.near(sums[index], sequence.sums)

    def check_mask(self, mask, positions, L, window):
        at = positions[len(positions) - L :, None]
        expected = positions <= at
        if window is not None:
            expected &= positions > at - window
        mask = np.ones_like(expected) if mask is None else np.array(mask)
        assert np.array_equal(mask[:, : len(positions)], expected) and not mask[:, len(positions) :].any()

    def check_attention(self, queries, rows, positions, window, out):
        keys, values = (np.repeat(side.astype(np.float64), 2, axis=0) for side in rows)
        scores = np.einsum("hd,htd->ht", queries, keys) * self.shape.dims[0] ** -0.5
        if window is not None:
            scores[:, positions <= positions[-1] - window] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = np.einsum("ht,htd->hd", weights / weights.sum(axis=1, keepdims=True), values)
        np.testing.assert_allclose(out, expected, atol=self.tolerance)

    def read_by_loop(self, cache, model):
        """What mlx-lm's loops do after each chunk of a prompt."""
        exec("mx.eval(cache.state)", {"__name__": "mlx_lm.generate", "mx": mx, "cache": cache})
        model.loop_reads_state()

    # --- comparing ------------------------------------------------------------------------------------------------

    def check_all(self):
        for cache, model in self.singles:
            self.check_single(cache, model)
        for cache, model in self.batches:
            self.check_batch(cache, model)

    def check_single(self, cache, model):
        sequence = model.sequence
        assert (cache.offset, cache.size()) == (sequence.offset, sequence.held)
        assert (cache.sink_tokens, cache.block_tokens, cache.tail_tokens) == (
            sequence.sinks, sequence.packed, sequence.tail
        )  # fmt: skip
        assert cache.empty() == (sequence.held == 0) and cache.is_trimmable() == (sequence.dropped == 0)
        assert (cache._chunk_ended, cache._trimmed) == (model.chunk_ended, model.trimmed)
        if sequence.held:
            self.check_rows(parts_of(cache), sequence)
            self.check_learned(cache, sequence, 0)
        self.check_bytes(cache, [sequence])

    def check_batch(self, cache, model):
        count = len(model.sequences)
        assert cache.offset.tolist() == [sequence.offset for sequence in model.sequences]
        lengths = [(s.sinks, s.packed, s.tail) for s in model.sequences]
        assert [tuple(length) for length in cache._rows.lengths] == lengths
        assert cache.size() == max(s.held for s in model.sequences) and cache.empty() == (cache.size() == 0)
        assert cache.is_trimmable() == (not any(s.dropped for s in model.sequences))
        for i in range(count):
            if cache._rows.tail is not None and model.sequences[i].held:
                self.check_rows(parts_of(cache, i), model.sequences[i])
                self.check_learned(cache, model.sequences[i], i)
        self.check_bytes(cache, model.sequences)

    def check_rows(self, rows, sequence):
        """Raw rows and old blocks bit for bit; new blocks as their quantizer encodes them alone, which is then kept."""
        first, stop = sequence.sinks + sequence.fresh, sequence.sinks + sequence.packed
        for got, expected in zip(rows, sequence.rows, strict=True):
            assert got.shape == expected.shape
            new = slice(first, stop)
            differ = (got != expected).any(axis=(0, 2))
            assert not differ[:first].any() and not differ[stop:].any()
            if differ[new].any():
                NOTES.append((self.text, str(self.shape.dtype), self.shape.dims, len(self.batches), differ[new].mean()))
                # Another order of sums may put a number on the other side of a cell's edge, or choose another scaling.
                apart = np.abs(got[:, new] - expected[:, new]) > 2e-2 * (1 + np.abs(expected[:, new]))
                assert apart.any(axis=-1).mean() <= 1 / 8
                expected[:, new] = got[:, new]
        if sequence.fresh < sequence.packed and sequence.before is not None:
            self.check_loss(rows, sequence)
        sequence.fresh, sequence.before = sequence.packed, None

    def check_loss(self, rows, sequence):
        """What was encoded last misses no more of its rows than its scheme may."""
        scheme, (start, before) = self.shape.scheme, sequence.before
        for side, (got, raw, bits) in enumerate(zip(rows, before, (scheme.key_bits, scheme.value_bits), strict=True)):
            error, energy = got[:, start : start + raw.shape[1]] - raw, raw
            if side == 0 and scheme.center:
                blocks = raw.reshape(raw.shape[0], -1, scheme.block, raw.shape[2])
                energy = (blocks - blocks.mean(axis=2, keepdims=True)).reshape(raw.shape)
            balance = getattr(sequence.quantizers[side], "balance", None)
            weights = 1 if balance is None else np.array(balance)[0, :, None]
            lost = np.square(error * weights).sum() / np.square(energy * weights).sum()
            assert lost <= most_lost(scheme, bits, keys=side == 0) + 1e-4, (side, lost)

    def check_learned(self, cache, sequence, index):
        self.check_sums(cache, sequence, index)
        if sequence.quantizers is not None:
            for ours, theirs in zip(sequence.quantizers, cache._quantizers, strict=True):
                for a, b in zip(ours.learned or (), theirs.learned or (), strict=True):
                    np.testing.assert_allclose(np.array(b[index]), np.array(a[0]), rtol=1e-5, atol=1e-6)

    def check_bytes(self, cache, sequences):
        """Bytes are those of all arrays; and at least those of what is held, and not more than the rules for room."""
        shape, item = self.shape, self.shape.dtype.size
        per_token = shape.heads * sum(shape.dims) * item
        tokens = sum(sequence.held for sequence in sequences)
        assert cache.raw_nbytes == tokens * per_token
        batch = isinstance(cache, BatchTurboQuantKVCache)
        held = [cache._rows, cache._queries.sums] if batch else [
            cache._tail, cache._sinks, cache._blocks, cache._queries.sums, [undo[1] for undo in cache._undo]
        ]  # fmt: skip
        found = all_arrays([*held, cache._learned()], [])
        assert cache.nbytes == sum(array.nbytes for array in found)
        if batch or not tokens:
            return
        (sequence,) = sequences
        packed = 0
        if sequence.packed:
            for quantizer in cache._quantizers:
                shapes, kinds = quantizer.layout(1, shape.heads, sequence.packed)
                packed += sum(int(np.prod(s)) * k.size for s, k in zip(shapes, kinds, strict=True) if s is not None)
            bits = cache.bits_per_element
            numbers = [shape.heads * sequence.packed * dim for dim in shape.dims]
            assert sum(b * n for b, n in zip(bits, numbers, strict=True)) == pytest.approx(8 * packed)
        extra = sum(array.nbytes for array in [cache._queries.sums, *cache._learned()] if array is not None)
        least = packed + extra + (sequence.sinks + sequence.tail) * per_token
        assert least <= cache.nbytes

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
        """Drafts are verified, and the rejected ones taken back; after the last call more than those, or nothing yet."""
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
        max_examples=EXAMPLES or 2,
        stateful_step_count=40 if EXAMPLES else 15,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    run_state_machine_as_test(machine, settings=how)
    print(STEPS, NOTES)
