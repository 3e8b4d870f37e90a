"""The prediction for Apple GPUs: its counts against stored bytes, theory and the emulator, its sums, an H200."""

import math
import sys
from itertools import permutations, product
from pathlib import Path

import kernel_emulator
import metal_emu
import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_emu.instructions import KINDS

from mlx_turboquant.ops import attend as kernel
from mlx_turboquant.ops import attend_plan
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.sizes import LayerShape, cache_nbytes
from mlx_turboquant.verification import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import apple_model as model
from decode_attention import random_side
from gpu_figures import APPLE, H200, HOPPER, MACHINES, MODELS, Heads, Machine

pytestmark = pytest.mark.skipif(bool(metal_emu.UNSUPPORTED), reason=metal_emu.UNSUPPORTED)
TOKENS = 8192
M1 = MACHINES[0]


def cost(name, H=32, Hkv=8, D=128, by_exchange=False):
    return model.costs(KVScheme.parse(name), Heads(H, Hkv, D), TOKENS, by_exchange)[0]


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("name", [*model.SCHEMES, "qjl4"])
def test_bytes_of_a_key_are_what_a_cache_grows_by(name, D):
    scheme, shape = KVScheme.parse(name), LayerShape(3, D, D, mx.float16)
    grown = cache_nbytes(scheme, shape, 64 * 200 + 20) - cache_nbytes(scheme, shape, 64 * 50 + 20)
    assert model.bytes_per_key(scheme, D) * 3 * 64 * 150 == grown


@pytest.mark.parametrize("name", model.SCHEMES)
def test_bytes_of_a_key_are_those_of_the_packed_arrays(name):
    scheme = KVScheme.parse(name)
    sides = [random_side(scheme.key_bits, 1, 2, 640, 128, True), random_side(scheme.value_bits, 1, 2, 640, 128, False)]
    assert sum(side.packed.nbytes for side in sides) == 2 * 640 * model.bytes_per_key(scheme, 128)


@pytest.mark.parametrize(("name", "D"), [("turbo4", 128), ("turbo8v4", 128), ("turbo2", 64)])
def test_the_kernel_loads_every_code_once(name, D):
    scheme = KVScheme.parse(name)
    assert cost(name, D=D).code_bytes == (scheme.key_bits + scheme.value_bits) * D / 8


def test_words_of_high_bits_are_loaded_by_each_lane_that_needs_some():
    # 3 bits: low bits once; the 32 high bits of a word by two lanes of 16 elements, by four of 8.
    assert cost("turbo3", by_exchange=True).code_bytes == 128 * (2 + 2 + 1 * 2 + 1 * 4) / 8
    assert cost("turbo3").code_bytes == 128 * (2 + 2 + 1 * 4 + 1 * 4) / 8


@pytest.mark.parametrize(
    ("name", "G", "D"), [("turbo4", 1, 128), ("turbo4", 4, 128), ("turbo4", 8, 128), ("turbo2", 1, 64)]
)
def test_products_and_lookups_are_those_of_the_arithmetic(name, G, D):
    found = cost(name, H=8 * G, D=D, by_exchange=True).counts
    assert found["fma"] == 2 * G * D / 32  # each element of a key and of a value with each query row
    # Each code once for all query rows; with several rows the centre's score reaches its row by one more in a block.
    assert found["lookup"] == 2 * D / 32 + (1 / 64 if G > 1 else 0)
    assert all(count > 0 for count in found.values())


@pytest.mark.parametrize(
    ("name", "G", "fmas"),
    # By Horner's rule one for each term but the first, and one that makes a float of the code, but for the code in the
    # lowest bits of a word, of which the others are 7 of 8 at 4 bits and, of 8 elements in two words, 3 of 4 at 3 bits.
    [
        *(("turbo4", 1, 7 + 7 / 8), ("turbo4", 4, 7 + 7 / 8), ("turbo4", 8, 7 + 7 / 8)),
        *(("turbo3", 4, 3 + 3 / 4), ("turbo2", 4, 0)),
    ],
)
def test_macs_look_no_code_up_in_a_lane_of_its_own_choice(name, G, fmas):
    found = cost(name, H=8 * G).counts
    assert found["fma"] == (2 * G + 2 * fmas) * 128 / 32
    assert found.get("lookup", 0) == (1 / 64 if G > 1 else 0)  # of the centre's score, once in a block


def test_eight_bit_keys_are_looked_up_in_threadgroup_memory():
    four, eight = (cost(name, by_exchange=True) for name in ("turbo4", "turbo8v4"))
    assert eight.counts["lookup"] == four.counts["lookup"] - 128 / 32
    assert eight.counts["threadgroup_load"] == four.counts["threadgroup_load"] + 128 / 32
    assert eight.threadgroup_bytes == four.threadgroup_bytes + 4 * 128


def test_a_long_head_is_read_again_for_more_than_four_query_rows():
    once, twice = cost("turbo4", H=32, D=256), cost("turbo4", H=64, D=256)
    assert twice.code_bytes == 2 * once.code_bytes
    assert twice.counts["fma"] == 2 * once.counts["fma"]


@pytest.fixture
def two_splits(monkeypatch):
    """Attention over one KV head is cut into two splits, however long it is."""

    def forget():
        attend_plan.plan_of.cache_clear()
        kernel._prepare.cache_clear()

    monkeypatch.setattr(attend_plan, "_THREADGROUPS", 2)
    forget()
    yield
    forget()


def test_counted_exchanges_are_those_that_a_run_makes(two_splits, monkeypatch):
    # The 8 simdgroups walk through whole blocks, and with queries of 0 no maximum moves on the way.
    runs = []
    for tokens in (1024, 2048):
        keys, values = (random_side(2, 1, 1, tokens, 64, centered) for centered in (True, False))
        lengths, options = ((4, tokens, 40),), {"scale": 0.125, "block": 64, "backend": "emulator"}
        mx.eval(kernel.attend(mx.zeros((1, 4, 1, 64), mx.float16), keys, values, lengths, **options))
        runs.append(kernel_emulator.KERNELS["attend"].counts["collectives"])
    monkeypatch.setattr(model, "moved_share", lambda tiles, rows: 0.0)
    counts = model.costs.__wrapped__(KVScheme.parse("turbo2"), Heads(32, 8, 64), TOKENS)[0].counts
    together = sum(counts[kind] for kind in ("lookup", "exchange", "vote", "barrier"))
    assert (runs[1] - runs[0]) / 1024 == together


def test_a_maximum_moves_as_often_as_records_fall():
    assert model.moved_share(50, 1) == pytest.approx(sum(1 / t for t in range(1, 51)) / 50)
    orders = list(permutations(range(4)))
    moved = [
        any(order[t] == max(order[: t + 1]) for order in rows) for rows in product(orders, repeat=2) for t in range(4)
    ]
    assert model.moved_share(4, 2) == pytest.approx(sum(moved) / len(moved))


def test_a_machine_that_was_measured_is_predicted():
    ratios = model.check()
    assert set(ratios) == {"fp16", *model.SCHEMES}
    assert all(abs(ratio - 1) < 0.15 for ratio in ratios.values()), ratios


@given(
    st.sampled_from(["fp16", *model.SCHEMES]),
    st.sampled_from([1024, 8192, 32768]),
    st.floats(50, 5000),
    st.floats(1, 10),
    st.sampled_from(model.LOOKUPS),
)
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_or_cores_is_never_slower_and_more_tokens_never_faster(name, tokens, bandwidth, more, lookup):
    heads = Heads(32, 8, 128)
    one = Machine("one", bandwidth, 10, 1.4)
    base = model.attention(one, name, heads, tokens, lookup)
    wide = model.attention(one._replace(bandwidth=bandwidth * more), name, heads, tokens, lookup)
    large = model.attention(one._replace(cores=math.ceil(10 * more)), name, heads, tokens, lookup)
    assert wide.us <= base.us and large.us <= base.us
    assert wide.memory_us == pytest.approx(base.memory_us / more) and wide.compute_us == base.compute_us
    assert model.attention(one, name, heads, 2 * tokens, lookup).us > base.us


def test_a_prediction_is_bytes_or_cycles_and_dispatches():
    heads, scheme = Heads(32, 8, 128), KVScheme.parse("turbo4")
    found = model.attention(M1, "turbo4", heads, TOKENS)
    packed, raw = model.split(scheme, TOKENS)
    assert packed + raw == TOKENS and packed % scheme.block == 0 and raw < scheme.block + scheme.sinks + scheme.window
    cycles = 8 * (packed * cost("turbo4").cycles(M1) + raw * model.costs(scheme, heads, TOKENS)[1].cycles(M1))
    assert found.compute_us == pytest.approx(cycles / (M1.cores * M1.ghz * 1e3))
    assert found.us == max(found.memory_us, found.compute_us) + 2 * M1.dispatch_us
    # fp16: 2 bytes, keys and values, at the reached share of the bandwidth in bytes per us.
    bytes_per_us = M1.bandwidth * M1.reached * 1e3
    assert model.attention(M1, "fp16", heads, TOKENS).memory_us == pytest.approx(TOKENS * 8 * 128 * 4 / bytes_per_us)


def test_cheaper_lookups_take_no_longer():
    arithmetic, sequence, one = (
        model.attention(M1, "turbo4", Heads(32, 8, 128), TOKENS, lookup).compute_us for lookup in model.LOOKUPS
    )
    assert one < arithmetic < sequence and H200.cycles["lookup"] == H200.cycles["exchange"]
    exchanged = cost("turbo4", by_exchange=True)
    saved = exchanged.counts["lookup"] * (M1.cycles["lookup"] - M1.cycles["exchange"]) / 4
    assert exchanged.cycles(M1) - exchanged.cycles(M1, M1.cycles["exchange"]) == pytest.approx(saved)
    # On an H200, where an exchange is one instruction, the other text takes longer.
    assert cost("turbo4").cycles(H200) > 1.4 * exchanged.cycles(H200)


def test_weights_are_those_of_the_published_models():
    # Parameters that a token reads: Llama-3.1-8B 8.03e9 without 0.525e9 of embeddings, Qwen2.5-1.5B 1.54e9 and
    # Llama-3.2-1B 1.24e9 with tied ones; norms and biases are left out here.
    for one, parameters in zip(MODELS, (8.03e9 - 0.525e9, 1.54e9, 1.24e9), strict=True):
        assert one.weight_bytes == pytest.approx(parameters * 4.5 / 8, rel=0.01)
        assert model.tokens_per_second(M1, one, "fp16", 1024) < 1e9 * M1.bandwidth / one.weight_bytes


def test_every_kind_of_instruction_has_its_cycles():
    assert set(KINDS) == set(APPLE) == set(HOPPER)


def test_a_single_pass_is_not_predicted():
    with pytest.raises(ValueError, match=r"\[costs\] wanted tokens for two passes, got 256"):
        model.costs(KVScheme.parse("turbo4"), Heads(32, 8, 128), 256)


def test_the_script_says_that_it_predicts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["apple_model.py", "--tokens", "1024"])
    model.main()
    out = capsys.readouterr().out
    assert out.startswith("Predictions; no Mac was measured.") and out.count("| M1, 8 cores |") == 1 + len(MODELS)


def test_a_gpu_says_how_fast_it_copies(monkeypatch):
    monkeypatch.setattr(machine, "COPIED", 1 << 20)
    assert "memory_gb_per_s" not in machine.describe("reference")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    report = machine.describe("reference")
    assert report["memory_gb_per_s"] > 0 and f" GB ({report['memory_gb_per_s']:g} GB/s copying), " in machine.card(
        report
    )
