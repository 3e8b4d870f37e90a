"""The encode kernel against plain MLX: the same codes, scales and centres, from any buffer, whatever is in it."""

import warnings

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from row_cases import BACKENDS, CASES, DTYPES, EMULATOR, FEW, ORDERS, PAIRS, Case, build_kernels, put_fault

from mlx_turboquant import TurboQuantKVCache
from mlx_turboquant.conditioning import block_centers, subtract_centers
from mlx_turboquant.ops import encode as ops
from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.encode import encode
from mlx_turboquant.packing import pack_codes, unpack_codes
from mlx_turboquant.rotation import make_rotation

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def run(case, backend, rows=None, **emulator):
    """What `encode` makes of a case's rows; which are bad is looked at here. The emulator checks every access."""
    with kernel_emulator.options(check=True, **emulator):
        rows = case.rows() if rows is None else rows
        out, bad = encode(rows, case.start, case.stop, backend=backend, **case.arguments())
        mx.eval(out, bad)
    valid = f64(rows)[:, :, case.start : case.stop].reshape(case.B, case.heads, case.blocks, case.block, case.D)
    wanted = ~np.isfinite(valid).all(axis=-1)
    bits = np.array(bad)[..., None] >> np.arange(32, dtype=np.uint32) & 1
    found = bits.reshape(*wanted.shape[:3], -1)
    assert np.array_equal(found[..., : case.block], wanted) and not found[..., case.block :].any()
    return out


def f64(x):
    return np.array(x.astype(mx.float32), np.float64)


def assert_right(case, got, rows):
    """The codes, scales and centres of plain MLX, but where a value or a centre lies on the edge between two.

    A centre that is rounded the other way changes codes; so plain MLX gets the kernel's centres, which are looked at
    by themselves.
    """
    D, dtype = case.D, DTYPES[case.dtype]
    group, eps = case.group or D, mx.finfo(dtype).eps
    valid = rows[:, :, case.start : case.stop]
    if case.center:
        wanted = f64(block_centers(valid, case.block))
        off = np.abs(f64(got.centers) - wanted)
        assert got.centers.dtype == dtype and np.all(
            off <= np.maximum(eps * np.abs(wanted), 1e-6 * np.nanmax(np.abs(f64(valid))))
        )
        assert case.dtype == "float32" or np.mean(off == 0) >= 0.99
    else:
        assert got.centers is None
    x = subtract_centers(valid, got.centers)
    if case.balance:
        x = x * case.factors()[:, :, None]
    x = case.rotation.apply(x)
    wanted = lloyd_max.quantize(x, case.bits, group, dtype, case.scalings)
    assert got.codes.shape == wanted.codes.shape and got.codes.dtype == mx.uint32
    assert got.scales.shape == wanted.scales.shape and got.scales.dtype == dtype
    codes, wanted_codes = (unpack_codes(p.codes, case.bits, D) for p in (got, wanted))
    assert mx.array_equal(pack_codes(codes, case.bits), got.codes)  # nothing in the padding
    codes, wanted_codes = (np.array(c).reshape(*c.shape[:3], -1, group) for c in (codes, wanted_codes))
    same = np.all(codes == wanted_codes, axis=-1)
    assert same.mean() >= 0.99
    # A group whose codes differ is as near with either.
    centroids, x = np.array(lloyd_max._codebook(case.bits).numbers, np.float64), f64(x).reshape(codes.shape)
    for rest in (c[~same] for c in (codes, wanted_codes)):
        near = (x[~same] * centroids[rest]).sum(-1) / np.linalg.norm(centroids[rest], axis=-1)
        best = (x[~same] * centroids[wanted_codes[~same]]).sum(-1) / np.linalg.norm(
            centroids[wanted_codes[~same]], axis=-1
        )
        np.testing.assert_allclose(near, best, rtol=0.01 / group)
    np.testing.assert_allclose(f64(got.scales)[same], f64(wanted.scales)[same], rtol=max(eps, 2e-6), atol=1e-37)


@pytest.fixture(scope="module")
def built():
    build_kernels(lambda case: run(case, "emulator"), [*CASES, *FEW])


@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_codes_scales_and_centers_are_those_of_plain_mlx(case, backend, built):
    rows = case.rows()
    assert_right(case, run(case, backend, rows, typecheck=False), rows)


@pytest.mark.parametrize("backend", [EMULATOR])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_order_of_threads_does_not_matter(case, backend, built):
    first, *others = [run(case, backend, typecheck=False, **order) for order in ORDERS]
    for other in others:
        assert all(mx.array_equal(a, b) for a, b in zip(first, other, strict=True) if a is not None)


@pytest.mark.parametrize("backend", [EMULATOR])
def test_every_kind_of_kernel_type_checks(backend):
    sizes = [64, 80, 96, 128, 256]
    kinds = [
        Case(D=D, bits=bits, dtype=dtype, center=(i + k + m) % 2 == 0, block=(16, 32, 64, 128, 256)[(i + k) % 5])
        for i, D in enumerate(sizes)
        for k, bits in enumerate((2, 3, 4, 8))
        for m, dtype in enumerate(DTYPES)
    ]
    kinds += [Case(D=D, bits=bits, scalings=n) for D, n in ((64, 1), (96, 3)) for bits in (2, 3, 4, 8)]
    kinds += [
        Case(D=D, bits=3, group=group)
        for D in (*sizes, 16, 32, 48, 112, 144, 160, 176, 192, 208, 224, 240)
        for group in (1, 7, 8, 24, 32, 40)
        if D % group == 0
    ]
    # The smallest buffers there can be: none has so few elements that MLX would pass it in another address space.
    kinds += [Case(D=16, bits=bits, B=1, heads=1, blocks=1, start=0, balance=False) for bits in (2, 3, 4, 8)]
    with kernel_emulator.noting() as calls:
        for case in kinds:
            run(case, backend)
    assert len(calls) > 120
    assert all(np.prod(shape) >= 8 for _, call in calls for shape, _ in call["inputs"])
    assert all(warnings_ == [] for warnings_ in metal_emu.typecheck(calls))


@pytest.mark.parametrize("backend", [EMULATOR])
def test_the_text_is_what_mlx_would_compile(backend, capfd):
    case = FEW[0]
    run(case, backend)
    kernel, call = kernel_emulator.KERNELS["encode"], kernel_emulator.CALLS["encode"]
    names = dict(input_names=list(ops._ENCODE.inputs), output_names=list(ops._ENCODE.outputs))
    traced = mx.fast.metal_kernel(name=kernel.name, header=kernel.header, source=kernel.source, **names)
    arguments = {k: v for k, v in call.items() if k != "inputs"}
    inputs = [mx.zeros(*shape_and_dtype) for shape_and_dtype in call["inputs"]]
    printed = kernel_emulator.text_of_mlx(traced, inputs, arguments, capfd)
    assert kernel.metal_source(**call) == printed


@pytest.mark.parametrize("backend", [EMULATOR])
def test_threadgroups_are_small_enough_for_any_gpu(backend):
    case = Case(D=256, dtype="float32", bits=8, B=1, heads=1, blocks=1)
    run(case, backend)
    assert kernel_emulator.KERNELS["encode"].counts["threadgroup_bytes"] <= 16384 and ops._THREADS <= 512


@on_each_backend
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_harms_no_other(case, backend, bad, built):
    rows = np.array(case.rows().astype(mx.float32))
    clean = run(case, backend, mx.array(rows).astype(DTYPES[case.dtype]), typecheck=False)
    rows[1, 0, case.start + 3, 7] = bad
    rows = mx.array(rows).astype(DTYPES[case.dtype])
    got = run(case, backend, rows, typecheck=False)
    assert_right(case, got, rows)
    assert np.all(np.isfinite(f64(got.scales)))
    same = np.all(np.array(got.codes) == np.array(clean.codes), axis=-1)
    changed = {tuple(i) for i in np.argwhere(~same)}
    # Its block's centre moves a little, and with it the codes of its neighbours.
    allowed = {(1, 0, row) for row in (range(case.block) if case.center else [3])}
    assert changed <= allowed


@on_each_backend
@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_block_without_a_finite_number_is_zero(case, backend, built):
    rows = np.array(case.rows().astype(mx.float32))
    rows[0, 1, case.start : case.start + case.block] = np.nan
    got = run(case, backend, mx.array(rows).astype(DTYPES[case.dtype]), typecheck=False)
    assert np.all(f64(got.scales)[0, 1, : case.block] == 0) and np.all(f64(got.scales)[0, 0] > 0)
    assert got.centers is None or np.all(f64(got.centers)[0, 1, 0] == 0)


@on_each_backend
@pytest.mark.parametrize("case", FEW, ids=str)
def test_zero_and_constant_rows_are_exact(case, backend, built):
    rows = np.zeros(case.rows().shape, np.float32)
    rows[0] = 2.0
    got = run(case, backend, mx.array(rows).astype(DTYPES[case.dtype]), typecheck=False)
    if case.center:
        assert np.all(f64(got.scales) == 0)
        assert np.all(f64(got.centers)[0] == 2.0) and np.all(f64(got.centers)[1] == 0.0)
    else:
        assert np.all(f64(got.scales)[1] == 0) and np.all(f64(got.scales)[0].max(-1) > 0)
    rows = mx.array(rows).astype(DTYPES[case.dtype])
    back = case.rotation.apply(subtract_centers(rows[:, :, case.start : case.stop], got.centers))
    own = lloyd_max.dequantize(got, case.bits, case.D)
    np.testing.assert_allclose(np.linalg.norm(f64(own), axis=-1), np.linalg.norm(f64(back), axis=-1), rtol=4e-3)


@on_each_backend
@pytest.mark.parametrize("magnitude", [1e-30, 1e-15, 1e-6, 1e3, 6e4, 1e12, 1e30])
def test_magnitude_does_not_matter(magnitude, backend):
    case = Case(D=64, dtype="float32", blocks=1, B=1)
    rows = case.rows(magnitude / 20)
    got = run(case, backend, rows)
    assert np.all(np.isfinite(f64(got.scales)))
    assert_right(case, got, rows)
    plain = run(case, backend, case.rows())
    assert np.mean(np.array(plain.codes) == np.array(got.codes)) > 0.97


@on_each_backend
def test_rows_of_very_different_sizes_lie_side_by_side(backend):
    case = Case(D=64, dtype="float32", center=False, balance=False, blocks=1)
    sizes = mx.array([10.0 ** (i % 12 * 5 - 30) for i in range(case.stop + 11)])
    rows = case.rows() / 1e4 * sizes[:, None]
    assert_right(case, run(case, backend, rows), rows)


@on_each_backend
@pytest.mark.parametrize("start", [0, 1, 17, 64, 99])
def test_any_row_can_be_the_first(start, backend, built):
    at = Case(block=64, start=start)
    here = run(at, backend, typecheck=False)
    first = run(Case(block=64, start=5), backend, typecheck=False)
    assert all(mx.array_equal(a, b) for a, b in zip(here, first, strict=True))


@on_each_backend
def test_offsets_beyond_32_bits_are_not_cut(backend):
    # 2^32 elements and more cannot be held in a test; the largest products of the body are formed in 64 bits.
    body = ops._ENCODE.text[1]
    for product in ("head * ulong(sizes[1])", "ulong out = (head * blocks + block) * BLOCK", "ulong(block) * BLOCK"):
        assert product in body


@on_each_backend
def test_float16_scales_saturate_instead_of_overflowing(backend):
    rows = mx.full((1, 2, 16, 64), 65504.0, mx.float16)
    arguments = Case(D=64).arguments() | dict(center=False, balance=mx.full((1, 2, 64), 4.0))
    got = encode(rows, 0, 16, **arguments, backend=backend).packed
    assert np.all(f64(got.scales) == 65504)


@on_each_backend
@pytest.mark.parametrize("center", [False, True])
def test_entries_that_no_sum_could_hold_are_clipped_and_their_neighbours_are_not(backend, center):
    case = Case(D=64, dtype="bfloat16", center=center, blocks=2)
    rows = np.array(case.rows().astype(mx.float32))
    block = rows[:, :, case.start : case.start + case.block]
    block[0, 0, 1] = 3e38
    block[0, 0, 4, 9] = -3e38
    block[0, 1, :, 5] = 3e38  # the sum for the centre overflows
    block[1, 0, ::2, 7], block[1, 0, 1::2, 7] = 1e37, -1e37
    block[1, 1] = -2e33
    rows = mx.array(rows).astype(mx.bfloat16)
    got = run(case, backend, rows)
    assert all(np.isfinite(f64(part)).all() for part in (got.scales, got.centers) if part is not None)
    assert_right(case, got, rows)


def test_what_the_kernel_cannot_take_is_encoded_by_plain_mlx_and_said_once():
    cases = [
        (dict(rotation=make_rotation("dense", 64)), 64, "the rotation is not one Hadamard transform"),
        (dict(rotation=make_rotation("hadamard", 72), group=72), 72, "head size 72 is not a multiple of 16 up to 256"),
        (dict(rotation=make_rotation("hadamard", 512), group=512), 512, "head size 512 is not"),
        (dict(block=8), 64, "blocks of 8 rows are not a multiple of 16"),
        (dict(bits=1), 64, "codes of 1 bits have no kernel"),
    ]
    arguments = dict(bits=4, group=64, block=16, rotation=make_rotation("hadamard", 64), center=True)
    backend = next(iter(p for p in BACKENDS if isinstance(p, str)), "emulator")
    for change, D, reason in cases:
        rows = mx.random.normal((1, 2, 40, D), key=mx.random.key(0))
        with pytest.warns(UserWarning, match=f"{backend} kernel does not take these rows, because {reason}"):
            got, bad = encode(rows, 3, 35, **arguments | change, backend=backend)
        wanted, none = encode(rows, 3, 35, **arguments | change, backend="reference")
        assert not bad.any() and bad.shape == none.shape
        assert all(mx.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encode(rows, 3, 35, **arguments | change, backend=backend)


def test_long_prompts_are_encoded_in_pieces_by_plain_mlx(monkeypatch):
    case = Case(blocks=9)
    whole = run(case, "reference")
    monkeypatch.setattr(ops, "_PIECE_ROWS", 32)
    pieces = run(case, "reference")
    assert all(mx.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize(("start", "stop"), [(0, 17), (-16, 0), (16, 16), (32, 64), (40, 24)])
def test_rows_that_are_not_whole_blocks_of_the_buffer_are_refused(start, stop):
    arguments = Case().arguments() | dict(balance=None)
    with pytest.raises(ValueError, match=rf"whole blocks of 16 rows within 50, got rows from {start} to {stop}"):
        encode(mx.zeros((1, 1, 50, 128)), start, stop, **arguments)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("fma(x[e], sign, simd", "fma(x[e], -sign, simd"),  # the rotation
        ("y[e] - center[e", "y[e] + center[e"),
        ("fit > best_fit", "fit < best_fit"),
        ("own : best_energy", "best_energy : own"),  # the scale
        ("row = first + lane / LANES", "row = first + lane % LANES"),
        ("ulong(sizes[0]) + ", ""),  # the first row
        ("bad_row ? 1 : 0", "bad_row ? 0 : 1"),
    ],
)
@pytest.mark.parametrize("backend", [EMULATOR])
def test_a_fault_in_the_kernel_is_noticed(backend, right, wrong, monkeypatch):
    put_fault(monkeypatch, ops, "_ENCODE", right, wrong)
    case = Case(D=64, block=16, blocks=2)
    rows = case.rows()
    with pytest.raises((AssertionError, metal_emu.KernelError)):
        assert_right(case, run(case, backend, rows), rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["turbo4v2:sinks=3", "turbo3:group=16,center=0", "turbo8v4:block=32,rotation=dense"])
def test_a_cache_is_compressed_and_cut_as_with_plain_mlx(backend, scheme, monkeypatch, random_rows):
    rows, decoded = random_rows(B=2, T=200), []
    for chosen in ("reference", backend):
        monkeypatch.setenv("MLX_TURBOQUANT_BACKEND", chosen)
        cache = TurboQuantKVCache(scheme)
        cache.update_and_fetch(*rows)
        assert cache.compress() >= 128
        cache.trim(90)  # cuts a block, which is decoded
        keys, values = cache.keys_and_values()
        decoded.append([f64(side.dense(64)) for side in (keys, values)])
    for wanted, got in zip(*decoded, strict=True):
        off = np.abs(got - wanted).max(axis=-1)
        assert np.mean(off < 5e-3) >= 0.99
