"""Rotations are orthogonal, spread evenly, and depend on nothing but kind, size and seed."""

import copy
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from scipy.linalg import hadamard

from mlx_turboquant import codebook
from mlx_turboquant.rotation import (
    DenseRotation,
    HadamardRotation,
    IdentityRotation,
    TwofoldHadamardRotation,
    make_rotation,
)

# mx.hadamard_transform alone aborts the process for 72, 144 and 576 and is not its own inverse for 80 and 112.
DIMS = [1, 2, 3, 7, 63, 64, 72, 80, 81, 96, 109, 112, 128, 144, 256, 576]
KINDS = {
    "hadamard": HadamardRotation,
    "hadamard2": TwofoldHadamardRotation,
    "dense": DenseRotation,
    "none": IdentityRotation,
}
RANDOM = ("hadamard", "hadamard2", "dense")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dim = pytest.mark.parametrize("dim", DIMS)


def rows(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def matrix(rotation):
    """The D x D matrix that `apply` multiplies row vectors' transposes with."""
    return np.array(rotation.apply(mx.eye(rotation.dim))).T.astype(np.float64)


@each_kind
@each_dim
def test_invert_undoes_apply(kind, dim):
    rotation, x = make_rotation(kind, dim), rows(2, 3, 5, dim)
    np.testing.assert_allclose(rotation.invert(rotation.apply(x)), x, atol=1e-5)
    np.testing.assert_allclose(rotation.apply(rotation.invert(x)), x, atol=1e-5)


@each_kind
@each_dim
def test_norms_and_inner_products_stay(kind, dim):
    rotation, x, y = make_rotation(kind, dim), rows(20, dim), rows(20, dim, seed=1)
    np.testing.assert_allclose(rotation.apply(x) @ rotation.apply(y).T, x @ y.T, atol=2e-6 * max(dim, 64))
    np.testing.assert_allclose(mx.linalg.norm(rotation.apply(x), axis=-1), mx.linalg.norm(x, axis=-1), rtol=1e-5)


@each_kind
@each_dim
def test_the_matrix_is_orthogonal_and_apply_is_linear(kind, dim):
    rotation = make_rotation(kind, dim)
    q, x = matrix(rotation), rows(4, dim)
    np.testing.assert_allclose(q @ q.T, np.eye(dim), atol=1e-5)
    np.testing.assert_allclose(rotation.apply(x), np.array(x) @ q.T, atol=1e-5)


@each_dim
def test_hadamard_spreads_every_coordinate_over_all(dim):
    entries = np.abs(matrix(HadamardRotation(dim))) * np.sqrt(dim)
    odd = dim // (dim & -dim)
    assert entries.max() <= np.sqrt(2) + 1e-5
    if odd == 1:
        np.testing.assert_allclose(entries, 1, rtol=1e-5)


@pytest.mark.parametrize("dim", [63, 81, 109])
def test_odd_sizes_are_the_literal_hartley_matrix(dim):
    rotation, x = HadamardRotation(dim, seed=3), rows(7, dim)
    angle = 2 * np.pi * np.outer(np.arange(dim), np.arange(dim)) / dim
    hartley = (np.cos(angle) + np.sin(angle)) / np.sqrt(dim)
    np.testing.assert_allclose(rotation.apply(x), (np.array(x) * np.array(rotation.signs)) @ hartley.T, atol=1e-5)


@pytest.mark.parametrize("sizes", [range(1, 300, 2), (1023,), (4095,)], ids=str)
def test_the_hartley_matrix_is_the_formula_in_float64_bit_for_bit_however_large(sizes):
    """Rotations are part of the stored format. Up to 1023 all rows are computed at once here, then the last 500."""
    for m in sizes:
        rows = np.arange(m)[-500 if m > 1023 else 0 :]
        angle = 2 * np.pi * np.outer(rows, np.arange(m)) / m
        literal = ((np.cos(angle) + np.sin(angle)) / np.sqrt(m)).astype(np.float32)
        np.testing.assert_array_equal(np.array(HadamardRotation(m)._hartley)[rows], literal)


@pytest.mark.parametrize("kind", ["hadamard", "hadamard2"])
def test_making_a_rotation_takes_the_memory_of_the_matrix_it_keeps_once_more(kind):
    """numpy's bytes; it took 6 times the matrix, for a file of 384 bytes that says d = 4095."""
    dim = 1023
    tracemalloc.start()
    rotation = KINDS[kind](dim)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert getattr(rotation, "_first", rotation)._odd == dim
    assert 4 * dim * dim <= peak_bytes < 4 * dim * dim + (3 << 20)


@pytest.mark.parametrize("kind", RANDOM)
def test_one_dimension_is_a_sign_and_both_occur(kind):
    found = {float(KINDS[kind](1, seed).apply(mx.array([2.0])).item()) for seed in range(20)}
    assert found == {-2.0, 2.0}


@pytest.mark.parametrize("dim", [2, 64, 128, 256])
def test_powers_of_two_are_the_literal_walsh_hadamard_product(dim):
    rotation, x = HadamardRotation(dim, seed=3), rows(7, dim)
    literal = (np.array(x) * np.array(rotation.signs)) @ hadamard(dim).T / np.sqrt(dim)
    np.testing.assert_allclose(rotation.apply(x), literal, atol=1e-5)
    assert set(np.array(rotation.signs).tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("dim", [64, 80, 109, 128, 192, 768])
def test_two_rounds_make_an_axis_look_like_a_random_direction(dim):
    """Theorem 1's bound: one round breaks it for vectors along an axis, two keep it (no lattice, no uneven rows)."""

    def error(kind, bits):
        axes = mx.eye(dim)[:: dim // 16]
        x = np.concatenate([np.array(make_rotation(kind, dim, seed).apply(axes)) for seed in range(8)])
        centroids = codebook.sphere(bits, dim)
        nearest = centroids[np.searchsorted(codebook.boundaries(centroids), x)]
        return np.square(x - nearest).sum(axis=1).mean() * 4**bits

    for bits in (1, 2, 3, 4, 5):
        assert 1 < error("hadamard2", bits) < codebook.DISTORTION_UPPER_BOUND
    if dim in (64, 128):
        assert min(error("hadamard", bits) for bits in (2, 3)) > codebook.DISTORTION_UPPER_BOUND


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("dim", [64, 80, 109])
def test_the_seed_decides_the_rotation(kind, dim):
    one, same, other = (matrix(KINDS[kind](dim, seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


@each_kind
def test_one_rotation_is_shared_by_all_layers_and_all_copies(kind):
    rotation = make_rotation(kind, 64, 0)
    assert type(rotation) is KINDS[kind]
    assert make_rotation(kind, 64, 0) is rotation
    assert copy.deepcopy({"layer": rotation})["layer"] is rotation


@each_kind
@pytest.mark.parametrize("dim", [0, -2])
def test_sizes_below_one_are_refused(kind, dim):
    with pytest.raises(ValueError, match=rf"\[{KINDS[kind].__name__}\] dim must be at least 1, got {dim}"):
        make_rotation(kind, dim)


def test_no_rotation_gives_the_very_array_back():
    rotation, x = make_rotation("none", 80), rows(3, 80)
    assert rotation.apply(x) is x and rotation.invert(x) is x


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"Unknown rotation 'givens'\. Known: hadamard, hadamard2, dense, none"):
        make_rotation("givens", 64)
