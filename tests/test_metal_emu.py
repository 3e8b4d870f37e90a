# ruff: noqa: E501
"""Every seeded bug must be reported; the clean kernels must stay clean (in three schedules)."""

import numpy as np
import pytest
from metal_emu import CompileError, KernelError, metal_kernel
from metal_emu import samples as K

R = np.random.default_rng(0)
X = R.standard_normal((37, 128)).astype(np.float16)
S = R.choice([-1.0, 1.0], 128).astype(np.float32)
INS = K.att_inputs(2, 4, 150)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("check", [False, True])
def test_clean(order, check):
    (o, sc), _ = K.run_wht(metal_kernel, X, S, check=check, order=order)
    ro, rs = K.wht_numpy(X, S)
    assert (o == ro).all() and (sc == rs).all()
    out, _ = K.run_att(metal_kernel, INS, 4, check=check, order=order)
    np.testing.assert_allclose(out, K.att_numpy(*INS, 4), atol=1e-5)


def wht(old, new, n=1, x=X, **kw):
    src = K.WHT_SOURCE
    hdr = K.WHT_HEADER
    assert old in src or old in hdr

    def mk(name, i, o, source, header="", **e):
        return metal_kernel(name, i, o, src.replace(old, new, n), header=hdr.replace(old, new, n), **e)

    return K.run_wht(mk, x, S, check=True, **kw)


def att(old, new, n=1, ins=INS, **kw):
    assert old in K.ATT1_SOURCE + K.ATT1_HEADER

    def mk(name, i, o, source, header="", **e):
        return metal_kernel(name, i, o, source.replace(old, new, n), header=header.replace(old, new, n), **e)

    return K.run_att(mk, ins, 4, check=True, **kw)


def kinds(f, *a, **k):
    with pytest.raises(KernelError) as e:
        f(*a, **k)
    print(e.value)
    return {r.kind for r in e.value.reports}


TB = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def test_missing_barrier_after_load():
    assert {"race", "uninitialised"} & kinds(wht, TB, "")
    assert {"race", "uninitialised"} & kinds(att, TB, "")


def test_missing_barrier_before_reduce():
    def mk_src(s):
        i = s.rindex(TB)
        return s[:i] + s[i + len(TB) :]

    def mk(name, i, o, source, header="", **e):
        return metal_kernel(name, i, o, mk_src(source) if "part_o[row" in source else source, header=header, **e)

    with pytest.raises(KernelError) as e:
        K.run_att(mk, INS, 4, check=True)
    assert {"race", "uninitialised"} & {r.kind for r in e.value.reports}


def test_wrong_mem_flags():
    assert "race" in kinds(wht, TB, "threadgroup_barrier(mem_flags::mem_device);")
    assert "race" in kinds(wht, TB, "threadgroup_barrier(mem_flags::mem_none);")
    assert "race" in kinds(
        wht, "simdgroup_barrier(mem_flags::mem_threadgroup);", "simdgroup_barrier(mem_flags::mem_none);"
    )
    assert "race" in kinds(wht, "simdgroup_barrier(mem_flags::mem_threadgroup);", "")


def test_simdgroup_barrier_is_not_enough_across_simdgroups():
    assert "race" in kinds(att, TB, "simdgroup_barrier(mem_flags::mem_threadgroup);")


def test_device_oob():
    assert "out-of-bounds" in kinds(wht, "if (row >= rows)", "if (row > rows + 100)")


def test_threadgroup_oob():
    assert {"out-of-bounds", "undefined-behaviour"} & kinds(
        att, "threadgroup float red_m[NSG * G];", "threadgroup float red_m[NSG * G - 1];"
    )


def test_private_array_oob():
    assert "undefined-behaviour" in kinds(
        wht, "for (int j = 0; j < PER; j++) {\n    v[j] = float", "for (int j = 0; j <= PER; j++) {\n    v[j] = float"
    )


def test_barrier_in_divergent_branch():
    assert {"barrier", "simd-divergence"} & kinds(wht, TB, "if (lane < 16) { " + TB + " }")


def test_barrier_after_partial_return():
    assert "barrier" in kinds(wht, TB, "if (thread_index_in_threadgroup == 5) return; " + TB)


def test_simd_op_in_divergent_branch():
    assert "simd-divergence" in kinds(
        wht,
        "amax = max(amax, simd_shuffle_xor(amax, 1));",
        "if (lane & 1) amax = max(amax, simd_shuffle_xor(amax, 1));",
    )


def test_shuffle_out_of_range():
    assert "simd-shuffle" in kinds(wht, "simd_shuffle_xor(amax, 2)", "simd_shuffle(amax, ushort(lane + 2))")


def test_broadcast_not_uniform():
    assert "simd-shuffle" in kinds(wht, "simd_shuffle_xor(amax, 2)", "simd_broadcast(amax, ushort(lane ^ 2))")


def test_unwritten_output():
    assert "unwritten-output" in kinds(wht, "if ((lane & 3) == 0)", "if ((lane & 7) == 0)")


def test_two_lanes_write_one_word():
    assert "race" in kinds(wht, "out[row * 16 + lane] =", "out[row * 16 + (lane & 7)] =")


def test_cross_threadgroup_race():
    assert "race" in kinds(att, "uint row = (kvh * G + g) * nsplit + split;", "uint row = (kvh * G + g) * nsplit;")


def test_misaligned_vector_load():
    k = metal_kernel(
        "mis",
        ["x"],
        ["o"],
        "uint i = thread_position_in_grid.x; float4 v = *(const device float4*)(x + i); o[i] = v.x + v.w;",
    )
    assert "misaligned" in kinds(
        k,
        inputs=[np.arange(64, dtype=np.float32)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(32,)],
        output_dtypes=[np.float32],
        check=True,
    )


def test_base_pointer_alignment_assumption():
    """float4 loads are fine on an aligned buffer, wrong on a sliced mx.array (offset view): misalign=1 shows it"""
    k = metal_kernel(
        "mis2",
        ["x"],
        ["o"],
        "uint i = thread_position_in_grid.x; float4 v = *(const device float4*)(x + 4 * i); o[i] = v.x + v.w;",
    )
    a = dict(
        inputs=[np.arange(128, dtype=np.float32)],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(32,)],
        output_dtypes=[np.float32],
        check=True,
    )
    k(**a)
    assert "misaligned" in kinds(k, misalign=1, **a)


def test_float_to_int_overflow():
    assert "undefined-behaviour" in kinds(wht, "int(rint(v[j] * inv))", "int(rint(v[j] * inv * 1e12f))")


def test_shift_out_of_range():
    assert "undefined-behaviour" in kinds(wht, "<< (4 * j)", "<< (16 * j)")


def test_read_output_before_write():
    k = metal_kernel("rmw", ["x"], ["o"], "uint i = thread_position_in_grid.x; o[i] += x[i];")
    a = dict(
        inputs=[np.ones(64, np.float32)],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[np.float32],
        check=True,
    )
    assert "uninitialised" in kinds(k, **a)
    assert (k(init_value=2.0, **a)[0] == 3).all()


def test_uninitialised_private():
    with pytest.raises(CompileError, match="uninitialized"):
        wht("float amax = 0;", "float amax; if (rows > 1000) amax = 0;")


def test_threadgroup_memory_limit():
    with pytest.raises(ValueError, match="exceeds"):
        att("threadgroup float cb[32];", "threadgroup float cb[9000];")


def test_threadgroup_size_limit():
    with pytest.raises(ValueError, match="maximum"):
        K.run_wht(metal_kernel, X, S, nsg=64)


def test_small_input_lands_in_constant():
    hdr = "METAL_FUNC float first(const device float* p) { return p[0]; }"
    k = metal_kernel("small", ["x"], ["o"], "o[thread_position_in_grid.x] = first(x);", header=hdr)
    a = dict(grid=(4, 1, 1), threadgroup=(4, 1, 1), output_shapes=[(4,)], output_dtypes=[np.float32])
    k(inputs=[np.ones(8, np.float32)], **a)
    with pytest.raises(CompileError, match="no matching function"):
        k(inputs=[np.ones(7, np.float32)], **a)


def test_wrong_shuffle_mask_is_a_numeric_error():
    (_o, sc), _ = wht("simd_shuffle_xor(amax, 2)", "simd_shuffle_xor(amax, 4)")
    assert (sc != K.wht_numpy(X, S)[1]).any()


def test_atomics_are_not_races():
    k = metal_kernel(
        "hist",
        ["x"],
        ["o"],
        "uint i = thread_position_in_grid.x; atomic_fetch_add_explicit(&o[x[i]], 1u, memory_order_relaxed);",
        atomic_outputs=True,
    )
    x = R.integers(0, 16, 1000).astype(np.uint32)
    (o,) = k(
        inputs=[x],
        grid=(1000, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(16,)],
        output_dtypes=[np.uint32],
        init_value=0,
        check=True,
    )
    assert (o == np.bincount(x, minlength=16)).all()


def test_simdgroup_matrix():
    k = metal_kernel(
        "mma",
        ["a", "b"],
        ["c"],
        """
      simdgroup_float8x8 A, B, C = simdgroup_float8x8(0);
      for (int k = 0; k < 16; k += 8) { simdgroup_load(A, a + k, 16); simdgroup_load(B, b + k * 8, 8); simdgroup_multiply_accumulate(C, A, B, C); }
      simdgroup_store(C, c, 8);""",
    )
    a, b = R.standard_normal((8, 16)).astype(np.float32), R.standard_normal((16, 8)).astype(np.float32)
    (c,) = k(
        inputs=[a, b],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(8, 8)],
        output_dtypes=[np.float32],
        check=True,
    )
    np.testing.assert_allclose(c, a @ b, atol=1e-5)
