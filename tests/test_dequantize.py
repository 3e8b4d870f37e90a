"""The dequantize kernel against float64: no further from it than plain MLX is, from any buffer, whatever is in it."""

import warnings

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from row_cases import (
    BACKENDS,
    CASES,
    DTYPES,
    EMULATOR,
    FEW,
    ORDERS,
    PAIRS,
    Case,
    build_kernels,
    put_fault,
    rotation_matrix,
)

from mlx_turboquant.codebook import gaussian
from mlx_turboquant.ops import dequantize as ops
from mlx_turboquant.ops.dequantize import dequantize
from mlx_turboquant.packing import pack_codes
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tensor import PackedTensor

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def f64(x):
    return np.array(x.astype(mx.float32), np.float64)


class Stored:
    """Random packed rows of a case in buffers with room: a block before them and more after, full of large numbers."""

    def __init__(self, case, seed=0):
        rng, dtype = np.random.default_rng(seed), DTYPES[case.dtype]
        B, H, D, group = case.B, case.heads, case.D, case.group or case.D
        rows, blocks = case.blocks * case.block, case.blocks
        self.case = case
        self.codes = rng.integers(0, 2**case.bits, (B, H, rows, D))
        self.scales = mx.array(rng.uniform(0.1, 2, (B, H, rows, D // group)), mx.float32).astype(dtype)
        self.centers = mx.array(rng.normal(0, 3, (B, H, blocks, D)), mx.float32).astype(dtype)
        words = pack_codes(mx.array(self.codes), case.bits)
        # Each buffer has another length after the valid rows.
        self.packed = PackedTensor(
            self._within(words, case.block, 19, 0xDEADBEEF),
            self._within(self.scales, case.block, 27, 6e4),
            self._within(self.centers, 1, 3, 6e4) if case.center else None,
        )
        self.start, self.stop = case.block, case.block + rows

    @staticmethod
    def _within(x, before, after, fill):
        B, H, _, W = x.shape
        first, last = (mx.full((B, H, n, W), fill).astype(x.dtype) for n in (before, after))
        return mx.concatenate([first, x, last], axis=2)

    def decoded(self, backend, **emulator):
        """What the wrapper makes of it."""
        case = self.case
        with kernel_emulator.options(check=True, **emulator):
            out = dequantize(
                *(self.packed, self.start, self.stop),
                bits=case.bits,
                dim=case.D,
                block=case.block,
                rotation=case.rotation,
                balance=case.factors() if case.balance else None,
                backend=backend,
            )
            mx.eval(out)
        return out

    def exact(self):
        """(B, H, rows, D) float64."""
        case = self.case
        group = case.group or case.D
        x = gaussian(case.bits).astype(np.float64)[self.codes] * np.repeat(f64(self.scales), group, axis=-1)
        x = x @ rotation_matrix(case.rotation)
        if case.balance:
            x = x / f64(case.factors())[:, :, None]
        return x + np.repeat(f64(self.centers), case.block, axis=2) if case.center else x


@pytest.fixture(scope="module")
def built():
    build_kernels(lambda case: Stored(case).decoded("emulator"), [*CASES, *FEW])


@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_rows_are_at_most_twice_as_far_from_float64_as_those_of_plain_mlx(case, backend, built):
    stored = Stored(case)
    exact, got, plain = stored.exact(), stored.decoded(backend, typecheck=False), stored.decoded("reference")
    assert got.shape == plain.shape and got.dtype == plain.dtype == DTYPES[case.dtype]
    floor = 1e-6 * np.abs(exact).max()
    for measure in (np.max, np.mean):
        assert measure(np.abs(f64(got) - exact)) <= 2 * measure(np.abs(f64(plain) - exact)) + floor
    assert np.abs(f64(got) - exact).max() <= 2 * mx.finfo(got.dtype).eps * np.abs(exact).max()


@pytest.mark.parametrize("backend", [EMULATOR])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_order_of_threads_does_not_matter(case, backend, built):
    first, *others = [Stored(case).decoded(backend, typecheck=False, **order) for order in ORDERS]
    assert all(mx.array_equal(first, other) for other in others)


@pytest.mark.parametrize("backend", [EMULATOR])
def test_every_kind_of_kernel_type_checks(backend):
    sizes = [64, 80, 96, 128, 256]
    kinds = [
        Case(D=D, bits=bits, dtype=dtype, center=(i + k + m) % 2 == 0)
        for i, D in enumerate(sizes)
        for k, bits in enumerate((2, 3, 4, 8))
        for m, dtype in enumerate(DTYPES)
    ]
    kinds += [
        Case(D=D, bits=3, group=group)
        for D in (*sizes, 16, 32, 48, 112, 144, 160, 176, 192, 208, 224, 240)
        for group in (7, 32)
        if D % group == 0
    ]
    kinds += [Case(D=16, bits=bits, B=1, heads=1, blocks=1, balance=False) for bits in (2, 3, 4, 8)]
    with kernel_emulator.noting() as calls:
        for case in kinds:
            Stored(case).decoded(backend)
    assert len(calls) > 70
    assert all(np.prod(shape) >= 8 for _, call in calls for shape, _ in call["inputs"])
    assert all(warnings_ == [] for warnings_ in metal_emu.typecheck(calls))


@pytest.mark.parametrize("backend", [EMULATOR])
def test_the_text_is_what_mlx_would_compile(backend, capfd):
    Stored(FEW[0]).decoded(backend)
    kernel, call = kernel_emulator.KERNELS["dequantize"], kernel_emulator.CALLS["dequantize"]
    names = dict(input_names=list(ops._DEQUANTIZE.inputs), output_names=list(ops._DEQUANTIZE.outputs))
    traced = mx.fast.metal_kernel(name=kernel.name, header=kernel.header, source=kernel.source, **names)
    arguments = {k: v for k, v in call.items() if k != "inputs"}
    inputs = [mx.zeros(*shape_and_dtype) for shape_and_dtype in call["inputs"]]
    printed = kernel_emulator.text_of_mlx(traced, inputs, arguments, capfd)
    assert kernel.metal_source(**call) == printed


@on_each_backend
def test_scales_of_any_size_stay_what_they_are(backend):
    case = Case(D=64, dtype="float32", center=False, balance=False, blocks=1)
    stored = Stored(case)
    sizes = 10.0 ** (np.arange(case.block) * 4 - 30)  # 1e-30 to 1e30
    scales = np.array(stored.packed.scales)
    scales[:, :, case.block : 2 * case.block, 0] = sizes
    stored.packed = stored.packed._replace(scales=mx.array(scales))
    stored.scales = mx.array(scales[:, :, case.block : 2 * case.block])
    exact, got = stored.exact(), f64(stored.decoded(backend))
    assert np.all(np.isfinite(got))
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert np.all(np.abs(got - exact) <= 1e-6 * largest)


@on_each_backend
def test_rows_beyond_the_dtype_end_at_its_largest_number(backend):
    stored = Stored(Case(D=64, center=False, balance=False, blocks=1))
    stored.packed = stored.packed._replace(scales=mx.full(stored.packed.scales.shape, 65504, mx.float16))
    got, wanted = f64(stored.decoded(backend)), f64(stored.decoded("reference"))
    assert np.isfinite(got).all() and (np.abs(got) == 65504).mean() > 0.1
    assert np.abs(got - wanted).max() <= 64


def test_what_the_kernel_cannot_take_is_decoded_by_plain_mlx_and_said_once():
    backend = next(iter(p for p in BACKENDS if isinstance(p, str)), "emulator")
    codes = pack_codes(mx.random.randint(0, 16, (1, 2, 64, 72), key=mx.random.key(0)), 4)
    packed = PackedTensor(codes, mx.ones((1, 2, 64, 1)))
    call = dict(bits=4, dim=72, block=32, rotation=make_rotation("hadamard", 72))
    with pytest.warns(UserWarning, match=r"\[dequantize\] .* head size 72 is not a multiple of 16 up to 256"):
        got = dequantize(packed, 32, 64, **call, backend=backend)
    assert mx.array_equal(got, dequantize(packed, 32, 64, **call, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dequantize(packed, 32, 64, **call, backend=backend)


@pytest.mark.parametrize(("start", "stop"), [(0, 17), (16, 16), (8, 24), (32, 64), (32, 16)])
def test_rows_that_are_not_whole_blocks_of_the_buffers_are_refused(start, stop):
    packed = PackedTensor(mx.zeros((1, 1, 50, 16), mx.uint32), mx.zeros((1, 1, 50, 1)))
    rotation = make_rotation("hadamard", 128)
    with pytest.raises(ValueError, match=rf"whole blocks of 16 rows within 50, got rows {start} to {stop}"):
        dequantize(packed, start, stop, bits=4, dim=128, block=16, rotation=rotation)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("fma(x[e], sign, simd", "fma(x[e], -sign, simd"),
        ("ulong(sizes[2]) + first_row", "ulong(sizes[1]) + first_row"),  # the length of another buffer
        ("first_row / BLOCK", "first_row / 16"),
        ("* norm", ""),
    ],
)
@pytest.mark.parametrize("backend", [EMULATOR])
def test_a_fault_in_the_kernel_is_noticed(backend, right, wrong, monkeypatch):
    put_fault(monkeypatch, ops, "_DEQUANTIZE", right, wrong)
    with pytest.raises((AssertionError, metal_emu.KernelError)):
        test_rows_are_at_most_twice_as_far_from_float64_as_those_of_plain_mlx(Case(D=64, block=32), backend, None)
