"""The look at rows before they are encoded: squares and bad rows as numpy counts them, on every backend."""

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from row_cases import BACKENDS, DTYPES, EMULATOR, ORDERS, build_kernels

from mlx_turboquant.cache.query_moments import QueryMoments
from mlx_turboquant.ops.survey import bad_tokens, survey
from mlx_turboquant.verification import BalanceCase, full, run

CASES = [
    dict(D=D, block=block, dtype=dtype, center=center)
    for (D, block, dtype), center in zip(
        [
            *((64, 64, "float16"), (128, 64, "bfloat16"), (96, 16, "float32"), (80, 48, "float16")),
            *((256, 128, "bfloat16"), (8, 64, "float32"), (128, 256, "float16"), (240, 32, "bfloat16")),
        ],
        [True, False] * 4,
        strict=True,
    )
]
IDS = [f"{case['D']}-{case['block']}-{case['dtype']}-{'mean' if case['center'] else 'zero'}" for case in CASES]
START = 5


def made(D, block, dtype, center, blocks=2, bad=True):
    """A buffer (2, 3, .., D) whose means are large beside what varies, and how many of its rows are meant."""
    rng = np.random.default_rng(D + block)
    count = blocks * block - (0 if center else block // 3)
    rows = rng.standard_normal((2, 3, START + count + 7, D)) + 30 * rng.standard_normal((2, 3, 1, D))
    rows = np.array(mx.array(rows.astype(np.float32)).astype(DTYPES[dtype]).astype(mx.float32))
    if bad:
        for at, value in (((0, 1, 0, 3), np.nan), ((0, 2, 7, D - 1), np.inf), ((1, 0, count - 1, 0), -np.inf)):
            rows[at[0], at[1], START + at[2], at[3]] = value
        rows[1, 2, START : START + block, 4] = np.nan  # a channel without a finite entry
        rows[:, :, [START - 1, START + count]] = np.nan  # beside the rows that are meant
    return mx.array(rows).astype(DTYPES[dtype]), rows[:, :, START : START + count].astype(np.float64), count


def look(case, backend, squares=True, **options):
    rows, _, count = made(**case)
    center = case["center"] and squares
    with kernel_emulator.options(check=True, **options):
        return survey(rows, START, START + count, block=case["block"], center=center, squares=squares, backend=backend)


def wanted_squares(x, block, center):
    x = np.where(np.isfinite(x), x, np.nan)
    if center:
        blocks = x.reshape(*x.shape[:2], -1, block, x.shape[3])
        with np.errstate(all="ignore"):
            means = np.nan_to_num(np.nanmean(blocks, axis=3, keepdims=True))
        x = (blocks - means).reshape(x.shape)
    return np.nansum(np.square(x), axis=2)


def bits(bad, block):
    """(B, H, T) of `Survey.bad`."""
    bad = np.array(bad)
    found = (bad[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    return found.reshape(*bad.shape[:3], -1)[..., :block].reshape(*bad.shape[:2], -1).astype(bool)


@pytest.fixture(scope="module")
def built():
    build_kernels(lambda case: (look(case, "emulator"), look(case, "emulator", squares=False)), CASES)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_squares_and_bad_rows_are_those_of_numpy(case, backend, built):
    _, x, count = made(**case)
    seen = look(case, backend)
    # The reference's mean is rounded to the rows' dtype, as the stored one is. A kernel's deviations are from a block's
    # first row: where that is NaN, from 0, and the mean of 30 standard deviations costs three digits.
    rounding = {"float16": 2e-3, "bfloat16": 1e-1, "float32": 1e-5}[case["dtype"]] if backend == "reference" else 3e-4
    np.testing.assert_allclose(seen.squares, wanted_squares(x, case["block"], case["center"]), rtol=rounding, atol=1e-3)
    found = bits(seen.bad, case["block"])
    assert np.array_equal(found[:, :, :count], ~np.isfinite(x).all(axis=-1)) and not found[:, :, count:].any()
    only = look(case, backend, squares=False)
    assert only.squares is None and mx.array_equal(only.bad, seen.bad)


@pytest.mark.parametrize("backend", [EMULATOR])
def test_the_order_of_threads_does_not_matter(backend, built):
    for case in CASES[:3]:
        first, *others = [look(case, backend, **order) for order in ORDERS]
        assert all(mx.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("backend", [EMULATOR])
def test_every_kind_of_kernel_type_checks_and_is_small(backend):
    with kernel_emulator.noting() as calls:
        for case in CASES:
            for squares in (True, False):
                look(case, backend, squares)
    assert len(calls) == 2 * len(CASES)
    assert all(found == [] for found in metal_emu.typecheck(calls))
    look(dict(D=256, block=256, dtype="float32", center=True), backend)
    assert kernel_emulator.KERNELS["survey"].counts["threadgroup_bytes"] <= 24576


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_balance_is_what_its_formula_says(backend):
    cases = [case for case in full() if isinstance(case, BalanceCase)]
    with kernel_emulator.options(check=True):
        results = [run(case, backend) for case in cases]
    assert len(results) == 10 and all(result.ok for result in results), results
    if backend == "emulator":
        with kernel_emulator.noting() as calls:
            for case in cases:
                run(case, backend)
        assert len(calls) == 10 and all(found == [] for found in metal_emu.typecheck(calls))


def test_tokens_that_are_bad_on_either_side_count_once():
    keys = mx.array([[[[1, 0]], [[5, 0]]]], mx.uint32)  # (B, H, n, W): tokens 0 and 2
    values = mx.array([[[[4, 1]]]], mx.uint32)  # tokens 2 and 32
    assert bad_tokens(keys, values) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompts_queries_are_summed_in_the_kernel(backend, monkeypatch):
    queries = mx.random.normal((2, 6, 83, 64), key=mx.random.key(4)).astype(mx.float16)
    plain, fused = QueryMoments(), QueryMoments()
    plain.observe(queries, 3, "squares", counts=[83, 83])
    monkeypatch.setenv("MLX_TURBOQUANT_BACKEND", backend)
    kernel_emulator.CALLS.pop("survey", None)
    fused.observe(queries, 3, "squares", counts=[83, 83])
    assert fused.sums.shape == (2, 3, 64)
    np.testing.assert_allclose(fused.sums, plain.sums, rtol=1e-5)
    assert backend != "emulator" or "survey" in kernel_emulator.CALLS
    fused.observe(queries, 3, "squares", counts=[83, 9])  # where some do not count, plain MLX sums
    assert mx.isfinite(fused.sums).all()
