"""Vector search: Faiss's conventions, filters, scoring again, tiles, and what is refused at the door."""

import doctest

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_model import METRICS, WIDTHS, IndexModel, estimates, filled
from unit_vectors import units

from mlx_turboquant.index import TurboQuantIndex, blocks, codec, search_shards, shards, turbo_index

# --- search


@pytest.mark.parametrize("metric", METRICS)
def test_results_follow_the_conventions_of_faiss(metric):
    worst = np.inf if metric == "l2" else -np.inf
    index = TurboQuantIndex(16, 4, metric)
    D, I = index.search(units(3, 16), 4)
    assert (I == -1).all() and (worst == D).all() and index.ntotal == 0 and index.ids.shape == (0,)
    index.add(units(2, 16))
    D, I = index.search(units(3, 16), 4)
    assert D.dtype == np.float32 and I.dtype == np.int64 and D.shape == I.shape == (3, 4)
    assert (np.sort(I[:, :2]) == [0, 1]).all() and (I[:, 2:] == -1).all() and (D[:, 2:] == worst).all()
    assert index.search(units(1, 16)[0], 1)[1].shape == (1, 1)
    assert index.search(np.zeros((0, 16), np.float32), 3)[0].shape == (0, 3)
    assert index.remove_ids([0, 1]) == 2 and (index.search(units(3, 16), 4)[1] == -1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("small", [True, False])
def test_equally_near_vectors_come_in_the_order_of_insertion(metric, small, monkeypatch):
    if small:
        monkeypatch.setattr(blocks, "BLOCK_CODES", 50 * 24)
    x = np.repeat(units(4, 24), 150, axis=0)[np.random.default_rng(0).permutation(600)]
    index = TurboQuantIndex(24, 3, metric)
    index.add(x, ids=np.random.default_rng(1).permutation(600))
    D, I = index.search(x[:5], 320)
    places = np.argsort(index.ids)[I]
    same = np.diff(D, axis=1) == 0
    assert same.sum() == 5 * 317 and (np.diff(places, axis=1)[same] > 0).all()
    x[:] = 0
    zeros = filled(x, 3, metric)
    D, I = zeros.search(-units(2, 24), 600)
    assert (np.arange(600) == I).all() and (metric == "l2" or (D == 0).all())


@pytest.mark.parametrize("dtype", ["float16", "float64", "mlx", "bfloat16"])
def test_other_dtypes_are_taken_as_float32(dtype):
    x = units(30, 24).astype(np.float16)
    if dtype in ("mlx", "bfloat16"):
        given_x = mx.array(x) if dtype == "mlx" else mx.array(x).astype(mx.bfloat16)
        x = np.array(given_x.astype(mx.float32))
    else:
        given_x = x.astype(dtype)
    a, b = filled(given_x, 4), filled(x.astype(np.float32), 4)
    for left, right in zip(a.search(given_x, 3), b.search(x.astype(np.float32), 3), strict=True):
        np.testing.assert_array_equal(left, right)


def test_zero_tiny_and_huge_vectors():
    x = units(6, 32)
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e17
    for bits in WIDTHS:
        index = filled(x, bits)
        products = estimates(index, x)
        assert np.isfinite(products).all() and (products[:, 1] == 0).all() and (products[1] == 0).all()
        np.testing.assert_allclose(np.diag(products), np.square(x).sum(axis=1), rtol=1e-4)  # exact by the scale
        cosine = filled(x, bits, "cosine")
        np.testing.assert_allclose(np.diag(estimates(cosine, x)), [1, 0, 1, 1, 1, 1], atol=1e-4)
        np.testing.assert_array_equal(cosine.reconstruct([1]), np.zeros((1, 32)))
    distances = filled(x[:3], 8, "l2").search(x[:3], 3)[0]
    assert (distances[:, 0] < 1e-3).all() and (distances >= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_filter_is_an_exact_search_of_fewer_vectors(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_CODES", data.draw(st.sampled_from([8, 100, 1 << 20])) * 8)
        model = IndexModel(
            TurboQuantIndex(8, data.draw(st.sampled_from([1, 2.5, 4])), data.draw(st.sampled_from(METRICS)))
        )
        n = data.draw(st.integers(1, 300))
        model.add(units(n, 8), ids=np.random.default_rng(0).permutation(3 * n)[:n])
        share = data.draw(st.sampled_from([0, 0.01, 0.1, 0.5, 1]))
        mask = np.random.default_rng(data.draw(st.integers(0, 9))).random(n) < share
        k = data.draw(st.integers(1, 2 * n))
        model.check(units(3, 8, seed=1), k, mask)
        model.check(units(3, 8, seed=1), k, model.index.ids[mask][::-1].tolist() * 2)


def test_scoring_again_with_kept_vectors_is_exact():
    x, q = units(3000, 40).astype(np.float16).astype(np.float32), units(30, 40, seed=1)
    for metric in METRICS:
        for keep, tolerance in (("float16", 1e-6), ("int8", 4e-3)):
            index = filled(x, 1, metric, keep=keep)
            D, I = index.search(q, 5, rerank=3000)
            exact = np.square(q[:, None] - x).sum(axis=2) if metric == "l2" else -(q @ x.T)
            if metric == "cosine":
                exact = exact / np.linalg.norm(x, axis=1)
            best = np.argsort(exact, axis=1)[:, :5]
            if metric == "cosine":  # what is kept is normalised, and so rounded again
                tolerance = max(tolerance, 1e-4)
            np.testing.assert_allclose(D if metric == "l2" else -D, np.sort(exact, axis=1)[:, :5], atol=2 * tolerance)
            if keep == "float16" and metric != "cosine":
                np.testing.assert_array_equal(I, best)
            plain, again = index.recall_at_k(q, x, 1), [index.search(q, 1, rerank=n)[1] for n in (10, 300)]
            shares = [plain, *((found == best[:, :1]).mean() for found in again)]
            assert shares[0] < shares[1] < shares[2] and shares[2] > 0.9
    D, I = index.search(q, 5, rerank=1)  # never fewer than k
    assert (I >= 0).all() and (np.sort(I) == np.sort(index.search(q, 5)[1])).all()


def test_kept_vectors_of_any_length_keep_their_digits():
    x = units(5, 16) * np.array([1e-30, 1e-4, 1, 1e6, 1e17], np.float32)[:, None]
    x[:, 0] = 0
    for keep, tolerance in (("float16", 2**-11), ("int8", 0.5 / 127)):
        held = turbo_index.kept.unkeep(filled(x, 1, keep=keep)._gather_kept(np.arange(5)))
        assert (np.abs(held - x) <= tolerance * np.abs(x).max(axis=1, keepdims=True) * 1.001).all()
    half = units(200, 16).astype(np.float16) * np.geomspace(1e-3, 6e4, 200)[:, None].astype(np.float16)
    exact = filled(half, 1, keep="float16")
    np.testing.assert_array_equal(turbo_index.kept.unkeep(exact._gather_kept(np.arange(200))), half.astype(np.float32))


def test_reranking_keeps_the_order_of_insertion_and_pads():
    index = filled(np.repeat(units(1, 8), 6, axis=0), 2, keep="int8")
    index.remove_ids([2])
    D, I = index.search(units(1, 8), 8, rerank=1 << 60)
    assert I.tolist() == [[0, 1, 3, 4, 5, -1, -1, -1]] and (D[0, 5:] == -np.inf).all()


# --- the door


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"d": 0}, "wanted d a whole number of at least 1, got 0"),
        ({"d": 2.5}, "wanted d a whole number"),
        ({"d": 65537}, "wanted d up to 65536"),
        ({"d": 4099}, "odd factor up to 4096, got 4099. Append zeros"),
        ({"bits": 5}, r"Unknown bits 5. Known: 1, 2, 2.5, 3, 3.5, 4, 8\."),
        ({"metric": "L2"}, r"Unknown metric 'L2'. Known: ip, cosine, l2\."),
        ({"keep": "float32"}, r"Unknown keep 'float32'. Known: None, float16, int8\."),
        ({"seed": -1}, "wanted seed a whole number of at least 0, got -1"),
    ],
)
def test_unknown_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=r"^\[TurboQuantIndex\] .*" + message):
        TurboQuantIndex(**{"d": 8, **setting})


NAN = np.full((2, 8), np.nan, np.float32)
BAD_CALLS = [
    (lambda i: i.add(units(2, 9)), r"\[TurboQuantIndex.add\] wanted shape \(n, 8\) or \(8,\), got \(2, 9\)"),
    (lambda i: i.add(np.ones((2, 8), int)), r"wanted a float dtype, got int64"),
    (lambda i: i.add([[1.0] * 8]), r"wanted a numpy or mlx array, got list"),
    (lambda i: i.add(NAN), r"got NaN, infinity .* \(0, 0\), \(0, 1\), \(0, 2\)"),
    (lambda i: i.add(np.full((1, 8), 1e300)), r"more than 3.4e38 at \(row, column\) \(0, 0\)"),
    (lambda i: i.add(np.full((1, 8), 1e18)), r"no longer than 1e\+18, got one of length 2.83e\+18"),
    (lambda i: i.add(units(2, 8), [1]), r"wanted ids \(2,\) whole numbers, got \(1,\) int64"),
    (lambda i: i.add(units(2, 8), [1.0, 2.0]), r"wanted ids \(2,\) whole numbers, got \(2,\) float64"),
    (lambda i: i.add(units(2, 8), [50, 50]), r"wanted different ids, got 50 twice"),
    (lambda i: i.add(units(3, 8), [50, 4, 2]), r"wanted new ids, got 4, 2, which the index has already"),
    (lambda i: i.add(units(1, 8), [-3]), r"wanted ids from 0 to 2\*\*63 - 1, got -3"),
    (lambda i: i.add(units(1, 8), np.array([1 << 63], np.uint64)), r"wanted ids from 0 .*, got 9223372036854775808"),
    (lambda i: i.search(units(2, 9), 1), r"\[TurboQuantIndex.search\] wanted shape"),
    (lambda i: i.search(NAN, 1), r"\[TurboQuantIndex.search\] wanted finite"),
    (lambda i: i.search(units(1, 8), 0), r"wanted k a whole number of at least 1, got 0"),
    (lambda i: i.search(units(1, 8), 1.5), r"wanted k a whole number"),
    (lambda i: i.search(units(1, 8), 1, rerank=-1), r"wanted rerank a whole number of at least 0, got -1"),
    (lambda i: i.search(units(1, 8), 1, rerank=5), r"got 5\. Make it with keep='float16' or keep='int8'"),
    (lambda i: i.search(units(1, 8), 1, [3, 70, 71]), r"wanted ids of the index, got 70, 71, which are not there"),
    (lambda i: i.search(units(1, 8), 1, np.ones(19, bool)), r"a mask \(20,\) in the order of ids, got a mask \(19,\)"),
    (lambda i: i.search(units(1, 8), 1, 0.5), r"wanted ids \(n,\) whole numbers, got \(\) float64"),
    (lambda i: i.reconstruct([0, 99]), r"\[TurboQuantIndex.reconstruct\] wanted ids of the index, got 99"),
    (lambda i: i.remove_ids([0, *range(30, 40)]), r"got 30, 31, 32, 33, 34 and 5 more, which are not there"),
    (lambda i: i.remove_ids([4, 4]), r"\[TurboQuantIndex.remove_ids\] wanted different ids, got 4 twice"),
    (lambda i: i.recall_at_k(units(1, 8), units(19, 8), 1), r"the 20 vectors of the index, got 1 and 19"),
    (lambda i: search_shards(i, units(1, 9), 1), r"\[search_shards\] wanted shape"),
]


@pytest.mark.parametrize("number", range(len(BAD_CALLS)))
def test_wrong_arguments_are_refused_in_one_line_and_change_nothing(number):
    call, message = BAD_CALLS[number]
    index = filled(units(20, 8), 4)
    with pytest.raises(ValueError, match=message) as error:
        call(index)
    assert "\n" not in str(error.value) and str(error.value).startswith("[") and str(error.value).endswith(".")
    assert index.ids.tolist() == [*range(20)] and index.search(units(1, 8), 1)[1].tolist() == [[0]]


def test_empty_calls_do_nothing():
    index = filled(units(4, 8))
    index.add(np.zeros((0, 8), np.float32))
    index.add(np.zeros((0, 8), np.float32), [])
    assert index.remove_ids([]) == 0 and index.reconstruct([]).shape == (0, 8) and index.ntotal == 4
    assert (index.search(units(2, 8), 3, filter=[])[1] == -1).all()


def test_many_queries_are_scored_in_tiles(monkeypatch):
    index, q = filled(units(200, 16), 4), units(50, 16, seed=1)
    whole = index.search(q, 5)
    monkeypatch.setattr("mlx_turboquant.index.search._SCORES", 7 * 200)
    np.testing.assert_array_equal(index.search(q, 5)[1], whole[1])
    np.testing.assert_allclose(index.search(q, 5)[0], whole[0], atol=1e-6)


def test_one_process_is_a_group_of_one():
    index, q = filled(units(100, 16), 2, "l2", keep="int8"), units(4, 16, seed=1)
    index.remove_ids([5, 6])
    for kw in ({}, {"rerank": 20}, {"filter": np.arange(10, 40)}):
        for left, right in zip(search_shards(index, q, 7, **kw), index.search(q, 7, **kw), strict=True):
            np.testing.assert_array_equal(left, right)


def test_it_says_what_it_is():
    assert repr(filled(units(3, 8), 2.5, "l2")) == (
        "TurboQuantIndex(d=8, bits=2.5, metric='l2', seed=0, keep=None): 3 vectors"
    )


@pytest.mark.parametrize("module", [turbo_index, shards])
def test_examples_run(module):
    done = doctest.testmod(module)
    assert done.attempted >= 4 and done.failed == 0


def test_the_codec_says_how_long_a_vector_may_be():
    index = TurboQuantIndex(16)
    index.add(units(1, 16) * np.float32(codec.MAX_NORM * 0.99))
    assert np.isfinite(index.search(units(1, 16) * np.float32(codec.MAX_NORM * 0.99), 1)[0]).all()
