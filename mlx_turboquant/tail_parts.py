"""The newest rows of a layer in three places, so that a decode step need not write its token into the tail.

Writing a key and a value takes two dispatches for each layer, as many as attention does. A kernel that reads the new
rows anyway hands them back behind the few that came before; every `FEW` tokens all of them are written into the tail.
"""

from dataclasses import dataclass

import mlx.core as mx

FEW = 16  # kernels/attend.metal has it too


@dataclass(slots=True, eq=False)
class TailParts:
    """The keys, or the values, of a tail: rows in its array, a few behind them, and one new row.

    Attributes:
        array: (B, Hkv, room, D), the tail, with room for all of them.
        joined: how many of its rows are valid.
        few: (B, Hkv, FEW, D), the rows that follow; None if there are none.
        count: how many of them are valid, less than FEW.
        new: (B, Hkv, 1, D), the row behind them.
        next: `few` with `new` behind it, once a kernel has made it.
    """

    array: mx.array
    joined: int
    few: mx.array | None
    count: int
    new: mx.array
    next: mx.array | None = None

    def loose(self) -> mx.array:
        """The rows (B, Hkv, count + 1, D) that are not in the array."""
        if self.next is not None:
            return self.next[:, :, : self.count + 1]
        return self.new if self.few is None else mx.concatenate([self.few[:, :, : self.count], self.new], axis=2)

    def whole(self) -> mx.array:
        """A copy of the array with all rows in it."""
        return mx.slice_update(self.array, self.loose(), mx.array(self.joined), axes=(2,))
