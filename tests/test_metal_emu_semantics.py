# ruff: noqa: E501
"""Arithmetic / builtin semantics of the emulator against numpy."""

import os
import sys

import numpy as np
import pytest
from metal_emu import metal_kernel

R = np.random.default_rng(1)


def ew(body, ins, od, n=None, hdr="", **kw):
    n = n or ins[0].size
    k = metal_kernel(
        "ew", [f"i{j}" for j in range(len(ins))], ["o"], "uint i = thread_position_in_grid.x; " + body, header=hdr
    )
    return k(
        inputs=ins, grid=(n, 1, 1), threadgroup=(64, 1, 1), output_shapes=[(n,)], output_dtypes=[od], check=True, **kw
    )[0]


def test_half_rounds_every_operation():
    a, b, c = (R.standard_normal(4096).astype(np.float16) for _ in range(3))
    assert (ew("o[i] = i0[i] * i1[i] + i2[i];", [a, b, c], np.float16) == (a * b + c)).all()
    f = ew("o[i] = fma(i0[i], i1[i], i2[i]);", [a, b, c], np.float16)
    assert (f == (a.astype(np.float64) * b + c).astype(np.float16)).all()


def test_bfloat():
    mx = pytest.importorskip("mlx.core")
    a, b = (mx.array(R.standard_normal(4096)).astype(mx.bfloat16) for _ in range(2))
    assert (ew("o[i] = i0[i] * i1[i];", [a, b], mx.bfloat16) == a * b).all()
    x = mx.array(R.standard_normal(4096)).astype(mx.float32)
    assert (ew("o[i] = static_cast<bfloat16_t>(i0[i]);", [x], mx.bfloat16) == x.astype(mx.bfloat16)).all()
    assert (ew("o[i] = float(i0[i]);", [a], mx.float32) == a.astype(mx.float32)).all()


def test_no_float_contraction():
    a, b, c = (R.standard_normal(4096).astype(np.float32) for _ in range(3))
    assert (ew("o[i] = i0[i] * i1[i] + i2[i];", [a, b, c], np.float32) == a * b + c).all()


def test_flush_to_zero_option():
    x = np.full(64, 1e-39, np.float32)
    assert (ew("o[i] = i0[i] * 2.0f;", [x], np.float32) > 0).all()
    assert (ew("o[i] = i0[i] * 2.0f;", [x], np.float32, ftz=True) == 0).all()


def test_int_builtins():
    x = R.integers(0, 2**32, 1000, dtype=np.uint32)
    x[:3] = [0, 1, 0xFFFFFFFF]
    pc = np.array([bin(v).count("1") for v in x], np.uint32)
    assert (ew("o[i] = popcount(i0[i]);", [x], np.uint32) == pc).all()
    assert (ew("o[i] = clz(i0[i]);", [x], np.uint32) == [32 - int(v).bit_length() for v in x]).all()
    assert (
        ew("o[i] = ctz(i0[i]);", [x], np.uint32) == [32 if v == 0 else (int(v) & -int(v)).bit_length() - 1 for v in x]
    ).all()
    assert (ew("o[i] = extract_bits(i0[i], 5, 7);", [x], np.uint32) == (x >> 5) & 127).all()
    assert (ew("o[i] = insert_bits(i0[i], 5u, 3, 4);", [x], np.uint32) == (x & ~np.uint32(15 << 3)) | (5 << 3)).all()
    assert (ew("o[i] = reverse_bits(i0[i]);", [x], np.uint32) == [int(f"{v:032b}"[::-1], 2) for v in x]).all()
    assert (ew("o[i] = mulhi(i0[i], 12345u);", [x], np.uint32) == ((x.astype(np.uint64) * 12345) >> 32)).all()
    assert (
        ew("o[i] = as_type<float>(i0[i] & 0x3fffffffu);", [x], np.float32) == (x & 0x3FFFFFFF).view(np.float32)
    ).all()
    assert (ew("o[i] = as_type<uint>(ushort2(i0[i], i0[i] >> 16));", [x], np.uint32) == x).all()


def test_vectors():
    x = R.standard_normal(256).astype(np.float32)
    o = ew(
        "float4 v = *(const device float4*)(i0 + 4 * (i / 4)); v = v.wzyx + float4(v.xy, 0.0f, 1.0f); o[i] = v[i % 4];",
        [x],
        np.float32,
    )
    v = x.reshape(-1, 4)
    ref = v[:, ::-1].copy()
    ref[:, 0] += v[:, 0]
    ref[:, 1] += v[:, 1]
    ref[:, 3] += 1
    assert (o == ref.reshape(-1)).all()
    o = ew(
        "half4 h = half4(float4(i0[i])); uint4 u = uint4(1, 2, 3, 4); o[i] = dot(float4(u), float4(h));",
        [x],
        np.float32,
    )
    assert np.allclose(o, 10 * x.astype(np.float16).astype(np.float32), atol=1e-3)


def test_simd_functions():
    x = R.integers(0, 1000, 128).astype(np.int32).reshape(-1, 32)
    f = x.reshape(-1)
    def s(b):
        return ew(b, [f], np.int32).reshape(-1, 32)
    lane = np.arange(32)
    assert (s("o[i] = simd_sum(i0[i]);") == x.sum(1, keepdims=True)).all()
    assert (s("o[i] = simd_max(i0[i]);") == x.max(1, keepdims=True)).all()
    assert (s("o[i] = simd_prefix_inclusive_sum(i0[i]);") == x.cumsum(1)).all()
    assert (s("o[i] = simd_prefix_exclusive_sum(i0[i]);") == x.cumsum(1) - x).all()
    assert (s("o[i] = simd_shuffle_xor(i0[i], 5);") == x[:, lane ^ 5]).all()
    assert (s("o[i] = simd_shuffle_down(i0[i], 3);") == x[:, np.where(lane + 3 < 32, lane + 3, lane)]).all()
    assert (s("o[i] = simd_shuffle_up(i0[i], 3);") == x[:, np.where(lane >= 3, lane - 3, lane)]).all()
    assert (s("o[i] = simd_shuffle(i0[i], ushort(31 - (i & 31)));") == x[:, ::-1]).all()
    assert (s("o[i] = simd_broadcast(i0[i], 7);") == x[:, 7:8]).all()
    assert (s("o[i] = simd_shuffle_rotate_down(i0[i], 3);") == x[:, (lane + 3) % 32]).all()
    assert (s("o[i] = int((uint)(simd_vote::vote_t)simd_ballot((i0[i] & 1) != 0) >> (i & 31)) & 1;") == (x & 1)).all()
    assert (s("o[i] = quad_sum(i0[i]);") == np.repeat(x.reshape(-1, 8, 4).sum(-1), 4, -1).reshape(-1, 32)).all()


def test_partial_simdgroup_and_edge_threadgroup():
    k = metal_kernel(
        "edge",
        ["x"],
        ["o", "p"],
        "uint i = thread_position_in_grid.x; o[i] = simd_sum(x[i]); p[i] = threads_per_threadgroup.x;",
    )
    x = np.ones(150, np.int32)
    o, p = k(
        inputs=[x],
        grid=(150, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(150,)] * 2,
        output_dtypes=[np.int32] * 2,
        check=True,
    )
    assert o.tolist() == [32] * 128 + [22] * 22 and p.tolist() == [64] * 128 + [22] * 22


def test_grid_3d():
    k = metal_kernel(
        "g3",
        ["x"],
        ["o"],
        "uint3 p = thread_position_in_grid; o[(p.z * 5 + p.y) * 7 + p.x] = p.x + 10 * p.y + 100 * p.z + x[0];",
    )
    (o,) = k(
        inputs=[np.zeros(9, np.uint32)],
        grid=(7, 5, 3),
        threadgroup=(4, 2, 2),
        output_shapes=[(3, 5, 7)],
        output_dtypes=[np.uint32],
        check=True,
    )
    z, y, x = np.indices((3, 5, 7))
    assert (o == x + 10 * y + 100 * z).all()


def test_generated_source_equals_mlx():
    """MLX itself prints the exact Metal source on a CPU-only build while exporting."""
    mx = pytest.importorskip("mlx.core")
    import tempfile

    src = "uint i = thread_position_in_grid.x; out[i] = (T)(a[i] + b + a_shape[0] + a_strides[0] + a_ndim + c[0]); // simdgroup_index_in_threadgroup\n"
    a, b, c = mx.zeros((4, 8), mx.float16), mx.array(3.0), mx.zeros((3,), mx.bfloat16)
    k = mx.fast.metal_kernel(name="kk", input_names=["a", "b", "c"], output_names=["out"], source=src, header="// h\n")
    t = [("T", mx.bfloat16), ("N", 4), ("F", True)]
    def fn(*x):
        return k(
            inputs=list(x),
            template=t,
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32,)],
            output_dtypes=[mx.bfloat16],
            verbose=True,
            stream=mx.gpu,
        )
    sys.stdout.flush()
    fd = os.dup(1)
    with tempfile.TemporaryFile() as f, tempfile.TemporaryDirectory() as d:
        os.dup2(f.fileno(), 1)
        try:
            mx.export_function(d + "/k.mlxfn", fn, a, b, c)
        finally:
            os.dup2(fd, 1)
        f.seek(0)
        text = f.read().decode().split("```\n", 1)[1].rsplit("\n```", 1)[0]
    assert text == metal_kernel("kk", ["a", "b", "c"], ["out"], src, "// h\n").metal_source(inputs=[a, b, c], output_dtypes=[mx.bfloat16], template=t)
