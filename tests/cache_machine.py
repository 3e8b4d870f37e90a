"""Layers beside their models: what a model calls and what mlx-lm's loops do, and everything that is then compared."""

import types
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from cache_model import in_float32
from cache_phases import Single
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_turboquant import KVScheme
from mlx_turboquant.binding import ATTENTION, bind
from mlx_turboquant.cache import BatchTurboQuantKVCache, query_moments
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.tensor import CompressedRows, RaggedRows

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


class Layers(RuleBasedStateMachine):
    """Some caches of one sequence and some batches, each beside its model.

    Attributes:
        shape: what they have in common.
        singles, batches: pairs of a cache and its model.
    """

    def __init__(self):
        super().__init__()
        self.singles, self.batches = [], []
        self.random = np.random.default_rng(0)

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
        """What the prompt's queries weigh: those of sequences that were read raw. Compared, then kept as rounded."""
        wanted, compressed = cache._quantizers[0].queries_wanted, not isinstance(keys, (mx.array, RaggedRows))
        for i, sequence in enumerate(sequences):
            valid = queries.shape[2] if isinstance(model, Single) else model.valid[i]
            if not sequence.packed and not compressed and wanted:
                sequence.observe(queries[i, :, :valid], wanted)
                if queries.shape[2] > 8:
                    sequence.count_newest()
                else:
                    sequence.newest = self.near(query_moments._sums_over(*cache._queries._newest)[i], sequence.newest)
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
        assert sequence.packed or not cache._learned()
        self.check_bytes(cache, [sequence])

    def check_batch(self, cache, model):
        count = len(model.sequences)
        assert cache.offset.tolist() == [sequence.offset for sequence in model.sequences]
        lengths = [(s.sinks, s.packed, s.tail) for s in model.sequences]
        assert [tuple(length) for length in cache._rows.lengths] == lengths
        assert cache.size() == max(s.held for s in model.sequences) and cache.empty() == (cache.size() == 0)
        assert cache.is_trimmable() == (not any(s.dropped for s in model.sequences))
        phase = cache._chunk_ended, cache._trimmed, cache._decoding
        assert phase == (model.chunk_ended, model.trimmed, model.decoding)
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
                # Another order of sums may put a number on the other side of a cell's edge, or choose another scaling;
                # in plain operations without products of matrices there is no other order.
                assert choose_backend() != "reference" or self.has_products()
                apart = np.abs(got[:, new] - expected[:, new]) > 2e-2 * (1 + np.abs(expected[:, new]))
                assert apart.any(axis=-1).mean() <= 1 / 8
                expected[:, new] = got[:, new]
        if sequence.fresh < sequence.packed and sequence.before is not None:
            self.check_loss(rows, sequence)
        sequence.fresh, sequence.before = sequence.packed, None

    def has_products(self):
        """Whether rows are multiplied with a matrix when they are encoded: all but rotations of powers of 2."""
        scheme, sizes = self.shape.scheme, {dim & (dim - 1) for dim in self.shape.dims}
        return scheme.method not in ("turbo", "int") or scheme.rotation == "dense" or sizes != {0}

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
