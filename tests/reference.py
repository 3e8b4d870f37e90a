"""Slow, literal translations of the definitions, to compare every fast path with. Plain Python and float64 numpy."""

from collections.abc import Sequence

import numpy as np
from scipy.integrate import simpson


def lloyd_iteration(density, low: float, high: float, bits: int) -> np.ndarray:
    """The 2**bits centroids that Lloyd's own iteration ends at: every centroid the mean of its cell, again and again.

    Args:
        density: of one float64 array, need not be normalised.
        low, high: where the density is cut off.
        bits: a few; the iteration needs some 4**bits steps.

    Source: S. Lloyd, "Least squares quantization in PCM" (1982), method I.
    """
    n = 2**bits
    x = np.linspace(low, high, 4001)
    mass = np.cumsum(density(x))
    centroids = np.interp((np.arange(n) + 0.5) / n, mass / mass[-1], x)
    for _ in range(20_000):
        edges = np.concatenate([[low], (centroids[1:] + centroids[:-1]) / 2, [high]])
        cells = np.linspace(edges[:-1], edges[1:], 301)  # (points, cells)
        means = simpson(cells * density(cells), cells, axis=0) / simpson(density(cells), cells, axis=0)
        moved, centroids = np.abs(means - centroids).max(), means
        if moved < 1e-8:
            return centroids
    raise AssertionError("Lloyd's iteration did not settle.")


def pack_row(codes: list[int], bits: int) -> list[int]:
    """The 32-bit words of one row: each plane one long integer, the first code in its lowest bits.

    A 3-bit code is two planes: the low two bits of all codes, then the high bit of all codes. Of 32 high bits, those of
    the first 16 codes come in pairs at bits 2, 6, 10, .. of their word, those of the other 16 at bits 0, 4, 8, ..
    """
    if bits == 3:
        high = [0] * -(-len(codes) // 32)
        for i, code in enumerate(codes):
            place = 4 * (i % 16 // 2) + i % 2 + (2 if i % 32 < 16 else 0)
            high[i // 32] |= (code // 4) << place
        return pack_row([code % 4 for code in codes], 2) + high
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return [(number >> (32 * w)) % 2**32 for w in range(words)]


def quantize_row(
    row: np.ndarray, centroids: np.ndarray, scalings: Sequence[tuple[float, float]]
) -> tuple[np.ndarray, float]:
    """Codes and scale of one group: scale it to near unit mean square, take the nearest centroids, match the norm.

    Of the scalings a + b / (largest entry at unit mean square), the one whose centroids point most nearly where the
    row does. Source: the scale is EDEN's (ICML 2022), so that scale * centroids[codes] is as long as the row was.
    """
    row, centroids = np.asarray(row, np.float64), np.asarray(centroids, np.float64)
    rms = np.sqrt(np.mean(row**2))
    if rms == 0:
        return np.zeros(len(row), int), 0.0
    unit = row / rms
    best, codes = -1.0, None
    for a, b in scalings:
        factor = a + b / np.abs(unit).max()
        tried = np.argmin(np.abs(unit[:, None] * factor - centroids), axis=1)
        cosine = row @ centroids[tried] / np.linalg.norm(row) / np.linalg.norm(centroids[tried])
        if cosine > best:
            best, codes = cosine, tried
    return codes, np.linalg.norm(row) / np.linalg.norm(centroids[codes])
