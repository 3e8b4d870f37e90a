"""Raw: rows kept as they are, for the side of a scheme that has 0 bits."""

import mlx.core as mx

from mlx_turboquant.quantizers.base import Fused, KeyQuantizer, ValueQuantizer
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tensor import PackedTensor


class RawRows(KeyQuantizer, ValueQuantizer):
    """Keys or values of one layer in the model's dtype; it serves either side."""

    bits = 0
    fused = Fused(0)
    in_kernels = True  # a slice needs none

    def __init__(self, scheme: KVScheme, dim: int, dtype: mx.Dtype):
        self.dim, self.dtype = dim, dtype

    def encode(self, rows: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Rows (B, Hkv, .., D) from start to stop as they are."""
        return PackedTensor(rows[:, :, start:stop])

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The rows (B, Hkv, stop - start, D) themselves."""
        return packed.codes[:, :, start:stop]

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """Shapes and dtypes of `encode`'s result."""
        return PackedTensor((B, H, T, self.dim)), PackedTensor(self.dtype)

    def prepare(self, queries: mx.array) -> mx.array:
        """Queries (B, Hkv, R, D) float32 as they are."""
        return queries

    def scores(self, prepared: mx.array, packed: PackedTensor) -> mx.array:
        """Inner products of queries and keys: (B, Hkv, R, T) float32."""
        return prepared @ packed.codes.astype(mx.float32).swapaxes(-1, -2)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor) -> mx.array:
        """weights (B, Hkv, R, T) times the values: (B, Hkv, R, D) float32."""
        return weights @ packed.codes.astype(mx.float32)

    def finish(self, total: mx.array) -> mx.array:
        """The sum as it is."""
        return total
