"""One symmetric 8-bit scale per row of one head, as in candle's quantized cache."""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_turboquant.ops.lookup import Codebook, Prepared, on_cpu
from mlx_turboquant.packing import pack_codes, words_per_row
from mlx_turboquant.quantizers.base import Learned
from mlx_turboquant.quantizers.codec import Codec
from mlx_turboquant.tensor import PackedTensor

LEVELS = 127
_SMALLEST = 1e-6  # candle's bound: a row whose largest entry is below it is rounded as if it were this
_WORDS = {mx.float32: mx.uint32, mx.float16: mx.uint16, mx.bfloat16: mx.uint16}


@cache
def _steps() -> Codebook:
    return Codebook(np.arange(256) - 128, 8)


class Int8Codec(Codec):
    """Rows x as round(x / s) + 128 in 8 bits, with s = max(max|x|, 1e-6) / 127 rounded to the model's dtype.

    Every element is at most s / 2 off: s is rounded to nearest, by less than one part in 2^8 (bfloat16) or 2^11
    (float16), so that the largest quotient stays below 127 (1 + 2^-8) = 127.496 and still rounds to 127. Rounding s up
    instead would make every step larger for nothing. So, with max|x| of the row,

    - float32: |x - x'| <= max|x| / 254,
    - float16: |x - x'| <= max|x| / 254 (1 + 2^-11),
    - bfloat16: |x - x'| <= max|x| / 254 (1 + 2^-8),

    and max|x| is replaced by 1e-6 if it is smaller. In float16, s is a multiple of 2^-24, and not 0: where max|x| is
    below 0.0078 this adds up to 3e-8 to the error, and s is rounded up if the largest entry would be clipped. A row of
    zeros stays zero. Only rows beyond 127 times float16's largest number, 65504, are clipped.

    Args:
        bits: 8.
        scheme, dim, dtype: as of `Codec`; it has no options but the block.

    Raises:
        ValueError: for other bits or dtypes.

    Source: `QuantizedKvCache` of huggingface/candle, pull request 3577, which keeps s in float32.
    """

    def __init__(self, scheme: Any, bits: float, dim: int, dtype: mx.Dtype):
        if bits != 8:
            raise ValueError(f"[Int8Codec] wanted 8 bits, got {bits}. Take affine4 or turbo4 for fewer.")
        if dtype not in _WORDS:
            raise ValueError(f"[Int8Codec] wanted float32, float16 or bfloat16, got {dtype}. Convert the model.")
        super().__init__(scheme, bits, dim, dtype)

    def quantize(self, rows: mx.array, learned: Learned) -> PackedTensor:
        """Rows (B, Hkv, T, D) float32 as codes (B, Hkv, T, W) uint32 and scales (B, Hkv, T, 1) in the model's dtype."""
        largest = mx.maximum(mx.abs(rows).max(axis=-1, keepdims=True), _SMALLEST)
        scales = _scales(largest, self.dtype)
        steps = mx.clip(mx.round(rows / scales.astype(mx.float32)), -LEVELS, LEVELS)
        return PackedTensor(pack_codes(steps + 128, 8), scales)

    def dequantize(self, packed: PackedTensor, learned: Learned) -> mx.array:
        """The rows (B, Hkv, T, D) float32 that the codes stand for."""
        return _steps().rows(packed.codes, self.dim) * packed.scales.astype(mx.float32)

    def prepare(self, x: mx.array, learned: Learned) -> Prepared:
        """x (B, Hkv, R, D) as the codebook wants it."""
        return _steps().prepare(x)

    def products(self, prepared: Prepared, packed: PackedTensor, learned: Learned) -> mx.array:
        """Inner products (B, Hkv, R, T) float32 with the rows."""
        return _steps().products(prepared, packed.codes) * packed.scales.astype(mx.float32).swapaxes(-1, -2)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor, learned: Learned) -> mx.array:
        """weights (B, Hkv, R, T) float32 times the rows."""
        weights = weights * packed.scales.astype(mx.float32).swapaxes(-1, -2)
        group = next((group for group in (128, 64, 32) if self.dim % group == 0), None)
        if not on_cpu() or group is None:
            return weights @ _steps().rows(packed.codes, self.dim)
        # MLX's product with quantized rows reads the codes: on a CPU three times as fast as decoding and multiplying.
        steps = mx.ones((*packed.codes.shape[:-1], self.dim // group))
        return mx.quantized_matmul(weights, packed.codes, steps, -128 * steps, False, group, 8)

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """The shapes and the dtypes of `quantize`'s result."""
        return PackedTensor((B, H, T, words_per_row(self.dim, 8)), (B, H, T, 1)), PackedTensor(mx.uint32, self.dtype)


def _scales(largest: mx.array, dtype: mx.Dtype) -> mx.array:
    """largest / 127 in dtype: the nearest number, or the next above it where the nearest would clip."""
    # A scale beyond the largest finite number would be inf.
    largest = mx.minimum(largest, LEVELS * mx.finfo(dtype).max)
    nearest = (largest / LEVELS).astype(dtype)
    # Happens only among float16's subnormal numbers, 0 included.
    above = (nearest.view(_WORDS[dtype]) + 1).view(dtype)
    return mx.where(nearest.astype(mx.float32) * (LEVELS + 0.5) < largest, above, nearest)
