"""Turbo: centre and balance keys, rotate, quantize to a Lloyd-Max codebook with matched norm; values without the first.

Rotation and codebook are TurboQuant's (arXiv 2504.19874); the scale is EDEN's; centring and balancing are explained in
`conditioning`. The key map k -> R diag(s) (k - c) is linear up to the offset c, so a query takes its inverse transpose
R diag(1 / s) once per step and no key is ever rotated back. Values are accumulated rotated; the sum is rotated back.
"""

import mlx.core as mx

from mlx_turboquant.conditioning import balance_factors, block_centers, subtract_centers
from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.dequantize import dequantize
from mlx_turboquant.ops.encode import encode
from mlx_turboquant.packing import words_per_row
from mlx_turboquant.quantizers.base import KeyQuantizer, ValueQuantizer
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tensor import PackedTensor


class TurboKeys(KeyQuantizer):
    """Keys of one layer in `bits` bits per element.

    Args:
        scheme: supplies group, block, center, balance, rotation and seed.
        dim: head size D.
        dtype: of scales and centres: the model's.
    """

    def __init__(self, scheme: KVScheme, dim: int, dtype: mx.Dtype):
        self.bits, self.dim, self.dtype, self.block = scheme.key_bits, dim, dtype, scheme.block
        self.group = _group_size(scheme, dim)
        self.center, self.wants_queries = scheme.center, scheme.balance
        self.rotation = make_rotation(scheme.rotation, dim, scheme.seed)

    def fit(self, keys: mx.array, query_squares: mx.array | None) -> None:
        """Set the balance from the prompt: keys (B, Hkv, T, D), query_squares (B, Hkv, D) or None if none were seen."""
        if self.wants_queries and query_squares is not None:
            self.balance = balance_factors(query_squares, subtract_centers(keys, self._centers(keys)))

    def encode(self, keys: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode keys (B, Hkv, .., D): the rows from start to stop, stop - start a multiple of block."""
        return _encode(self, keys, start, stop)

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The keys (B, Hkv, stop - start, D) that the codes stand for, in the model's dtype; whole blocks."""
        return _decode(self, packed, start, stop)

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """Shapes and dtypes of `encode`'s result."""
        shapes, dtypes = _layout(self, B, H, T)
        centers = (B, H, T // self.block, self.dim) if self.center else None
        return shapes._replace(centers=centers), dtypes._replace(centers=self.dtype)

    def prepare(self, queries: mx.array) -> tuple[mx.array, mx.array]:
        """Queries (B, Hkv, R, D) float32 as `scores` wants them: transformed, and as they were (for the centres)."""
        balanced = queries if self.balance is None else queries / self.balance[:, :, None]
        return self.rotation.apply(balanced), queries

    def scores(self, prepared: tuple[mx.array, mx.array], packed: PackedTensor) -> mx.array:
        """Inner products of prepared queries with encoded keys: (B, Hkv, R, T) float32."""
        rotated, plain = prepared
        scores = rotated @ lloyd_max.dequantize(packed, self.bits, self.dim).swapaxes(-1, -2)
        if packed.centers is None:
            return scores
        offsets = plain @ packed.centers.astype(mx.float32).swapaxes(-1, -2)
        return (scores.reshape(*offsets.shape, self.block) + offsets[..., None]).reshape(scores.shape)

    def _centers(self, keys: mx.array) -> mx.array | None:
        return block_centers(keys, self.block) if self.center else None


class TurboValues(ValueQuantizer):
    """Values of one layer in `bits` bits per element; arguments as for `TurboKeys`."""

    center = False

    def __init__(self, scheme: KVScheme, dim: int, dtype: mx.Dtype):
        self.bits, self.dim, self.dtype, self.block = scheme.value_bits, dim, dtype, scheme.block
        self.group = _group_size(scheme, dim)
        self.rotation = make_rotation(scheme.rotation, dim, scheme.seed)

    def encode(self, values: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode values (B, Hkv, .., D): the rows from start to stop, stop - start a multiple of block."""
        return _encode(self, values, start, stop)

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The values (B, Hkv, stop - start, D) that the codes stand for, in the model's dtype; whole blocks."""
        return _decode(self, packed, start, stop)

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """Shapes and dtypes of `encode`'s result."""
        return _layout(self, B, H, T)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor) -> mx.array:
        """weights (B, Hkv, R, T) float32 times the encoded values, still rotated: (B, Hkv, R, D) float32."""
        return weights @ lloyd_max.dequantize(packed, self.bits, self.dim)

    def finish(self, total: mx.array) -> mx.array:
        """Rotate a sum of `weighted_sum` results back."""
        return self.rotation.invert(total)


def _encode(side: TurboKeys | TurboValues, rows: mx.array, start: int, stop: int | None) -> PackedTensor:
    return encode(
        rows,
        start,
        rows.shape[2] if stop is None else stop,
        bits=side.bits,
        group=side.group,
        block=side.block,
        rotation=side.rotation,
        center=side.center,
        balance=side.balance,
    )


def _decode(side: TurboKeys | TurboValues, packed: PackedTensor, start: int, stop: int | None) -> mx.array:
    return dequantize(
        packed,
        start,
        packed.length if stop is None else stop,
        bits=side.bits,
        dim=side.dim,
        block=side.block,
        rotation=side.rotation,
        balance=side.balance,
    )


def _group_size(scheme: KVScheme, dim: int) -> int:
    group = scheme.group or dim
    if dim % group:
        raise ValueError(
            f"[KVScheme] group={group} does not divide the head size {dim}. Leave group out for one scale per row."
        )
    return group


def _layout(side: TurboKeys | TurboValues, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
    shapes = PackedTensor((B, H, T, words_per_row(side.dim, side.bits)), (B, H, T, side.dim // side.group))
    return shapes, PackedTensor(mx.uint32, side.dtype)
