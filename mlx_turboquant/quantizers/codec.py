"""What a quantization method provides: how one side of a layer becomes codes and numbers, and what they stand for."""

from typing import Any

import mlx.core as mx

from mlx_turboquant.quantizers.base import Fused, Learned
from mlx_turboquant.tensor import PackedTensor


class Codec:
    """One side, keys or values, of one layer. A new method is a file with a class like this.

    What a row keeps is read as a vector y of E >= D elements that meets transformed queries: q.k is estimated as
    (A q).y with A linear. So k itself is estimated as A^T y, and a weighted sum of rows as A^T of the sum of their y.
    For a method that rotates, A is the rotation and E is D.

    It is given keys after they were centred and balanced, if the scheme asks for that: see `coded`.

    Args:
        scheme: the `KVScheme`, for its options.
        bits: of this side.
        dim: head size D.
        dtype: the model's; of every number that is stored beside the codes.

    Attributes:
        wants_queries: whether `fit` has a use for the second moments of the prompt's queries.
        fused: how the attention kernel reads what it stores; None if no kernel does.
        in_kernels: whether kernels encode and decode its rows, where a GPU has some.

    Raises:
        ValueError: if an option does not suit the head size.
    """

    wants_queries = False
    fused: Fused | None = None
    in_kernels = False

    def __init__(self, scheme: Any, bits: float, dim: int, dtype: mx.Dtype):
        self.bits, self.dim, self.dtype, self.block = bits, dim, dtype, scheme.block

    def fit(self, rows: mx.array, moments: mx.array | None) -> Learned:
        """What is learned from the prompt: arrays of `learned_layout`'s shapes.

        Args:
            rows: (B, Hkv, T, D) float32, whole blocks.
            moments: (B, Hkv, D, D) float32, the sum of q q^T over the prompt's queries that read this head, if
                `wants_queries` and if any were seen; else None.
        """
        return ()

    def learned_layout(self, B: int, H: int) -> tuple[tuple[tuple[int, ...], mx.Dtype], ...]:
        """Shape (B, H, ...) and dtype of each array that `fit` returns."""
        return ()

    def quantize(self, rows: mx.array, learned: Learned) -> PackedTensor:
        """Rows (B, Hkv, T, D) float32, finite, whole blocks, packed; `centers` only if blocks keep numbers too."""
        raise NotImplementedError

    def dequantize(self, packed: PackedTensor, learned: Learned) -> mx.array:
        """The vectors y (B, Hkv, T, E) float32 of packed rows, whole blocks."""
        raise NotImplementedError

    def prepare(self, x: mx.array, learned: Learned) -> Any:
        """What `products` needs of x = A q (B, Hkv, R, E) float32; made once per step."""
        return x

    def products(self, prepared: Any, packed: PackedTensor, learned: Learned) -> mx.array:
        """Inner products (B, Hkv, R, T) float32 of prepared x with the vectors y of packed rows."""
        return prepared @ self.dequantize(packed, learned).swapaxes(-1, -2)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor, learned: Learned) -> mx.array:
        """weights (B, Hkv, R, T) float32 times the vectors y of packed rows: (B, Hkv, R, E) float32."""
        return weights @ self.dequantize(packed, learned)

    def transform(self, x: mx.array, learned: Learned) -> mx.array:
        """A x for x (B, Hkv, R, D) float32: (B, Hkv, R, E)."""
        return x

    def transform_back(self, y: mx.array, learned: Learned) -> mx.array:
        """A^T y for y (B, Hkv, R, E) float32: (B, Hkv, R, D)."""
        return y

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """The shapes and the dtypes of `quantize`'s result for T rows; None for a field that it leaves out."""
        raise NotImplementedError
