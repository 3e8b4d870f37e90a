"""Model families: which layers are compressed and why others are not, and what compressed layers do to the output."""

import sys
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import decode, kld, tokens
from families import FAMILIES, RECURRENT, family_table, made_cache, tiny_model
from mlx_lm.generate import generate_step

from mlx_turboquant import TurboQuantKVCache, load_prompt_cache, report, save_prompt_cache

README = Path(__file__).resolve().parents[1] / "README.md"
PROMPT, DECODED, TURN, AFTER = 150, 20, 30, 4
# Of the divergence of a cache whose keys are in the wrong order, which is what a broken cache comes to.
ALLOWED = {"turbo8": 0.02, "turbo4": 0.1}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
compressed = pytest.mark.parametrize("family", [f for f in FAMILIES if f.compressed], ids=lambda family: family.name)


@pytest.fixture(scope="module", autouse=True)
def no_compiling():
    """MLX would run a C++ compiler for each family's fused functions on the CPU, longer than all of these tests."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@lru_cache
def model_of(family_name: str):
    return tiny_model(next(family for family in FAMILIES if family.name == family_name))


@lru_cache
def conversation(family_name: str, scheme: str, broken: bool = False):
    """The logits of an answer and of a second turn, teacher-forced, and the cache after them."""
    model, ids = model_of(family_name), tokens(PROMPT + DECODED + TURN + AFTER)
    cache = made_cache(model, scheme)
    model(ids[:, :PROMPT], cache=cache)
    first = decode(model, ids, cache, PROMPT, PROMPT + 1)
    if broken:
        disorder_keys(cache)
    answer = mx.concatenate([first, decode(model, ids, cache, PROMPT + 1, PROMPT + DECODED)], axis=1)
    turn = model(ids[:, PROMPT + DECODED : -AFTER], cache=cache)
    turn = mx.concatenate([turn, decode(model, ids, cache, PROMPT + DECODED + TURN, ids.shape[1])], axis=1)
    mx.eval(answer, turn)
    return answer, turn, cache


def disorder_keys(cache) -> None:
    """Put the encoded keys of each compressed layer, with their scales, in another order."""
    for layer in cache:
        if isinstance(layer, TurboQuantKVCache):
            order = mx.random.permutation(layer.block_tokens, key=mx.random.key(5))
            codes, scales, _ = layer._blocks[0]._parts
            for part in (codes, scales):
                part.array[:, :, : layer.block_tokens] = part.array[:, :, order]


@every_family
def test_which_layers_are_compressed_and_why_others_are_not(family):
    told = report(conversation(family.name, "turbo4")[2]).layers
    assert tuple(layer.why_raw for layer in told) == family.why_raw
    for layer in told:
        assert (layer.scheme == "turbo4") == (layer.why_raw == "") == (layer.block_tokens > 0)
        held = layer.sink_tokens + layer.block_tokens + layer.tail_tokens
        assert held == (0 if layer.why_raw == RECURRENT else PROMPT + DECODED + TURN + AFTER)


@compressed
@pytest.mark.parametrize("scheme", ["turbo8", "turbo4"])
@pytest.mark.parametrize("part", [0, 1], ids=["answer", "second_turn"])
def test_logits_stay_close_and_much_closer_than_with_disordered_keys(family, scheme, part):
    exact, ours = conversation(family.name, "fp16")[part], conversation(family.name, scheme)[part]
    broken = kld(exact, conversation(family.name, "turbo8", broken=True)[part])
    assert 1e-9 < kld(exact, ours) < ALLOWED[scheme] * broken
    assert broken > 1e-3


@every_family
def test_a_saved_cache_goes_on_bit_for_bit(family, tmp_path):
    model, ids = model_of(family.name), tokens(PROMPT + 12)
    cache = made_cache(model, "turbo4")
    model(ids[:, :PROMPT], cache=cache)
    decode(model, ids, cache, PROMPT, PROMPT + 2)
    path = save_prompt_cache(tmp_path / "cache.safetensors", cache, model=model)
    loaded = load_prompt_cache(path, model=model)
    told = [[layer.why_raw for layer in report(c).layers] for c in (cache, loaded)]
    assert told[0] == told[1] or (not family.compressed and "from a file" in told[1][0])
    ends = [
        mx.concatenate([decode(model, ids, c, PROMPT + 2, PROMPT + 6), model(ids[:, PROMPT + 6 :], cache=c)], axis=1)
        for c in (cache, loaded)
    ]
    assert mx.array_equal(*ends)


@compressed
def test_mlx_lms_own_loop_generates_the_same_tokens_through_the_bookkeeping(family):
    """With raw rows in sinks, blocks and tail; prompts are read in chunks of which the last has one token."""
    model, ids = model_of(family.name), tokens(PROMPT)[0]
    ours, theirs = made_cache(model, "turbo0v0"), made_cache(model, "fp16")
    runs = [
        [token for token, _ in generate_step(ids, model, prompt_cache=c, max_tokens=20, prefill_step_size=74)]
        for c in (ours, theirs)
    ]
    assert runs[0] == runs[1]
    assert {c.block_tokens for c in ours if isinstance(c, TurboQuantKVCache)} == {128}


def test_the_readme_has_the_table_of_families():
    found = README.read_text().split("<!-- families -->")[1].split("<!-- /families -->")[0]
    assert found.strip() == family_table(), f"{sys.executable} tests/families.py prints the table"
