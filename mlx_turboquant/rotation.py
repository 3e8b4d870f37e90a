"""Random orthogonal rotations that spread a vector's energy evenly over its coordinates."""

from functools import lru_cache

import mlx.core as mx
import numpy as np

_ANGLES = 1 << 16  # of a Hartley matrix that are held at once, 512 KiB in float64


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
    inverse for 80, 112 and 160. For an odd dim T is the Hartley matrix alone; for dim 1 the rotation is a sign.

    It spreads what is spread a little already. A vector along one axis becomes +-1 / sqrt(dim) everywhere, not the
    nearly Gaussian coordinates of a random direction: see `TwofoldHadamardRotation`.

    Args:
        dim: at least 1.
        seed: of the signs; an integer or a sequence of them.

    Raises:
        ValueError: for a dim below 1.
    """

    def __init__(self, dim: int, seed: int | tuple[int, ...] = 0):
        _check_dim("HadamardRotation", dim)
        self.dim = dim
        self._two = dim & -dim  # the largest power of two that divides dim
        self._odd = dim // self._two
        self.signs = mx.array(np.random.default_rng(seed).choice([-1.0, 1.0], dim).astype(np.float32))
        matrix = _hartley(self._odd)
        self._hartley = mx.array(matrix)
        # For kernels: row by row, and at least 8 numbers (MLX passes fewer in another address space). numpy fills it
        # up: MLX would do that again in all that is compiled before this is first evaluated.
        more = max(8 - matrix.size, 0)
        self.kernel_hartley = mx.array(np.pad(matrix.reshape(-1), (0, more))) if more else self._hartley.reshape(-1)

    def apply(self, x: mx.array) -> mx.array:
        """Rotate (..., dim) float32 vectors; norms and inner products stay."""
        return self.transform(x * self.signs)

    def invert(self, x: mx.array) -> mx.array:
        """Undo `apply`."""
        return self.transform(x) * self.signs

    def transform(self, x: mx.array) -> mx.array:
        """T x, without signs."""
        if self._odd == 1:
            return mx.hadamard_transform(x)
        if self._two == 1:
            return x @ self._hartley  # symmetric; one product of matrices instead of one per vector
        parts = mx.hadamard_transform(x.reshape(*x.shape[:-1], self._odd, self._two))
        return (self._hartley @ parts).reshape(x.shape)


class TwofoldHadamardRotation(_Shared):
    """x -> T G P T (s * x): signs and T as in `HadamardRotation`, a permutation P, rotations G of pairs, and T again.

    The first T makes a vector along one axis equal everywhere but for signs (an odd part: nearly); the second makes
    each coordinate a sum of dim random terms, which is nearly Gaussian. So codebooks for a random direction suit every
    vector. After one T, a vector along an axis has 2.2 times the squared error of a random one at 2 bits and 1.7 times
    at 3 bits, more than Theorem 1 of arXiv 2504.19874 proves for a uniform rotation.

    Signs alone between the two do not do: sums of equal terms lie on a lattice, coarse beside a codebook of 4 bits (19%
    above the bound at dim 64), and without P each row of an odd part keeps an energy of its own (13% above at 5 bits of
    dim 768). Random angles fill the lattice, P mixes the rows.

    Args:
        dim: at least 1.
        seed: of signs, permutation and angles.

    Raises:
        ValueError: for a dim below 1.

    Source: several rounds of N. Ailon and B. Chazelle, "The fast Johnson-Lindenstrauss transform" (2009).
    """

    def __init__(self, dim: int, seed: int = 0):
        _check_dim("TwofoldHadamardRotation", dim)
        self.dim = dim
        self._first = HadamardRotation(dim, (seed, 1))
        random, half = np.random.default_rng((seed, 2)), dim // 2
        order, angles = random.permutation(dim), random.uniform(0, 2 * np.pi, half)
        # Element i < half meets element i + half. A last one of an odd dim has no partner and takes a sign.
        rest = np.arange(2 * half, dim)
        partner = np.concatenate([np.arange(half, 2 * half), np.arange(half), rest])
        cosines = np.concatenate([np.cos(angles), np.cos(angles), random.choice([-1.0, 1.0], rest.size)])
        sines = np.concatenate([-np.sin(angles), np.sin(angles), np.zeros(rest.size)])
        self._order, self._met, self._partner = mx.array(order), mx.array(order[partner]), mx.array(partner)
        self._places = mx.array(np.argsort(order))
        self._cosines, self._sines = mx.array(cosines.astype(np.float32)), mx.array(sines.astype(np.float32))

    def apply(self, x: mx.array) -> mx.array:
        """Rotate (..., dim) float32 vectors; norms and inner products stay."""
        x = self._first.apply(x)
        return self._first.transform(x[..., self._order] * self._cosines + x[..., self._met] * self._sines)

    def invert(self, x: mx.array) -> mx.array:
        """Undo `apply`."""
        x = self._first.transform(x)
        x = x * self._cosines - x[..., self._partner] * self._sines
        return self._first.invert(x[..., self._places])


class DenseRotation(_Shared):
    """x -> Q x with Q uniform over the orthogonal matrices.

    Args:
        dim: at least 1; Q takes dim * dim float32, and ten times that while it is made.
        seed: of the Gaussian matrix whose QR factor is Q, with the signs that make it uniform (Mezzadri 2007).

    Raises:
        ValueError: for a dim below 1.
    """

    def __init__(self, dim: int, seed: int = 0):
        _check_dim("DenseRotation", dim)
        self.dim = dim
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
        self._matrix = mx.array((q * np.sign(np.diag(r))).astype(np.float32))

    def apply(self, x: mx.array) -> mx.array:
        """Rotate (..., dim) float32 vectors; norms and inner products stay."""
        return x @ self._matrix.T

    def invert(self, x: mx.array) -> mx.array:
        """Undo `apply`."""
        return x @ self._matrix


class IdentityRotation(_Shared):
    """x -> x, for methods whose rotation is optional.

    Args:
        dim: at least 1.
        seed: not used; rotations are made alike.

    Raises:
        ValueError: for a dim below 1.
    """

    def __init__(self, dim: int, seed: int = 0):
        _check_dim("IdentityRotation", dim)
        self.dim = dim

    def apply(self, x: mx.array) -> mx.array:
        """x as it is."""
        return x

    def invert(self, x: mx.array) -> mx.array:
        """x as it is."""
        return x


Rotation = HadamardRotation | TwofoldHadamardRotation | DenseRotation | IdentityRotation
_KINDS = {
    "hadamard": HadamardRotation,
    "hadamard2": TwofoldHadamardRotation,
    "dense": DenseRotation,
    "none": IdentityRotation,
}


@lru_cache(maxsize=64)
def make_rotation(kind: str, dim: int, seed: int = 0) -> Rotation:
    """The rotation of one kind ('hadamard', 'hadamard2', 'dense' or 'none'), size and seed, made once and shared.

    Raises:
        ValueError: for another kind, or a dim below 1.
    """
    if kind not in _KINDS:
        raise ValueError(f"[make_rotation] Unknown rotation {kind!r}. Known: {', '.join(_KINDS)}.")
    return _KINDS[kind](dim, seed)


def _hartley(m: int) -> np.ndarray:
    """The m-point Hartley matrix (m, m) float32, computed in float64, some rows at a time: all at once is six times it.

    Angles are not reduced to one turn: that would round them otherwise, and rotations are part of what is stored.
    """
    columns, out = np.arange(m), np.empty((m, m), np.float32)
    step = max(_ANGLES // m, 1)
    for start in range(0, m, step):
        angle = 2 * np.pi * np.outer(columns[start : start + step], columns) / m
        out[start : start + step] = (np.cos(angle) + np.sin(angle)) / np.sqrt(m)
    return out


def _check_dim(where: str, dim: int) -> None:
    if dim < 1:
        raise ValueError(f"[{where}] dim must be at least 1, got {dim}. Give the length of a vector.")
