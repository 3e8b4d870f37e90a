"""Attention over compressed rows against plain attention over the rows they decode to."""

import kernel_emulator
import mlx.core as mx
import pytest
from attend_cases import BACKEND, ON_GPU, UNSUPPORTED
from schemes import METHODS, SCHEMES, TURBO

from mlx_turboquant import TurboQuantKVCache, plain_attention
from mlx_turboquant.attention import attend

with_kernels = pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param(BACKEND, marks=with_kernels)])


def plain(queries, keys, values, scale, mask=None, sinks=None):
    """Softmax attention in float32, written out; a row with no key to attend to is 0."""
    _, H, L, _ = queries.shape
    Hkv, T = keys.shape[1:3]
    keys, values = (mx.repeat(rows.astype(mx.float32), H // Hkv, axis=1) for rows in (keys, values))
    scores = (queries.astype(mx.float32) * scale) @ keys.swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = mx.arange(T - L, T)[:, None] >= mx.arange(T)[None]
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask.astype(mx.float32)
    top = mx.maximum(scores.max(axis=-1, keepdims=True), -1e30)
    if sinks is not None:
        top = mx.maximum(top, sinks[None, :, None, None])
    weights = mx.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sinks[None, :, None, None] - top)
    return (weights @ values) / mx.maximum(total, 1e-37)


def case(scheme="turbo4", T=300, D=64, Dv=None, B=1, heads=4, kv_heads=2, L=1, dtype=mx.float32, seed=0):
    """Queries, compressed keys and values, and the dense rows that these stand for."""
    key = mx.random.split(mx.random.key(seed), 3)
    keys = mx.random.normal((B, kv_heads, T, D), key=key[0]).astype(dtype) + 0.5
    values = mx.random.normal((B, kv_heads, T, Dv or D), key=key[1]).astype(dtype)
    queries = mx.random.normal((B, heads, L, D), key=key[2]).astype(dtype)
    cache = TurboQuantKVCache(scheme)
    cache.update_and_fetch(keys, values)
    cache.observe_queries(queries)
    cache.compress()
    packed = cache.keys_and_values()
    return queries, packed, tuple(rows.dense(64) for rows in packed)


def check(queries, packed, dense, tolerance=3e-5, backend=None, **kwargs):
    scale = queries.shape[-1] ** -0.5
    out = attend(queries, *packed, scale, **kwargs, backend=backend)
    assert out.dtype == queries.dtype
    assert mx.abs(out - plain(queries, *dense, scale, **kwargs)).max() < tolerance


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("L", [1, 5])
def test_every_scheme_equals_plain_attention_over_what_it_stores(scheme, L):
    check(*case(scheme, L=L), mask="causal")


FUSED = [*TURBO, *(scheme for scheme in METHODS if scheme.startswith("qjl"))]


@pytest.fixture(scope="module")
def kernels_of_all_schemes():
    """Compiled, two at a time."""
    with kernel_emulator.prebuilding(check=False):
        for scheme in FUSED:
            queries, packed, _ = case(scheme, L=2)
            attend(queries, *packed, 0.125, "causal", backend=BACKEND)


@pytest.mark.skipif(ON_GPU, reason="the test above did it")
@with_kernels
@pytest.mark.filterwarnings("ignore:.*because the rotation is not one Hadamard transform")
@pytest.mark.parametrize("scheme", FUSED)
def test_kernels_read_every_scheme(scheme, kernels_of_all_schemes):
    with kernel_emulator.options(typecheck=False):
        check(*case(scheme, L=2), mask="causal", backend=BACKEND)


@pytest.mark.parametrize("dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (16, 1)])
def test_head_sizes_and_groups(dim, heads, kv_heads):
    check(*case(D=dim, heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 2e-3), (mx.bfloat16, 2e-2)])
def test_half_precision(dtype, tolerance):
    check(*case(dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("L", range(1, 9))
def test_causal_among_the_newest_tokens(L):
    check(*case("turbo4:window=0", T=4 + 128, L=L, B=2), mask="causal")


@pytest.mark.parametrize("L", [9, 40])
def test_longer_runs_of_queries_take_the_dense_path(L):
    check(*case(L=L), mask="causal", tolerance=1e-4)


def test_values_may_have_another_head_size():
    check(*case(D=96, Dv=64))


def test_pieces_add_up_whatever_their_size(monkeypatch):
    queries, packed, dense = case(T=700, L=3)
    for tokens in (1, 64, 100, 640, 10_000):
        monkeypatch.setattr(plain_attention, "_piece_tokens", lambda *sizes, tokens=tokens: tokens)
        check(queries, packed, dense, mask="causal")


@pytest.mark.parametrize("shape", [(300,), (3, 300), (1, 1, 3, 300), (2, 1, 3, 300), (2, 4, 3, 300), (1, 4, 1, 300)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@each_backend
def test_masks(shape, kind, backend):
    queries, packed, dense = case(B=2, L=3)
    keep = mx.random.bernoulli(0.5, shape, key=mx.random.key(8))
    mask = keep if kind == "boolean" else mx.where(keep, mx.random.normal(shape), -mx.inf)
    check(queries, packed, dense, mask=mask, backend=backend)


def test_a_fully_masked_row_is_zero():
    queries, packed, _ = case(L=2)
    mask = mx.broadcast_to(mx.array([[False], [True]]), (2, 300))
    out = attend(queries, *packed, 0.125, mask)
    assert mx.all(out[:, :, 0] == 0) and mx.isfinite(out).all() and mx.abs(out[:, :, 1]).max() > 0.01


@pytest.mark.parametrize("L", [1, 4])
def test_attention_sink_logits(L):
    check(*case(L=L), mask="causal", sinks=mx.array([0.0, 3.0, -40.0, 12.0]))


def test_large_scores_do_not_overflow():
    queries, packed, dense = case()
    check(queries * 300, packed, dense, tolerance=1e-3)


def test_bad_raw_entries_count_as_zero():
    queries, packed, _ = case()
    packed[0].tail[0, 0, 2, 1] = mx.nan
    packed[1].tail[0, 1, 3, 1] = mx.inf
    assert mx.isfinite(attend(queries, *packed, 0.125)).all()


def test_unknown_masks_are_refused():
    queries, packed, _ = case(L=2)
    with pytest.raises(ValueError, match="'causal' or an array, got 'full'"):
        attend(queries, *packed, 0.125, "full")


def test_decoding_never_holds_all_rows_dense():
    """Peak memory of a step is far below one layer's keys at full length (16 MiB in float32 here)."""
    queries, packed, _ = case(T=32768, D=128, heads=4, kv_heads=1, L=8)
    mx.eval(queries, [(rows.sinks, *(a for a in rows.packed if a is not None), rows.tail) for rows in packed])
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(queries, *packed, 0.1, "causal"))
    dense_bytes = 32768 * 128 * 4
    assert mx.get_peak_memory() - held < dense_bytes / 3
