"""Turbo: rows rotated and quantized to a Lloyd-Max codebook with matched norm, in kernels where there are some.

Rotation and codebook are TurboQuant's (arXiv 2504.19874); the scale is EDEN's. The kernels centre and balance keys too,
so these classes take the place of `coded`'s for encoding and decoding.
"""

from typing import Any

import mlx.core as mx

from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.dequantize import dequantize
from mlx_turboquant.ops.encode import Encoded, encode
from mlx_turboquant.ops.lookup import Prepared
from mlx_turboquant.ops.row_kernels import reason_against
from mlx_turboquant.packing import words_per_row
from mlx_turboquant.quantizers.base import Fused, Learned
from mlx_turboquant.quantizers.codec import Codec
from mlx_turboquant.quantizers.coded import CodedKeys, CodedValues
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tensor import PackedTensor


class TurboCodec(Codec):
    """Rows of one layer in `bits` Lloyd-Max bits per element; arguments as of `Codec`.

    Raises:
        ValueError: if the head size is not a multiple of the scheme's group.
    """

    def __init__(self, scheme: Any, bits: int, dim: int, dtype: mx.Dtype):
        super().__init__(scheme, bits, dim, dtype)
        self.group = scheme.group or dim
        if dim % self.group:
            raise ValueError(
                f"[KVScheme] group={self.group} does not divide the head size {dim}. Leave group out for one scale per "
                "row."
            )
        self.rotation = make_rotation(scheme.rotation, dim, scheme.seed)
        self.fused = Fused(bits, self.rotation)
        self.in_kernels = reason_against(dim, bits, self.block, dtype, self.rotation) is None

    def quantize(self, rows: mx.array, learned: Learned) -> PackedTensor:
        """Rows (B, Hkv, T, D) float32 as codes and one scale per group."""
        return lloyd_max.quantize(self.rotation.apply(rows), self.bits, self.group, self.dtype)

    def dequantize(self, packed: PackedTensor, learned: Learned) -> mx.array:
        """The rotated rows (B, Hkv, T, D) float32."""
        return lloyd_max.dequantize(packed, self.bits, self.dim)

    def prepare(self, x: mx.array, learned: Learned) -> Prepared:
        """Rotated queries (B, Hkv, R, D), with tables where they pay."""
        return lloyd_max.prepare(x, self.bits)

    def products(self, prepared: Prepared, packed: PackedTensor, learned: Learned) -> mx.array:
        """Inner products (B, Hkv, R, T) float32 with the rotated rows."""
        return lloyd_max.products(prepared, packed, self.bits)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor, learned: Learned) -> mx.array:
        """weights (B, Hkv, R, T) float32 times the rotated rows."""
        return lloyd_max.weighted_sum(weights, packed, self.bits, self.dim)

    def transform(self, x: mx.array, learned: Learned) -> mx.array:
        """Rotate (B, Hkv, R, D)."""
        return self.rotation.apply(x)

    def transform_back(self, y: mx.array, learned: Learned) -> mx.array:
        """Rotate (B, Hkv, R, D) back."""
        return self.rotation.invert(y)

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """Shapes and dtypes of `quantize`'s result."""
        shapes = PackedTensor((B, H, T, words_per_row(self.dim, self.bits)), (B, H, T, self.dim // self.group))
        return shapes, PackedTensor(mx.uint32, self.dtype)


class TurboKeys(CodedKeys):
    """Keys of one layer, encoded and decoded in a kernel where there is one."""

    def encode(self, rows: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode keys (B, Hkv, .., D): the rows from start to stop, stop - start a multiple of block."""
        return _encode(self, rows, start, stop, self.center, self.balance).packed

    def encode_and_look(self, rows: mx.array, start: int, stop: int, block: int) -> Encoded:
        """The same, and which of the rows hold NaN or infinities, in one dispatch."""
        return _encode(self, rows, start, stop, self.center, self.balance)

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The keys (B, Hkv, stop - start, D) that the codes stand for, in the model's dtype; whole blocks."""
        return _decode(self, packed, start, stop, self.balance)


class TurboValues(CodedValues):
    """Values of one layer, encoded and decoded in a kernel where there is one."""

    def encode(self, rows: mx.array, start: int = 0, stop: int | None = None) -> PackedTensor:
        """Encode values (B, Hkv, .., D): the rows from start to stop, stop - start a multiple of block."""
        return _encode(self, rows, start, stop, False, None).packed

    def encode_and_look(self, rows: mx.array, start: int, stop: int, block: int) -> Encoded:
        """The same, and which of the rows hold NaN or infinities, in one dispatch."""
        return _encode(self, rows, start, stop, False, None)

    def decode(self, packed: PackedTensor, start: int = 0, stop: int | None = None) -> mx.array:
        """The values (B, Hkv, stop - start, D) that the codes stand for, in the model's dtype; whole blocks."""
        return _decode(self, packed, start, stop, None)


def _encode(side: TurboKeys | TurboValues, rows, start, stop, center, balance) -> Encoded:
    return encode(
        rows,
        start,
        rows.shape[2] if stop is None else stop,
        bits=side.bits,
        group=side.codec.group,
        block=side.block,
        rotation=side.codec.rotation,
        center=center,
        balance=balance,
    )


def _decode(side: TurboKeys | TurboValues, packed, start, stop, balance) -> mx.array:
    return dequantize(
        packed,
        start,
        packed.length if stop is None else stop,
        bits=side.bits,
        dim=side.dim,
        block=side.block,
        rotation=side.codec.rotation,
        balance=balance,
    )
