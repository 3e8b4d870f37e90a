"""Attention in plain MLX: the same on either kind of device, in memory that does not grow with the cache."""

import statistics

import mlx.core as mx
import pytest
from conftest import memory_in_use
from test_attention import case, check

from mlx_turboquant import plain_attention
from mlx_turboquant.attention import attend
from mlx_turboquant.ops import lookup
from mlx_turboquant.quantizers import affine, int8

WITH_TABLES = ["turbo4", "turbo3v2", "turbo8v3", "turbo2.5", "qjl4", "outlier3", "int8", "affine4", "affine3v6"]


@pytest.mark.parametrize("scheme", WITH_TABLES)
def test_the_way_of_a_cpu_and_that_of_a_gpu_agree(scheme, monkeypatch):
    queries, packed, _ = case(scheme, T=400, heads=6, L=2)
    on_cpu = attend(queries, *packed, 0.125, "causal", backend="reference")
    mx.eval(on_cpu)
    for module in (lookup, plain_attention, affine, int8):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    elsewhere = attend(queries, *packed, 0.125, "causal", backend="reference")
    assert mx.abs(on_cpu - elsewhere).max() < 1e-5 * mx.abs(elsewhere).max()


@pytest.mark.parametrize("heads", [2, 16])
def test_more_pieces_than_are_kept_at_a_time_are_merged(heads, monkeypatch):
    queries, packed, dense = case(T=64 * 40, heads=heads, L=2)
    monkeypatch.setattr(plain_attention, "_piece_tokens", lambda *sizes: 64)
    kept = []
    merged = plain_attention._merged
    monkeypatch.setattr(plain_attention, "_merged", lambda pieces: kept.append(len(pieces)) or merged(pieces))
    check(queries, packed, dense, mask="causal", sinks=mx.linspace(-2, 2, heads), backend="reference")
    assert kept[:2] == [16, 16] and max(kept) == 16


def test_every_piece_but_one_may_be_masked():
    queries, packed, dense = case(T=700, L=3)
    for start in (0, 100, 600):
        mask = (mx.arange(700) >= start) & (mx.arange(700) < start + 64)
        check(queries, packed, dense, mask=mask, backend="reference")
        check(queries, packed, dense, mask=mx.where(mask, 0.5, -mx.inf), backend="reference")


@pytest.mark.parametrize("L", [1, 8])
def test_memory_of_a_step_does_not_grow_with_the_cache(L):
    """What grows is the causal mask: 9 bytes for a token, where keys and values are 1 KiB in float32."""
    peaks = []
    for T in (8192, 32768):
        queries, packed, _ = case(T=T, D=128, heads=4, kv_heads=1, L=L)
        mx.eval(queries, [(rows.sinks, rows.stored.map(lambda a: a), rows.tail) for rows in packed])
        held, seen = memory_in_use(), []
        for _ in range(9):  # which pieces are under way at once depends on MLX's threads: now and then few
            mx.reset_peak_memory()
            mx.eval(attend(queries, *packed, 0.1, "causal", backend="reference"))
            seen.append(mx.get_peak_memory() - held)
        peaks.append(statistics.median(seen))
    assert peaks[0] < 10 * plain_attention.CPU_PIECE_BYTES
    assert peaks[1] - peaks[0] < 24 * (32768 - 8192) + plain_attention.CPU_PIECE_BYTES
