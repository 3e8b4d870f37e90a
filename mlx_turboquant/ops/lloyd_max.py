"""Rows to Lloyd-Max codes with one matched-norm scale per group, and back."""

from functools import cache

import mlx.core as mx

from mlx_turboquant import codebook
from mlx_turboquant.packing import pack_codes, unpack_codes
from mlx_turboquant.tensor import PackedTensor


@cache
def _tables(bits: int) -> tuple[mx.array, mx.array]:
    centroids = codebook.gaussian(bits)
    return mx.array(centroids), mx.array(codebook.boundaries(centroids))


def quantize(x: mx.array, bits: int, group: int, dtype: mx.Dtype) -> PackedTensor:
    """Quantize rows to the nearest centroids of N(0, 1), each group scaled to unit mean square first.

    The stored scale is ||group|| / ||its centroids||, so that a dequantized group has the norm of the original
    (EDEN's matched norm, ICML 2022); rotating keeps it, and softmax sees keys of the right length.

    Args:
        x: (B, Hkv, T, D) float32, finite.
        bits: 1, 2, 3, 4 or 8.
        group: elements per scale, a divisor of D.
        dtype: of the stored scales.

    Returns:
        PackedTensor with codes (B, Hkv, T, W) uint32 and scales (B, Hkv, T, D / group).
    """
    *lead, D = x.shape
    centroids, boundaries = _tables(bits)
    groups = x.reshape(*lead, D // group, group)
    # Squares of what a float32 holds may overflow or vanish; squares of what lies in [-1, 1] do not.
    largest = mx.abs(groups).max(axis=-1, keepdims=True)
    unit = groups / mx.maximum(largest, 1e-37)
    rms = mx.sqrt((unit * unit).mean(axis=-1, keepdims=True))
    codes = mx.searchsorted(boundaries, unit / mx.maximum(rms, 1e-37))
    chosen = centroids[codes]
    matched = mx.sqrt(group / (chosen * chosen).sum(axis=-1, keepdims=True))
    scales = mx.minimum(largest * rms * matched, mx.finfo(dtype).max)
    return PackedTensor(pack_codes(codes.reshape(x.shape), bits), scales[..., 0].astype(dtype))


def dequantize(packed: PackedTensor, bits: int, dim: int) -> mx.array:
    """The (B, Hkv, T, dim) float32 rows that the codes and scales of `quantize` stand for."""
    values = _tables(bits)[0][unpack_codes(packed.codes, bits, dim)]
    groups = packed.scales.shape[-1]
    values = values.reshape(*values.shape[:-1], groups, dim // groups)
    return (values * packed.scales[..., None].astype(mx.float32)).reshape(*packed.codes.shape[:-1], dim)
