"""Scale and bias per group of channels, as in mlx-lm's quantized cache, of rows that may be rotated first."""

from typing import Any

import mlx.core as mx

from mlx_turboquant.ops.lookup import on_cpu
from mlx_turboquant.quantizers.base import Learned
from mlx_turboquant.quantizers.codec import Codec
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tensor import PackedTensor

BITS = (2, 3, 4, 6, 8)
GROUPS = (32, 64, 128)
# Larger entries are clipped, so that a group's range and the sums in a rotation stay finite float32.
_LARGEST = 1e35


class AffineCodec(Codec):
    """Groups of `scheme.group` channels as scale * code + bias with codes of `bits` bits: `mx.quantize`, mode affine.

    With n = 2^bits - 1 and e the entry of largest size in a group, the step is (max - min) / n, changed a little so
    that e is a whole number of steps from 0; the bias is e, so that e is exact. Every other element is at most
    (max - min) / 2^bits off: e lies at least n / 2 steps from 0, so that making this number whole takes at most
    n / (n + 1) of a step from the far end. To that adds the rounding of the scale to the model's dtype: up to n 2^-8
    steps in bfloat16, a whole step at 8 bits, since MLX chooses codes before it rounds the scale. It is kept so, that
    codes, scales and biases are bit for bit those of mlx-lm's `QuantizedKVCache` if nothing is rotated.

    They are decoded in float32. In float16, scale * code can be inf where the sum is finite. MLX makes no step below
    1e-7, and float16 scales below 6e-5 are multiples of 6e-8: in groups of small entries an element is up to 1e-7 off,
    and up to n times 3e-8 more in float16. Entries beyond 1e35, and after the rotation beyond the largest number of the
    model's dtype, are clipped.

    Args:
        scheme: supplies group (32, 64 or 128), rotation ("none", "hadamard" or "dense") and seed.
        bits: 2, 3, 4, 6 or 8.
        dim: head size D, a multiple of the group.
        dtype: of scales and biases: the model's.

    Raises:
        ValueError: for other bits, or a group that is not one of those or does not divide D.

    Source: `mx.quantize` and `mlx_lm.models.cache.QuantizedKVCache`. Rotating first is QuaRot's (arXiv 2404.00456).
    """

    def __init__(self, scheme: Any, bits: float, dim: int, dtype: mx.Dtype):
        super().__init__(scheme, bits, dim, dtype)
        if bits not in BITS:
            raise ValueError(f"[AffineCodec] bits must be one of {', '.join(map(str, BITS))}, got {bits}.")
        _check_group(scheme.group, dim)
        self.group = scheme.group
        self.rotation = make_rotation(scheme.rotation, dim, scheme.seed)

    def quantize(self, rows: mx.array, learned: Learned) -> PackedTensor:
        """Rows (B, Hkv, T, D) float32, packed.

        Returns:
            PackedTensor with codes (B, Hkv, T, D * bits / 32) uint32, in MLX's order; scales (B, Hkv, T, 2 D / group)
            in the model's dtype, the scales of all groups and then their biases.
        """
        largest = mx.finfo(self.dtype).max
        rotated = mx.clip(self.rotation.apply(mx.clip(rows, -_LARGEST, _LARGEST)), -largest, largest)
        codes, scales, biases = mx.quantize(rotated.astype(self.dtype), group_size=self.group, bits=self.bits)
        return PackedTensor(codes, mx.concatenate([scales, biases], axis=-1))

    def dequantize(self, packed: PackedTensor, learned: Learned) -> mx.array:
        """The rotated rows (B, Hkv, T, D) float32 that the codes stand for."""
        return mx.dequantize(*_in_float32(packed), group_size=self.group, bits=self.bits)

    def products(self, prepared: mx.array, packed: PackedTensor, learned: Learned) -> mx.array:
        """Inner products (B, Hkv, R, T) float32 with the rotated rows."""
        if not on_cpu():
            return super().products(prepared, packed, learned)
        # On a CPU half the time of decoding and multiplying. On CUDA, MLX refuses some shapes.
        return mx.quantized_matmul(prepared, *_in_float32(packed), True, self.group, self.bits)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor, learned: Learned) -> mx.array:
        """weights (B, Hkv, R, T) float32 times the rotated rows."""
        if not on_cpu():
            return super().weighted_sum(weights, packed, learned)
        return mx.quantized_matmul(weights, *_in_float32(packed), False, self.group, self.bits)

    def transform(self, x: mx.array, learned: Learned) -> mx.array:
        """x (B, Hkv, R, D) float32 rotated."""
        return self.rotation.apply(x)

    def transform_back(self, y: mx.array, learned: Learned) -> mx.array:
        """y (B, Hkv, R, D) float32 rotated back."""
        return self.rotation.invert(y)

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """The shapes and the dtypes of `quantize`'s result."""
        shapes = PackedTensor((B, H, T, self.dim * self.bits // 32), (B, H, T, 2 * self.dim // self.group))
        return shapes, PackedTensor(mx.uint32, self.dtype)


def _in_float32(packed: PackedTensor) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases, the latter two in float32: in float16 scale * code may be inf."""
    return packed.codes, *mx.split(packed.scales.astype(mx.float32), 2, axis=-1)


def _check_group(group: int, dim: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"[KVScheme] group must be one of {', '.join(map(str, GROUPS))}, got {group}.")
    if dim % group:
        fitting = [str(g) for g in GROUPS if dim % g == 0]
        known = " or ".join(fitting)
        hint = f"Take group={known}." if fitting else "No other does: take int8, or turbo, whose rows need no groups."
        raise ValueError(f"[KVScheme] group={group} does not divide the head size {dim}. {hint}")
