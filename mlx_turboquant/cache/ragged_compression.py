"""How the sequences of a batch are encoded: each for itself, at the moments when it would be alone."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_turboquant.attention import in_kernels
from mlx_turboquant.cache.bound import tokens_to_drop
from mlx_turboquant.cache.nonfinite import NonfiniteReport
from mlx_turboquant.cache.plain_batch_steps import PlainBatchSteps
from mlx_turboquant.cache.query_moments import QueryMoments
from mlx_turboquant.cache.ragged_store import RaggedStore
from mlx_turboquant.cache.schedule import due
from mlx_turboquant.quantizers import RawRows, make_quantizers
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.settling import start_settling


class RaggedCompression:
    """The rows of several sequences, their quantizers, and what encodes and drops; see `BatchTurboQuantKVCache`."""

    def __init__(
        self,
        scheme: KVScheme | str,
        layer: int = 0,
        module: str = "",
        fingerprint: str = "",
        max_size: int | None = None,
        sequences: int = 0,
    ):
        self.scheme = KVScheme.parse(scheme)
        self.layer, self.module, self.fingerprint, self.max_size = layer, module, fingerprint, max_size
        self._rows = RaggedStore(self.scheme, sequences)
        self._fitted = [False] * sequences  # whether a sequence's part of what was learned is its own, or all 1
        self._quantizers: tuple[Any, Any] | None = None
        self._queries = QueryMoments()
        self._padding: list[int] | None = None  # tokens behind a prompt that are not its own
        self._ahead: list[int] | None = None  # tokens of such a prompt that are still to come
        self._valid: list[int] | None = None  # of the tokens of the last update
        self._chunk_ended = self._trimmed = False  # as of TurboQuantKVCache
        self._decoding = False  # the last update was a token of each, not a chunk: the next such one is a decode step
        self._nonfinite = NonfiniteReport()
        self._plain = PlainBatchSteps()

    @property
    def keys(self) -> mx.array | None:
        """The raw keys at the end (B, Hkv, room, D) with their spare room; None before the first.

        A pipeline's stage writes them back, tied to what it sends on, as of `TurboQuantKVCache.keys`.
        """
        return None if self._rows.tail is None else self._rows.tail[0]

    @keys.setter
    def keys(self, rows: mx.array) -> None:
        self._rows.tail = [rows, self._rows.tail[1]]

    @property
    def values(self) -> mx.array | None:
        """The raw values at the end (B, Hkv, room, Dv) with their spare room; None before the first."""
        return None if self._rows.tail is None else self._rows.tail[1]

    def size(self) -> int:
        """Tokens of the longest sequence."""
        return max(self._rows.tokens, default=0)

    def empty(self) -> bool:
        """Whether no sequence holds a token."""
        return self.size() == 0

    @property
    def nbytes(self) -> int:
        """Bytes of every array held, with the room that shorter sequences do not fill."""
        arrays = [*self._rows.arrays().values(), self._queries.sums, *self._learned()]
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def raw_nbytes(self) -> int:
        """Bytes of the same tokens in the model's dtype, without spare room."""
        per_token = sum(rows.shape[1] * rows.shape[3] * rows.itemsize for rows in self._rows.tail or ())
        return sum(self._rows.tokens) * per_token

    def compress(self) -> int:
        """Encode every whole block of each sequence that is older than its window; return how many tokens that was.

        A bounded cache first drops what a next token would leave no room for.
        """
        self._drop_oldest(1)
        return self._encode_whole_blocks(range(len(self._rows.lengths)))

    def _encode_whole_blocks(self, sequences: Sequence[int]) -> int:
        if self.scheme.method == "fp16" or self._rows.tail is None:
            return 0
        lengths = self._rows.lengths
        skips, stops = [0] * len(lengths), [0] * len(lengths)
        for i in sequences:
            tail = lengths[i].tail - self._beyond(i)
            skip, stop = due(self.scheme, tail, lengths[i].packed == 0)
            if stop > skip:
                skips[i], stops[i] = skip, stop
        work = [i for i, stop in enumerate(stops) if stop]
        if not work:
            return 0
        self._plain.stop()
        cases = {(length.packed == 0, stop) for length, stop in zip(lengths, stops, strict=True)}
        groups = [slice(0, len(stops))] if len(cases) == 1 else [slice(i, i + 1) for i in work]
        for which in groups:
            self._encode(which, skips[which.start], stops[which.start])
        self._rows.encoded(skips, stops)
        encoded = sum(stops) - sum(skips)
        per_token = sum(rows.shape[1] * rows.shape[3] * rows.itemsize for rows in self._rows.tail)
        lean = in_kernels(None, *self._quantizers)
        start_settling(encoded * per_token, lambda: [*self._rows.arrays().values(), *self._learned()], lean=lean)
        return encoded

    def _encode(self, which: slice, skip: int, stop: int) -> None:
        """Encode rows skip..stop of the tails of some sequences, which all are raw or all have blocks."""
        tails = [rows[which] for rows in self._rows.tail]
        quantizers = [quantizer.sequences(which) for quantizer in self._quantizers]
        starts = [length.packed for length in self._rows.lengths[which]]
        if starts[0] == 0:
            if skip:
                self._rows.keep_sinks(which.start, [rows[:, :, :skip] for rows in tails])
            sums = self._queries.sums
            sums = None if sums is None else sums[which]
            for quantizer, rows in zip(quantizers, tails, strict=True):
                quantizer.fit(rows[:, :, skip:stop], sums, quantizer.squares(rows, skip, stop))
            self._keep_learned(which, quantizers)
        seen = []
        for side, (quantizer, rows) in enumerate(zip(quantizers, tails, strict=True)):
            packed, bad = quantizer.encode_and_look(rows, skip, stop, self.scheme.block)
            self._rows.write_blocks(side, packed, starts, which.start)
            seen.append(bad)
        self._nonfinite.add(*seen)

    def _drops(self, new: int) -> list[int]:
        """How many of its oldest tokens each sequence drops so that so many fit."""
        held = [tokens - self._beyond(i) for i, tokens in enumerate(self._rows.tokens)]
        return [tokens_to_drop(tokens, new, self.max_size, self.scheme) for tokens in held]

    def _drop_oldest(self, new: int) -> None:
        if self.max_size is None:
            return
        drops = self._drops(new)
        if not any(drops):
            return
        self._plain.stop()
        pairs = enumerate(zip(drops, self._rows.lengths, strict=True))
        # A later turn's prompt, raw behind the blocks, must go too: it is encoded first.
        self._encode_whole_blocks([i for i, (n, length) in pairs if length.packed and n >= length.packed])
        self._rows.drop_oldest(drops)

    def _beyond(self, index: int) -> int:
        """Tokens at the end of a sequence that are padding."""
        return 0 if self._ahead is None else max(-self._ahead[index], 0)

    def _make_quantizers(self, keys: mx.array, values: mx.array) -> None:
        dims = keys.shape[3], values.shape[3]
        if self.scheme.method == "fp16":
            self._quantizers = tuple(RawRows(self.scheme, dim, keys.dtype) for dim in dims)
        else:
            self._quantizers = make_quantizers(self.scheme, *dims, keys.dtype)

    def _learned(self) -> list[mx.array]:
        """What the quantizers learned, for all sequences."""
        return [array for quantizer in self._quantizers or () for array in quantizer.learned or ()]

    def _set_learned(self, learned: Sequence[Sequence[mx.array] | None]) -> None:
        """Give the quantizers, copies of them since another cache may hold these, what was learned."""
        copies = tuple(quantizer.sequences(slice(None)) for quantizer in self._quantizers)
        for quantizer, arrays in zip(copies, learned, strict=True):
            quantizer.learned = None if arrays is None else tuple(arrays)
        self._quantizers = copies

    def _keep_learned(self, which: slice, quantizers: Sequence[Any]) -> None:
        """Keep what the quantizers of some sequences have learned beside the others'."""
        count, every = len(self._fitted), []
        for held, part in zip(self._quantizers, quantizers, strict=True):
            before = held.learned or [mx.ones((count, *a.shape[1:]), a.dtype) for a in part.learned or ()]
            pairs = zip(before, part.learned or (), strict=True)
            every.append([mx.concatenate([a[: which.start], b, a[which.stop :]]) for a, b in pairs])
        self._set_learned(every)
        self._fitted[which] = [True] * len(self._fitted[which])
