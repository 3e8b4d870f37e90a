"""Keys and values stored by any `Codec`: keys centred and balanced around it, where the scheme asks for that.

The key map k -> A diag(s) (k - c) is linear up to the offset c, so a query takes its inverse transpose A diag(1 / s)
once per step and no key is ever taken back; A is the codec's. Values are summed as they are stored, and the sum is
taken back.
"""

from typing import Any

import mlx.core as mx

from mlx_turboquant.conditioning import block_centers, in_dtype, subtract_centers
from mlx_turboquant.ops.balance import balance
from mlx_turboquant.ops.encode import in_pieces
from mlx_turboquant.ops.survey import survey
from mlx_turboquant.quantizers.base import KeyQuantizer, ValueQuantizer
from mlx_turboquant.quantizers.codec import Codec
from mlx_turboquant.tensor import PackedTensor


class CodedKeys(KeyQuantizer):
    """Keys of one layer.

    Args:
        codec: stores them.
        scheme: supplies block, center and balance.
    """

    def __init__(self, codec: Codec, scheme: Any):
        self.codec, self.block = codec, scheme.block
        self.bits, self.dim, self.dtype = codec.bits, codec.dim, codec.dtype
        self.in_kernels = codec.in_kernels
        self.fused = codec.fused or f"no kernel reads {scheme.method}{codec.bits:g} keys"
        self.center, self.balanced = scheme.center, scheme.balance
        self.queries_wanted = "moments" if codec.wants_queries else "squares" if self.balanced else ""

    @property
    def balance(self) -> mx.array | None:
        """(B, Hkv, D) float32 that centred keys are multiplied with; None if they are not."""
        return self.learned[0] if self.balanced and self.learned is not None else None

    def learned_layout(self, B: int, H: int) -> tuple[tuple[tuple[int, ...], mx.Dtype], ...]:
        """Shape and dtype of the balance, if any, and of what the codec learns."""
        balance = (((B, H, self.dim), mx.float32),) if self.balanced else ()
        return (*balance, *self.codec.learned_layout(B, H))

    def squares(self, rows: mx.array, start: int, stop: int) -> mx.array | None:
        """Sums over squares of centred keys, for the balance; None without one."""
        if not self.balanced:
            return None
        return survey(rows, start, stop, block=self.block, center=self.center, squares=True).squares

    def fit(self, rows: mx.array, queries: mx.array | None, squares: mx.array | None = None) -> None:
        """Learn from the prompt's keys (B, Hkv, T, D) and the sums over its queries; a balance of 1 without them."""
        B, H = rows.shape[:2]
        moments = queries if self.queries_wanted == "moments" else None
        learns = bool(self.codec.learned_layout(B, H))
        keys = factors = None
        if learns or (self.balanced and squares is None):  # building a graph that nobody evaluates takes time too
            keys = subtract_centers(rows, self._centers(rows))
        if self.balanced:
            asked = queries if moments is None else mx.diagonal(moments, axis1=-2, axis2=-1)
            if squares is None:
                squares = mx.square(keys).sum(axis=2)
            factors = mx.ones((B, H, self.dim)) if queries is None else balance(asked, squares)
            if moments is not None:  # a query meets the balanced keys divided by it
                moments = moments / (factors[..., None] * factors[:, :, None])
        self.learned = () if factors is None else (factors,)
        if learns:
            self.learned += self.codec.fit(keys if factors is None else keys * factors[:, :, None], moments)

    def encode(self, rows: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode keys (B, Hkv, .., D): the rows from start to stop, stop - start a multiple of block."""
        return in_pieces(self._encode, rows, start, rows.shape[2] if stop is None else stop, self.block)

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The keys (B, Hkv, stop - start, D) that the codes stand for, in the model's dtype; whole blocks."""
        packed = packed.rows(start, packed.length if stop is None else stop, self.block)
        centers, stored = self._parts(packed)
        keys = self.codec.transform_back(self.codec.dequantize(stored, self._codecs), self._codecs)
        if self.balance is not None:
            keys = keys / self.balance[:, :, None]
        if centers is not None:
            B, H, T, D = keys.shape
            keys = keys.reshape(B, H, -1, self.block, D) + centers[:, :, :, None].astype(mx.float32)
            keys = keys.reshape(B, H, T, D)
        return in_dtype(keys, self.dtype)

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """Shapes and dtypes of `encode`'s result."""
        shapes, dtypes = self.codec.layout(B, H, T)
        columns = (self.dim if self.center else 0) + (0 if shapes.centers is None else shapes.centers[-1])
        centers = (B, H, T // self.block, columns) if columns else None
        return shapes._replace(centers=centers), dtypes._replace(centers=self.dtype)

    def prepare(self, queries: mx.array) -> tuple[Any, mx.array]:
        """Queries (B, Hkv, R, D) float32 as `scores` wants them: transformed, and as they were (for the centres)."""
        balanced = queries if self.balance is None else queries / self.balance[:, :, None]
        return self.codec.prepare(self.codec.transform(balanced, self._codecs), self._codecs), queries

    def scores(self, prepared: tuple[Any, mx.array], packed: PackedTensor) -> mx.array:
        """Inner products of prepared queries with encoded keys: (B, Hkv, R, T) float32."""
        transformed, plain = prepared
        centers, stored = self._parts(packed)
        scores = self.codec.products(transformed, stored, self._codecs)
        if centers is None:
            return scores
        offsets = plain @ centers.astype(mx.float32).swapaxes(-1, -2)
        return (scores.reshape(*offsets.shape, self.block) + offsets[..., None]).reshape(scores.shape)

    def _encode(self, rows: mx.array) -> PackedTensor:
        centers = self._centers(rows)
        keys = subtract_centers(rows, centers)
        if self.balance is not None:
            keys = keys * self.balance[:, :, None]
        packed = self.codec.quantize(keys, self._codecs)
        if centers is not None and packed.centers is not None:
            centers = mx.concatenate([centers, packed.centers], axis=-1)
        return packed._replace(centers=packed.centers if centers is None else centers)

    def _centers(self, rows: mx.array) -> mx.array | None:
        return block_centers(rows, self.block) if self.center else None

    def _parts(self, packed: PackedTensor) -> tuple[mx.array | None, PackedTensor]:
        """The key centres, and what the codec made."""
        if not self.center:
            return None, packed
        centers, rest = packed.centers[..., : self.dim], packed.centers[..., self.dim :]
        return centers, packed._replace(centers=rest if rest.shape[-1] else None)

    @property
    def _codecs(self) -> tuple[mx.array, ...]:
        """What the codec learned."""
        return () if self.learned is None else self.learned[1 if self.balanced else 0 :]


class CodedValues(ValueQuantizer):
    """Values of one layer, stored by a codec."""

    def __init__(self, codec: Codec, scheme: Any):
        self.codec, self.block = codec, scheme.block
        self.bits, self.dim, self.dtype = codec.bits, codec.dim, codec.dtype
        self.in_kernels = codec.in_kernels
        self.fused = codec.fused or f"no kernel reads {scheme.method}{codec.bits:g} values"

    def learned_layout(self, B: int, H: int) -> tuple[tuple[tuple[int, ...], mx.Dtype], ...]:
        """Shape and dtype of what the codec learns."""
        return self.codec.learned_layout(B, H)

    def fit(self, rows: mx.array, queries: mx.array | None, squares: mx.array | None = None) -> None:
        """Learn from the prompt's values (B, Hkv, T, D)."""
        learns = self.codec.learned_layout(*rows.shape[:2])
        self.learned = self.codec.fit(subtract_centers(rows, None), None) if learns else ()

    def encode(self, rows: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode values (B, Hkv, .., D): the rows from start to stop, stop - start a multiple of block."""
        stop = rows.shape[2] if stop is None else stop
        return in_pieces(self._encode, rows, start, stop, self.block)

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The values (B, Hkv, stop - start, D) that the codes stand for, in the model's dtype; whole blocks."""
        packed = packed.rows(start, packed.length if stop is None else stop, self.block)
        return in_dtype(self.finish(self.codec.dequantize(packed, self.learned)), self.dtype)

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """Shapes and dtypes of `encode`'s result."""
        return self.codec.layout(B, H, T)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor) -> mx.array:
        """weights (B, Hkv, R, T) float32 times the encoded values, as they are stored: (B, Hkv, R, E) float32."""
        return self.codec.weighted_sum(weights, packed, self.learned)

    def finish(self, total: mx.array) -> mx.array:
        """Take a sum of `weighted_sum` results back."""
        return self.codec.transform_back(total, self.learned)

    def _encode(self, rows: mx.array) -> PackedTensor:
        return self.codec.quantize(subtract_centers(rows, None), self.learned)
