"""Counted instructions: of a loop written for this, by hand; and of loops that cannot be counted."""

import metal_emu
import mlx.core as mx
import pytest
from metal_emu import metal_kernel
from metal_emu.instructions import count_loop

pytestmark = pytest.mark.skipif(bool(metal_emu.UNSUPPORTED), reason=metal_emu.UNSUPPORTED)

# Each turn: a load of 16 bytes in one instruction, one of 4 bytes, and behind a condition one of an input of its own.
SOURCE = """
  threadgroup float table[32];
  uint lane = thread_index_in_simdgroup, turns = n[0], which = n[1];
  table[lane] = a[lane];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float held = a[lane + 1], sum = 0.0f;
  for (uint i = 0; i < turns; i++) {
    uint4 words = ((const device uint4*)codes)[i * 32 + lane];
    uint word = (words.x ^ words.y) + (words.z & words.w);
    float x = simd_shuffle(held, ushort((word >> 3) & 31u));
    x = fma(x, simd_shuffle_xor(x, ushort(8)), held);
    x = fast::exp2(quad_shuffle(x, ushort(word & 3u)));
    sum += x * table[word >> 27];
    if (simd_any(x > 3.0f)) { sum = simd_shuffle_xor(sum, ushort(1)) * held; }
    if (i % 4 == which) { sum = fma(sum, rare[i], held); }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
  out[lane] = sum;
"""
INPUTS = {"a": mx.float32, "codes": mx.uint32, "rare": mx.float32, "n": mx.uint32}


def instance(source=SOURCE):
    kernel = metal_kernel(name="counted", input_names=list(INPUTS), output_names=["out"], source=source)
    return kernel.instance(inputs=[((64,), dtype) for dtype in INPUTS.values()], output_dtypes=[mx.float32])


def test_a_loop_is_counted_as_by_hand():
    loop = count_loop(instance(), ("codes",))
    always, *rest = loop.parts
    voted = next(part for part in rest if part.voted)
    rare = next(part for part in rest if part.bytes_read["rare"])
    assert len(rest) == 2 and not always.conditional
    wanted = {
        "load": 1,
        "lookup": 1,
        "exchange": 2,
        "exp2": 1,
        "fma": 1,
        "vote": 1,
        "barrier": 1,
        "threadgroup_load": 1,
    }
    assert {kind: always.counts[kind] for kind in wanted} == wanted
    # word >> 3 & 31 is one extraction, word >> 27 and i * 32 are shifts; xor, and, word & 3, i % 4.
    assert (always.counts["extract"], always.counts["shift"], always.counts["bitwise"]) == (1, 2, 4)
    assert always.counts["float"] == 2 and rare.counts["fma"] == 1
    assert (voted.counts["float"], voted.counts["exchange"]) == (1, 1) and not rare.voted
    assert (always.bytes_read["codes"], always.threadgroup_bytes, rare.bytes_read["rare"]) == (16, 4, 4)
    assert loop.kept >= 3  # held, sum, i


def test_a_loop_that_nothing_reads_is_not_counted():
    with pytest.raises(ValueError, match=r"\[count_loop\] wanted one innermost loop of counted .* q, got 0 of 1"):
        count_loop(instance(), ("q",))


def test_two_loops_that_read_the_same_are_told_apart_or_refused():
    again = SOURCE.replace("out[lane] = sum;", "for (uint i = 0; i < turns; i++) { sum += float(codes[i] ^ i); }")
    with pytest.raises(ValueError, match="got 2 of 2"):
        count_loop(instance(again + "out[lane] = sum;"), ("codes",))


def test_an_instruction_without_a_kind_is_named():
    divided = SOURCE.replace("sum += x * table", "sum = sum / x + table")
    with pytest.raises(ValueError, match=r"wanted an instruction with a kind, got `fdiv"):
        count_loop(instance(divided), ("codes",))
