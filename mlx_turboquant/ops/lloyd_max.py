"""Rows to Lloyd-Max codes with one matched-norm scale per group, and back."""

from functools import cache

import mlx.core as mx
import numpy as np

from mlx_turboquant import codebook
from mlx_turboquant.ops.lookup import Codebook, Prepared
from mlx_turboquant.packing import pack_codes
from mlx_turboquant.tensor import PackedTensor

# How many scalings are tried unless a call says otherwise.
SCALINGS = 2
# By bits, then by how many are tried: pairs (a, b). A group of unit mean square whose largest entry is t is scaled by
# a + b / t before rounding. Found for Gaussian rows of 64 and 128: at 4 and 8 bits it is best to put the largest entry
# near the outermost centroid, or on one, whatever the rest; two such scalings are as good as nine fixed ones from -15%
# to +15% (benchmarks/LOG.md). At 4 and 8 bits a is 0, so that the largest entry stays where `cell_polynomial` is good.
_SCALINGS = {
    1: {n: ((1.0, 0.0),) * n for n in (1, 2, 3)},
    2: {
        1: ((0.839, 0.43),),
        2: ((0.717, 0.555), (0.871, 0.489)),
        3: ((0.78, 0.249), (0.715, 0.705), (0.862, 0.598)),
    },
    3: {
        1: ((0.32, 1.831),),
        2: ((0.324, 1.633), (0.475, 1.591)),
        3: ((0.225, 1.795), (0.415, 1.571), (0.496, 1.638)),
    },
    4: {1: ((0.0, 2.9),), 2: ((0.0, 2.76), (0.0, 3.0)), 3: ((0.0, 2.7), (0.0, 2.87), (0.0, 3.06))},
    8: {1: ((0.0, 3.2285),), 2: ((0.0, 3.1371), (0.0, 3.3298)), 3: ((0.0, 3.1371), (0.0, 3.3298), (0.0, 3.4441))},
}
_TERMS = {1: 1, 2: 1, 3: 3, 4: 3, 8: 6}
# Cells are found to this part of a cell, downwards, by all implementations.
_STEPS = 256


@cache
def _codebook(bits: int) -> Codebook:
    return Codebook(codebook.gaussian(bits), bits)


@cache
def cell_polynomial(bits: int) -> tuple[float, ...]:
    """Coefficients p of x (p0 + p1 x^2 + p2 x^4 ...), which is 0 at 0 and 1 more from each boundary to the next.

    So a value's cell is found without a search. Boundaries move by less than 0.003 of a cell, which costs nothing that
    can be measured: the error grows with the square of that. At 2 and 3 bits they stay where they are.
    """
    inner = codebook.boundaries(codebook.gaussian(bits)).astype(np.float64)
    inner = inner[(inner > 1e-6) & (inner < 3.7)]
    if inner.size == 0:
        return (1.0,)
    weights = np.exp(-(inner**2) / 6)  # of an error there: the density times the width of a cell, cubed
    powers = inner[:, None] ** np.arange(1, 2 * _TERMS[bits], 2)
    solution = np.linalg.lstsq(powers * weights[:, None], np.arange(1, inner.size + 1) * weights, rcond=None)[0]
    return tuple(float(p) for p in solution)


@cache
def kernel_tables(bits: int, scalings: int, dtype: mx.Dtype) -> mx.array:
    """What `encode.metal` reads: centroids, cell polynomial, scalings, the largest finite number of dtype; float32."""
    pairs = [number for pair in _pairs(bits, scalings) for number in pair]
    return mx.array([*codebook.gaussian(bits).tolist(), *cell_polynomial(bits), *pairs, float(mx.finfo(dtype).max)])


def _pairs(bits: int, scalings: int) -> tuple[tuple[float, float], ...]:
    if scalings not in _SCALINGS[bits]:
        raise ValueError(f"[lloyd_max] scalings must be one of {', '.join(map(str, _SCALINGS[bits]))}, got {scalings}.")
    return _SCALINGS[bits][scalings]


def _cells(x: mx.array, bits: int) -> mx.array:
    """The codes (...) uint32 of values (...)."""
    count, (last, *coefficients) = 2**bits, reversed(cell_polynomial(bits))
    square, slope = x * x, last
    for p in coefficients:
        slope = slope * square + p
    position = mx.clip(x * slope + count / 2, 0, count - 1 / _STEPS)
    return mx.round(position * _STEPS).astype(mx.uint32) // _STEPS


def quantize(x: mx.array, bits: int, group: int, dtype: mx.Dtype, scalings: int = SCALINGS) -> PackedTensor:
    """Quantize rows to centroids of N(0, 1), each group scaled to about unit mean square first.

    The stored scale is ||group|| / ||its centroids||, so that a dequantized group has the norm of the original
    (EDEN's matched norm, ICML 2022); rotating keeps it, and softmax sees keys of the right length. The error is then
    2 ||group||^2 (1 - cosine of group and centroids), so of several scalings before rounding the one with the largest
    cosine is best: it costs nothing to store or to read. Against plain unit mean square, two scalings take 8, 20 and
    25% off the squared error of rows of 64 at 3, 4 and 8 bits, and 4, 13 and 19% off rows of 128.

    Args:
        x: (B, Hkv, T, D) float32, finite.
        bits: 1, 2, 3, 4 or 8.
        group: elements per scale, a divisor of D.
        dtype: of the stored scales.
        scalings: how many to try, 1 to 3.

    Returns:
        PackedTensor with codes (B, Hkv, T, W) uint32 and scales (B, Hkv, T, D / group).

    Raises:
        ValueError: for other numbers of scalings.
    """
    *lead, D = x.shape
    groups = x.reshape(*lead, D // group, group)
    # Squares of what a float32 holds may overflow or vanish; squares of what lies in [-1, 1] do not.
    largest = mx.abs(groups).max(axis=-1, keepdims=True)
    unit = groups / mx.maximum(largest, 1e-37)
    rms = mx.sqrt((unit * unit).mean(axis=-1, keepdims=True))
    unit = unit / mx.maximum(rms, 1e-37)
    codes = best = None
    for a, b in _pairs(bits, scalings):
        factor = a + b * rms  # the largest entry of `unit` is 1 / rms
        tried = _cells(unit * factor, bits)
        chosen = _codebook(bits).look_up(tried)
        if bits == 8:  # comes so near that float32 cosines cannot tell which is nearer
            fit = -mx.square(unit * factor - chosen).sum(axis=-1, keepdims=True) / mx.square(factor)
        else:
            fit = (unit * chosen).sum(axis=-1, keepdims=True) / mx.linalg.norm(chosen, axis=-1, keepdims=True)
        if codes is None:
            codes, best = tried, fit
        else:
            codes = mx.where(fit > best, tried, codes)
            best = mx.maximum(fit, best)
    chosen = _codebook(bits).look_up(codes)
    matched = mx.sqrt(group / (chosen * chosen).sum(axis=-1, keepdims=True))
    scales = mx.minimum(largest * rms * matched, mx.finfo(dtype).max)
    return PackedTensor(pack_codes(codes.reshape(x.shape), bits), scales[..., 0].astype(dtype))


def dequantize(packed: PackedTensor, bits: int, dim: int) -> mx.array:
    """The (B, Hkv, T, dim) float32 rows that the codes and scales of `quantize` stand for."""
    values = _codebook(bits).rows(packed.codes, dim)
    groups = packed.scales.shape[-1]
    values = values.reshape(*values.shape[:-1], groups, dim // groups)
    return (values * packed.scales[..., None].astype(mx.float32)).reshape(*packed.codes.shape[:-1], dim)


def prepare(x: mx.array, bits: int) -> Prepared:
    """Vectors x (B, Hkv, R, D) float32, finite, as `products` wants them."""
    return _codebook(bits).prepare(x)


def products(prepared: Prepared, packed: PackedTensor, bits: int) -> mx.array:
    """Inner products (B, Hkv, R, T) float32 of R prepared vectors with T rows of `quantize`."""
    vectors = prepared.vectors
    if packed.scales.shape[-1] > 1:
        return vectors @ dequantize(packed, bits, vectors.shape[-1]).swapaxes(-1, -2)
    # One scale per row is taken with the products, which are fewer than the row's elements.
    return _codebook(bits).products(prepared, packed.codes) * packed.scales.astype(mx.float32).swapaxes(-1, -2)


def weighted_sum(weights: mx.array, packed: PackedTensor, bits: int, dim: int) -> mx.array:
    """weights (B, Hkv, R, T) float32 times T rows of `quantize`: (B, Hkv, R, dim) float32."""
    if packed.scales.shape[-1] > 1:
        return weights @ dequantize(packed, bits, dim)
    weights = weights * packed.scales.astype(mx.float32).swapaxes(-1, -2)
    return weights @ _codebook(bits).rows(packed.codes, dim)
