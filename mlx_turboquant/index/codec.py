"""Vectors to codes whose inner products are right on average, and back."""

from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_turboquant.index.rounding import Array, rounded, values
from mlx_turboquant.index.settings import Settings
from mlx_turboquant.ops import host
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.score import score
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.vectors import rows

# The longest vector and query: an inner product of two stays within float32.
MAX_NORM = 1e18
# Without a GPU vectors are multiplied with the rotation's matrix in numpy's BLAS, where MLX's CPU build takes 9 times
# as long to rotate them at d = 384. Up to this d (64 MiB), and up to this d^2 times the odd factor of d, which is what
# making the matrix takes: 1 to 2 s at most, once.
_MATRIX_D, _MATRIX_WORK = 4096, 1 << 30
# Rows of one product, always as many: see `host.ROWS`.
_MATRIX_ROWS = 256
_TINY = 1e-37  # the smallest power of ten that float32 holds with all its digits, with room for rounding


class IndexCodec:
    """Encodes, scores and decodes vectors for the settings of an index.

    A vector x is rotated at random and scaled to unit mean square, and becomes codes: at 2 bits those of a path through
    a trellis (`ops.trellis`), else every element takes the nearest centroid of N(0, 1), and of several scalings before
    that the one with the largest cosine between Rx and its centroids c is taken: the error of an inner product is that
    of the part of c that is at right angles to Rx. What is stored beside the codes is the scale ||x||^2 / <Rx, c>, so
    that x is estimated by scale R^T c, whose product with x is ||x||^2. Its other part, at right angles to x, has no
    preferred direction under a random rotation, so that products with any query are right on average.

    Args:
        settings: of the index.

    Source: EDEN (Vargaftik et al., ICML 2022, the unbiased scale) and RaBitQ (Gao and Long, SIGMOD 2024, Theorem 3.2);
        rotation and codebook of TurboQuant (arXiv 2504.19874). A width between two whole numbers of bits gives the
        first half of the elements one bit more: after the rotation all are alike.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.rotation = make_rotation("hadamard2", settings.d, settings.seed)

    def prepare(self, where: str, x: mx.array) -> mx.array:
        """Vectors or queries (n, d) float32 as the metric takes them: for cosine, of length 1 or 0.

        Raises:
            ValueError: for a vector longer than `MAX_NORM`.
        """
        directions, norms = rows.normalise(where, x)
        if self.settings.metric == "cosine":
            return directions
        if (norms > MAX_NORM).any().item():
            raise ValueError(
                f"[{where}] wanted vectors no longer than {MAX_NORM:g}, got one of length {norms.max().item():.3g}. "
                "Scale the vectors down."
            )
        return x

    def rotate(self, x: Array) -> Array:
        """Vectors (n, d) float32, rotated, as an array of MLX or numpy as they come.

        In numpy, what a row becomes does not depend on the rows beside it: an index is the same however it is filled.
        """
        if isinstance(x, mx.array):
            if choose_backend() != "reference" or self._matrix is None:
                return self.rotation.apply(x)
            return mx.array(host.product(np.asarray(x), self._matrix))
        if self._matrix is None:
            return np.asarray(self.rotation.apply(mx.array(x)))
        out = np.empty_like(x)
        for start in range(0, len(x), _MATRIX_ROWS):
            part = x[start : start + _MATRIX_ROWS]
            whole = host.product(host.filled(part, _MATRIX_ROWS), self._matrix)
            out[start : start + len(part)] = whole[: len(part)]
        return out

    def encode(self, x: Array) -> dict[str, Array]:
        """What becomes of vectors (n, d) float32: packed codes by part, "scales", "norms"; in MLX not evaluated yet.

        The norm of a vector with NaN or infinite numbers is not finite, and its codes are anything. With `keep` there
        is also "prepared": the vectors as the metric takes them.
        """
        xp = mx if isinstance(x, mx.array) else np
        # Squares of what a float32 holds may overflow or vanish; squares of what lies in [-1, 1] do not.
        largest = xp.maximum(xp.abs(x).max(axis=-1, keepdims=True), _TINY)
        x_scaled = x / largest
        lengths = xp.sqrt(xp.square(x_scaled).sum(axis=-1, keepdims=True))
        units = xp.where(lengths > 0, lengths, 1)
        norms = (lengths * largest)[:, 0]
        codes, products = rounded(self.rotate(x_scaled) * (self.settings.d**0.5 / units), self.settings.parts)
        sizes = xp.where(norms > 0, xp.ones_like(norms), norms) if self.settings.metric == "cosine" else norms
        scales = xp.where(norms > 0, sizes * (self.settings.d**0.5 / xp.maximum(products, _TINY)), xp.zeros_like(norms))
        out = codes | {"scales": scales, "norms": norms}
        if self.settings.keep:
            out["prepared"] = x_scaled / units if self.settings.metric == "cosine" else x
        return out

    def score(self, rotated: mx.array, arrays: dict[str, mx.array]) -> mx.array:
        """How good n vectors are for m rotated queries, (m, n) float32: the inner product, less ||x||^2 / 2 for l2."""
        products = None
        for part in self.settings.parts:
            queries = rotated[:, part.start : part.stop]
            dim = part.stop - part.start
            product = score(queries, arrays[part.name], arrays["scales"], bits=part.bits, dim=dim)
            products = product if products is None else products + product
        return products - 0.5 * mx.square(arrays["norms"]) if "norms" in arrays else products

    def decode(self, arrays: dict[str, np.ndarray]) -> mx.array:
        """The vectors (n, d) float32 that codes and scales stand for."""
        chosen = [values(mx.array(arrays[part.name]), part) for part in self.settings.parts]
        chosen = chosen[0] if len(chosen) == 1 else mx.concatenate(chosen, axis=-1)
        return self.rotation.invert(chosen) * mx.array(arrays["scales"])[:, None]

    @cached_property
    def _matrix(self) -> np.ndarray | None:
        """(d, d) float32 such that a row times it is the row rotated; None if MLX rotates."""
        d = self.settings.d
        if d > _MATRIX_D or d // (d & -d) * d * d > _MATRIX_WORK:
            return None
        return np.array(self.rotation.apply(mx.eye(d)))
