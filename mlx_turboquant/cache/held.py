"""What a cache of one sequence holds: three runs of tokens, what was learned from the prompt, and what it all weighs.

Its tokens lie in three parts, any of them empty:

    sinks   raw     (B, Hkv, <= sinks, D)        the first tokens
    blocks  packed  whole blocks only            encoded once, never touched again
    tail    raw     (B, Hkv, <= block + window, D)  the newest tokens; during a prompt, everything not yet encoded

While it is raw, its sinks are the tail's first rows. A bounded cache misses tokens right behind its sinks: see `bound`.
"""

from typing import Any

import mlx.core as mx

from mlx_turboquant.cache.buffers import PackedBuffer, RowBuffer
from mlx_turboquant.cache.nonfinite import NonfiniteReport
from mlx_turboquant.cache.plain_steps import PlainSteps
from mlx_turboquant.cache.query_moments import QueryMoments
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.settling import start_layer
from mlx_turboquant.tensor import CompressedRows


class HeldTokens:
    """The rows of one layer and one sequence (or several of equal lengths), and how many; see `TurboQuantKVCache`."""

    scheme: KVScheme

    def _reset(self) -> None:
        self._tail = (RowBuffer(), RowBuffer())
        self._sinks: tuple[mx.array, mx.array] | None = None
        self._blocks: tuple[PackedBuffer, PackedBuffer] | None = None
        self._quantizers: tuple[Any, Any] | None = None
        self._queries = QueryMoments()  # of the prompt
        self._chunk_ended = False  # a prefill loop read the state since the last update
        self._trimmed = False  # trim was called since the last update
        self._dropped = 0  # tokens right behind the sinks that a bounded cache no longer holds
        self._nonfinite = NonfiniteReport()
        self._plain = PlainSteps()
        self._undo: list[Any] = []  # of each encoding inside the last call: offset, tails and blocks before it

    def keys_and_values(self):
        """The keys and values of all tokens held, as `update_and_fetch` returns them."""
        if self._blocks is None:
            return tuple(rows.view() for rows in self._tail)
        shared = self.scheme.block, self._plain.readers
        return tuple(
            CompressedRows(sinks, blocks.stored(), blocks.length, tail.array, tail.length, quantizer, *shared)
            for sinks, blocks, tail, quantizer in zip(
                self._sinks or (None, None), self._blocks, self._tail, self._quantizers, strict=True
            )
        )

    @property
    def quantizers(self) -> tuple[Any, Any] | None:
        """What encodes keys and values; None before the first tokens."""
        return self._quantizers

    @property
    def keys(self) -> mx.array | None:
        """The raw keys at the end with their spare room, for a pipeline: its stages write `keys` back, tied to what
        they send to the next stage, so that evaluating the cache after a chunk of the prompt sends it."""
        return self._tail[0].array

    @keys.setter
    def keys(self, rows: mx.array) -> None:
        self._tail[0].array = rows

    @property
    def offset(self) -> int:
        """The next token's position: how many tokens it has seen and not trimmed."""
        return self.size() + self._dropped

    @property
    def sink_tokens(self) -> int:
        """Tokens kept raw at the front of a compressed cache."""
        return 0 if self._sinks is None else self._sinks[0].shape[2]

    @property
    def block_tokens(self) -> int:
        """Tokens in encoded blocks."""
        return 0 if self._blocks is None else self._blocks[0].length

    @property
    def tail_tokens(self) -> int:
        """Tokens kept raw at the end; all of them while the cache is raw."""
        return self._tail[0].length

    def size(self) -> int:
        """How many tokens it holds: all of them, but for those that a bound made it drop."""
        return self.sink_tokens + self.block_tokens + self.tail_tokens

    def empty(self) -> bool:
        """Whether it holds no tokens."""
        return self.size() == 0

    def is_trimmable(self) -> bool:
        """Whether any number of newest tokens can be forgotten: True until a bound made it drop old ones."""
        return self._dropped == 0

    @property
    def nbytes(self) -> int:
        """Bytes of every array held: raw and packed rows with their spare room, scales, centres, what was learned."""
        undone = (array for _, tails, _ in self._undo for array, _ in tails)
        return sum(array.nbytes for array in (*self._arrays(), *undone) if array is not None)

    @property
    def raw_nbytes(self) -> int:
        """Bytes of the tokens held in the model's dtype, without spare room."""
        arrays = [rows.array for rows in self._tail if rows.array is not None]
        return sum(self.size() * B * H * D * a.itemsize for a in arrays for B, H, _, D in [a.shape])

    @property
    def bits_per_element(self) -> tuple[float, float]:
        """Stored bits per element of encoded keys and of encoded values: codes, scales, centres; 16 or 32 while raw."""
        if self._blocks is None:
            bits = 16.0 if self._tail[0].array is None else 8.0 * self._tail[0].array.itemsize
            return bits, bits
        packed = (blocks.view() for blocks in self._blocks)
        return tuple(
            8 * rows.nbytes / (rows.length * rows.codes.shape[0] * rows.codes.shape[1] * quantizer.dim)
            for rows, quantizer in zip(packed, self._quantizers, strict=True)
        )

    def _arrays(self) -> list[mx.array]:
        """Every array held, with its spare room."""
        held = [rows.array for rows in self._tail]
        for blocks in self._blocks or ():
            held += blocks.stored()
        held += [*(self._sinks or ()), self._queries.sums, *self._learned()]
        return [array for array in held if array is not None]

    def _append_to_tail(self, keys: mx.array, values: mx.array) -> None:
        for rows, new in zip(self._tail, (keys, values), strict=True):
            rows.append(new, -(-(rows.length + new.shape[2]) // 256) * 256)
        start_layer(self._tail[0].array, keys.shape[2])

    def _learned(self) -> list[mx.array]:
        """What the quantizers learned from the prompt."""
        return [array for quantizer in self._quantizers or () for array in quantizer.learned or ()]

    def _forget_learned(self) -> None:
        for quantizer in self._quantizers:
            quantizer.learned = None
