"""The cache of several sequences of unequal lengths, each compressed on its own, which join and leave between steps.

Each sequence lies from row 0 of its buffers, as in `two_phase`, and lengths say what is valid. (mlx-lm's batch cache
pads on the left; packed blocks would have to move whenever a longer sequence comes.)
"""

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_turboquant.attention import MAX_DIRECT_QUERIES
from mlx_turboquant.cache.checks import check_rows
from mlx_turboquant.cache.ragged_compression import RaggedCompression
from mlx_turboquant.cache.ragged_mask import ragged_mask
from mlx_turboquant.cache.ragged_sequences import all_learned, batch_of_one, extracted, joined, same_kind
from mlx_turboquant.cache.ragged_store import Length
from mlx_turboquant.cache.two_phase import PREFILL_LOOPS
from mlx_turboquant.ops.device_ints import advancing_ints, device_ints
from mlx_turboquant.settling import start_layer
from mlx_turboquant.tensor import PackedTensor, RaggedRows


class BatchTurboQuantKVCache(RaggedCompression):
    """A KV cache for one layer and several sequences, with the interface of mlx-lm's ``BatchKVCache``.

    `TurboQuantKVCache.merge` makes it, `extract` takes a sequence out again. A sequence is encoded at the same moments
    and from the same rows as it would be alone.

    Args:
        scheme: a ``turbo`` scheme or its text; or ``fp16``, which is never encoded.
        layer, module, fingerprint, max_size: as of `TurboQuantKVCache`; the bound is each sequence's.
        sequences: how many empty ones it begins with.
    """

    # --- what a model calls -------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        """Add L tokens to each sequence: keys (B, Hkv, L, D), values (B, Hkv, L, Dv).

        Returns:
            All keys and all values: arrays (B, Hkv, T, D) while nothing is compressed and all lengths are equal,
            `RaggedRows` otherwise.

        Raises:
            ValueError: for another number of sequences, or shapes or dtypes that do not fit this cache.
        """
        plain = self._plain.take(self, keys, values)
        if plain is not None:
            return plain
        self._plain.stop()
        L = keys.shape[2]
        self._admit(keys, values)
        self._queries.forget_newest()
        decode = self._is_decode(L)
        self._drop_oldest(L if decode else 1)
        if decode or self.scheme.prefill == "compressed":
            self.compress()  # before the new tokens are added, as TurboQuantKVCache does
        self._decoding = L == 1
        self._chunk_ended = self._trimmed = False
        self._rows.append(keys, values)
        start_layer(self._rows.tail[0], L)
        self._valid = [L] * keys.shape[0]
        if self._ahead is not None:
            self._valid = [min(max(n, 0), L) for n in self._ahead]
            self._ahead = [n - L for n in self._ahead]
        self._nonfinite.step(self.layer)
        self._plain.start(self)
        return self.keys_and_values()

    def keys_and_values(self):
        """All keys and all values, as `update_and_fetch` returns them."""
        rows, lengths = self._rows, tuple(self._rows.lengths)
        if rows.blocks is None and len({length.tail for length in lengths}) == 1:
            return tuple(array[:, :, : lengths[0].tail] for array in rows.tail)
        sinks, blocks = rows.sinks or (None, None), rows.blocks or (None, None)
        return tuple(
            RaggedRows(*parts, lengths, quantizer, self.scheme.block, self._plain.readers)
            for *parts, quantizer in zip(sinks, blocks, rows.tail, self._quantizers, strict=True)
        )

    def observe_queries(self, queries: mx.array) -> mx.array | None:
        """Add up what the queries (B, H, L, D) of sequences that are raw weigh; what to evaluate, if anything."""
        raw = [length.packed == 0 for length in self._rows.lengths]
        wanted = "" if self._quantizers is None else self._quantizers[0].queries_wanted
        if not wanted or not any(raw):
            return None
        counts = [n if is_raw else 0 for n, is_raw in zip(self._valid, raw, strict=True)]
        return self._queries.observe(queries, self._rows.tail[0].shape[1], wanted, counts)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any):
        """The mask for the next N tokens of each sequence.

        Returns:
            None or "causal", which attention applies to each sequence's own length; or, if an array or a window is
            asked for, boolean (N, T) or (B, 1, N, T).
        """
        if not return_array and window_size is None:
            return None if N == 1 else "causal"
        drops = self._drops(N if self._is_decode(N) else 1)
        held = [tokens - n for tokens, n in zip(self._rows.tokens, drops, strict=True)]
        dropped = [before + n for before, n in zip(self._rows.dropped, drops, strict=True)]
        return ragged_mask(N, held, dropped, self.scheme.sinks, window_size)

    @property
    def offset(self) -> mx.array:
        """(B,) int32: the position of each sequence's next token."""
        positions = map(sum, zip(self._rows.tokens, self._rows.dropped, strict=True))
        return mx.array(advancing_ints(tuple(positions)))  # of its own: a model may add to it in place

    # --- batching -------------------------------------------------------------------------------------------------

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> "BatchTurboQuantKVCache":
        """A batch of the sequences of single caches, in order.

        What is raw stays so, and all get room for the longest: more of its prompt may follow, which would read it raw
        if it were alone.

        Raises:
            ValueError: for caches of different schemes, models or layers, or one that holds several sequences.
        """
        batch, *others = (batch_of_one(cls, cache) for cache in caches)
        batch._take_in(others)
        return batch

    def extend(self, other: "BatchTurboQuantKVCache") -> None:
        """Add the other batch's sequences behind these.

        Raises:
            ValueError: for a batch of another scheme, model or layer.
        """
        same_kind(self, other)
        if self._decoding and other._decoding:
            # The next step would encode the same rows. Done now, since all tails are as long as the longest: one raw
            # prompt of 4,000 tokens beside 7 sequences would take its bytes eight times.
            self.compress()
            other.compress()
        self._take_in([other])

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep only the sequences of these indices, in this order."""
        self._plain.stop()
        keep = [int(i) for i in batch_indices]
        for name in ("_fitted", "_ahead", "_padding", "_valid"):
            if getattr(self, name) is not None:
                setattr(self, name, [getattr(self, name)[i] for i in keep])
        self._queries.forget_newest()
        if self._queries.sums is not None:
            self._queries.sums = self._queries.sums[device_ints(keep)]
        if self._learned():
            chosen = device_ints(keep)
            self._set_learned([side.learned and [a[chosen] for a in side.learned] for side in self._quantizers])
        self._rows.take(keep)

    def extract(self, idx: int) -> Any:
        """The cache of one sequence, with arrays of its own."""
        return extracted(self, idx)

    def prepare(
        self, *, left_padding: Any = None, lengths: Sequence[int] | None = None, right_padding: Any = None
    ) -> None:
        """Say that the next tokens are prompts that are padded on the right, until `finalize`.

        Args:
            left_padding: only 0 is supported, since rows lie from 0 on.
            lengths: (B,) how many of the tokens to come are valid.
            right_padding: (B,) how many behind them are not.

        Raises:
            ValueError: for left padding.
        """
        if left_padding is not None and max(left_padding) > 0:
            raise ValueError(
                "[BatchTurboQuantKVCache] Left padding is not supported: pad prompts on the right, and give lengths "
                "and right_padding."
            )
        if right_padding is not None and max(right_padding) > 0:
            self._ahead, self._padding = list(lengths), list(right_padding)

    def finalize(self) -> None:
        """Forget the padding that `prepare` spoke of."""
        if self._padding is not None:
            self._rows.forget_newest(self._padding)
            self._ahead = self._padding = None

    def is_trimmable(self) -> bool:
        """Whether any number of newest tokens can be forgotten: no, once one of a bounded cache's were dropped."""
        return not any(self._rows.dropped)

    def trim(self, n: int) -> int:
        """Forget the newest n tokens of each sequence (all, of one that has fewer); return how many of the longest.

        Raises:
            ValueError: if a bounded sequence would have to go back to a token that it dropped.
        """
        self._plain.stop()
        n = min(n, self.size())
        pairs = zip(self._rows.lengths, self._rows.dropped, strict=True)
        # One that is emptied forgets more than its rows, and one that would go back to what it dropped refuses.
        if not n or all(k.tail >= n and sum(k) - n > (self.scheme.sinks if gone else 0) for k, gone in pairs):
            self._rows.forget_newest([n] * len(self._rows.lengths))
        else:
            singles = [self.extract(i) for i in range(len(self._rows.lengths))]
            for single in singles:
                single.trim(n)
            # What is the layer's and not a sequence's stays: its phase, and what it has yet to warn of.
            ours = {name: getattr(self, name) for name in ("_nonfinite", "_chunk_ended", "_decoding")}
            self.__dict__.update(self.merge(singles).__dict__ | ours)
        self._trimmed = True
        return n

    @property
    def state(self) -> tuple:
        """All that it is: text, numbers and arrays; what mlx-lm evaluates between chunks of a prompt."""
        rows = self._rows
        if sys._getframe(1).f_globals.get("__name__") in PREFILL_LOOPS:
            self._chunk_ended, self._decoding = True, False
            self._queries.count_newest()
            if self.scheme.prefill == "compressed":
                self.compress()  # now, so that what the loop evaluates no longer needs the raw chunk
        return (
            (self.scheme.full_text(), self.layer, self.module, self.fingerprint, self.max_size),
            ([tuple(length) for length in rows.lengths], rows.dropped),
            (rows.tail, rows.sinks, rows.blocks and [tuple(packed) for packed in rows.blocks]),
            (self._fitted, [side.learned or None for side in self._quantizers or ()], self._queries.sums),
            (self._padding, self._ahead, self._chunk_ended, self._trimmed, self._decoding),
        )

    @state.setter
    def state(self, state: tuple) -> None:
        # Rows are written in place, so the arrays and lists of whoever gave the state are not shared.
        kind, lengths, arrays, learned, phase = tree_map(lambda x: mx.array(x) if isinstance(x, mx.array) else x, state)
        self.__init__(*kind)
        rows = self._rows
        rows.lengths, rows.dropped = [Length(*length) for length in lengths[0]], list(lengths[1])
        rows.tail, rows.sinks, blocks = arrays
        rows.blocks = blocks and [PackedTensor(*packed) for packed in blocks]
        self._fitted, learned, self._queries.sums = learned
        self._padding, self._ahead, self._chunk_ended, self._trimmed, self._decoding = phase
        if rows.tail is not None:
            self._make_quantizers(*rows.tail)
            self._set_learned(learned)

    @classmethod
    def from_state(cls, state: tuple) -> "BatchTurboQuantKVCache":
        """The batch that `state` describes; mlx-lm's ``load_prompt_cache`` asks for it."""
        batch = cls.__new__(cls)
        batch.state = state
        return batch

    # --- inside ---------------------------------------------------------------------------------------------------

    def _is_decode(self, tokens: int) -> bool:
        if self.empty() or self._chunk_ended or self._padding is not None or tokens > MAX_DIRECT_QUERIES:
            return False
        return tokens == 1 or self._trimmed

    def _admit(self, keys: mx.array, values: mx.array) -> None:
        if keys.shape[0] != len(self._rows.lengths):
            raise ValueError(
                f"[BatchTurboQuantKVCache] layer {self.layer}: holds {len(self._rows.lengths)} sequences, got keys of "
                f"{keys.shape[0]}. Merge, extend or filter before the model is called."
            )
        held = self._rows.tail or (None, None)
        check_rows(self.layer, tuple(SimpleNamespace(array=array) for array in held), keys, values)
        if self._quantizers is None:
            self._make_quantizers(keys, values)

    def _take_in(self, others: Sequence["BatchTurboQuantKVCache"]) -> None:
        """Put the sequences of the others behind these."""
        parts = [self, *others]
        for part in parts:
            part._plain.stop()
        for other in others:
            same_kind(self, other)
        counts = [len(part._fitted) for part in parts]
        self._queries.sums = joined(counts, [part._queries.sums for part in parts], 0)
        learned = [all_learned(parts, counts, side) for side in range(2)]
        self._rows.take_in([other._rows for other in others])
        self._fitted = [one for part in parts for one in part._fitted]
        self._quantizers = next((part._quantizers for part in parts if part._quantizers is not None), None)
        if self._quantizers is not None:
            self._set_learned(learned)
        self._chunk_ended = any(part._chunk_ended for part in parts)
        self._decoding = all(part._decoding for part in parts)
        self._valid = None
        self._queries.forget_newest()
        self._nonfinite.take_in([other._nonfinite for other in others])
