"""Codebooks against theory: distortions, the fixed point, the bound of TurboQuant's Theorem 1."""

import mlx.core as mx
import numpy as np
import pytest
from reference import lloyd_iteration
from scipy.integrate import quad
from scipy.stats import beta, norm

from mlx_turboquant import codebook
from mlx_turboquant.rotation import make_rotation

DISTORTION = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # of N(0, 1): J. Max (1960), Table I
BOOKS = {"gaussian": codebook.gaussian} | {
    f"sphere{dim}": lambda bits, dim=dim: codebook.sphere(bits, dim) for dim in (3, 64, 128, 1536)
}
DENSITIES = {"gaussian": norm} | {
    f"sphere{dim}": beta((dim - 1) / 2, (dim - 1) / 2, loc=-1, scale=2) for dim in (3, 64, 128, 1536)
}


def cells(centroids, bound):
    """(low, high, centroid) of every cell, in float64."""
    c = centroids.astype(np.float64)
    edges = np.concatenate([[-bound], (c[1:] + c[:-1]) / 2, [bound]])
    return list(zip(edges[:-1], edges[1:], c, strict=True))


@pytest.mark.parametrize("bits", DISTORTION)
def test_gaussian_distortion_is_the_published_one(bits):
    parts = [
        quad(lambda x, c=c: (x - c) ** 2 * norm.pdf(x), low, high)[0]
        for low, high, c in cells(codebook.gaussian(bits), np.inf)
    ]
    assert sum(parts) == pytest.approx(DISTORTION[bits], rel=1e-3)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("book", BOOKS)
def test_every_centroid_is_the_mean_of_its_cell(book, bits):
    centroids, density = BOOKS[book](bits), DENSITIES[book]
    bound = 12 if book == "gaussian" else 1
    nodes, weights = np.polynomial.legendre.leggauss(64)
    for low, high, c in cells(centroids, bound):
        x = (low + high) / 2 + (high - low) / 2 * nodes
        w = weights * density.pdf(x)
        assert (w @ x) / w.sum() == pytest.approx(c, abs=2e-6 * float(centroids[-1]))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("book", BOOKS)
def test_centroids_are_symmetric_ascending_and_read_only(book, bits):
    centroids = BOOKS[book](bits)
    assert centroids.shape == (2**bits,) and centroids.dtype == np.float32
    assert np.all(np.diff(centroids) > 0)
    np.testing.assert_array_equal(centroids, -centroids[::-1])
    with pytest.raises(ValueError, match="read-only"):
        centroids[0] = 0


def test_boundaries_lie_midway():
    np.testing.assert_array_equal(codebook.boundaries(np.float32([-3, -1, 0, 4])), np.float32([-2, -0.5, 2]))


def test_outermost_centroid_of_128_dimensions_is_not_the_known_wrong_one():
    outermost = codebook.sphere(4, 128)[-1]
    assert outermost == pytest.approx(0.2376, abs=2e-4)  # a table with 0.1739 is in circulation


def test_sphere_tends_to_gaussian_as_the_dimension_grows():
    gaps = [
        np.abs(codebook.sphere(4, dim) * np.sqrt(dim) - codebook.gaussian(4)).max() for dim in (16, 64, 256, 1024, 4096)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 2e-3 < 0.1 < gaps[0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_newton_ends_where_lloyds_own_iteration_ends(bits):
    literal = lloyd_iteration(lambda x: np.exp(-x * x / 2), -9, 9, bits)
    np.testing.assert_allclose(codebook.gaussian(bits), literal, atol=5e-6)
    literal = lloyd_iteration(lambda x: (1 - x * x) ** (61 / 2), -1, 1, bits)
    np.testing.assert_allclose(codebook.sphere(bits, 64), literal, atol=5e-6)


@pytest.mark.parametrize(
    ("kind", "dim"),
    [("hadamard", d) for d in (64, 128, 200, 384, 768, 1536)] + [("dense", d) for d in (64, 128, 200, 384)],
)
def test_rotated_unit_vectors_keep_the_proven_bound(kind, dim):
    x = np.random.default_rng(dim).standard_normal((256, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x = np.array(make_rotation(kind, dim, seed=1).apply(mx.array(x)))
    for bits in (1, 2, 3, 4):
        centroids = codebook.sphere(bits, dim)
        nearest = centroids[np.searchsorted(codebook.boundaries(centroids), x)]
        mse = np.square(x - nearest).sum(axis=1).mean()
        assert 4.0**-bits < mse <= codebook.DISTORTION_UPPER_BOUND * 4.0**-bits  # below: Shannon, Theorem 3


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        codebook.gaussian(bits)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        codebook.sphere(bits, 64)


@pytest.mark.parametrize("dim", [2, 0, -64])
def test_other_dimensions_are_refused(dim):
    with pytest.raises(ValueError, match="dim must be at least 3"):
        codebook.sphere(4, dim)
