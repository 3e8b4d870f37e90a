"""Quantized rows: the codes of the literal definition, the norm of the original, nothing infinite."""

import mlx.core as mx
import numpy as np
import pytest
from reference import quantize_row

from mlx_turboquant import codebook
from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.lloyd_max import dequantize, quantize
from mlx_turboquant.packing import unpack_codes, words_per_row

WIDTHS = (1, 2, 3, 4, 8)
D = 128
each_width = pytest.mark.parametrize("bits", WIDTHS)
each_group = pytest.mark.parametrize("group", [16, D])
each_dtype = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["f32", "f16", "bf16"])


def rows(seed=0):
    """(2, 3, 4, D) float32 with heavy tails and rows of different lengths."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, (2, 3, 4, D)) * rng.uniform(0.1, 10, (2, 3, 4, 1))).astype(np.float32)


def round_trip(x, bits, group=D, dtype=mx.float32):
    return np.array(dequantize(quantize(mx.array(x), bits, group, dtype), bits, D))


def group_norms(x, group):
    return np.linalg.norm(x.reshape(-1, group).astype(np.float64), axis=1)


@each_width
@each_group
def test_codes_and_scales_are_those_of_the_literal_definition(bits, group):
    x, centroids = rows(bits), codebook.gaussian(bits)
    packed = quantize(mx.array(x), bits, group, mx.float32)
    codes = np.array(unpack_codes(packed.codes, bits, D)).reshape(-1, group)
    scales, same = np.array(packed.scales).reshape(-1), 0
    for row, code, scale in zip(x.reshape(-1, group), codes, scales, strict=True):
        wanted, wanted_scale = quantize_row(row, centroids)
        got, best = (cosine(row, centroids[c]) for c in (code, wanted))
        # Two scalings may be as good as each other within float32; then their codes differ and their errors do not.
        assert got >= best - 1e-6
        if np.array_equal(code, wanted):
            same += 1
            assert scale == pytest.approx(wanted_scale, rel=1e-5)
    assert same >= 0.8 * len(scales)


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(("bits", "most"), [(2, 1.0), (3, 0.96), (4, 0.88), (8, 0.84)])
def test_trying_scalings_lowers_the_error(bits, most, monkeypatch):
    x = np.random.default_rng(0).standard_normal((1, 1, 1000, D)).astype(np.float32)
    tried = np.square(round_trip(x, bits) - x).mean()
    monkeypatch.setattr(lloyd_max, "_SCALINGS", (1.0,))
    assert tried < np.square(round_trip(x, bits) - x).mean() * most


@each_group
@each_dtype
def test_shapes_and_dtypes_follow_the_contract(group, dtype):
    packed = quantize(mx.array(rows()), 3, group, dtype)
    assert packed.codes.shape == (2, 3, 4, words_per_row(D, 3)) and packed.codes.dtype == mx.uint32
    assert packed.scales.shape == (2, 3, 4, D // group) and packed.scales.dtype == dtype
    assert packed.centers is None
    back = dequantize(packed, 3, D)
    assert back.shape == (2, 3, 4, D) and back.dtype == mx.float32


@each_width
@each_group
@each_dtype
def test_a_dequantized_group_is_as_long_as_the_original(bits, group, dtype):
    x = rows(1)
    back = round_trip(x, bits, group, dtype)
    rounding = max(mx.finfo(dtype).eps, 1e-5)
    np.testing.assert_allclose(group_norms(back, group), group_norms(x, group), rtol=rounding)


@each_group
def test_error_falls_as_bits_rise(group):
    x = rows(2)
    errors = [np.square(round_trip(x, bits, group) - x).mean() for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_rows_lose_what_theory_says_matched_norms_lose(bits, distortion):
    # The centroid c of x has E[xc] = E[c^2] = 1 - d. Matching the norm scales it by 1 / sqrt(1 - d), which makes the
    # squared error 2 - 2 sqrt(1 - d) of the row's energy. Rows are long: scaled short ones have lighter tails.
    x = np.random.default_rng(bits).standard_normal((1, 1, 100, 4096)).astype(np.float32)
    back = np.array(dequantize(quantize(mx.array(x), bits, 4096, mx.float32), bits, 4096))
    lost = np.square(back - x).sum() / np.square(x).sum()
    assert lost == pytest.approx(2 - 2 * np.sqrt(1 - distortion), rel=0.01)


@each_width
@each_group
@each_dtype
def test_zero_rows_come_back_as_zeros(bits, group, dtype):
    x = rows()
    x[:, :, 1] = 0
    back = round_trip(x, bits, group, dtype)
    assert np.all(back[:, :, 1] == 0)
    assert np.all(group_norms(back[:, :, 0], group) > 0)


@each_width
@each_group
@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e-6, 1.0, 6e4])
def test_magnitude_does_not_matter(bits, group, magnitude):
    x = rows(3)
    x *= magnitude / np.abs(x).max()
    back = round_trip(x, bits, group)
    assert np.all(np.isfinite(back))
    np.testing.assert_allclose(group_norms(back, group), group_norms(x, group), rtol=1e-5)


@each_width
@each_group
def test_constant_rows_and_one_hot_rows_stay_finite_and_keep_their_length(bits, group):
    x = np.zeros((1, 1, 4, D), np.float32)
    x[0, 0, 0], x[0, 0, 1] = 1e-30, -6e4
    x[0, 0, 2, ::group], x[0, 0, 3, ::group] = 1e-30, 6e4
    back = round_trip(x, bits, group)
    assert np.all(np.isfinite(back))
    np.testing.assert_allclose(group_norms(back, group), group_norms(x, group), rtol=1e-5)
    np.testing.assert_allclose(back[0, 0, :2], x[0, 0, :2], rtol=1e-5)  # a constant row is one centroid: exact


@each_width
def test_float16_scales_saturate_instead_of_overflowing(bits):
    packed = quantize(mx.full((1, 1, 2, D), 3e5), bits, D, mx.float16)
    assert np.all(np.array(packed.scales) == np.finfo(np.float16).max)
    assert np.all(np.isfinite(np.array(dequantize(packed, bits, D))))
