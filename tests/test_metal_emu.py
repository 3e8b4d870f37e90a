"""Kernels run on the CPU: every seeded bug is reported, and the clean kernels stay clean in three schedules."""

import metal_emu
import numpy as np
import pytest
from metal_emu import CompileError, KernelError, metal_kernel
from metal_emu.samples import (
    ATTEND_SOURCE,
    attend,
    attention_inputs,
    attention_reference,
    encode,
    encode_reference,
)

pytestmark = pytest.mark.skipif(bool(metal_emu.UNSUPPORTED), reason=metal_emu.UNSUPPORTED)

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((37, 128)).astype(np.float16)
SIGNS = RANDOM.choice([-1.0, 1.0], 128).astype(np.float32)
ATTENTION = attention_inputs(2, 4, 150)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
LAST_PART = ATTEND_SOURCE[ATTEND_SOURCE.rindex(BARRIER) :][:120]
MAXIMUM = "amax = max(amax, simd_shuffle_xor(amax, 1));"


def kinds(function, *args, **kwargs):
    """The kinds of what a checked run reports."""
    with pytest.raises(KernelError) as caught:
        function(*args, check=True, **kwargs)
    print(caught.value)
    return {report.kind for report in caught.value.reports}


def elementwise(source, inputs, outputs=64, dtype=np.float32, name="elementwise", threads=32, **options):
    """Run a body over a flat grid of ``outputs`` threads, one output of as many elements."""
    names = ["x", "y", "z"][: len(inputs)]
    atomic = options.pop("atomic_outputs", False)
    kernel = metal_kernel(name, names, ["o"], source, header=options.pop("header", ""), atomic_outputs=atomic)
    size = options.pop("output_size", outputs)
    (out,) = kernel(
        inputs=inputs,
        grid=(outputs, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[dtype],
        **options,
    )
    return out


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("check", [False, True])
def test_clean_kernels_are_clean_and_right(order, check):
    codes, scales = encode(ROWS, SIGNS, check=check, order=order)
    expected_codes, expected_scales = encode_reference(ROWS, SIGNS)
    assert (codes == expected_codes).all() and (scales == expected_scales).all()
    out = attend(ATTENTION, check=check, order=order)
    np.testing.assert_allclose(out, attention_reference(*ATTENTION), atol=1e-5)


UNORDERED = {"race", "uninitialised"}
BUGS = {
    "encode: no barrier after the load": (BARRIER, "", UNORDERED),
    "encode: barrier for device memory": (BARRIER, BARRIER.replace("mem_threadgroup)", "mem_device)"), {"race"}),
    "encode: barrier for no memory": (BARRIER, BARRIER.replace("mem_threadgroup)", "mem_none)"), {"race"}),
    "encode: simdgroup barrier for no memory": (
        SIMD_BARRIER,
        SIMD_BARRIER.replace("mem_threadgroup", "mem_none"),
        {"race"},
    ),
    "encode: no simdgroup barrier": (SIMD_BARRIER, "", {"race"}),
    "encode: two lanes write one word": ("out[row * 16 + lane] =", "out[row * 16 + (lane & 7)] =", {"race"}),
    "encode: row beyond the last": ("if (row >= rows)", "if (row > rows + 100)", {"out-of-bounds"}),
    "encode: private array overrun": (
        "for (int j = 0; j < PER; j++) {\n    v[j] = float",
        "for (int j = 0; j <= PER; j++) {\n    v[j] = float",
        {"undefined-behaviour"},
    ),
    "encode: barrier in half a simdgroup": (
        BARRIER,
        "if (lane < 16) { " + BARRIER + " }",
        {"barrier", "simd-divergence"},
    ),
    "encode: barrier after a return": (
        BARRIER,
        "if (thread_index_in_threadgroup == 5) return; " + BARRIER,
        {"barrier"},
    ),
    "encode: shuffle in a branch": (MAXIMUM, "if (lane & 1) " + MAXIMUM, {"simd-divergence"}),
    "encode: shuffle from lane 33": (
        "simd_shuffle_xor(amax, 2)",
        "simd_shuffle(amax, ushort(lane + 2))",
        {"simd-shuffle"},
    ),
    "encode: broadcast of two lanes": (
        "simd_shuffle_xor(amax, 2)",
        "simd_broadcast(amax, ushort(lane ^ 2))",
        {"simd-shuffle"},
    ),
    "encode: half the scales unwritten": ("if ((lane & 3) == 0)", "if ((lane & 7) == 0)", {"unwritten-output"}),
    "encode: float too large for int": ("rint(v[j] * inv)", "rint(v[j] * inv * 1e12f)", {"undefined-behaviour"}),
    "encode: shift by 48": ("<< (4 * j)", "<< (16 * j)", {"undefined-behaviour"}),
    "attend: no barrier after the load": (BARRIER, "", UNORDERED),
    "attend: no barrier before the sum": (LAST_PART, LAST_PART.removeprefix(BARRIER), UNORDERED),
    "attend: simdgroup barrier for all": (BARRIER, SIMD_BARRIER, {"race"}),
    "attend: threadgroup array too short": (
        "red_m[NSG * G];",
        "red_m[NSG * G - 1];",
        {"out-of-bounds", "undefined-behaviour"},
    ),
    "attend: splits write one row": ("* nsplit + split;", "* nsplit;", {"race"}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_reported(bug):
    old, new, expected = BUGS[bug]
    run = (encode, ROWS, SIGNS) if bug.startswith("encode") else (attend, ATTENTION)
    assert expected & kinds(*run, (old, new))


def test_reports_name_the_line_the_array_and_the_other_thread():
    with pytest.raises(
        KernelError, match=r"encode\.metal:\d+.*data race.*`stage`.*other: thread \d+ at encode\.metal:\d"
    ):
        encode(ROWS, SIGNS, (SIMD_BARRIER, ""), check=True)


def test_reports_find_the_caller_of_a_library_function():
    load = "simdgroup_float8x8 a;\nsimdgroup_load(a, x, 16);\no[0] = a.thread_elements()[0];"
    with pytest.raises(KernelError, match=r"out-of-bounds\] elementwise\.metal:2:1: .*`x`"):
        elementwise(load, [np.zeros(64, np.float32)], check=True)


def test_reports_tell_body_and_header_apart():
    header = "METAL_FUNC float f(float v, int by) { return v + by + simd_shuffle_xor(v, ushort(1)); }"
    apart = "uint i = thread_position_in_grid.x; o[i] = (i & 1) ? f(x[i], 1 << (i * 8)) : simd_sum(x[i]);"
    with pytest.raises(
        KernelError, match=r"simd-divergence\] apart\.metal:1:\d+: .*other: thread 1 at apart\.header:1"
    ):
        elementwise(apart, [np.zeros(64, np.float32)], name="apart", header=header, check=True)
    both = "uint i = thread_position_in_grid.x; o[i] = f(x[i], 1 << i);"
    with pytest.raises(KernelError, match=r"undefined-behaviour\] both\.metal:1:"):
        elementwise(both, [np.zeros(64, np.float32)], name="both", header=header, check=True)


def test_vector_loads_are_aligned():
    strided = "uint i = thread_position_in_grid.x; float4 v = *(const device float4*)(x + {} * i); o[i] = v.x + v.w;"
    x = np.arange(256, dtype=np.float32)
    assert "misaligned" in kinds(elementwise, strided.format(1), [x])
    # An aligned buffer hides what a sliced array, which starts anywhere, would show.
    elementwise(strided.format(4), [x], check=True)
    assert "misaligned" in kinds(elementwise, strided.format(4), [x], misalign=1)


def test_outputs_hold_nothing_before_they_are_written():
    add = "uint i = thread_position_in_grid.x; o[i] += x[i];"
    x = np.ones(64, np.float32)
    assert "uninitialised" in kinds(elementwise, add, [x])
    assert (elementwise(add, [x], check=True, init_value=2.0) == 3).all()


def test_inputs_are_not_written():
    write = "uint i = thread_position_in_grid.x; ((device float*)x)[i] = 1; o[i] = 0;"
    assert "write-to-input" in kinds(elementwise, write, [np.ones(64, np.float32)], typecheck=False)


def test_variables_are_set_before_use():
    with pytest.raises(CompileError, match="uninitialized"):
        encode(ROWS, SIGNS, ("float amax = 0;", "float amax; if (rows > 1000) amax = 0;"))


def test_threadgroup_limits():
    with pytest.raises(ValueError, match="exceeds the 32768"):
        attend(ATTENTION, ("threadgroup float cb[32];", "threadgroup float cb[9000];"))
    with pytest.raises(ValueError, match="maximum of 1024 threads"):
        encode(ROWS, SIGNS, simdgroups=64)


def test_threadgroup_memory_is_forgotten_between_threadgroups():
    source = """
      threadgroup float kept[32];
      uint i = thread_index_in_threadgroup;
      if (threadgroup_position_in_grid.x == 0) kept[i] = 1;
      o[thread_position_in_grid.x] = kept[i] + x[0];"""
    assert kinds(elementwise, source, [np.zeros(9, np.float32)]) == {"uninitialised"}


def test_a_runaway_thread_is_a_report_and_not_a_crash():
    deep = """
      float big[40000];
      for (int i = 0; i < 40000; i++) big[i] = x[i % 9];
      o[thread_position_in_grid.x] = big[int(x[0])];"""
    with pytest.raises(KernelError, match="private variables of a thread take more than"):
        elementwise(deep, [np.zeros(9, np.float32)])
    with pytest.raises(KernelError, match="crash"):
        elementwise("*(device float*)16 = 1; o[0] = x[0];", [np.zeros(9, np.float32)], typecheck=False)


def test_a_wrong_shuffle_mask_is_only_a_wrong_number():
    _, scales = encode(ROWS, SIGNS, ("simd_shuffle_xor(amax, 2)", "simd_shuffle_xor(amax, 4)"), check=True)
    assert (scales != encode_reference(ROWS, SIGNS)[1]).any()


def test_atomics_are_no_races():
    x = RANDOM.integers(0, 16, 1000).astype(np.uint32)
    count = "atomic_fetch_add_explicit(&o[x[thread_position_in_grid.x]], 1u, memory_order_relaxed);"
    options = dict(dtype=np.uint32, atomic_outputs=True, output_size=16, threads=256)
    counted = elementwise(count, [x], 1000, check=True, init_value=0, **options)
    assert (counted == np.bincount(x, minlength=16)).all()
    with pytest.raises(KernelError, match=r"uninitialised\] elementwise\.metal:1:1: .*`o`"):
        elementwise(count, [x], 1000, check=True, **options)


def test_simdgroup_matrices_multiply():
    kernel = metal_kernel(
        "multiply",
        ["a", "b"],
        ["c"],
        """
        simdgroup_float8x8 A, B, C = simdgroup_float8x8(0);
        for (int k = 0; k < 16; k += 8) {
          simdgroup_load(A, a + k, 16);
          simdgroup_load(B, b + k * 8, 8);
          simdgroup_multiply_accumulate(C, A, B, C);
        }
        simdgroup_store(C, c, 8);""",
    )
    a, b = RANDOM.standard_normal((8, 16)).astype(np.float32), RANDOM.standard_normal((16, 8)).astype(np.float32)
    sizes = dict(grid=(32, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(8, 8)], output_dtypes=[np.float32])
    (c,) = kernel(inputs=[a, b], check=True, **sizes)
    np.testing.assert_allclose(c, a @ b, atol=1e-5)


def test_wrong_calls_say_what_was_wanted():
    with pytest.raises(ValueError, match=r"\[k\] unknown options \['chekc'\]. Known: check, strict"):
        metal_kernel("k", ["x"], ["o"], "o[0] = x[0];", chekc=True)
    with pytest.raises(ValueError, match=r"wanted 1 inputs \(x\), got 2"):
        metal_kernel("k", ["x"], ["o"], "o[0] = x[0];").typecheck(inputs=[1.0, 2.0], output_dtypes=[np.float32])
    with pytest.raises(ValueError, match="order must be one of forward, reverse, random, got 'up'"):
        elementwise("o[0] = x[0];", [1.0], order="up")
    with pytest.raises(ValueError, match="Metal has no double"):
        elementwise("o[0] = x[0];", [np.zeros(8)])
    with pytest.raises(ValueError, match="grid must be three positive numbers"):
        elementwise("o[0] = x[0];", [1.0], outputs=0)
