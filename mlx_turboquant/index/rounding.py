"""Rotated rows to packed codes: the nearest centroids at the best of several scalings, or the nearest trellis path."""

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_turboquant import codebook
from mlx_turboquant.index.settings import Part
from mlx_turboquant.ops import trellis
from mlx_turboquant.ops.lloyd_max import cell_polynomial
from mlx_turboquant.packing import pack_codes, unpack_codes

Array = Any  # mx.array or np.ndarray: the functions below take both and return what they got

# By bits: the scalings tried before rounding, in units of 0.64 / d^(1/3) around unit mean square. At 3, 4 and 8 bits
# three take 2, 4 and 9% off the squared sine of one at d = 384, and 0.4, 2 and 6% at d = 1536 (Gaussian rows); 91 from
# 0.6 to 1.5 would take 2, 7 and 20, and 0.5, 3 and 10%. At 1 bit all give the same codes.
# Those of `ops.lloyd_max` were found for rows of up to 128 and add 10% at d = 1536 and 4 bits.
_SCALINGS = {1: (0,), 3: (-1, 0, 1), 4: (-1, 0, 1), 8: (0, 0.75, 1.5)}
# The polynomial that finds cells was fitted to boundaries up to here; at 8 bits there are others beyond.
_FITTED = 3.7


def rounded(rows: Array, parts: tuple[Part, ...]) -> tuple[dict[str, mx.array], Array]:
    """Packed codes of all parts by name, and the inner products (n,) float32 of rows with what the codes stand for.

    Args:
        rows: (n, d) float32, rotated, of unit mean square or 0.
        parts: of the settings. 2 bits are a path through the trellis. A part beside one is rounded as it is: parts
            must be scaled alike, and other scalings would take 2% off its error for three searches instead of one.
    """
    singly = [part for part in parts if part.bits != 2]
    packed, products = {}, None
    if singly:
        columns = rows[:, : singly[-1].stop]
        factors = _factors(columns, singly, parts[-1].stop) if len(singly) == len(parts) else [1.0]
        codes, products = _singly(columns, singly, factors)
        for part, each in zip(singly, codes, strict=True):
            packed[part.name] = pack_codes(mx.array(each), part.bits)
    for part in parts:
        if part.bits == 2:
            path, along = trellis.encode(mx.array(rows), part.start, part.stop)
            along = along if isinstance(rows, mx.array) else np.asarray(along)
            packed[part.name], products = path, along if products is None else products + along
    return packed, products


def values(codes: mx.array, part: Part) -> mx.array:
    """What packed codes (n, words) uint32 of a part stand for: (n, stop - start) float32, without scales."""
    dim = part.stop - part.start
    return trellis.decode(codes, dim) if part.bits == 2 else _in_mlx(part.bits)[unpack_codes(codes, part.bits, dim)]


@cache
def _in_mlx(bits: int) -> mx.array:
    return mx.array(codebook.gaussian(bits))


def _singly(rows: Array, parts: list[Part], factors: list[float | Array]) -> tuple[list[Array], Array]:
    """Codes (n, dim) of each part, every element rounded by itself, and the products of rows with their centroids."""
    xp = mx if isinstance(rows, mx.array) else np
    books = [_in_mlx(part.bits) if xp is mx else codebook.gaussian(part.bits) for part in parts]
    length, codes, best, products = _dot(rows, rows), None, None, None
    for factor in factors:
        scaled = rows * factor
        tried = [_cells(xp, scaled[:, part.start : part.stop], part.bits) for part in parts]
        chosen = [xp.take(book, each) for book, each in zip(books, tried, strict=True)]
        chosen = chosen[0] if len(chosen) == 1 else xp.concatenate(chosen, axis=-1)
        along = _dot(rows, chosen)
        if len(factors) == 1:
            return tried, along
        error = scaled - chosen
        # The squared sine of the angle, without the cancellation of 1 - cosine^2.
        in_line = xp.square(_dot(error, rows)) / xp.maximum(length, 1e-37)
        sine = (_dot(error, error) - in_line) / _dot(chosen, chosen)
        if codes is None:
            codes, best, products = tried, sine, along
            continue
        better = sine < best
        codes = [xp.where(better[:, None], new, old) for new, old in zip(tried, codes, strict=True)]
        best, products = xp.where(better, sine, best), xp.where(better, along, products)
    return codes, products


def _dot(a: Array, b: Array) -> Array:
    return (a * b).sum(axis=-1)


def _factors(rows: Array, parts: list[Part], d: int) -> list[float | Array]:
    xp, bits = mx if isinstance(rows, mx.array) else np, max(part.bits for part in parts)
    factors = [1 + step * 0.64 / d ** (1 / 3) for step in _SCALINGS[bits]]
    if bits < 8:
        return factors
    largest = xp.maximum(xp.abs(rows).max(axis=-1, keepdims=True), 1e-37)
    return [xp.minimum(factor, _FITTED / largest) for factor in factors]


def _cells(xp: Any, x: Array, bits: int) -> Array:
    """The codes (n, dim) uint8 of values."""
    count, (last, *coefficients) = 2**bits, reversed(cell_polynomial(bits))
    if bits in (3, 4):  # the polynomial holds up to the outermost boundary; what lies beyond is in the last cell
        end = 1.01 * float(codebook.boundaries(codebook.gaussian(bits))[-1])
        x = xp.clip(x, -end, end)
    square, slope = x * x, last
    for p in coefficients:
        slope = slope * square + p
    return xp.clip(xp.floor(x * slope + count / 2), 0, count - 1).astype(xp.uint8)
