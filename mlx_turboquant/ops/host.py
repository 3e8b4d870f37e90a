"""Products of matrices, and rows decoded for them, in numpy: MLX's CPU build multiplies some fifty times slower."""

from functools import cache

import numpy as np

from mlx_turboquant import codebook
from mlx_turboquant.ops import trellis
from mlx_turboquant.packing import words_per_row

# Rows of a product are a multiple of this, filled with zeros: BLAS sums the last few of a matrix, and small matrices,
# in another order, and equal rows would then differ by where they stand.
ROWS = 64


def rows_of_product(dim: int, elements: int) -> int:
    """How many rows of `dim` numbers make a piece of about so many elements."""
    return max(elements // dim // ROWS, 1) * ROWS


def filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows (n, ...) and zeros behind them up to so many; as they are if there are."""
    if len(rows) == count:
        return rows
    out = np.zeros((count, *rows.shape[1:]), rows.dtype)
    out[: len(rows)] = rows
    return out


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix product of float32 arrays, in numpy's BLAS."""
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities in give NaN and infinities out, as in MLX
        return np.matmul(a, b)


def decoded(codes: np.ndarray, bits: int, dim: int) -> np.ndarray:
    """What packed codes stand for, without scales: each byte or two pick several numbers from a table.

    Args:
        codes: (n, words_per_row(dim, bits)) uint32, contiguous.
        bits: 1, 3, 4 or 8 for centroids of `codebook.gaussian`, 2 for values of `trellis`.
        dim: elements of a row.

    Returns:
        (n, dim) float32, rows perhaps longer in memory.
    """
    octets = codes.view(np.uint8)
    if bits == 2:
        picked = octets.astype(np.uint16) << 6
        picked[:, 1:] |= octets[:, :-1] >> 2
    elif bits == 3:
        low = 4 * words_per_row(dim, 2)
        high = octets[:, low:].reshape(len(codes), -1, 1, 4)
        # Of 32 codes, the first 16 have their high bits in the upper half of each four bits, see `packing`.
        high = (np.concatenate([high >> 2, high], axis=2) & 0x33).reshape(len(codes), -1)
        picked = octets[:, :low] | high[:, :low].astype(np.uint16) << 8
    else:
        picked = octets
    table = _table(bits)
    return table.take(picked, axis=0).reshape(len(codes), -1)[:, :dim]


@cache
def _table(bits: int) -> np.ndarray:
    """The numbers for each value of what `decoded` picks with: (256 or 16384, how many) float32."""
    if bits == 2:  # the three codes before, and four
        row = np.arange(1 << 14)[:, None] >> 2 * np.arange(4)
        return trellis.values()[row & 255]
    centroids = codebook.gaussian(bits)
    if bits == 3:  # four low parts, and their high bits at 8, 9, 12 and 13
        word, places = np.arange(1 << 14)[:, None], np.arange(4)
        return centroids[(word >> 2 * places & 3) | (word >> np.array([8, 9, 12, 13]) & 1) << 2]
    return centroids[np.arange(256)[:, None] >> bits * np.arange(8 // bits) & (1 << bits) - 1]
