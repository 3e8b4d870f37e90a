"""Packed rows: what the encoders write, the cache keeps and attention reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_turboquant.tail_parts import TailParts


class PackedTensor(NamedTuple):
    """T encoded rows of every head. A NamedTuple, so that MLX walks it as a tree (a dataclass it would not).

    Attributes:
        codes: (B, Hkv, T, W) uint32, often from `packing.pack_codes`; or, stored raw, (B, Hkv, T, D) in the model's
            dtype.
        scales: (B, Hkv, T, S) in the model's dtype, what a row keeps beside its codes: what each group's centroids are
            multiplied with, and what else a method needs (biases, norms, exact channels); None if nothing.
        centers: (B, Hkv, T / block, C) in the model's dtype, what a block keeps: its mean key, if one was subtracted,
            and what else a method needs; None if nothing.
    """

    codes: mx.array
    scales: mx.array | None = None
    centers: mx.array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self if a is not None)

    @property
    def length(self) -> int:
        """How many rows (tokens) it holds."""
        return self.codes.shape[2]

    def map(self, function: Callable[..., Any], *others: Sequence[Any]) -> "PackedTensor":
        """`function` of each array there is, and of what the others have in its place."""
        return PackedTensor(
            *(None if a is None else function(a, *rest) for a, *rest in zip(self, *others, strict=True))
        )

    def rows(self, start: int, stop: int, block: int) -> "PackedTensor":
        """The rows from start to stop, both multiples of block."""
        return self.map(lambda a, n: a[:, :, start // n : stop // n], tokens_per_row(block))

    @staticmethod
    def joined(parts: Sequence["PackedTensor"]) -> "PackedTensor":
        """Whole blocks, one part behind the other."""
        first, *rest = parts
        return first.map(lambda *arrays: mx.concatenate(arrays, axis=2), *rest) if rest else first


def tokens_per_row(block: int) -> tuple[int, int, int]:
    """For each field of a `PackedTensor`, how many tokens one of its rows is for."""
    return 1, 1, block


@dataclass(slots=True, eq=False)  # not frozen: one is made for each side, layer and step, and freezing takes 1.5 us
class CompressedRows:
    """The keys, or the values, of one layer as a compressed cache holds them: first tokens, blocks, newest tokens.

    A model receives it where it would receive an array and passes it to its attention function.

    Attributes:
        sinks: (B, Hkv, S, D) raw, or None.
        stored: whole blocks, in buffers with room for more: a kernel reads these, since a slice would be copied.
        stored_length: how many rows of them are valid.
        newest: (B, Hkv, room, D) raw, or the same in parts, or None.
        newest_length: how many rows of it are valid.
        quantizer: knows what `stored` means (see `quantizers`).
        block: tokens per block.
        readers: of the keys, what attention keeps of these sinks and blocks from one step to the next, by backend; None
            if they are read once.
    """

    sinks: mx.array | None
    stored: PackedTensor
    stored_length: int
    newest: mx.array | TailParts | None
    newest_length: int
    quantizer: Any
    block: int
    readers: dict[str | None, Any] | None = None

    @property
    def packed(self) -> PackedTensor:
        """The valid blocks."""
        return self.stored if self.stored_length == self.stored.length else self.rows(0, self.stored_length)

    @property
    def tail(self) -> mx.array | None:
        """The valid newest rows (B, Hkv, t, D), or None."""
        if not self.newest_length:
            return None
        rows = self.newest.whole() if isinstance(self.newest, TailParts) else self.newest
        return rows[:, :, : self.newest_length]

    def rows(self, start: int, stop: int) -> PackedTensor:
        """Packed rows from start to stop, both multiples of block."""
        return self.stored.rows(start, stop, self.block)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Valid rows of sinks, blocks and tail."""
        return 0 if self.sinks is None else self.sinks.shape[2], self.stored_length, self.newest_length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, T, D), as of the array it stands for."""
        return *self.stored.codes.shape[:2], sum(self.lengths), self.quantizer.dim

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype."""
        return self.quantizer.dtype

    def segments(self, tokens: int) -> Iterator[tuple[int, int, "mx.array | PackedTensor"]]:
        """(start, stop, rows) in token order: the sinks, the blocks in pieces of at most so many tokens, the tail."""
        start = 0
        if self.sinks is not None:
            yield 0, (start := self.sinks.shape[2]), self.sinks
        step = max(tokens // self.block, 1) * self.block
        for row in range(0, self.stored_length, step):
            stop = min(row + step, self.stored_length)
            yield start + row, start + stop, self.rows(row, stop)
        start += self.stored_length
        if self.newest_length:
            yield start, start + self.newest_length, self.tail

    def dense(self, tokens: int | None = None) -> mx.array:
        """All rows (B, Hkv, T, D) in the model's dtype.

        Args:
            tokens: decode pieces of at most so many, where decoding makes large temporaries; None: all in one call.
        """
        step = self.stored_length if tokens is None else max(tokens // self.block, 1) * self.block
        rows = [] if self.sinks is None else [self.sinks]
        for start in range(0, self.stored_length, max(step, 1)):
            rows.append(self.quantizer.decode(self.stored, start, min(start + step, self.stored_length)))
        if self.newest_length:
            rows.append(self.tail)
        return mx.concatenate(rows, axis=2)


@dataclass(slots=True, eq=False)
class RaggedRows:
    """The keys, or the values, of one layer of several sequences of unequal lengths, each from row 0 of its buffers.

    Attributes:
        sinks, stored, newest, quantizer, block, readers: as of `CompressedRows`, a sequence in each entry of the first
            axis; `stored` is None while no sequence is compressed.
        lengths: for each sequence, valid rows of sinks, blocks and newest.
    """

    sinks: mx.array | None
    stored: PackedTensor | None
    newest: mx.array
    lengths: tuple[tuple[int, int, int], ...]
    quantizer: Any
    block: int
    readers: dict[str | None, Any] | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens each sequence has."""
        return tuple(map(sum, self.lengths))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, T, D) with the longest sequence's T, as of the padded array it stands for."""
        B, H, _, D = self.newest.shape
        return B, H, max(self.tokens), D

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype."""
        return self.quantizer.dtype

    @property
    def is_raw(self) -> bool:
        """Whether no sequence is compressed."""
        return self.stored is None or not any(packed for _, packed, _ in self.lengths)

    def sequence(self, index: int) -> CompressedRows:
        """One sequence, with a first axis of length 1."""
        one = slice(index, index + 1)
        sinks, packed, newest = self.lengths[index]
        return CompressedRows(
            self.sinks[one, :, :sinks] if sinks else None,
            self.stored.map(lambda array: array[one]),
            packed,
            self.newest[one] if newest else None,
            newest,
            self.quantizer.sequences(one),
            self.block,
        )


@dataclass(frozen=True)
class SplitRows:
    """The keys, or the values, of one layer for a call in which later queries see more of it packed than earlier ones.

    Attributes:
        parts: what so many next queries see, and how many they are: an array (B, Hkv, T1, D) or `CompressedRows`.
    """

    parts: tuple[tuple[Any, int], ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, T, D), as of the array it stands for."""
        return self.parts[-1][0].shape

    @property
    def dtype(self) -> mx.Dtype:
        """The model's dtype."""
        return self.parts[-1][0].dtype
