"""What every quantizer promises the cache and attention: products with codes are products with decoded rows."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_turboquant.conditioning import balance_factors, block_centers, subtract_centers
from mlx_turboquant.quantizers import RawRows, TurboKeys, TurboValues, make_quantizers
from mlx_turboquant.scheme import KVScheme

B, H, T, R, BLOCK = 2, 2, 32, 3, 16
SCHEMES = [
    "turbo4",
    "turbo2v3:balance=0",
    "turbo3v2:center=0,group=16",
    "turbo8:center=0,balance=0",
    "turbo4v8:rotation=dense,group=16",
    "turbo0v4:rotation=dense",
    "turbo3v0:seed=7",
]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
each_scheme = pytest.mark.parametrize("text", SCHEMES)
each_dim = pytest.mark.parametrize("dim", [64, 80, 128])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def fitted(text, dim, dtype, tokens=T):
    """(key quantizer, value quantizer, keys, values), fitted to the keys and to queries that prefer low channels."""
    scheme = KVScheme.parse(f"{text}{',' if ':' in text else ':'}block={BLOCK}")
    keys = (normal(B, H, tokens, dim) + 3 * normal(B, H, 1, dim, seed=1)).astype(DTYPES[dtype])
    values = normal(B, H, tokens, dim, seed=2).astype(DTYPES[dtype])
    key_side, value_side = make_quantizers(scheme, dim, dim, DTYPES[dtype])
    key_side.fit(keys, mx.broadcast_to(mx.exp(-mx.arange(dim) / dim), (B, H, dim)))
    return key_side, value_side, keys, values


def close(found, left, right, dtype):
    """Whether found is left @ right but for the rounding of right to dtype (bounded entry by entry) and float32's."""
    exact = np.array(left, np.float64) @ np.array(right, np.float64)
    sizes = np.abs(np.array(left, np.float64)) @ np.abs(np.array(right, np.float64))
    return np.all(np.abs(np.array(found) - exact) <= (mx.finfo(DTYPES[dtype]).eps / 2 + 5e-6) * sizes + 1e-6)


@each_scheme
@each_dim
@each_dtype
def test_scores_are_products_with_the_decoded_keys(text, dim, dtype):
    side, _, keys, _ = fitted(text, dim, dtype)
    queries, packed = normal(B, H, R, dim, seed=3), side.encode(keys)
    decoded = side.decode(packed)
    assert decoded.shape == keys.shape and decoded.dtype == DTYPES[dtype]
    scores = side.scores(side.prepare(queries), packed)
    assert scores.shape == (B, H, R, T) and scores.dtype == mx.float32
    assert close(scores, queries, decoded.astype(mx.float32).swapaxes(-1, -2), dtype)


@each_scheme
@each_dim
@each_dtype
def test_weighted_sums_are_sums_of_the_decoded_values(text, dim, dtype):
    _, side, _, values = fitted(text, dim, dtype)
    weights, packed = mx.softmax(2 * normal(B, H, R, T, seed=4), axis=-1), side.encode(values)
    decoded = side.decode(packed)
    assert decoded.shape == values.shape and decoded.dtype == DTYPES[dtype]
    total = side.finish(side.weighted_sum(weights, packed))
    assert total.shape == (B, H, R, dim) and total.dtype == mx.float32
    assert close(total, weights, decoded.astype(mx.float32), dtype)


@each_scheme
@each_dim
@each_dtype
def test_layout_says_what_encode_returns(text, dim, dtype):
    key_side, value_side, keys, values = fitted(text, dim, dtype)
    for side, rows in ((key_side, keys), (value_side, values)):
        shapes, dtypes = side.layout(B, H, T)
        for array, shape, kind in zip(side.encode(rows), shapes, dtypes, strict=True):
            assert shape is None if array is None else (array.shape, array.dtype) == (shape, kind)


@pytest.mark.parametrize("text", ["turbo{}", "turbo{}:rotation=dense,group=16", "turbo{}:center=0,balance=0"])
@each_dim
def test_decoded_rows_come_closer_as_bits_rise(text, dim):
    errors = {"keys": [], "values": []}
    for bits in (2, 3, 4, 8, 0):
        key_side, value_side, keys, values = fitted(text.format(bits), dim, "float32")
        errors["keys"].append(mx.square(key_side.decode(key_side.encode(keys)) - keys).mean().item())
        errors["values"].append(mx.square(value_side.decode(value_side.encode(values)) - values).mean().item())
    for side in errors.values():
        assert side == sorted(side, reverse=True)
        assert side[0] > 100 * side[3] > 0 == side[4]


@each_dim
@each_dtype
def test_centering_takes_a_large_constant_offset_out_of_the_error(dim, dtype):
    queries, errors = normal(B, H, R, dim, seed=3), []
    for center in (0, 1):
        side, _, keys, _ = fitted(f"turbo4:balance=0,center={center}", dim, dtype)
        keys[..., 5] = keys[..., 5] + 50
        exact = queries @ keys.astype(mx.float32).swapaxes(-1, -2)
        errors.append(mx.square(side.scores(side.prepare(queries), side.encode(keys)) - exact).mean().item())
    assert errors[1] < errors[0] / 10


@each_dim
def test_balancing_lowers_the_error_that_the_queries_see(dim):
    # Queries look at the quiet channels; the quantizer would spend its accuracy on the loud ones.
    slope, errors = mx.exp(mx.linspace(-2, 2, dim)), []
    keys, queries = normal(B, H, T, dim) * slope, normal(B, H, 40, dim, seed=3) / slope
    for balance in (0, 1):
        side, _ = make_quantizers(KVScheme.parse(f"turbo3:block=16,balance={balance}"), dim, dim, mx.float32)
        side.fit(keys, mx.square(queries).sum(axis=2))
        assert (side.balance is not None) == bool(balance)
        exact = queries @ keys.swapaxes(-1, -2)
        errors.append(mx.square(side.scores(side.prepare(queries), side.encode(keys)) - exact).mean().item())
    assert errors[1] < errors[0] / 3


def test_the_balance_is_fitted_to_centred_keys():
    keys, squares = normal(B, H, T, 64) * mx.exp(mx.linspace(-1, 1, 64)), mx.ones((B, H, 64))
    side, _ = make_quantizers(KVScheme.parse("turbo4:block=16"), 64, 64, mx.float32)
    side.fit(keys + 50 * normal(B, H, 1, 64, seed=1), squares)
    wanted = balance_factors(squares, mx.square(subtract_centers(keys, block_centers(keys, BLOCK))).sum(axis=2))
    np.testing.assert_allclose(side.balance, wanted, rtol=1e-3)


def test_methods_learn_of_balanced_keys_and_of_what_queries_become_with_them():
    """Their moments too: a query meets balanced keys divided by the balance."""
    keys, queries = normal(B, H, T, 32) * mx.exp(mx.linspace(-1, 1, 32)), normal(B, H, 40, 32, seed=3)
    side, _ = make_quantizers(KVScheme.parse("squat3:block=16,group=16,balance=1"), 32, 32, mx.float32)
    side.fit(keys, queries.swapaxes(-1, -2) @ queries)
    balanced = queries / side.balance[:, :, None]
    wanted = side.codec.fit(keys * side.balance[:, :, None], balanced.swapaxes(-1, -2) @ balanced)
    for found, part in zip(side.learned[1:], wanted, strict=True):
        np.testing.assert_allclose(mx.abs(found), mx.abs(part), rtol=2e-3, atol=2e-3 * mx.abs(part).max().item())


@each_dtype
def test_a_raw_side_returns_its_rows_unchanged(dtype):
    key_side, value_side, keys, values = fitted("turbo0", 80, dtype)
    for side, rows in ((key_side, keys), (value_side, values)):
        packed = side.encode(rows)
        assert type(side) is RawRows and packed.scales is None and packed.centers is None
        assert mx.array_equal(packed.codes, rows) and mx.array_equal(side.decode(packed), rows)
        assert packed.codes.dtype == side.decode(packed).dtype == rows.dtype


def test_each_side_is_chosen_by_its_own_bits():
    kinds = {text: [type(s) for s in fitted(text, 64, "float32")[:2]] for text in ("turbo4v2", "turbo0v4", "turbo4v0")}
    assert kinds == {
        "turbo4v2": [TurboKeys, TurboValues],
        "turbo0v4": [RawRows, TurboValues],
        "turbo4v0": [TurboKeys, RawRows],
    }


@pytest.mark.parametrize("text", ["turbo4:group=32", "turbo4v0:group=64", "turbo0v4:group=128"])
def test_a_group_that_does_not_divide_the_head_size_is_refused(text):
    with pytest.raises(ValueError, match=r"group=\d+ does not divide the head size 80"):
        make_quantizers(KVScheme.parse(text), 80, 80, mx.float16)


def test_an_odd_head_size_is_stored_too():
    key_side, value_side, keys, values = fitted("turbo4", 81, "float32")
    for side, rows in ((key_side, keys), (value_side, values)):
        error = side.decode(side.encode(rows)) - rows
        assert mx.square(error).sum() < 0.02 * mx.square(rows - rows.mean(axis=2, keepdims=True)).sum()
