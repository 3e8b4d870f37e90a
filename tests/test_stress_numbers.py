"""Numbers at the ends of what the dtypes hold: everything stays finite, and no row is further off than its method may.

A row may be off by a part of its length, from its codebook; by rounding to the dtype, of the centre and of itself; and
by the smallest number that float32 or a float16 scale is computed with.
"""

import math
from dataclasses import replace
from functools import lru_cache

import mlx.core as mx
import numpy as np
import pytest
from schemes import SCHEMES

from mlx_turboquant import KVScheme, TurboQuantKVCache
from mlx_turboquant.attention import attend
from mlx_turboquant.conditioning import LARGEST
from mlx_turboquant.index import TurboQuantIndex
from mlx_turboquant.quantizers import make_quantizers

T, D = 64, 64
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
BIG = {"float16": 6e4, "bfloat16": 1e30, "float32": 1e30}
# Half the distance between 1 and the next number; sums of 64 float32 numbers are not better than 2^-21.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-21}
STEP_FLOAT16 = 2.0**-24
# Below it a float32 loses its digits, or becomes 0 where a device flushes subnormal numbers.
SMALLEST = 1e-36

# Squared error of Lloyd-Max codes for Gaussian rows, as a part of the row's energy; of half a step of uniform ones.
GAUSSIAN = {2: 0.1175, 2.5: 0.1175, 3: 0.0345, 3.5: 0.0345, 4: 0.0095, 8: 5e-5}
# A row along an axis has 2.2 times the error of a Gaussian one (`TwofoldHadamardRotation`), a single row of 64 numbers
# up to twice its expectation: 6 is beyond both together.
WORST = 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@lru_cache
def patterns(dtype):
    """Names, an array (1, H, T, D) whose heads are so many patterns, and the same exactly as float64."""
    names, heads = zip(*_patterns(dtype), strict=True)
    array = mx.array(np.stack(heads)[None].astype(np.float32)).astype(DTYPES[dtype])
    return names, array, exact(array)


def _patterns(dtype):
    big, shape, random = BIG[dtype], (T, D), np.random.default_rng(1)
    tiny = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}[dtype]
    sizes = [1e-7, 1e-5, 1e-3, 1, 1e3] if dtype == "float16" else [1e-38, 1e-30, 1e-20, 1e-10, 1e-5, 1, 1e10, 1e20]
    for size in (*sizes, big / 6):
        yield f"normal, {size:g}", normal(*shape) * size
    yield "zeros", np.zeros(shape)
    yield "one subnormal number", np.where(np.arange(T * D).reshape(T, D) == 99, tiny, np.zeros(shape))
    yield "subnormal", random.integers(-9, 10, shape) * tiny
    for size in (1e-3, 3.7, big):
        yield f"constant, {size:g}", np.full(shape, size)
        yield f"alternating rows, {size:g}", np.where(np.arange(T)[:, None] % 2, size, -size) * np.ones(shape)
        yield f"alternating channels, {size:g}", np.where(np.arange(D) % 2, size, -size) * np.ones(shape)
        yield f"random signs, {size:g}", np.sign(normal(*shape)) * size
        yield f"one-hot, {size:g}", np.where(np.arange(D) == 7, size, np.zeros(shape))
        yield f"a hot channel in each row, {size:g}", size * (np.arange(D) == random.integers(0, D, (T, 1)))
    yield "equal rows", np.repeat(normal(1, D), T, axis=0)
    yield "equal rows, big", np.repeat(normal(1, D), T, axis=0) * big / 6
    yield "a constant outlier channel", np.where(np.arange(D) == 5, big / 2, normal(*shape) * 1e-3)
    yield "an outlier channel", np.where(np.arange(D) == 5, big / 6, 1e-3) * normal(*shape)
    yield "a huge row", np.where(np.arange(T)[:, None] == 20, big / 6, 1) * normal(*shape)
    yield "a tiny row", np.where(np.arange(T)[:, None] == 20, 1 / big, 1) * normal(*shape)
    yield "rows from 1e-6 to 1e4", np.geomspace(1e-6, 1e4, T)[:, None] * normal(*shape)
    yield "channels from 1e-6 to 1e4", np.geomspace(1e-6, 1e4, D) * normal(*shape)


def exact(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def length(rows):
    return np.linalg.norm(rows, axis=-1)


def fitted(scheme, array, dtype):
    """Quantizers that have learned from rows and from normal queries."""
    queries = mx.random.normal((1, array.shape[1], 100, D), key=mx.random.key(5))
    for quantizer in make_quantizers(scheme, D, D, DTYPES[dtype]):
        moments = quantizer.queries_wanted == "moments"
        quantizer.fit(array, queries.swapaxes(-1, -2) @ queries if moments else mx.square(queries).sum(axis=2))
        yield quantizer


def most_off(scheme, bits, keys, rows, dtype):
    """The largest length (1, H, T) of a row's error, where keys of `rows` were centred and balanced already."""
    levels = 2**bits - 1
    whole = np.abs(rows).max(axis=-1)
    if scheme.method in ("turbo", "outlier") or (scheme.method == "qjl" and not keys):
        low = math.floor(bits)  # of mixed bits, the half with fewer
        return np.sqrt(WORST * GAUSSIAN[low]) * length(rows)
    if scheme.method == "qjl":  # codes of one bit less; the sketch of what they miss has pi / 2 times its energy
        return np.sqrt(WORST * np.pi / 2 * GAUSSIAN[bits - 1]) * length(rows)
    if scheme.method == "int":  # half a step in each of D elements; rows below 1e-6 are rounded as if they were that
        return np.sqrt(D) * np.maximum(whole, 1e-6) / 254
    if scheme.method == "affine":  # a step in each element, of a group's range; steps are at least 1e-7
        spread = 2 * (whole if scheme.rotation == "none" else length(rows))
        return np.sqrt(D) * (spread / 2**bits + spread * ROUNDING[dtype] + 1e-7)
    assert scheme.method == "squat"
    if not keys:  # half a step in each element, of a group's range
        return np.sqrt(D) * whole / levels
    # Half a step in each element, of the range of a channel over a group's tokens, which corrections widen by less
    # than half; and the corrections themselves, which are no larger than the errors that they answer.
    widest = np.abs(rows).max(axis=(2, 3))[..., None]
    return np.sqrt(D) * 1.5 * 2 * widest / levels + 0 * whole


def allowed(scheme, quantizer, bits, keys, rows, dtype):
    """What decoded rows may be off, (1, H, T), and what errors are multiplied with before they are measured."""
    weights, inner = np.ones(D), rows
    if keys and scheme.center:
        blocks = rows.reshape(*rows.shape[:2], -1, scheme.block, D)
        inner = (blocks - blocks.mean(axis=3, keepdims=True)).reshape(rows.shape)
    if keys and quantizer.balance is not None:
        weights = exact(quantizer.balance)[:, :, None]
    lost = most_off(scheme, bits, keys, inner * weights, dtype)
    # Rounding of a centre, of a row, of scales and minima: of numbers as large as the largest near it.
    rounding = 4 * ROUNDING[dtype] * np.abs(rows).max(axis=(2, 3))[..., None] * np.sqrt(D)
    # Half a step of a float16 scale, times a code of up to 5 (Lloyd-Max) or 2^bits - 1.
    codes = 5 if scheme.method in ("turbo", "qjl", "outlier") else 2**bits
    small = np.sqrt(D) * (SMALLEST + (codes * STEP_FLOAT16 if dtype == "float16" else 0))
    # A float16 scale ends at 65504: rows in which every element is near that are stored shorter.
    long = length(inner) > 0.5 * 65504 * np.sqrt(D) if dtype == "float16" else False
    return lost + np.max(weights) * (rounding + small + np.where(long, 0.5 * length(inner), 0)), weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SCHEMES)
def test_rows_of_any_size_come_back_finite_and_as_near_as_their_method_promises(text, dtype):
    scheme, (names, array, rows) = KVScheme.parse(text), patterns(dtype)
    query = mx.random.normal((1, len(names), 3, D), key=mx.random.key(9))
    sides = zip(fitted(scheme, array, dtype), (scheme.key_bits, scheme.value_bits), (True, False), strict=True)
    for quantizer, bits, keys in sides:
        packed = quantizer.encode(array)
        decoded = exact(quantizer.decode(packed))
        if keys:
            seen = quantizer.scores(quantizer.prepare(query), packed)
        else:
            seen = quantizer.finish(quantizer.weighted_sum(mx.full((1, len(names), 3, T), 1 / T), packed))
        assert np.isfinite(decoded).all() and mx.isfinite(seen).all()
        if bits == 0:
            assert np.array_equal(decoded, rows)
            continue
        bound, weights = allowed(scheme, quantizer, bits, keys, rows, dtype)
        part = (length((decoded - rows) * weights) / bound).max(axis=-1)[0]
        over = {name: f"{p:.3g} of what is allowed" for name, p in zip(names, part, strict=True) if not p <= 1}
        assert not over


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_largest_numbers_of_a_dtype_are_stored_finite(text, dtype):
    """Beyond `LARGEST`, which no float16 is, they are clipped: less a centre that is no larger."""
    scheme, most = KVScheme.parse(text), float(mx.finfo(DTYPES[dtype]).max)
    signs = [np.ones((T, D)), np.sign(normal(T, D)), np.where(np.arange(T)[:, None] % 2, 1, -np.ones((T, D)))]
    array = mx.array(np.stack(signs)[None].astype(np.float32) * np.float32(most)).astype(DTYPES[dtype])
    for quantizer, bits in zip(fitted(scheme, array, dtype), (scheme.key_bits, scheme.value_bits), strict=True):
        decoded = exact(quantizer.decode(quantizer.encode(array)))
        assert np.isfinite(decoded).all()
        if bits:
            assert 0.5 * min(most, LARGEST) < np.abs(decoded).max() <= min(most, 5 * LARGEST)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("text", [text for text in SCHEMES if text != "turbo0v0"])  # read by mlx's own attention
def test_attention_is_finite_and_an_average_of_the_decoded_values(text, dtype):
    """Patterns as keys of normal values, whatever softmax makes of them; as values of normal keys, exactly."""
    scheme, (names, array, _) = KVScheme.parse(text), patterns(dtype)
    small = replace(scheme, sinks=2, window=5, block=16, group=16 if scheme.method == "squat" else scheme.group)
    plain = mx.random.normal(array.shape, key=mx.random.key(3)).astype(DTYPES[dtype])
    query = mx.random.normal((1, len(names), 2, D), key=mx.random.key(9)).astype(DTYPES[dtype])
    for keys, values in ((array, plain), (plain, array)):
        cache = TurboQuantKVCache(small)
        cache.update_and_fetch(keys, values)
        assert cache.compress() == 48
        out = exact(attend(query, *cache.keys_and_values(), D**-0.5, backend="reference"))
        k, v = (exact(side.dense()) for side in cache.keys_and_values())
        largest = np.abs(v).max(axis=(2, 3), keepdims=True)
        clipped = largest == 65504  # then a sum of values as they are stored is a little larger
        least = 8 * STEP_FLOAT16 if dtype == "float16" else 4 * SMALLEST
        allowed = np.where(clipped, 1.5, 1 + 4 * ROUNDING[dtype]) * largest + least
        assert np.isfinite(out).all() and (np.abs(out) <= allowed).all()
        if values is array:
            scores = exact(query) @ k.swapaxes(-1, -2) * D**-0.5
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            expected = weights / weights.sum(axis=-1, keepdims=True) @ v
            # Scores of up to 4 are sums of 64 products of rounded keys, which move weights by as much.
            allowed = 16 * ROUNDING[dtype] * largest + least
            over = (np.abs(out - expected) / np.where(clipped, np.inf, allowed)).max(axis=(0, 2, 3))
            assert over.max() <= 1, f"{names[int(over.argmax())]}: {over.max():.3g} of what is allowed"


def test_a_million_tokens_are_read_and_found():
    """One planted key wins the softmax wherever it lies; with equal keys a million values are averaged."""
    tokens, dim, chunk = 1_000_000, 8, 1 << 16
    cache = TurboQuantKVCache("turbo8:prefill=compressed,block=256")
    planted = {3: 1.0, 499_999: 2.0, 999_990: 3.0}
    random = np.random.default_rng(2)
    total = 0.0
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        values = mx.array(random.standard_normal((1, 1, count, dim)).astype(np.float16))
        keys = np.zeros((1, 1, count, dim), np.float16)
        for i, (place, value) in enumerate(planted.items()):
            if start <= place < start + count:
                keys[0, 0, place - start, i], values[0, 0, place - start] = 8, value
        total = total + exact(values).sum(axis=2)
        cache.update_and_fetch(mx.array(keys), values)
        cache.compress()
        mx.eval(cache.state)
    assert cache.offset == tokens and cache.nbytes < 30e6
    assert cache.make_mask(1) is None and cache.make_mask(3) == "causal"
    queries = mx.concatenate([8 * mx.eye(dim)[:3], mx.zeros((1, dim))]).astype(mx.float16)[None, :, None]
    out = exact(attend(queries, *cache.keys_and_values(), 1.0, backend="reference"))[0, :, 0]
    # exp(64) is 6e27, a million others weigh 1 each. Keys of 8 bits are off by up to 1%, values likewise.
    for got, value in zip(out, planted.values(), strict=False):
        np.testing.assert_allclose(got, value, rtol=0.02)
    np.testing.assert_allclose(out[3], total[0, 0] / tokens, atol=1e-4)


@pytest.mark.parametrize("text", ["turbo4", "turbo0v2", "qjl3", "squat2", "int8"])
def test_positions_beyond_a_million_are_exact_in_a_bounded_cache(text):
    """As if a million tokens had been dropped: nothing but positions depends on them."""
    scheme, far = (
        replace(KVScheme.parse(text), sinks=2, window=4, block=16, group=16 if text == "squat2" else 0),
        999_984,
    )
    near, distant = (TurboQuantKVCache(scheme, max_size=64) for _ in range(2))
    rows = [mx.array(normal(1, 1, 90, 32, seed=i).astype(np.float16)) for i in range(2)]
    for cache in (near, distant):
        cache.update_and_fetch(*(side[:, :, :60] for side in rows))
        cache.compress()
    state = distant.state
    distant = TurboQuantKVCache.from_state((*state[:-1], (64, far)))
    assert distant.offset == 60 + far
    for step in range(60, 90):
        assert mx.array_equal(*(cache.make_mask(2, window_size=20) for cache in (near, distant)))
        seen = [cache.update_and_fetch(*(side[:, :, step : step + 1] for side in rows)) for cache in (near, distant)]
        assert distant.offset == step + 1 + far == near.offset + far and distant.size() == near.size() <= 64
        assert all(mx.array_equal(a.dense(), b.dense()) for a, b in zip(*seen, strict=True))
    loaded = TurboQuantKVCache.from_state(distant.state)
    assert loaded.offset == 90 + far
    mask = np.array(loaded.make_mask(3, window_size=20))
    assert mask.sum(axis=1).tolist() == [20, 20, 20] and not mask[:, :2].any()
    batch = TurboQuantKVCache.merge([near, distant])
    assert batch.offset.tolist() == [90, 90 + far]


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 4, 8])
def test_an_index_takes_vectors_of_any_size_that_it_does_not_refuse(bits, metric):
    """Estimates of <q, x> are off by ||q|| ||x|| / sqrt(d) times the tangent of a vector and its codes, on average."""
    names, x = zip(*_patterns("float32"), strict=True)
    rows = np.stack(x)[:, :3].astype(np.float32)  # (patterns, 3, D)
    exactly = rows.astype(np.float64)
    short = length(exactly).max(axis=1) < 1e18
    index = TurboQuantIndex(D, bits, metric)
    if metric != "cosine":
        with pytest.raises(ValueError, match="wanted vectors no longer than 1e\\+18, got one of length"):
            index.add(rows[~short][0])
        assert index.ntotal == 0
        names, rows, exactly = [n for n, s in zip(names, short, strict=True) if s], rows[short], exactly[short]
    index.add(rows.reshape(-1, D))
    q = normal(5, D, seed=3).astype(np.float32)
    distances, ids = index.search(q, index.ntotal)
    decoded = index.reconstruct(np.arange(index.ntotal))
    assert np.isfinite(distances).all() and np.isfinite(decoded).all()
    assert (np.sort(ids, axis=1) == np.arange(index.ntotal)).all()
    unit, norms = exactly.reshape(-1, D), length(exactly).reshape(-1, 1)
    if metric == "cosine":
        # What is shorter than float32's digits reach has the direction that is left of it, or none.
        unit, norms = unit / np.maximum(norms, 1e-300), (norms > SMALLEST) * 1.0
        unit, decoded = unit * norms, decoded * norms
    distortion = {1: 0.3634, **GAUSSIAN}[bits]
    off = length(decoded - unit)
    bound = np.sqrt(WORST * distortion / (1 - distortion)) * norms[:, 0] + np.sqrt(D) * SMALLEST
    over = (off / bound).reshape(-1, 3).max(axis=1)
    assert over.max() <= 1, f"{names[int(over.argmax())]}: {over.max():.3g} of what is allowed"
