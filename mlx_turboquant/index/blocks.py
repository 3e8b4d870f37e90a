"""Rows of an index in blocks: appended, marked as removed, read back, and handed to MLX one block at a time."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_turboquant.index.settings import Settings

# Codes per block. A search holds one block of a mapped file at a time (64 MiB at 8 bits, 32 at 4) and its scores (see
# `search`), whatever the number of rows. Smaller blocks would leave a GPU idle between them.
BLOCK_CODES = 1 << 26
_MAX_BLOCK_ROWS = 1 << 18
# Bytes that are copied at a time to write a file.
_PIECE_BYTES = 4 << 20


class Block:
    """Up to `capacity` rows.

    A block in memory starts small and doubles; when it is full, what searches read moves to MLX. One of a mapped file
    is never written to, and is read when it is searched.
    """

    def __init__(self, settings: Settings, capacity: int):
        self._settings, self._capacity = settings, capacity
        self.count, self.mapped = 0, False
        self._arrays = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in settings.columns.items()}
        self._in_mlx: dict[str, mx.array] | None = None

    @classmethod
    def of_file(cls, settings: Settings, arrays: dict[str, np.ndarray]) -> "Block":
        """A full block of arrays that stay where they are."""
        block = cls(settings, 0)
        block._arrays, block.count, block.mapped = arrays, len(arrays["ids"]), True
        return block

    @property
    def room(self) -> int:
        """How many more rows fit."""
        return 0 if self.mapped else self._capacity - self.count

    def reserve(self, n: int) -> None:
        """Make place for so many more rows, at most `room`, so that they need not move as they come."""
        for name, held in self._arrays.items():
            if len(held) < self.count + n:
                size = min(max(2 * len(held), self.count + n), self._capacity)
                larger = np.empty((size, *held.shape[1:]), held.dtype)
                larger[: self.count] = held[: self.count]
                self._arrays[name] = larger

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        """Add rows, at most `room`."""
        n = len(arrays["ids"])
        self.reserve(n)
        start, self.count = self.count, self.count + n
        self._in_mlx = None
        for name, new in arrays.items():
            self._arrays[name][start : self.count] = new
        if not self.room:
            self.in_mlx()
            for name in self._settings.searched:
                del self._arrays[name]

    def truncate(self, count: int) -> None:
        """Keep the first rows only."""
        arrays = {name: np.array(self.column(name)[:count]) for name in self._settings.columns}
        self._arrays, self.count, self._in_mlx = arrays, count, None

    def column(self, name: str) -> np.ndarray:
        """One array of all rows, not to be written to."""
        if name in self._arrays:
            return self._arrays[name][: self.count]
        return np.array(self._in_mlx[name], copy=None)

    def in_mlx(self) -> dict[str, mx.array]:
        """What a search reads; of a mapped file a copy, which is not kept."""
        if self._in_mlx is not None:
            return self._in_mlx
        arrays = {name: mx.array(self.column(name)) for name in self._settings.searched}
        if not self.mapped:
            self._in_mlx = arrays
        return arrays

    def some_in_mlx(self, places: np.ndarray) -> dict[str, mx.array]:
        """The same of the rows at some places; of a mapped file only these are read."""
        if self.mapped:
            return {name: mx.array(self.column(name)[places]) for name in self._settings.searched}
        at = mx.array(places)
        return {name: array[at] for name, array in self.in_mlx().items()}


class Blocks:
    """All rows of an index. A row's number is its place in the order of insertion, removed rows included."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.block_rows = max(min(BLOCK_CODES // settings.d, _MAX_BLOCK_ROWS), 1)
        self._blocks: list[Block] = []
        self._living = np.zeros(0, bool)
        self.total = self.count = 0
        self._mapped = self._gone = 0  # rows of a mapped file, and removed rows in memory

    @property
    def living(self) -> np.ndarray:
        """Which rows are not removed, (total,) bool, not to be written to."""
        return self._living[: self.total]

    def attach(self, arrays: dict[str, np.ndarray]) -> None:
        """Take the rows of a mapped file, before any other."""
        for start in range(0, len(arrays["ids"]), self.block_rows):
            part = {name: array[start : start + self.block_rows] for name, array in arrays.items()}
            self._blocks.append(Block.of_file(self._settings, part))
        self._mapped = len(arrays["ids"])
        self._came(self._mapped)

    def append(self, arrays: dict[str, np.ndarray], coming: int = 0) -> None:
        """Add rows behind the last; `coming` more will follow, for which place is made."""
        n, start = len(arrays["ids"]), 0
        self._grow(n + coming)
        while start < n:
            if not self._blocks or not self._blocks[-1].room:
                self._blocks.append(Block(self._settings, self.block_rows))
            self._blocks[-1].reserve(min(n - start + coming, self._blocks[-1].room))
            stop = min(start + self._blocks[-1].room, n)
            self._blocks[-1].append({name: array[start:stop] for name, array in arrays.items()})
            self._came(stop - start)
            start = stop

    def truncate(self, total: int) -> None:
        """Forget the rows from `total` on, which were all in memory and not removed."""
        self.count -= self.total - total
        self.total = total
        for start, block in list(self)[::-1]:
            if start >= total:
                self._blocks.pop()
            elif start + block.count > total:
                block.truncate(total - start)

    def remove(self, rows: np.ndarray) -> bool:
        """Mark different living rows as removed; whether rows were numbered anew.

        They are, and memory is given back, once more rows in memory are removed than are left there: every row is then
        copied once per removed row at most. Rows of a mapped file are only marked.
        """
        self._living[rows] = False
        self.count -= len(rows)
        self._gone += int(np.count_nonzero(rows >= self._mapped))
        if 2 * self._gone <= self.total - self._mapped:
            return False
        kept = Blocks(self._settings)
        for start, block in self:
            if not block.mapped:
                living = self.living[start : start + block.count]
                kept.append({name: block.column(name)[living] for name in self._settings.columns})
        self._blocks = [block for block in self._blocks if block.mapped] + kept._blocks
        self._living = np.concatenate([self._living[: self._mapped], kept.living])
        self.total, self._gone = self._mapped + kept.total, 0
        return True

    def gather(self, names: list[str], rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some columns of rows (n,) in any order."""
        out = {}
        for name in names:
            shape, dtype = self._settings.columns[name]
            out[name] = np.empty((len(rows), *shape), dtype)
        for start, block in self:
            places = np.flatnonzero((rows >= start) & (rows < start + block.count))
            if places.size:
                for name in names:
                    out[name][places] = block.column(name)[rows[places] - start]
        return out

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """One column of the rows that are not removed, a few at a time."""
        for start, block in self:
            column = block.column(name)
            step = max(_PIECE_BYTES // max(column[:1].nbytes, 1), 1)
            for first in range(0, block.count, step):
                living = self.living[start + first : start + min(first + step, block.count)]
                yield column[first : first + step][living]

    def __iter__(self) -> Iterator[tuple[int, Block]]:
        """Each block with the number of its first row."""
        start = 0
        for block in self._blocks:
            yield start, block
            start += block.count

    def _grow(self, n: int) -> None:
        if len(self._living) < self.total + n:
            larger = np.ones(max(2 * len(self._living), self.total + n), bool)
            larger[: self.total] = self.living
            self._living = larger

    def _came(self, n: int) -> None:
        self._grow(n)
        self._living[self.total : self.total + n] = True
        self.total, self.count = self.total + n, self.count + n
