"""The score kernel against float64: no further from it than plain MLX is, whatever lies beside the rows."""

import itertools
import tracemalloc

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from row_cases import BACKENDS, EMULATOR, ORDERS, OWN, build_kernels, put_fault

from mlx_turboquant.codebook import gaussian
from mlx_turboquant.ops import score as ops
from mlx_turboquant.ops import trellis
from mlx_turboquant.ops.score import score
from mlx_turboquant.packing import pack_codes, words_per_row
from mlx_turboquant.verification.cases import MANY_SCORES

BITS = [1, 2, 3, 4, 8]
LEVELS = {
    "bits": BITS,
    "dim": [8, 64, 75, 100, 200, 256, 384],
    "n": [1, 31, 64, 257],
    "m": [1, 2, 3, 8, 17],
    "many": [False, True],  # whether a lane takes 4 rows, as it does where there are many
}
# Rows of whole multiples of 4 words meet all widths and tiles, too.
STARTS = [dict(bits=bits, dim=256, m=m) for bits in BITS for m in (1, 2, 3, 8)]
CASES = pairwise(LEVELS, starts=STARTS)
FEW = [
    dict(bits=1, dim=200, n=257, m=2, many=False),
    dict(bits=2, dim=100, n=31, m=1, many=True),
    dict(bits=2, dim=384, n=64, m=3, many=False),
    dict(bits=3, dim=384, n=257, m=8, many=True),
    dict(bits=8, dim=75, n=64, m=17, many=False),
]
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
on_the_emulator = pytest.mark.parametrize("backend", [EMULATOR])


def name(case):
    return ",".join(f"{k}={int(v)}" for k, v in case.items())


# A GPU compiles each kernel for a second: it gets a third of them.
PAIRS = [pytest.param(case, *EMULATOR.values, marks=EMULATOR.marks, id=f"{name(case)}-emulator") for case in CASES]
PAIRS += [pytest.param(case, OWN, id=f"{name(case)}-{OWN}") for case in CASES[::3] if OWN != "reference"]


class Stored:
    """Random queries, codes and scales, cut out of larger arrays that are NaN, or full of ones, before and behind."""

    def __init__(self, bits, dim, n, m, many=False, seed=0):
        rng = np.random.default_rng(seed)
        self.bits, self.dim, self.many = bits, dim, many
        self.queries = rng.normal(size=(m, dim)).astype(np.float32)
        self.codes = rng.integers(0, 2**bits, (n, dim))
        self.scales = rng.uniform(0.1, 2, n).astype(np.float32)
        words = np.array(pack_codes(mx.array(self.codes), bits))
        self.inputs = [self._within(x, loud) for x, loud in ((self.queries, np.nan), (words, 2**32 - 1))]
        self.inputs.append(self._within(self.scales, np.nan))

    @staticmethod
    def _within(x, loud):
        side = np.full((8, *x.shape[1:]), loud, x.dtype)
        return mx.array(np.concatenate([side, x, side]))[8 : 8 + len(x)]

    def scores(self, backend, **emulator):
        """(m, n) as numpy; on the emulator every access is checked."""
        with pytest.MonkeyPatch.context() as patch, kernel_emulator.options(check=True, **emulator):
            if self.many:
                patch.setattr(ops, "_MANY", 0)
            out = score(*self.inputs, bits=self.bits, dim=self.dim, backend=backend)
            mx.eval(out)
        assert out.dtype == mx.float32
        return np.array(out)

    def plain(self):
        """(m, n) as numpy, by MLX's own product on a CPU, which adds up in order."""
        with mx.stream(mx.cpu):
            return np.array((mx.array(self.queries) @ mx.array(self.values()).T) * mx.array(self.scales))

    def exact(self):
        """(m, n) float64."""
        return self.queries.astype(np.float64) @ self.rows().T

    def rows(self):
        """(n, dim) float64: what the codes stand for."""
        return self.values().astype(np.float64) * self.scales[:, None]

    def values(self):
        """(n, dim) float32: centroids, or at 2 bits the values of windows of four codes."""
        if self.bits != 2:
            return gaussian(self.bits)[self.codes]
        codes = np.pad(self.codes, [(0, 0), (3, 0)])
        return trellis.values()[sum(4**k * codes[:, k : k + self.dim] for k in range(4))]

    def lengths(self):
        """(m, n): of each query times that of each row, what errors are measured by."""
        return np.linalg.norm(self.queries, axis=1)[:, None] * np.linalg.norm(self.rows(), axis=1)


@pytest.fixture(scope="module")
def built():
    build_kernels(lambda case: Stored(**case).scores("emulator"), [*CASES, *FEW])


def largest_and_typical(errors):
    return np.array([errors.max(), np.sqrt(np.mean(errors**2))])


@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_scores_are_at_most_twice_as_far_from_float64_as_those_of_plain_mlx(case, backend, built):
    stored = Stored(**case)
    exact, lengths = stored.exact(), stored.lengths()
    got, plain = stored.scores(backend), stored.plain()
    assert got.shape == plain.shape == exact.shape
    got, plain = (largest_and_typical(np.abs(x - exact) / lengths) for x in (got, plain))
    # Few products may be right by chance: beside twice the error, a quarter of what float32 tells apart is allowed.
    assert np.all(got <= 2 * plain + 3e-8)


@on_the_emulator
@pytest.mark.parametrize("case", FEW, ids=name)
def test_the_order_of_threads_does_not_matter(case, backend, built):
    first, *others = [Stored(**case).scores(backend, typecheck=False, **order) for order in ORDERS]
    assert all(np.array_equal(first, other) for other in others)


@on_the_emulator
def test_every_kind_of_kernel_type_checks(backend):
    with kernel_emulator.noting() as calls:
        for bits, m, many, dim in itertools.product(BITS, (1, 2, 4, 8), (False, True), (128, 72)):
            Stored(bits, dim, 1, m, many).scores(backend)
        Stored(8, 1, 1, 1).scores(backend)
    kinds = {kernel.name for kernel, _ in calls}
    assert len(kinds) == 5 * 4 * 2 * 2
    assert all(np.prod(shape) >= 8 for _, call in calls for shape, _ in call["inputs"])
    assert all(call["threadgroup"][0] <= 512 for _, call in calls)
    assert all(warnings == [] for warnings in metal_emu.typecheck(calls))


@on_the_emulator
def test_threadgroup_memory_is_what_every_device_has(backend):
    for bits, m in itertools.product(BITS, (2, 8)):
        Stored(bits, 64, 1, m, many=True).scores(backend, typecheck=False)
        assert kernel_emulator.KERNELS["score"].counts["threadgroup_bytes"] <= 32768


@on_the_emulator
def test_the_text_is_what_mlx_would_compile(backend, capfd):
    Stored(**FEW[0]).scores(backend)
    kernel, call = kernel_emulator.KERNELS["score"], kernel_emulator.CALLS["score"]
    names = dict(input_names=list(ops._SCORE.inputs), output_names=list(ops._SCORE.outputs))
    traced = mx.fast.metal_kernel(name=kernel.name, header=kernel.header, source=kernel.source, **names)
    arguments = {k: v for k, v in call.items() if k != "inputs"}
    inputs = [mx.zeros(*shape_and_dtype) for shape_and_dtype in call["inputs"]]
    printed = kernel_emulator.text_of_mlx(traced, inputs, arguments, capfd)
    assert kernel.metal_source(**call) == printed


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([2, 3]), st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 5, 8, 9]), st.booleans())
@on_the_emulator
def test_any_lengths(backend, bits, dim, n, m, many):
    stored = Stored(bits, dim, n, m, many)
    assert np.all(np.abs(stored.scores(backend, typecheck=False) - stored.exact()) <= 1e-6 * stored.lengths())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", [1, 5])
def test_a_product_depends_neither_on_where_a_row_stands_nor_on_how_many_there_are(backend, bits, m):
    stored = Stored(bits, 100, 257, m)
    whole = stored.scores(backend, typecheck=False)
    assert np.array_equal(Stored(bits, 100, 257, m, many=True).scores(backend, typecheck=False), whole)
    queries, codes, scales = stored.inputs
    for part in (slice(0, 1), slice(3, 200), slice(250, 257)):
        got = score(queries, codes[part], scales[part], bits=bits, dim=100, backend=backend)
        assert np.array_equal(np.array(got), whole[:, part])


@on_each_backend
@pytest.mark.parametrize("m", [2, 5])
def test_nan_stays_with_its_query_and_its_row(backend, m):
    stored = Stored(2, 64, 40, m)
    right = stored.scores(backend)
    stored.inputs[0][1, 7] = mx.nan
    stored.inputs[2][33] = mx.inf
    got = stored.scores(backend)
    assert np.isnan(got[1]).all() and not np.isfinite(got[:, 33]).any()
    others = np.ix_([i for i in range(m) if i != 1], [i for i in range(40) if i != 33])
    assert np.array_equal(got[others], right[others])


@on_each_backend
def test_a_scale_of_0_gives_0_and_large_ones_stay_finite(backend):
    stored = Stored(4, 200, 31, 3)
    stored.inputs[2][:2] = mx.array([0.0, 1e30])
    got = stored.scores(backend)
    assert np.all(got[:, 0] == 0) and np.isfinite(got[:, 1]).all() and np.abs(got[:, 1]).min() > 1e25


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_score_is_an_empty_array(backend, m, n):
    out = score(mx.zeros((m, 24)), mx.zeros((n, 3), mx.uint32), mx.zeros((n,)), bits=4, dim=24, backend=backend)
    assert out.shape == (m, n) and out.dtype == mx.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(queries=mx.zeros((2, 23))), r"wanted queries \(2, 24\) mlx.core.float32, got \(2, 23\)"),
        (dict(queries=mx.zeros((2, 24), mx.float16)), r"got \(2, 24\) mlx.core.float16"),
        (dict(queries=mx.zeros(24)), r"wanted queries \(24, 24\) mlx.core.float32, got \(24,\)"),
        (dict(queries=mx.zeros(())), r"wanted queries \(24,\) mlx.core.float32, got \(\)"),
        (dict(codes=mx.zeros((5, 4), mx.uint32)), r"wanted codes \(5, 3\) mlx.core.uint32, got \(5, 4\)"),
        (dict(codes=mx.zeros((5, 3), mx.int32)), r"got \(5, 3\) mlx.core.int32.* dim=24, bits=4"),
        (dict(scales=mx.zeros(4)), r"wanted scales \(5,\) mlx.core.float32, got \(4,\)"),
        (dict(scales=mx.zeros(5, mx.float16)), r"got \(5,\) mlx.core.float16"),
        (dict(bits=5), r"wanted bits 1, 2, 3, 4, 8, got 5\. Score other widths in parts"),
        (dict(bits=2.5), r"wanted bits 1, 2, 3, 4, 8, got 2\.5"),
        (dict(dim=0), r"wanted a dim of at least 1, got 0"),
        (dict(backend="metl"), r"Unknown backend 'metl'"),
    ],
)
def test_other_inputs_are_refused_in_one_line(change, message):
    call = dict(queries=mx.zeros((2, 24)), codes=mx.zeros((5, 3), mx.uint32), scales=mx.zeros(5), bits=4, dim=24)
    with pytest.raises(ValueError, match=message) as error:
        score(**call | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", BITS)
def test_without_a_kernel_all_rows_are_never_numbers_at_once(bits):
    n, dim = 20000, 1024  # 80 MB of float32
    codes, scales = mx.zeros((n, words_per_row(dim, bits)), mx.uint32), mx.ones(n)
    mx.eval(codes, scales)
    tracemalloc.start()
    mx.eval(score(mx.ones((1, dim)), codes, scales, bits=bits, dim=dim, backend="reference"))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4 * ops._PIECE_ELEMENTS < held < 20 * ops._PIECE_ELEMENTS


def test_the_self_check_knows_how_many_rows_are_many():
    for m, n in MANY_SCORES:
        tiles = -(-m // ops._MOST_QUERIES)
        assert tiles * n >= ops._MANY > tiles * 32 * ops._SIMDGROUPS


@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        ("row0 + first + 32 * t;", "row0 + first + 16 * t;", 3),
        ("query < m && k < dim ?", "query < m ?", 4),  # reads beyond the last query
        ("word < words && row < rows ?", "row < rows ?", 4),  # reads beyond the last row
        ("if (start > 0) { threadgroup_barrier", "if (false) { threadgroup_barrier", 2),
        ("<< (s % 2 * 2)", "<< (s % 2)", 3),
        ("acc[j][t] * scale", "acc[j][t]", 2),
        ("query0 + j < m", "true", 4),
        ("% FIELDS * 4;", "% FIELDS;", 0),
        ("before[t] >> 26", "before[t] >> 24", 2),
        ("before[t] = even[t];", "", 2),
        ("i < 3 ? odd", "i < 2 ? odd", 2),
        ("(ROWS + 4) + first", "(ROWS + 4) + lane", 0),
    ],
)
@on_the_emulator
def test_a_fault_in_the_kernel_is_noticed(backend, right, wrong, case, monkeypatch):
    put_fault(monkeypatch, ops, "_SCORE", right, wrong)
    with pytest.raises((AssertionError, metal_emu.KernelError)):
        test_scores_are_at_most_twice_as_far_from_float64_as_those_of_plain_mlx(FEW[case], backend, None)
