"""What a kernel computes on the CPU equals numpy, operation by operation; its text equals what MLX generates."""

import os
import sys
import tempfile

import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import metal_kernel

pytestmark = pytest.mark.skipif(bool(metal_emu.UNSUPPORTED), reason=metal_emu.UNSUPPORTED)

RANDOM = np.random.default_rng(1)
LANES = np.arange(32)


def each(expressions, inputs, dtype, **options):
    """The value of each expression of x, y, z and i, for every element; one kernel computes them all."""
    expressions = [expressions] if isinstance(expressions, str) else expressions
    count, names = inputs[0].size, ["x", "y", "z"][: len(inputs)]
    outputs = [f"o{j}" for j in range(len(expressions))]
    body = "uint i = thread_position_in_grid.x;\n"
    body += "\n".join(f"{o}[i] = {e.replace('@', '[i]')};" for o, e in zip(outputs, expressions, strict=True))
    out = metal_kernel("each", names, outputs, body)(
        inputs=inputs,
        grid=(count, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(count,)] * len(outputs),
        output_dtypes=[dtype] * len(outputs),
        check=True,
        **options,
    )
    return out if len(out) > 1 else out[0]


def assert_equal(expected, inputs, dtype):
    """``expected``: expression -> array."""
    computed = each(list(expected), inputs, dtype)
    for (expression, wanted), got in zip(expected.items(), computed, strict=True):
        np.testing.assert_array_equal(got, np.reshape(wanted, -1), err_msg=expression)


def test_every_half_operation_rounds():
    a, b, c = (RANDOM.standard_normal(4096).astype(np.float16) for _ in range(3))
    fused = (a.astype(np.float64) * b + c).astype(np.float16)
    assert_equal({"x@ * y@ + z@": a * b + c, "fma(x@, y@, z@)": fused}, [a, b, c], np.float16)


def test_every_bfloat_operation_rounds():
    a, b, c = (mx.random.normal((4096,), key=mx.random.key(k)).astype(mx.bfloat16) for k in range(3))
    product, total = each(["x@ * y@", "x@ * y@ + z@"], [a, b, c], mx.bfloat16)
    assert (product == a * b).all() and (total == a * b + c).all()
    x = mx.random.normal((4096,))
    assert (each("static_cast<bfloat16_t>(x@)", [x], mx.bfloat16) == x.astype(mx.bfloat16)).all()
    assert (each("float(x@)", [a], mx.float32) == a.astype(mx.float32)).all()


def test_nothing_is_fused_unasked():
    a, b, c = (RANDOM.standard_normal(4096).astype(np.float32) for _ in range(3))
    assert_equal({"x@ * y@ + z@": a * b + c, "x@ * y@ - z@": a * b - c}, [a, b, c], np.float32)


def test_float_functions():
    x = RANDOM.uniform(0.1, 4, 512).astype(np.float32)
    wide = x.astype(np.float64)
    expected = {
        "exp(x@)": np.exp(wide),
        "metal::exp2(x@)": np.exp2(wide),
        "fast::exp2(x@)": np.exp2(wide),
        "precise::log(x@)": np.log(wide),
        "rsqrt(x@)": wide**-0.5,
        "precise::tanh(x@)": np.tanh(wide),
        "pow(x@, 1.5f)": wide**1.5,
        "mix(x@, 2.0f, 0.25f)": wide * 0.75 + 0.5,
        "clamp(x@, 1.0f, 2.0f)": np.clip(wide, 1, 2),
        "fract(x@)": wide - np.floor(wide),
        "smoothstep(0.0f, 4.0f, x@)": (wide / 4) ** 2 * (3 - wide / 2),
        "select(x@, 0.0f, x@ > 1.0f)": np.where(wide > 1, 0, wide),
    }
    for (expression, wanted), got in zip(expected.items(), each(list(expected), [x], np.float32), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=3e-7, err_msg=expression)


def test_denormals_can_be_flushed():
    x = np.full(64, 1e-39, np.float32)
    assert (each("x@ * 2.0f", [x], np.float32) > 0).all()
    assert (each("x@ * 2.0f", [x], np.float32, ftz=True) == 0).all()


def test_integer_functions():
    x = RANDOM.integers(0, 2**32, 1000, dtype=np.uint32)
    x[:3] = [0, 1, 0xFFFFFFFF]
    words = [int(v) for v in x]
    expected = {
        "popcount(x@)": [v.bit_count() for v in words],
        "clz(x@)": [32 - v.bit_length() for v in words],
        "ctz(x@)": [32 if v == 0 else (v & -v).bit_length() - 1 for v in words],
        "extract_bits(x@, 5, 7)": (x >> 5) & 127,
        "insert_bits(x@, 5u, 3, 4)": (x & ~np.uint32(15 << 3)) | (5 << 3),
        "reverse_bits(x@)": [int(f"{v:032b}"[::-1], 2) for v in words],
        "rotate(x@, 7u)": (x << 7) | (x >> 25),
        "mulhi(x@, 12345u)": (x.astype(np.uint64) * 12345) >> 32,
        "addsat(x@, 0x80000000u)": [min(v + 2**31, 2**32 - 1) for v in words],
        "subsat(x@, 0x80000000u)": [max(v - 2**31, 0) for v in words],
        "uint((ulong(x@) * 3ul) >> 2)": (x.astype(np.uint64) * 3) >> 2 & 0xFFFFFFFF,
        "as_type<uint>(ushort2(x@, x@ >> 16))": x,
        "as_type<uint>(uchar4(x@, x@ >> 8, x@ >> 16, x@ >> 24))": x,
        "as_type<uint>(as_type<half2>(x@))": x,
        "as_type<uint>(as_type<float>(x@ & 0x3fffffffu))": x & 0x3FFFFFFF,
    }
    assert_equal({e: np.asarray(v, np.uint32) for e, v in expected.items()}, [x], np.uint32)


def test_vectors():
    x = RANDOM.standard_normal(256).astype(np.float32)
    rows = x.reshape(-1, 4)
    flipped = rows[:, ::-1] + np.stack([rows[:, 0], rows[:, 1], 0 * rows[:, 0], 0 * rows[:, 0] + 1], 1)
    load = "(*(const device float4*)(x + 4 * (i / 4)))"
    halved = 10 * x.astype(np.float16).astype(np.float32)
    expected = {
        f"({load}.wzyx + float4({load}.xy, 0.0f, 1.0f))[i % 4]": flipped,
        "dot(float4(uint4(1, 2, 3, 4)), float4(half4(float4(x@))))": halved,
        "vec<float, 2>(1.0f, x@).y": x,
        "fma(float2(x@), float2(2.0f, 4.0f), float2(1.0f)).y": x * 4 + 1,
    }
    computed = each(list(expected), [x], np.float32)
    for (expression, wanted), got in zip(expected.items(), computed, strict=True):
        np.testing.assert_allclose(got, np.reshape(wanted, -1), rtol=2e-6, atol=1e-6, err_msg=expression)


def test_simdgroup_functions():
    x = RANDOM.integers(0, 1000, 128).astype(np.int32).reshape(-1, 32)
    fours = x.reshape(-1, 8, 4)
    expected = {
        "simd_sum(x@)": np.repeat(x.sum(1), 32),
        "simd_max(x@)": np.repeat(x.max(1), 32),
        "simd_min(x@)": np.repeat(x.min(1), 32),
        "simd_xor(x@)": np.repeat(np.bitwise_xor.reduce(x, 1), 32),
        "simd_prefix_inclusive_sum(x@)": x.cumsum(1),
        "simd_prefix_exclusive_sum(x@)": x.cumsum(1) - x,
        "simd_shuffle_xor(x@, 5)": x[:, LANES ^ 5],
        "simd_shuffle_down(x@, 3)": x[:, np.where(LANES + 3 < 32, LANES + 3, LANES)],
        "simd_shuffle_up(x@, 3)": x[:, np.where(LANES >= 3, LANES - 3, LANES)],
        "simd_shuffle(x@, ushort(31 - (i & 31)))": x[:, ::-1],
        "simd_broadcast(x@, 7)": np.repeat(x[:, 7], 32),
        "simd_broadcast_first(x@)": np.repeat(x[:, 0], 32),
        "simd_shuffle_rotate_down(x@, 3)": x[:, (LANES + 3) % 32],
        "simd_shuffle_rotate_up(x@, 3)": x[:, (LANES - 3) % 32],
        "simd_shuffle_and_fill_down(x@, -1, 3)": np.where(LANES + 3 < 32, x[:, (LANES + 3) % 32], -1),
        "simd_shuffle_and_fill_up(x@, -1, 3)": np.where(LANES >= 3, x[:, LANES - 3], -1),
        "int((uint)(simd_vote::vote_t)simd_ballot((x@ & 1) != 0) >> (i & 31)) & 1": x & 1,
        "simd_any(x@ == x[3])": np.repeat((x == x[0, 3]).any(1), 32),
        "quad_sum(x@)": np.repeat(fours.sum(-1), 4),
        "quad_max(x@)": np.repeat(fours.max(-1), 4),
        "quad_broadcast(x@, 2)": np.repeat(fours[:, :, 2], 4),
    }
    assert_equal(expected, [x.reshape(-1)], np.int32)


def test_simdgroup_functions_of_other_types():
    x = RANDOM.standard_normal(64).astype(np.float32)
    halves = x.astype(np.float16).reshape(2, 32)
    expected = {
        "float(simd_max(half(x@)))": np.repeat(halves.max(1), 32).astype(np.float32),
        "simd_shuffle_xor(float2(x@, 1.0f), 1).x": x.reshape(2, 32)[:, LANES ^ 1],
        "float(simd_shuffle(static_cast<bfloat16_t>(i), ushort(9)))": np.repeat([9, 41], 32),
    }
    assert_equal(expected, [x], np.float32)


def test_the_last_threadgroup_and_simdgroup_may_be_partial():
    body = "uint i = thread_position_in_grid.x; o[i] = simd_sum(x[i]); p[i] = threads_per_threadgroup.x;"
    sums, sizes = metal_kernel("edge", ["x"], ["o", "p"], body)(
        inputs=[np.ones(150, np.int32)],
        grid=(150, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(150,)] * 2,
        output_dtypes=[np.int32] * 2,
        check=True,
    )
    assert sums.tolist() == [32] * 128 + [22] * 22 and sizes.tolist() == [64] * 128 + [22] * 22


def test_grids_of_three_dimensions_and_all_attributes():
    names = [f"{k}_per_threadgroup" for k in ("simdgroups", "quadgroups", "dispatch_simdgroups", "dispatch_quadgroups")]
    body = "uint3 p = thread_position_in_grid; o[(p.z * 5 + p.y) * 7 + p.x] = p.x + 10 * p.y + 100 * p.z + x[0];\n"
    body += (
        "uint n = grid_size.x * grid_size.y + threads_per_grid.z + threads_per_simdgroup + thread_execution_width;\n"
    )
    body += f"if (thread_index_in_threadgroup == 0 && threadgroup_position_in_grid.x == 0) n += {' + '.join(names)};\n"
    body += "q[(p.z * 5 + p.y) * 7 + p.x] = n;"
    out, counts = metal_kernel("grid", ["x"], ["o", "q"], body)(
        inputs=[np.zeros(9, np.uint32)],
        grid=(7, 5, 3),
        threadgroup=(4, 2, 2),
        output_shapes=[(3, 5, 7)] * 2,
        output_dtypes=[np.uint32] * 2,
        check=True,
    )
    z, y, x = np.indices((3, 5, 7))
    assert (out == x + 10 * y + 100 * z).all()
    assert counts[0, 0, 1] == 7 * 5 + 3 + 64 and counts[0, 0, 0] == 7 * 5 + 3 + 64 + 1 + 4 + 1 + 4


def test_a_threadgroup_of_1024_threads():
    body = """
      threadgroup uint all[1024];
      uint i = thread_index_in_threadgroup;
      all[i] = x[i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      o[i] = all[1023 - i];"""
    x = np.arange(1024, dtype=np.uint32)
    sizes = dict(grid=(1024, 1, 1), threadgroup=(1024, 1, 1), output_shapes=[(1024,)], output_dtypes=[np.uint32])
    (out,) = metal_kernel("flip", ["x"], ["o"], body)(inputs=[x], check=True, order="random", **sizes)
    assert (out == x[::-1]).all()


def test_arrays_go_in_and_come_out_as_mlx_or_numpy():
    kernel = metal_kernel("copy", ["x"], ["o"], "o[thread_position_in_grid.x] = x[thread_position_in_grid.x];")
    for dtype in (mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint8, mx.int64, mx.uint64, mx.bool_):
        x = (mx.arange(24).reshape(4, 6) % 5).astype(dtype).T  # not contiguous
        call = dict(inputs=[x], grid=(24, 1, 1), threadgroup=(8, 1, 1), output_shapes=[(6, 4)], output_dtypes=[dtype])
        (out,) = kernel(**call, check=True)
        assert isinstance(out, mx.array) and out.dtype == dtype and mx.array_equal(out, x)
    call = dict(grid=(6, 1, 1), threadgroup=(6, 1, 1), output_shapes=[(6,)], output_dtypes=[np.int16])
    (out,) = kernel(inputs=[np.arange(6, dtype=np.int16)], **call)
    assert isinstance(out, np.ndarray) and out.tolist() == list(range(6))


def test_the_generated_source_is_that_of_mlx(capfd):
    source = "out[thread_position_in_grid.x] = (T)(a[0] + b + a_shape[0] + a_strides[0] + a_ndim + c[0]);\n"
    source += "// simdgroup_index_in_threadgroup\n"
    names = dict(name="traced", input_names=["a", "b", "c"], output_names=["out"], source=source, header="// header\n")
    arrays = [mx.zeros((4, 8), mx.float16), mx.array(3.0), mx.zeros((3,), mx.bfloat16)]
    call = dict(
        template=[("T", mx.bfloat16), ("N", 4), ("F", True)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(32,)],
        output_dtypes=[mx.bfloat16],
    )
    traced = mx.fast.metal_kernel(**names)
    with tempfile.TemporaryDirectory() as folder:
        # MLX prints the text while it traces, on any machine; it compiles nothing.
        mx.export_function(
            os.path.join(folder, "traced.mlxfn"),
            lambda *x: traced(inputs=list(x), verbose=True, stream=mx.gpu, **call),
            *arrays,
        )
    sys.stdout.flush()
    printed = capfd.readouterr().out.split("```\n", 1)[1].rsplit("\n```", 1)[0]
    assert metal_kernel(**names).metal_source(inputs=arrays, **call) == printed
