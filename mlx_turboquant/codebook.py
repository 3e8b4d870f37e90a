"""Lloyd-Max codebooks: the centroids that quantize a known density with the least mean squared error."""

from functools import cache

import numpy as np

# Panter-Dite at high rate; arXiv 2504.19874, Theorem 1 proves it as an upper bound for a coordinate of the sphere.
DISTORTION_UPPER_BOUND = np.sqrt(3) * np.pi / 2


@cache
def gaussian(bits: int) -> np.ndarray:
    """Centroids of the Lloyd-Max quantizer of N(0, 1).

    Args:
        bits: 1 to 8.

    Returns:
        (2**bits,) float32, ascending, read-only, symmetric about 0. Their mean squared errors for 1 to 4 bits are
        0.3634, 0.1175, 0.03454 and 0.009497.

    Raises:
        ValueError: for other bits.

    Source: S. Lloyd, "Least squares quantization in PCM" (1982); J. Max, "Quantizing for minimum distortion" (1960).
    """
    from scipy.stats import norm

    # E[x; a < x < b] = pdf(a) - pdf(b), since the derivative of the normal density is -x times it.
    return _solve(bits, lambda p: np.sqrt(3) * norm.ppf(p), norm.cdf, norm.pdf, lambda x: -norm.pdf(x), np.inf)


@cache
def sphere(bits: int, dim: int) -> np.ndarray:
    """Centroids of the Lloyd-Max quantizer of one coordinate of a uniform point on the unit sphere in R^dim.

    Args:
        bits: 1 to 8.
        dim: at least 3.

    Returns:
        (2**bits,) float32, ascending, read-only, symmetric about 0.

    Raises:
        ValueError: for other bits or dimensions.

    Source: arXiv 2504.19874, Lemma 1: the density is proportional to (1 - x^2)^((dim - 3) / 2) on [-1, 1].
    """
    from scipy.special import gammaln
    from scipy.stats import beta

    if dim < 3:
        raise ValueError(f"[codebook.sphere] dim must be at least 3, got {dim}.")
    a = (dim - 1) / 2  # (x + 1) / 2 is Beta(a, a)
    log_norm = gammaln(dim / 2) - gammaln(a) - 0.5 * np.log(np.pi)

    def density(x: np.ndarray) -> np.ndarray:
        return np.exp(log_norm) * np.clip(1 - x * x, 0, None) ** (a - 1)

    def partial_mean(x: np.ndarray) -> np.ndarray:  # an antiderivative of x * density(x)
        return -np.exp(log_norm) * np.clip(1 - x * x, 0, None) ** a / (dim - 1)

    def start(p: np.ndarray) -> np.ndarray:
        return 2 * beta.ppf(p, (a + 2) / 3, (a + 2) / 3) - 1

    return _solve(bits, start, lambda x: beta.cdf((x + 1) / 2, a, a), density, partial_mean, 1.0)


def boundaries(centroids: np.ndarray) -> np.ndarray:
    """The (len(centroids) - 1,) midpoints: a value between two of them takes the code of the centroid there."""
    return ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32)


def _solve(bits, start, cdf, density, partial_mean, bound) -> np.ndarray:
    """Newton's method on centroid = mean of its cell; quadratic where Lloyd's own iteration needs 4**bits steps.

    It starts at the quantiles of the density to the power 1/3, which is the point density of the best quantizer
    (Panter and Dite 1951): for a Gaussian one sqrt(3) times wider, for Beta(a, a) another Beta.

    With cell i = [b_(i-1), b_i], b_i = (c_i + c_(i+1)) / 2 and m_i its mean, the residual c - m(c) has a tridiagonal
    Jacobian: dm_i/db_i = f(b_i) (b_i - m_i) / P_i and dm_i/db_(i-1) = f(b_(i-1)) (m_i - b_(i-1)) / P_i.
    """
    from scipy.linalg import solve_banded

    if bits not in range(1, 9):
        raise ValueError(f"[codebook] bits must be 1 to 8, got {bits}.")
    n = 2**bits
    c = start((np.arange(n) + 0.5) / n)
    for _ in range(100):
        inner = (c[1:] + c[:-1]) / 2
        edge = np.concatenate([[-bound], inner, [bound]])
        mass = np.diff(cdf(edge))
        mean = np.diff(partial_mean(edge)) / mass
        f = density(inner)
        right = f * (inner - mean[:-1]) / mass[:-1] / 2  # d mean_i / d c_(i+1), and its share of d mean_i / d c_i
        left = f * (mean[1:] - inner) / mass[1:] / 2
        diagonal = np.ones(n)
        diagonal[:-1] -= right
        diagonal[1:] -= left
        banded = np.zeros((3, n))
        banded[0, 1:], banded[1], banded[2, :-1] = -right, diagonal, -left
        step = solve_banded((1, 1), banded, mean - c)
        # A full step may cross a neighbour while far from the solution; half of Lloyd's step never does.
        c_new = c + step
        c = c_new if np.all(np.diff(c_new) > 0) and np.abs(c_new).max() < bound else (c + mean) / 2
        if np.abs(step).max() < 1e-12:
            break
    c = ((c - c[::-1]) / 2).astype(np.float32)
    c.setflags(write=False)
    return c
