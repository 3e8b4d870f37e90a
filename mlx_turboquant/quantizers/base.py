"""What a quantization method provides to the cache and to attention."""

import copy

import mlx.core as mx

from mlx_turboquant.tensor import PackedTensor


class Quantizer:
    """One side, keys or values, of one layer. A new method is a file with a key class and a value class like this.

    Arrays it holds are replaced, never changed in place, so that a copy of a cache may share them.

    Attributes:
        bits: per element; 0 stores rows raw.
        dim: head size D.
        dtype: the model's.
        balance: (B, Hkv, D) float32 fitted to the prompt, or None. Saved with the cache.
        wants_queries: whether `fit` has a use for the prompt's queries.
    """

    bits: int
    dim: int
    dtype: mx.Dtype
    balance: mx.array | None = None
    wants_queries: bool = False

    def fit(self, keys: mx.array, query_squares: mx.array | None) -> None:
        """Learn from the prompt: keys (B, Hkv, T, D), whole blocks; query_squares (B, Hkv, D) or None if none seen."""

    def encode(self, rows: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode rows (B, Hkv, .., D) from start to stop, stop - start a multiple of the block.

        A kernel takes a whole buffer and reads those rows; a slice of it would be copied first.
        """
        raise NotImplementedError

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The rows (B, Hkv, stop - start, D) in the model's dtype that the codes of whole blocks stand for."""
        raise NotImplementedError

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """The shapes and the dtypes of `encode`'s result for T rows, to check what a file holds."""
        raise NotImplementedError

    def sequences(self, which: slice) -> "Quantizer":
        """The same for some of the sequences."""
        part = copy.copy(self)
        part.balance = None if self.balance is None else self.balance[which]
        return part

    def __deepcopy__(self, memo: dict) -> "Quantizer":
        return copy.copy(self)


class KeyQuantizer(Quantizer):
    """A quantizer whose rows meet queries."""

    def prepare(self, queries: mx.array):
        """What `scores` needs of scaled queries (B, Hkv, R, D) float32; computed once per step."""
        raise NotImplementedError

    def scores(self, prepared, packed: PackedTensor) -> mx.array:
        """Inner products of prepared queries with encoded keys: (B, Hkv, R, T) float32."""
        raise NotImplementedError


class ValueQuantizer(Quantizer):
    """A quantizer whose rows are averaged."""

    def weighted_sum(self, weights: mx.array, packed: PackedTensor) -> mx.array:
        """weights (B, Hkv, R, T) float32 times encoded values, in the stored space: (B, Hkv, R, D) float32."""
        raise NotImplementedError

    def finish(self, total: mx.array) -> mx.array:
        """A total of `weighted_sum` results, as the model has values."""
        raise NotImplementedError
