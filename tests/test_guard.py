"""The guard: what it measures, which layers it keeps raw, that it changes nothing else, and what it refuses."""

import sys
from unittest import mock

import mlx.core as mx
import mlx_lm
import pytest
from conftest import kld, tiny_llama

import mlx_turboquant
from mlx_turboquant import guard, make_prompt_cache, report
from mlx_turboquant.cache import RawLayerCache, TurboQuantKVCache

SCHEME = "turbo2:sinks=2,window=4,block=16"


@pytest.fixture(scope="module")
def model():
    """Four layers, of which the third has keys that two bits cannot hold."""
    model = tiny_llama(layers=4, seed=5)
    model.layers[2].self_attn.k_proj.weight *= 6
    return model


@pytest.fixture(scope="module")
def loaded(model_dir):
    return mlx_lm.load(str(model_dir))


def ids(count, seed=1):
    return mx.random.randint(0, 96, (count,), key=mx.random.key(seed))


def read(model, prompt, cache):
    """Read a prompt as mlx-lm does, but for its last token."""
    model(prompt[None, :-1], cache=cache)
    for layer in cache:
        if isinstance(layer, TurboQuantKVCache):
            layer.end_chunk()


def measured(model, prompt, kept):
    """The KLD of the guarded tokens with all layers compressed but some."""
    logits = []
    for compressed in (False, True):
        cache = make_prompt_cache(model, kv_scheme=SCHEME)
        model(prompt[None, : -guard.REPLAYED - 1], cache=cache)
        for i, layer in enumerate(cache):
            if compressed and i not in kept:
                layer.compress()
        logits.append(model(prompt[None, -guard.REPLAYED - 1 : -1], cache=cache))
    return kld(*logits)


def guarded(model, prompt, bound):
    left, cache = guard.read_guarded(model, prompt, make_prompt_cache(model, kv_scheme=SCHEME), bound)
    return left, cache, [i for i, layer in enumerate(cache) if isinstance(layer, RawLayerCache)]


def test_within_the_bound_everything_is_compressed_and_as_without_a_guard(model):
    prompt = ids(90)
    left, cache, kept = guarded(model, prompt, 100.0)
    assert kept == [] and left.tolist() == prompt[-guard.REPLAYED - 1 :].tolist()
    plain = make_prompt_cache(model, kv_scheme=SCHEME)
    read(model, left, cache)
    read(model, prompt, plain)
    for token in [*prompt[-1:].tolist(), 5, 7, 9]:
        out = [model(mx.array([[token]]), cache=each) for each in (cache, plain)]
        assert mx.allclose(*out, atol=1e-4)
    assert [layer.block_tokens for layer in cache] == [layer.block_tokens for layer in plain] != [0] * 4
    assert [layer.offset for layer in cache] == [layer.offset for layer in plain]


def test_the_layers_that_cost_most_stay_raw_until_the_rest_is_within_the_bound(model):
    prompt = ids(90)
    whole = measured(model, prompt, [])
    alone = [measured(model, prompt, [j for j in range(4) if j != i]) for i in range(4)]
    bound = 0.5 * whole
    _, cache, kept = guarded(model, prompt, bound)
    assert 1 <= len(kept) < 4 and measured(model, prompt, kept) <= bound
    assert set(kept) == set(sorted(range(4), key=lambda i: -alone[i])[: len(kept)])
    notes = {layer.layer: layer.why_raw for layer in report(cache).layers}
    assert all(("the guard kept it raw" in note) == (i in kept) for i, note in notes.items())


def test_a_bound_of_zero_keeps_all_raw_and_decodes_exactly(model):
    prompt = ids(90)
    left, cache, kept = guarded(model, prompt, 0)
    assert kept == [0, 1, 2, 3]
    exact = make_prompt_cache(model, kv_scheme="fp16")
    read(model, left, cache)
    read(model, prompt, exact)
    for token in (3, 4):
        assert mx.allclose(*(model(mx.array([[token]]), cache=each) for each in (cache, exact)), atol=1e-5)


def test_a_short_prompt_is_not_measured_and_that_is_said(model):
    with pytest.warns(RuntimeWarning, match="kv_guard measured nothing: of this prompt's 30 tokens none"):
        left, cache, kept = guarded(model, ids(30), 0.1)
    assert left.size == 30 and kept == [] and all(layer.empty() for layer in cache)


def test_nan_costs_more_than_any_bound(model):
    with mock.patch.object(guard._Guard, "_kld", lambda self, compressed: float("inf") if compressed else 0.0):
        assert guarded(model, ids(90), 1e9)[2] == [0, 1, 2, 3]


def test_generate_takes_it(loaded, prompt):
    model, tokenizer = loaded
    arguments = {"max_tokens": 12, "kv_scheme": "turbo4:window=4,block=32"}
    plain = mlx_turboquant.generate(model, tokenizer, prompt, **arguments)
    assert mlx_turboquant.generate(model, tokenizer, prompt, **arguments, kv_guard=100) == plain
    made, make = [], mlx_turboquant.generation.make_prompt_cache

    def noted(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return made[-1]

    exact = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    with mock.patch.object(mlx_turboquant.generation, "make_prompt_cache", noted):
        assert mlx_turboquant.generate(model, tokenizer, prompt, **arguments, kv_guard=0) == exact
    assert all(isinstance(layer, RawLayerCache) for layer in made[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_guard": 0.1}, "needs kv_scheme"),
        ({"kv_guard": -1, "kv_scheme": "turbo4"}, "wanted kv_guard .* got -1"),
        ({"kv_guard": float("nan"), "kv_scheme": "turbo4"}, "got nan"),
        ({"kv_guard": 0.1, "kv_scheme": "turbo4", "max_kv_size": 400}, "does not go with max_kv_size"),
        ({"kv_guard": 0.1, "kv_scheme": "turbo4:prefill=compressed"}, "prefill=compressed keeps none"),
    ],
)
def test_what_does_not_go_with_it_is_refused(loaded, prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        mlx_turboquant.generate(*loaded, prompt, **arguments, max_tokens=2)
    if "kv_scheme" in arguments:
        cache = make_prompt_cache(loaded[0], kv_scheme=arguments["kv_scheme"])
        with pytest.raises(ValueError, match="needs kv_scheme"):
            mlx_turboquant.generate(*loaded, prompt, **arguments, prompt_cache=cache)


def test_the_command_takes_it(model_dir, prompt, monkeypatch, capsys):
    from mlx_turboquant.cli.generate import main

    common = ["generate", "--model", str(model_dir), "--prompt", prompt, "--max-tokens", "6", "--kv-report"]
    monkeypatch.setattr(sys, "argv", [*common, "--kv-scheme", "turbo4:window=4,block=32", "--kv-guard", "0"])
    main()
    assert "the guard kept it raw" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*common, "--kv-guard", "0.1"])
    with pytest.raises(SystemExit):
        main()
    assert "needs kv_scheme" in capsys.readouterr().err


def test_raw_layers_are_not_copied_while_it_measures(model):
    prompt = ids(90)
    cache = make_prompt_cache(model, kv_scheme=SCHEME)
    model(prompt[None, :-9], cache=cache)
    arrays = [layer._tail[0].array for layer in cache]
    guard._Guard(model, cache, prompt[-9:-1], 0.1).layers_to_keep_raw([0, 1, 2, 3])
    assert all(a is layer._tail[0].array for a, layer in zip(arrays, cache, strict=True))
    assert all(isinstance(layer, TurboQuantKVCache) and layer.offset == 81 for layer in cache)
