"""Buffers that grow along the token axis, with spare room counted in their bytes."""

import mlx.core as mx

from mlx_turboquant.cache.schedule import spare_blocks
from mlx_turboquant.tail_parts import FEW, TailParts
from mlx_turboquant.tensor import PackedTensor, tokens_per_row


class RowBuffer:
    """Rows (B, Hkv, length, D) in an array with room for more.

    Its array never holds on to a larger one that rows come from, and is row contiguous: kernels would copy another
    layout at every step. Rows that were put `beside` it are joined to it when it is next asked for.
    """

    def __init__(self) -> None:
        self._array: mx.array | None = None
        self._parts: TailParts | None = None  # the array with rows beside it
        self.length = 0

    @property
    def array(self) -> mx.array | None:
        """All rows, with spare room; None before any."""
        self._join()
        return self._array

    @array.setter
    def array(self, array: mx.array | None) -> None:
        self._array, self._parts = array, None

    def view(self) -> mx.array:
        """The rows (B, Hkv, length, D)."""
        full = self.length == self.array.shape[2]
        return self.array if full else self.array[:, :, : self.length]

    def append(self, rows: mx.array, capacity: int = 0) -> None:
        """Add rows (B, Hkv, n, D); if they do not fit, move to an array of `capacity` rows, or more if they need it."""
        array, start = self.array, self.length
        B, H, n, D = rows.shape
        self.length = stop = start + n
        if array is None and capacity <= stop:
            # Assigning all of an array makes it the assigned one, a slice of another perhaps.
            self.array = mx.contiguous(rows)
            return
        room = 0 if array is None else array.shape[2]
        if stop > room:
            held = array if start == room else array[:, :, :start]  # of None, too: there are no rows then
            if start and stop >= capacity:
                self.array = mx.concatenate([held, rows], axis=2)
                return
            array = mx.zeros((B, H, max(stop, capacity), D), rows.dtype)
            if start:
                array[:, :, :start] = held
            self.array = array
        array[:, :, start:stop] = rows

    def beside(self, row: mx.array) -> TailParts:
        """Add a row (B, Hkv, 1, D), for which the array has room, without writing it into the array yet."""
        parts = self._parts
        if parts is not None and (parts.next is None or parts.count + 1 == FEW):
            self._join()
            parts = None
        if parts is None:
            parts = TailParts(self._array, self.length, None, 0, row)
        else:
            parts = TailParts(self._array, parts.joined, parts.next, parts.count + 1, row)
        self._parts, self.length = parts, self.length + 1
        return parts

    def _join(self) -> None:
        parts, self._parts = self._parts, None
        if parts is not None:
            self._array[:, :, parts.joined : parts.joined + parts.count + 1] = parts.loose()

    def keep(self, start: int, stop: int, capacity: int = 0) -> None:
        """Keep only rows start..stop, in a new array of `capacity` rows, or more if they need it."""
        rows = self.array[:, :, start:stop]
        self.array, self.length = None, 0
        self.append(rows, capacity)

    def drop(self, start: int, stop: int, capacity: int = 0) -> None:
        """Forget rows start..stop and close the gap, in a new array of `capacity` rows, or more if they need it."""
        rows = self.view()
        kept = mx.concatenate([rows[:, :, :start], rows[:, :, stop:]], axis=2) if start else rows[:, :, stop:]
        self.array, self.length = None, 0
        self.append(kept, capacity)

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` on; their room stays."""
        self._join()
        self.length = length


class PackedBuffer:
    """Packed blocks of one side of a layer: codes, scales and centres in buffers that grow together."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._tokens = tokens_per_row(block)
        self._parts: PackedTensor | None = None  # of RowBuffers in place of arrays

    @property
    def length(self) -> int:
        """Rows (tokens) held."""
        return 0 if self._parts is None else self._parts.codes.length

    def view(self) -> PackedTensor:
        """All packed rows."""
        return self._parts.map(RowBuffer.view)

    def stored(self) -> PackedTensor:
        """The buffers themselves, with their spare room."""
        return PackedTensor(*[None if part is None else part.array for part in self._parts])

    def append(self, packed: PackedTensor, expected: int = 0) -> None:
        """Add encoded blocks. The first time the room is for `expected` rows; later it grows when it must."""
        blocks = (self.length + packed.length) // self.block
        if self._parts is None:
            self._parts = PackedTensor(*[None if array is None else RowBuffer() for array in packed])
            room = expected // self.block
        else:
            room = blocks + spare_blocks(blocks, self.block)
        for part, array, n in zip(self._parts, packed, self._tokens, strict=True):
            if part is not None:
                part.append(array, room * (self.block // n))

    def drop(self, length: int) -> None:
        """Forget the first `length` rows (whole blocks); the others move to new arrays with as much room as before."""
        self._parts.map(lambda part, n: part.drop(0, length // n, part.array.shape[2]), self._tokens)

    def truncate(self, length: int) -> None:
        """Forget the rows from `length` (whole blocks) on."""
        self._parts.map(lambda part, n: part.truncate(length // n), self._tokens)
