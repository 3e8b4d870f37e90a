"""Random orthogonal rotations that spread a vector's energy evenly over its coordinates."""

from functools import lru_cache

import mlx.core as mx
import numpy as np


class _Shared:
    """Never changes, so that a copy of a cache shares it."""

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self


class HadamardRotation(_Shared):
    """x -> T (s * x) with random signs s and T symmetric, orthogonal and its own inverse.

    For dim = m * 2**k with m odd, T is the Kronecker product of the m-point Hartley matrix and the Walsh-Hadamard
    matrix of size 2**k, both normalised. Hartley is (cos + sin)(2 pi i j / m) / sqrt(m): symmetric, its own inverse,
    with entries of at most sqrt(2 / m), so that T spreads nearly as evenly as a Walsh-Hadamard matrix would. Only
    powers of two reach ``mx.hadamard_transform``, which aborts the process for 72, 144 and 576 and is not its own
    inverse for 80, 112 and 160.

    Args:
        dim: even, at least 2.
        seed: of the signs.

    Raises:
        ValueError: for an odd dim.
    """

    def __init__(self, dim: int, seed: int = 0):
        if dim < 2 or dim % 2:
            raise ValueError(f"[HadamardRotation] dim must be even and at least 2, got {dim}.")
        self.dim = dim
        self._two = dim & -dim  # the largest power of two that divides dim
        self._odd = dim // self._two
        self.signs = mx.array(np.random.default_rng(seed).choice([-1.0, 1.0], dim).astype(np.float32))
        angle = 2 * np.pi * np.outer(np.arange(self._odd), np.arange(self._odd)) / self._odd
        self._hartley = mx.array(((np.cos(angle) + np.sin(angle)) / np.sqrt(self._odd)).astype(np.float32))
        # For kernels: row by row, and at least 8 numbers (MLX passes fewer in another address space).
        flat = self._hartley.reshape(-1)
        self.kernel_hartley = flat if flat.size >= 8 else mx.concatenate([flat, mx.zeros(8 - flat.size)])

    def apply(self, x: mx.array) -> mx.array:
        """Rotate (..., dim) float32 vectors; norms and inner products stay."""
        return self._transform(x * self.signs)

    def invert(self, x: mx.array) -> mx.array:
        """Undo `apply`."""
        return self._transform(x) * self.signs

    def _transform(self, x: mx.array) -> mx.array:
        if self._odd == 1:
            return mx.hadamard_transform(x)
        parts = mx.hadamard_transform(x.reshape(*x.shape[:-1], self._odd, self._two))
        return (self._hartley @ parts).reshape(x.shape)


class DenseRotation(_Shared):
    """x -> Q x with Q uniform over the orthogonal matrices.

    Args:
        dim: even, at least 2 (the packed formats store even rows).
        seed: of the Gaussian matrix whose QR factor is Q, with the signs that make it uniform (Mezzadri 2007).

    Raises:
        ValueError: for an odd dim.
    """

    def __init__(self, dim: int, seed: int = 0):
        if dim < 2 or dim % 2:
            raise ValueError(f"[DenseRotation] dim must be even and at least 2, got {dim}.")
        self.dim = dim
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
        self._matrix = mx.array((q * np.sign(np.diag(r))).astype(np.float32))

    def apply(self, x: mx.array) -> mx.array:
        """Rotate (..., dim) float32 vectors; norms and inner products stay."""
        return x @ self._matrix.T

    def invert(self, x: mx.array) -> mx.array:
        """Undo `apply`."""
        return x @ self._matrix


@lru_cache(maxsize=64)
def make_rotation(kind: str, dim: int, seed: int = 0) -> HadamardRotation | DenseRotation:
    """The rotation of one kind ('hadamard' or 'dense'), size and seed, made once and shared by all layers."""
    kinds = {"hadamard": HadamardRotation, "dense": DenseRotation}
    if kind not in kinds:
        raise ValueError(f"[make_rotation] Unknown rotation {kind!r}. Known: {', '.join(kinds)}.")
    return kinds[kind](dim, seed)
