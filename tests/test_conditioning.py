"""Centring and balancing change the variables, never the result; the balance is the best of its kind."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_turboquant.conditioning import balance_factors, block_centers, finite_or_zero, subtract_centers

B, H, T, D, BLOCK = 2, 3, 64, 32, 16
each_dtype = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def keys_with_offsets(dtype=mx.float32):
    """Keys (B, H, T, D) whose channels have offsets of up to about 30 times the signal."""
    return (normal(B, H, T, D) + 10 * normal(B, H, 1, D, seed=1)).astype(dtype)


def test_finite_or_zero_keeps_numbers_only():
    x = mx.array([1.5, float("nan"), float("inf"), -float("inf"), -6e4], mx.float16)
    kept = finite_or_zero(x)
    assert kept.dtype == mx.float32 and kept.tolist() == [1.5, 0, 0, 0, -60000]


@each_dtype
def test_centers_are_block_means_in_the_dtype_of_the_keys(dtype):
    keys = keys_with_offsets(dtype)
    centers = block_centers(keys, BLOCK)
    assert centers.shape == (B, H, T // BLOCK, D) and centers.dtype == dtype
    means = np.array(keys.astype(mx.float32), np.float64).reshape(B, H, T // BLOCK, BLOCK, D).mean(axis=3)
    np.testing.assert_allclose(centers.astype(mx.float32), means, rtol=max(mx.finfo(dtype).eps, 1e-5), atol=1e-5)


def test_centers_are_means_over_finite_entries():
    keys = np.array(normal(1, 1, BLOCK, 3))
    keys[0, 0, 2:5, 0], keys[0, 0, 7, 1], keys[..., 2] = np.nan, np.inf, -np.inf
    centers = np.array(block_centers(mx.array(keys), BLOCK))[0, 0, 0]
    wanted = [np.delete(keys[0, 0, :, 0], [2, 3, 4]).mean(), np.delete(keys[0, 0, :, 1], 7).mean(), 0]
    np.testing.assert_allclose(centers, wanted, atol=1e-6)


@each_dtype
def test_centering_is_exact_for_the_softmax(dtype):
    queries, keys = normal(B, H, 5, D, seed=2) / np.sqrt(D), keys_with_offsets(dtype)
    plain = mx.softmax(queries @ keys.astype(mx.float32).swapaxes(-1, -2), axis=-1)
    centers = block_centers(keys, BLOCK)
    centered = queries @ subtract_centers(keys, centers).swapaxes(-1, -2)
    offsets = mx.repeat(queries @ centers.astype(mx.float32).swapaxes(-1, -2), BLOCK, axis=-1)
    np.testing.assert_allclose(mx.softmax(centered + offsets, axis=-1), plain, rtol=1e-3, atol=2e-5)
    without = mx.softmax(centered, axis=-1)  # blocks have different centres, so leaving q.c out is another softmax
    assert np.abs(np.array(without - plain)).max() > 0.01


def test_centering_takes_the_offset_away():
    keys = keys_with_offsets()
    centered = subtract_centers(keys, block_centers(keys, BLOCK))
    np.testing.assert_allclose(centered.reshape(B, H, -1, BLOCK, D).mean(axis=3), 0, atol=1e-5)
    assert mx.abs(centered).max() < 6 < 20 < mx.abs(keys).max()
    assert mx.array_equal(subtract_centers(keys, None), keys)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_entry_becomes_zero_and_harms_no_other(bad, dtype):
    keys = keys_with_offsets(dtype)
    keys[0, 1, 20, 7] = bad
    for centers in (block_centers(keys, BLOCK), None):
        centered = np.array(subtract_centers(keys, centers))
        assert np.all(np.isfinite(centered))
        assert centered[0, 1, 20, 7] == 0
        assert np.count_nonzero(centered == 0) < centered.size / 10


def test_balancing_is_exact_in_the_product():
    queries, keys = normal(B, H, 5, D, seed=3), normal(B, H, T, D) * mx.exp(normal(D, seed=4))
    s = balance_factors((queries * queries).sum(axis=2), (keys * keys).mean(axis=2))[:, :, None]
    assert s.max() > 2 * s.min()
    np.testing.assert_allclose((queries / s) @ (s * keys).swapaxes(-1, -2), queries @ keys.swapaxes(-1, -2), atol=1e-3)


def energies(seed=5):
    """Query squares (B, H, D) and keys (B, H, T, D) with energies of the same order in all channels."""
    rng = np.random.default_rng(seed)
    queries = mx.array(rng.uniform(0.5, 2, (B, H, D)).astype(np.float32))
    return queries, normal(B, H, T, D) * mx.array(rng.uniform(0.7, 1.4, (B, H, 1, D)).astype(np.float32))


def test_factors_have_geometric_mean_one_whatever_the_scale():
    queries, keys = energies()
    s = balance_factors(queries, mx.square(keys).sum(axis=2))
    np.testing.assert_allclose(mx.log(s).mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(balance_factors(1e6 * queries, 1e-3 * mx.square(keys).mean(axis=2)), s, rtol=1e-4)


def test_factors_are_the_minimiser_of_the_noise():
    queries, keys = energies()
    q2, k2 = np.array(queries, np.float64), np.square(np.array(keys, np.float64)).mean(axis=2)
    s = np.array(balance_factors(queries, mx.square(keys).mean(axis=2)), np.float64)

    def noise(s):  # the error of q.k when every rotated channel of s k gets an equal share of its energy
        return (q2 / s**2).sum(axis=-1) * (s**2 * k2).sum(axis=-1)

    rng = np.random.default_rng(6)
    for size in (0.1, 0.3, 1.0):
        for _ in range(20):
            assert np.all(noise(s) < noise(s * np.exp(size * rng.standard_normal(s.shape))))
    least = np.sqrt(q2 * k2).sum(axis=-1) ** 2  # Cauchy-Schwarz
    np.testing.assert_allclose(noise(s), least, rtol=1e-3)  # the floor keeps it a little above
    assert np.all(noise(np.ones_like(s)) > 1.01 * least)


def test_a_channel_that_queries_or_keys_leave_unused_gets_a_moderate_factor():
    queries, keys = np.array(energies()[0]), np.array(energies()[1])
    queries[..., 3], keys[..., 5] = 0, 0
    s = np.array(balance_factors(mx.array(queries), mx.square(mx.array(keys)).mean(axis=2)))
    assert np.all((s > 0.1) & (s < 10))  # a floor of 1e-3 allows 0.18 and its inverse, beside the rest
    assert np.all((s[..., 3] < s[..., 4]) & (s[..., 4] < s[..., 5]))


@pytest.mark.parametrize(("query_size", "key_size"), [(0, 0), (0, 1), (1, 0)])
def test_a_head_without_query_or_key_energy_is_left_as_it_is(query_size, key_size):
    queries, keys = energies()
    s = np.array(balance_factors(query_size * queries, mx.square(key_size * keys).mean(axis=2)))
    assert np.all(np.isfinite(s))
    np.testing.assert_allclose(s, 1, rtol=1e-5)
