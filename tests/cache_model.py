"""The slow, literal model that caches are compared with: rows in numpy, and the documented rules one token at a time.

It keeps, for each sequence, the rows that a cache stands for with their positions, and knows from the rules alone which
of them are sinks, which were encoded when and from what, and what a bound dropped. Encoded rows are what the scheme's
own quantizer gives when it is asked directly.
"""

import copy

import mlx.core as mx
import numpy as np

from mlx_turboquant.quantizers import make_quantizers


class Shape:
    """What all sequences of a run have in common.

    Args:
        scheme: a `KVScheme`.
        dims: head size of keys and of values.
        dtype: the model's.
        max_size: the bound or None.
    """

    heads, queries = 2, 4  # key heads, query heads

    def __init__(self, scheme, dims, dtype, max_size=None):
        self.scheme, self.dims, self.dtype, self.max_size = scheme, dims, dtype, max_size

    def __deepcopy__(self, memo):
        return self

    def quantizers(self):
        """The scheme's own for one layer."""
        return make_quantizers(self.scheme, *self.dims, self.dtype)

    def array(self, rows):
        """Rows (.., H, T, D) of numpy with a first axis, in the model's dtype."""
        return mx.array(rows if rows.ndim == 4 else rows[None]).astype(self.dtype)


def in_float32(array):
    """An array of the model's dtype as float32, exactly."""
    return np.array(array.astype(mx.float32))


class Sequence:
    """One sequence: rows (H, T, D) of keys and of values in float32, and what became of them.

    Attributes:
        rows: keys and values that the cache stands for, of the tokens it holds.
        positions: of those tokens.
        sinks, packed: how many tokens are set apart at the front and how many follow encoded; 0 while it is raw.
        fresh: packed tokens from here on were encoded since they were last compared.
        before: the rows that were encoded last: where they begin, keys and values as they were; None once compared.
        sums: of the prompt's queries, float32; None before any.
        newest: of the last call's queries, which may have been a decode step's.
    """

    def __init__(self, shape):
        self.shape = shape
        self.forget()

    def forget(self):
        self.rows = [np.zeros((self.shape.heads, 0, dim), np.float32) for dim in self.shape.dims]
        self.positions = np.zeros(0, int)
        self.sinks = self.packed = self.fresh = 0
        self.sums = self.newest = self.quantizers = self.before = None

    def __deepcopy__(self, memo):
        other = copy.copy(self)  # arrays are replaced, never written to, but for rows
        other.rows = [side.copy() for side in self.rows]
        return other

    @property
    def held(self):
        return len(self.positions)

    @property
    def offset(self):
        return int(self.positions[-1]) + 1 if self.held else 0

    @property
    def dropped(self):
        return self.offset - self.held

    @property
    def tail(self):
        return self.held - self.sinks - self.packed

    def append(self, rows):
        """New tokens: keys and values (H, L, D)."""
        start = self.offset
        self.rows = [np.concatenate(pair, axis=1) for pair in zip(self.rows, rows, strict=True)]
        self.positions = np.concatenate([self.positions, np.arange(start, start + rows[0].shape[1])])

    def keep(self, which):
        """Hold on to some of the tokens."""
        self.rows, self.positions = [side[:, which] for side in self.rows], self.positions[which]
        self.before = None

    def due(self, padding=0):
        """Tokens that are encoded next: whole blocks behind the sinks that are older than the window."""
        scheme = self.shape.scheme
        raw = self.tail - padding - (0 if self.packed else scheme.sinks)
        return max(raw - scheme.window, 0) // scheme.block * scheme.block

    def encode(self, padding=0):
        """Encode what is due; returns how many tokens that was."""
        count = self.due(padding)
        if not count:
            return 0
        if not self.packed:
            self.sinks = self.shape.scheme.sinks
        start = self.sinks + self.packed
        sides = [self.shape.array(side[:, start : start + count]) for side in self.rows]
        if self.quantizers is None:
            self.quantizers = self.shape.quantizers()
            queries = None if self.sums is None else mx.array(self.sums)[None]
            for quantizer, rows in zip(self.quantizers, sides, strict=True):
                quantizer.fit(rows, queries)
        self.before = start, [side[:, start : start + count].copy() for side in self.rows]
        for quantizer, rows, side in zip(self.quantizers, sides, self.rows, strict=True):
            packed = quantizer.encode(rows)
            for block in range(0, count, self.shape.scheme.block):
                stop = block + self.shape.scheme.block
                side[:, start + block : start + stop] = in_float32(quantizer.decode(packed, block, stop))[0]
        self.packed += count
        return count

    def make_room(self, new, padding=0):
        """Drop the oldest whole blocks behind the sinks so that so many tokens fit into the bound; whether any did."""
        scheme, bound, held = self.shape.scheme, self.shape.max_size, self.held - padding
        if bound is None or held + new <= bound:
            return False
        wanted = -(-max(held + new - bound, bound // 16) // scheme.block)
        count = min(wanted, (held - scheme.sinks - scheme.window) // scheme.block - 1) * scheme.block
        if self.packed and count >= self.packed:
            self.encode(padding)
        if self.packed:
            self.packed, self.fresh = self.packed - count, max(self.fresh - count, 0)
        first = np.arange(self.held)
        self.keep((first < scheme.sinks) | (first >= scheme.sinks + count))
        return True

    def can_trim(self, n):
        """Whether the token that the newest would then be is still held."""
        return self.dropped == 0 or n >= self.offset or self.held - n > self.shape.scheme.sinks

    def trim(self, n):
        """Forget the newest n tokens. The rest of a cut block is raw again, as it was decoded."""
        if n >= self.offset:
            self.forget()
            return
        self.keep(slice(0, self.held - n))
        if self.sinks + self.packed > self.held:
            self.packed = max(self.held - self.sinks, 0) // self.shape.scheme.block * self.shape.scheme.block
        self.fresh = min(self.fresh, self.packed)
        if not self.packed:
            self.sinks, self.quantizers = 0, None

    def observe(self, queries, wanted):
        """Queries (Hq, L, D) that met this sequence raw: few of them may have been a decode step's."""
        rows = queries.astype(np.float64).reshape(self.shape.heads, -1, queries.shape[-1])
        new = rows.swapaxes(1, 2) @ rows if wanted == "moments" else np.square(rows).sum(axis=1)
        self.newest = new.astype(np.float32) if wanted else None

    def count_newest(self):
        """What was held back was prompt."""
        if self.newest is not None:
            self.sums = self.newest if self.sums is None else self.sums + self.newest
        self.newest = None
