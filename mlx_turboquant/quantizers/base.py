"""What the cache and attention ask of one side of a layer: encode, decode, scores and weighted sums."""

from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.ops.encode import Encoded, look_too
from mlx_turboquant.tensor import PackedTensor

Learned = tuple[mx.array, ...]


class Fused(NamedTuple):
    """How the attention kernel reads packed rows.

    Attributes:
        bits: of a Lloyd-Max code; 0 for raw rows.
        rotation: of packed rows; None for raw ones.
        projection: (D, D) float32 that a query is multiplied with to meet the sign bits of packed keys, or None.
    """

    bits: int
    rotation: object | None = None
    projection: mx.array | None = None


class Quantizer:
    """One side, keys or values, of one layer.

    Arrays it holds are replaced, never changed in place, so that a copy of a cache may share them.

    Attributes:
        bits: per element; 0 stores rows raw.
        dim: head size D.
        dtype: the model's.
        learned: what `fit` learned from the prompt, arrays (B, Hkv, ...) of `learned_layout`; None before. Saved with
            the cache.
        queries_wanted: what `fit` uses of the prompt's queries: "" for nothing, "squares" for sums of q_i^2, "moments"
            for sums of q q^T.
        fused: how the attention kernel reads it, or in words why it cannot.
        in_kernels: whether rows are encoded and decoded in kernels, where a GPU has some.
    """

    bits: float
    dim: int
    dtype: mx.Dtype
    learned: Learned | None = None
    queries_wanted: str = ""
    fused: Fused | str
    in_kernels = False

    def squares(self, rows: mx.array, start: int, stop: int) -> mx.array | None:
        """What `fit` wants to know of a buffer's rows from start to stop, whole blocks; None for nothing."""
        return None

    def fit(self, rows: mx.array, queries: mx.array | None, squares: mx.array | None = None) -> None:
        """Learn from the prompt.

        Args:
            rows: (B, Hkv, T, D), whole blocks.
            queries: sums over the prompt's queries that read a head, (B, Hkv, D) or (B, Hkv, D, D) float32 as
                `queries_wanted`; None if none were seen.
            squares: what `squares` gave of these rows, if it was asked.
        """

    def learned_layout(self, B: int, H: int) -> tuple[tuple[tuple[int, ...], mx.Dtype], ...]:
        """Shape and dtype of each array that is learned."""
        return ()

    def encode(self, rows: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode rows (B, Hkv, .., D) from start to stop, stop - start a multiple of the block.

        A kernel takes a whole buffer and reads those rows; a slice of it would be copied first.
        """
        raise NotImplementedError

    def encode_and_look(self, rows: mx.array, start: int, stop: int, block: int) -> Encoded:
        """The same, and which of the rows hold NaN or infinities, in blocks of so many."""
        return look_too(self.encode(rows, start, stop), rows, start, stop, block)

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The rows (B, Hkv, stop - start, D) in the model's dtype that the codes of whole blocks stand for."""
        raise NotImplementedError

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """The shapes and the dtypes of `encode`'s result for T rows, to check what a file holds."""
        raise NotImplementedError

    def sequences(self, which: slice) -> "Quantizer":
        """The same for some of the sequences."""
        part = self._twin()
        part.learned = None if self.learned is None else tuple(array[which] for array in self.learned)
        return part

    def _twin(self) -> "Quantizer":
        """What `copy.copy` gives, in a tenth of its time: a batch makes two for each layer and block."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict) -> "Quantizer":
        return self._twin()


class KeyQuantizer(Quantizer):
    """A quantizer whose rows meet queries.

    Attributes:
        balance: (B, Hkv, D) float32 that keys were multiplied with, or None.
    """

    balance: mx.array | None = None

    def prepare(self, queries: mx.array):
        """What `scores` needs of scaled queries (B, Hkv, R, D) float32; computed once per step."""
        raise NotImplementedError

    def scores(self, prepared, packed: PackedTensor) -> mx.array:
        """Inner products of prepared queries with encoded keys: (B, Hkv, R, T) float32."""
        raise NotImplementedError


class ValueQuantizer(Quantizer):
    """A quantizer whose rows are averaged."""

    def weighted_sum(self, weights: mx.array, packed: PackedTensor) -> mx.array:
        """weights (B, Hkv, R, T) float32 times encoded values, in the stored space: (B, Hkv, R, E) float32."""
        raise NotImplementedError

    def finish(self, total: mx.array) -> mx.array:
        """A total (B, Hkv, R, E) of `weighted_sum` results, as the model has values: (B, Hkv, R, D)."""
        raise NotImplementedError
