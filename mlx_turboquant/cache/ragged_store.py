"""The rows of one layer for several sequences: first tokens, packed blocks, newest tokens, and how many of each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.cache import ragged_buffers as buffers
from mlx_turboquant.cache.schedule import spare_blocks, tail_room
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tensor import PackedTensor, tokens_per_row

_Name = tuple[str, int, int]  # of an array: part, side (keys, values), field of a PackedTensor


class Length(NamedTuple):
    """Tokens of one sequence: raw first ones, encoded ones, raw newest ones."""

    sinks: int
    packed: int
    tail: int


class RaggedStore:
    """Buffers whose first axis is the sequence; each sequence's rows lie from row 0 on.

    Args:
        scheme: says how many tokens a block, the window and the sinks have.
        sequences: how many empty ones it begins with.

    Attributes:
        lengths: a `Length` for each sequence.
        dropped: for each sequence, tokens right behind the sinks that it no longer holds.
        tail: keys and values (B, Hkv, room, D); None before the first.
        sinks: keys and values (B, Hkv, scheme.sinks, D), or None.
        blocks: packed keys and packed values, with room for the longest sequence and more; None if there are none.
    """

    def __init__(self, scheme: KVScheme, sequences: int):
        self.scheme = scheme
        self.lengths = [Length(0, 0, 0) for _ in range(sequences)]
        self.dropped = [0] * sequences
        self.tail: list[mx.array] | None = None
        self.sinks: list[mx.array] | None = None
        self.blocks: list[PackedTensor] | None = None

    @property
    def tokens(self) -> list[int]:
        """How many tokens each sequence has."""
        return [sum(length) for length in self.lengths]

    def arrays(self) -> dict[_Name, mx.array]:
        """Every array with rows."""
        table = {("tail", i, 0): array for i, array in enumerate(self.tail or ())}
        table |= {("sinks", i, 0): array for i, array in enumerate(self.sinks or ())}
        for i, packed in enumerate(self.blocks or ()):
            table |= {("blocks", i, j): array for j, array in enumerate(packed) if array is not None}
        return table

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add L tokens to the tail of every sequence."""
        L = keys.shape[2]
        starts = [length.tail for length in self.lengths]
        need = max(starts) + L
        if self.tail is None or need > self.tail[0].shape[2]:
            held = self.tail or [rows[:, :, :0] for rows in (keys, values)]
            self.tail = [buffers.resized(rows, -(-need // 256) * 256) for rows in held]
        for rows, new in zip(self.tail, (keys, values), strict=True):
            buffers.write(rows, new, starts)
        self.lengths = [length._replace(tail=length.tail + L) for length in self.lengths]

    def forget_newest(self, counts: Sequence[int]) -> None:
        """Shorten each sequence's tail by so many tokens."""
        self.lengths = [n._replace(tail=n.tail - count) for n, count in zip(self.lengths, counts, strict=True)]

    def keep_sinks(self, first: int, rows: Sequence[mx.array]) -> None:
        """Set the first tokens (b, Hkv, S, D) of the sequences from `first` on apart."""
        if self.sinks is None:
            shapes = [(array.shape[0], array.shape[1], self.scheme.sinks, array.shape[3]) for array in self.tail]
            self.sinks = [mx.zeros(shape, rows[0].dtype) for shape in shapes]
        for sinks, part in zip(self.sinks, rows, strict=True):
            buffers.write(sinks, part, [0], first)

    def write_blocks(self, side: int, packed: PackedTensor, starts: Sequence[int], first: int) -> None:
        """Write encoded blocks of the sequences from `first` on, each from its own row, into room for more."""
        B, block = len(self.lengths), self.scheme.block
        tokens = tokens_per_row(block)
        need = max(starts) + packed.length
        if self.blocks is None:
            self.blocks = [None, None]
        held = self.blocks[side]
        if held is None:
            held = packed.map(lambda a: mx.zeros((B, a.shape[1], 0, a.shape[3]), a.dtype))
        if need > held.length:
            room = need + (spare_blocks(need // block, block) * block if held.length else 0)
            held = held.map(lambda array, n: buffers.resized(array, room // n), tokens)
        held.map(lambda array, new, n: buffers.write(array, new, [s // n for s in starts], first), packed, tokens)
        self.blocks[side] = held

    def encoded(self, skips: Sequence[int], stops: Sequence[int]) -> None:
        """Take rows off the front of each tail: `skip` of them are sinks, those up to `stop` have become blocks."""
        self.lengths = [
            Length(n.sinks + skip, n.packed + stop - skip, n.tail - stop)
            for n, skip, stop in zip(self.lengths, skips, stops, strict=True)
        ]
        self.tail = [buffers.moved_up(rows, stops, self._tail_room()) for rows in self.tail]

    def drop_oldest(self, counts: Sequence[int]) -> None:
        """Forget so many tokens (whole blocks) behind each sequence's sinks, of the blocks where there are any."""
        packed = [n if length.packed else 0 for n, length in zip(counts, self.lengths, strict=True)]
        raw = [0 if length.packed else n for n, length in zip(counts, self.lengths, strict=True)]
        if any(packed):
            tokens = tokens_per_row(self.scheme.block)
            self.blocks = [
                held.map(lambda a, n: buffers.moved_up(a, [count // n for count in packed], a.shape[2]), tokens)
                for held in self.blocks
            ]
        if any(raw):
            self.tail = [buffers.without(rows, self.scheme.sinks, raw) for rows in self.tail]
        self.lengths = [
            length._replace(packed=length.packed - n, tail=length.tail - m)
            for length, n, m in zip(self.lengths, packed, raw, strict=True)
        ]
        self.dropped = [before + n for before, n in zip(self.dropped, counts, strict=True)]

    def take(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences, in this order, and no more room than they need."""
        table = self.arrays()
        self.lengths, self.dropped = [self.lengths[i] for i in sequences], [self.dropped[i] for i in sequences]
        self._set(table, lambda name, array: buffers.chosen(array, sequences, self._room(name)))

    def take_in(self, others: Sequence["RaggedStore"]) -> None:
        """Put the sequences of the others behind these."""
        parts = [(len(part.lengths), part.arrays()) for part in (self, *others)]
        self.lengths = [length for part in (self, *others) for length in part.lengths]
        self.dropped = [n for part in (self, *others) for n in part.dropped]
        names = dict.fromkeys(name for _, table in parts for name in table)

        def stack(name: _Name, _: None) -> mx.array:
            return buffers.stacked([(count, table.get(name)) for count, table in parts], self._room(name))

        self._set(dict.fromkeys(names), stack)

    def _set(self, table: dict[_Name, mx.array | None], make: Callable[[_Name, mx.array | None], mx.array]) -> None:
        packed = any(length.packed for length in self.lengths)
        new = {name: make(name, array) for name, array in table.items() if packed or name[0] == "tail"}
        self.tail = [new["tail", i, 0] for i in range(2)] if ("tail", 0, 0) in new else None
        self.sinks = [new["sinks", i, 0] for i in range(2)] if ("sinks", 0, 0) in new else None
        self.blocks = None
        if packed:
            self.blocks = [PackedTensor(*(new.get(("blocks", i, j)) for j in range(3))) for i in range(2)]

    def _room(self, name: _Name) -> int:
        part, _, field = name
        if part == "tail":
            return self._tail_room()
        if part == "sinks":
            return self.scheme.sinks
        packed = max(length.packed for length in self.lengths)
        return packed // self.scheme.block if field == 2 else packed

    def _tail_room(self) -> int:
        """Rows that the tails need: few while all decode, whole steps of 256 for a prompt."""
        longest = max((length.tail for length in self.lengths), default=0)
        few = tail_room(self.scheme)
        return few if longest <= few else -(-longest // 256) * 256
