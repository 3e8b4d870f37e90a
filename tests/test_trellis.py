"""The trellis code against a search of all paths, its theory, and a literal decoder; its kernel against numpy."""

import itertools
import subprocess
import sys
from pathlib import Path

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import BACKENDS, EMULATOR, ORDERS, put_fault

from mlx_turboquant.kernel_source import kernel_source
from mlx_turboquant.ops import trellis, viterbi
from mlx_turboquant.packing import pack_codes, unpack_codes, words_per_row

ROOT = Path(__file__).resolve().parents[1]
on_each_backend = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
on_the_emulator = pytest.mark.parametrize("backend", [EMULATOR])
# Rows, their length, the first and the last element that are encoded.
CASES = [
    (1, 1, 0, 1),
    (3, 5, 1, 5),
    (2, 19, 3, 19),
    (9, 40, 0, 40),
    (17, 100, 33, 98),
    (8, 16, 0, 16),
    (5, 384, 0, 384),
]


def gaussian(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d), np.float32)


def literal_values(codes):
    """(n, dim) float32: the codes of elements i - 3 to i name a value, and those before the row are 0."""
    n, dim = codes.shape
    out = np.empty((n, dim), np.float32)
    for row, i in itertools.product(range(n), range(dim)):
        window = [int(codes[row, k]) if k >= 0 else 0 for k in range(i - 3, i + 1)]
        out[row, i] = trellis.values()[window[0] + 4 * window[1] + 16 * window[2] + 64 * window[3]]
    return out


def encoded(x, start, stop, backend="reference", **emulator):
    """Packed codes, their values and the products, all numpy; on the emulator every access is checked."""
    with kernel_emulator.options(**{"check": True, **emulator}):
        codes, products = trellis.encode(mx.array(x), start, stop, backend=backend)
        mx.eval(codes, products)
    assert codes.shape == (len(x), words_per_row(stop - start, 2)) and codes.dtype == mx.uint32
    assert products.shape == (len(x),) and products.dtype == mx.float32
    return np.array(codes), np.array(trellis.decode(codes, stop - start)), np.array(products)


# --- the code


def test_the_header_and_the_table_are_those_of_the_solver():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "solve_trellis.py", "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "trellis_half[128]" in kernel_source("trellis.h")


def test_the_table_is_antisymmetric_and_its_rows_begin_well():
    values = trellis.values()
    assert values.shape == (256,) and values.dtype == np.float32 and not values.flags.writeable
    np.testing.assert_array_equal(values, -values[::-1])
    # The first element has four values to choose from, two of each sign.
    assert sorted(np.sign(values[[0, 64, 128, 192]])) == [-1, -1, 1, 1]


def test_the_squared_error_of_gaussian_rows_is_two_thirds_of_the_best_single_quantizer():
    x = gaussian(512, 384, seed=5)
    error = np.square(x - encoded(x, 0, 384)[1]).mean()
    assert 0.0625 < 0.0755 < error < 0.0775 < 0.1175 * 2 / 3  # the least of any code of 2 bits; ours; Lloyd and Max's


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5])
def test_the_path_found_is_the_nearest_of_all(dim):
    paths = np.array(list(itertools.product(range(4), repeat=dim)))
    all_values = literal_values(paths).astype(np.float64)
    x = 1.3 * gaussian(300, dim)
    errors = np.square(x[:, None].astype(np.float64) - all_values).sum(axis=2)
    codes, values, products = encoded(x, 0, dim)
    np.testing.assert_allclose(np.square(x - values).sum(axis=1), errors.min(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.array(unpack_codes(mx.array(codes), 2, dim)), paths[errors.argmin(axis=1)])
    np.testing.assert_allclose(products, (x * values).sum(axis=1), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(0, 999))
def test_packed_codes_stand_for_the_values_of_their_windows(dim, seed):
    codes = np.random.default_rng(seed).integers(0, 4, (3, dim))
    np.testing.assert_array_equal(np.array(trellis.decode(pack_codes(mx.array(codes), 2), dim)), literal_values(codes))


@pytest.mark.parametrize("dim", [7, 16, 33, 384])
def test_codes_are_packed_as_all_others(dim):
    codes = encoded(gaussian(20, dim), 0, dim)[0]
    again = pack_codes(unpack_codes(mx.array(codes), 2, dim), 2)
    np.testing.assert_array_equal(np.array(again), codes)  # with zeros behind the last code


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 9])
def test_every_direction_has_codes_on_its_side(dim):
    """The scale of an index is 1 over this product."""
    x = gaussian(5000, dim)
    x *= np.sqrt(dim) / np.linalg.norm(x, axis=1, keepdims=True)
    _, values, products = encoded(x, 0, dim)
    cosines = products / np.sqrt(dim) / np.linalg.norm(values, axis=1)
    assert cosines.min() > 0.75


def test_rows_do_not_depend_on_those_beside_them(monkeypatch):
    x = gaussian(50, 60)
    whole = encoded(x, 0, 60)
    monkeypatch.setattr(viterbi, "_ROWS", 16)
    for left, right in zip(whole, encoded(x, 0, 60), strict=True):
        np.testing.assert_array_equal(left, right)
    for left, right in zip(whole, encoded(x[20:21], 0, 60), strict=True):
        np.testing.assert_array_equal(left[20:21], right)


@on_each_backend
def test_long_rows_and_large_numbers(backend):
    x = gaussian(2, 4099)
    x[1] *= np.linspace(0.1, 30, 4099)
    _, values, _ = encoded(x, 0, 4099, backend, check=False)
    assert np.square(x[0] - values[0]).mean() < 0.085
    large = np.abs(x[1]) > 20
    assert np.mean(values[1][large] * x[1][large] > 0) > 0.95


@on_each_backend
def test_bad_numbers_stay_in_their_row(backend):
    x = gaussian(9, 40)
    right = encoded(x, 0, 40, backend)
    x[3, 5], x[4] = np.nan, 0
    x[5, 0] = np.inf
    with np.errstate(invalid="ignore"):
        got = encoded(x, 0, 40, backend)
    for left, whole in zip(got, right, strict=True):
        np.testing.assert_array_equal(np.delete(left, [3, 4, 5], axis=0), np.delete(whole, [3, 4, 5], axis=0))
    assert got[2][4] == 0 and not np.isfinite(got[2][[3, 5]]).any()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nothing_to_encode_is_an_empty_array(backend):
    codes, products = trellis.encode(mx.zeros((0, 33)), 0, 33, backend=backend)
    assert codes.shape == (0, 3) and products.shape == (0,) and trellis.decode(codes, 33).shape == (0, 33)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (mx.zeros((2, 8), mx.float16), 0, 8),
            r"wanted rows \(n, D\) float32 .* got \(2, 8\) mlx.core.float16, 0 and 8",
        ),
        ((mx.zeros(8), 0, 8), r"got \(8,\) mlx.core.float32"),
        ((mx.zeros((2, 8)), 3, 3), r"0 <= start < stop <= D, got \(2, 8\) .* 3 and 3\. Reshape"),
        ((mx.zeros((2, 8)), 0, 9), r"0 and 9"),
        ((mx.zeros((2, 8)), -1, 8), r"-1 and 8"),
    ],
)
def test_other_inputs_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        trellis.encode(*arguments)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Unknown backend 'metl'"):
        trellis.encode(mx.zeros((2, 8)), 0, 8, backend="metl")
    with pytest.raises(ValueError, match=r"wanted codes \(n, 2\) for dim=17, got \(3, 1\)"):
        trellis.decode(mx.zeros((3, 1), mx.uint32), 17)


# --- the kernel


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_finds_a_path_as_near_as_numpy_does(case, backend):
    n, D, start, stop = case
    x = gaussian(n, D, seed=n)
    got, plain = encoded(x, start, stop, backend), encoded(x, start, stop)
    x = x[:, start:stop].astype(np.float64)
    np.testing.assert_allclose(*(np.square(x - values).sum(axis=1) for _, values, _ in (got, plain)), rtol=1e-5)
    np.testing.assert_allclose(got[2], (x * got[1]).sum(axis=1), rtol=1e-5)
    again = pack_codes(unpack_codes(mx.array(got[0]), 2, stop - start), 2)
    np.testing.assert_array_equal(np.array(again), got[0])
    if backend == "emulator":  # no fused multiplications round otherwise: the very same codes
        np.testing.assert_array_equal(got[0], plain[0])


@on_the_emulator
def test_rows_are_taken_in_pieces(backend, monkeypatch):
    x = gaussian(21, 30)
    whole = encoded(x, 2, 29, backend)
    monkeypatch.setattr(trellis, "_PIECE_ELEMENTS", 27 * 8)
    for left, right in zip(whole, encoded(x, 2, 29, backend), strict=True):
        np.testing.assert_array_equal(left, right)


@on_the_emulator
def test_the_order_of_threads_does_not_matter(backend):
    x = gaussian(11, 37)
    first, *others = [encoded(x, 0, 37, backend, **order) for order in ORDERS]
    for other in others:
        for left, right in zip(first, other, strict=True):
            np.testing.assert_array_equal(left, right)


@on_the_emulator
def test_the_kernel_type_checks_and_is_what_mlx_would_compile(backend, capfd):
    with kernel_emulator.noting() as calls:
        encoded(gaussian(1, 1), 0, 1, backend)
        encoded(gaussian(9, 20), 0, 20, backend)
    assert all(np.prod(shape) >= 8 for _, call in calls for shape, _ in call["inputs"])
    assert all(call["threadgroup"][0] <= 512 for _, call in calls)
    assert all(warnings == [] for warnings in metal_emu.typecheck(calls))
    encoded(gaussian(9, 20), 0, 20, backend)
    kernel, call = kernel_emulator.KERNELS["trellis"], kernel_emulator.CALLS["trellis"]
    assert kernel.counts["threadgroup_bytes"] <= 2048
    names = dict(input_names=list(trellis._TRELLIS.inputs), output_names=list(trellis._TRELLIS.outputs))
    traced = mx.fast.metal_kernel(name=kernel.name, header=kernel.header, source=kernel.source, **names)
    inputs = [mx.zeros(*shape_and_dtype) for shape_and_dtype in call["inputs"]]
    arguments = {k: v for k, v in call.items() if k != "inputs"}
    assert kernel.metal_source(**call) == kernel_emulator.text_of_mlx(traced, inputs, arguments, capfd)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(4 * m & 15u) + j", "(4 * m & 15u)"),
        ("(m - k) & 3u) + m) + j", "(m + k) & 3u) + m) + j"),
        ("min(slot_row, n - 1)", "slot_row"),  # reads beyond the last row
        ("16 * chunk + m < dim ?", "true ?"),  # reads beyond the last element
        ("m == 0 && k == 0 ? 0.0f", "k == 0 ? 0.0f"),  # starts in any state
        ("slot_row < n) { codes", "true) { codes"),
        ("i < 3 ?", "i < 2 ?"),
        ("r + low / 4", "r + low"),
        ("ulong(slot_row) * chunks * 16", "ulong(slot_row) * chunks * 8"),
        ("int step = 8; step > 0; step /= 2) { product", "int step = 4; step > 0; step /= 2) { product"),
    ],
)
@on_the_emulator
def test_a_fault_in_the_kernel_is_noticed(backend, right, wrong, monkeypatch):
    put_fault(monkeypatch, trellis, "_TRELLIS", right, wrong)
    with pytest.raises((AssertionError, metal_emu.KernelError)):
        test_the_kernel_finds_a_path_as_near_as_numpy_does(CASES[4], backend)
