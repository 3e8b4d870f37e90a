"""Speculative decoding over compressed caches: drafts are verified on packed rows, rejected ones are taken back.

A call that verifies L tokens encodes before its first one, so its later tokens may see raw a block that single steps
would have encoded by then. Its logits are therefore not those of single steps with the rule for single steps, but
exactly those of single steps over a cache that is encoded at the same moments; that is what is compared here.
"""

import copy

import mlx.core as mx
import mlx_lm
import pytest
from conftest import kld, tiny_llama, tokens
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step, speculative_generate_step

import mlx_turboquant
from mlx_turboquant import TurboQuantKVCache, make_prompt_cache
from mlx_turboquant.tensor import CompressedRows


def dense(cache):
    """The keys and values that a cache stands for."""
    return [r.dense() if isinstance(r, CompressedRows) else r for r in cache.keys_and_values()]


@pytest.fixture(scope="module")
def target():
    return tiny_llama(layers=1)


@pytest.fixture(scope="module")
def draft(target):
    """The target with noise on its weights: it guesses right now and then."""
    model = tiny_llama(layers=1)
    weights = tree_flatten(target.parameters())
    keys = mx.random.split(mx.random.key(5), len(weights))
    noisy = [
        (name, w + 0.1 * mx.abs(w).mean() * mx.random.normal(w.shape, key=key))
        for (name, w), key in zip(weights, keys, strict=True)
    ]
    model.update(tree_unflatten(noisy))
    mx.eval(model.parameters())
    return model


class Speculation:
    """One speculative run of 60 tokens; what each call gave the target's cache, and whether a trim cut a block."""

    def __init__(self, monkeypatch, target, draft, scheme, num_draft, prompt):
        self.calls = []  # (tokens held, tokens given, tokens in blocks) of the target's first layer
        self.rewinds = []  # (tokens in blocks, tokens trimmed)
        self.cuts = set()  # whose cache lost a block
        self.target_cache, self.draft_cache = (make_prompt_cache(m, kv_scheme=scheme) for m in (target, draft))
        update, trim = TurboQuantKVCache.update_and_fetch, TurboQuantKVCache.trim

        def spy_update(cache, keys, values):
            held = cache.offset
            fetched = update(cache, keys, values)
            if cache is self.target_cache[0]:
                self.calls.append((held, keys.shape[2], cache.block_tokens))
            return fetched

        def spy_trim(cache, n):
            before = cache.block_tokens
            trimmed = trim(cache, n)
            self.rewinds.append((before, trimmed))
            if cache.block_tokens != before:
                self.cuts.add("target" if any(cache is layer for layer in self.target_cache) else "draft")
            return trimmed

        with monkeypatch.context() as patch:
            patch.setattr(TurboQuantKVCache, "update_and_fetch", spy_update)
            patch.setattr(TurboQuantKVCache, "trim", spy_trim)
            steps = list(
                speculative_generate_step(
                    prompt, target, draft, prompt_cache=self.target_cache + self.draft_cache,
                    num_draft_tokens=num_draft, max_tokens=60,
                )
            )  # fmt: skip
        self.tokens = [token for token, *_ in steps]
        self.logits = mx.stack([logits for _, logits, _ in steps])
        self.accepted = sum(from_draft for *_, from_draft in steps)


class StepByStep(TurboQuantKVCache):
    """A cache that is encoded only when it is told to."""

    def _is_decode(self, tokens):
        return False


def replay(target, run, scheme, prompt):
    """The logits of single steps over the run's tokens, with a cache that is encoded where the run's was."""
    cache = make_prompt_cache(target, kv_scheme=scheme)
    for layer in cache:
        layer.__class__ = StepByStep
    target(prompt[None, :-1], cache=cache)
    encoded, logits = {held: blocks for held, _, blocks in run.calls[1:]}, []
    for token in [prompt[-1].item(), *run.tokens[:-1]]:
        if cache[0].block_tokens < encoded.get(cache[0].offset, 0):
            for layer, other in zip(cache, run.target_cache, strict=True):
                # The run's first call, the prompt's last token and its drafts, was one more call of the prompt.
                layer._query_squares = other._query_squares
                layer.compress()
        logits.append(target(mx.array([[token]]), cache=cache)[0, -1])
        mx.eval(logits[-1])
    logits = mx.stack(logits)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


# With blocks of 16, sixty tokens cross three or four boundaries; the lengths shift where the calls meet them.
@pytest.mark.parametrize("length", [35, 46])
@pytest.mark.parametrize("num_draft", range(1, 8))
def test_verification_gives_the_logits_of_single_steps_encoded_alike(monkeypatch, target, draft, num_draft, length):
    scheme, prompt = "turbo4:block=16", tokens(length, seed=length)[0]
    run = Speculation(monkeypatch, target, draft, scheme, num_draft, prompt)
    assert len(run.tokens) == 60 and run.target_cache[0].block_tokens >= 48
    assert any(before and n for before, n in run.rewinds) and not run.cuts
    logits = replay(target, run, scheme, prompt)
    assert mx.abs(logits - run.logits).max() < 1e-3
    assert logits.argmax(axis=-1).tolist() == run.tokens


@pytest.mark.parametrize("num_draft", [1, 3, 7])
def test_the_raw_scheme_gives_the_tokens_of_plain_decoding(monkeypatch, target, draft, num_draft):
    prompt = tokens(84)[0]
    run = Speculation(monkeypatch, target, draft, "turbo0v0", num_draft, prompt)
    cache = make_prompt_cache(target, kv_scheme="turbo0v0")
    assert run.tokens == [token for token, _ in generate_step(prompt, target, prompt_cache=cache, max_tokens=60)]
    assert run.accepted and run.target_cache[0].block_tokens == 64


@pytest.mark.parametrize(("scheme", "bound"), [("turbo8", 2e-4), ("turbo4", 0.02)])
def test_against_plain_decoding_only_the_moments_of_encoding_differ(monkeypatch, target, draft, scheme, bound):
    """On the same tokens: as close to plain decoding as the scheme is to the raw cache, or closer."""
    prompt = tokens(84)[0]
    run = Speculation(monkeypatch, target, draft, scheme, 5, prompt)
    plain = make_prompt_cache(target, kv_scheme=scheme)
    ids = mx.concatenate([prompt, mx.array(run.tokens)])[None]
    mx.eval(target(ids[:, :84], cache=plain))
    logits = [target(ids[:, i : i + 1], cache=plain)[0, -1] for i in range(84, 143)]
    assert 0 < kld(mx.stack(logits), run.logits[1:]) < bound
    assert plain[0].block_tokens == run.target_cache[0].block_tokens == 64


@pytest.mark.parametrize("options", ["", ":block=16,window=7"])
def test_no_rewind_cuts_a_block_at_any_length_of_the_tail(random_rows, options):
    """Every length of the tail, every number of drafts, every number of them rejected."""
    cache = TurboQuantKVCache(f"turbo4{options}")
    block, window = cache.scheme.block, cache.scheme.window
    cache.update_and_fetch(*random_rows(T=4 + block + window))
    cache.compress()
    tails = set()
    for step in range(block + 1):
        tails.add(cache.tail_tokens)
        for drafts in range(1, 8):
            verified = copy.deepcopy(cache)
            verified.trim(0)  # as after the call before
            rows = random_rows(T=drafts + 1, seed=100 + drafts)
            verified.update_and_fetch(*rows)
            held, blocks = verified.offset, verified.block_tokens
            whole = dense(verified) if step % 8 == 0 else None
            for rejected in range(drafts + 1):
                rewound = copy.deepcopy(verified)
                assert rewound.trim(rejected) == rejected
                assert (rewound.offset, rewound.block_tokens) == (held - rejected, blocks)
                if whole and rejected == drafts:
                    for one, other in zip(dense(rewound), whole, strict=True):
                        assert mx.array_equal(one, other[:, :, : held - rejected])
            # A draft model takes the same tokens one by one, and may have encoded a block on the way.
            drafting = copy.deepcopy(cache)
            for i in range(drafts):
                drafting.update_and_fetch(*(side[:, :, i : i + 1] for side in rows))
            blocks = drafting.block_tokens
            drafting.trim(drafts - 1)
            assert drafting.block_tokens == blocks
        cache.update_and_fetch(*random_rows(T=1, seed=step))
    assert tails == set(range(window, window + block + 1))


def test_a_window_smaller_than_the_drafts_costs_only_the_drafts(monkeypatch, target, draft):
    """A draft model's block may then be cut and encoded again; the target's never is."""
    prompt = tokens(40)[0]
    run = Speculation(monkeypatch, target, draft, "turbo4:block=16,window=0", 7, prompt)
    assert run.cuts == {"draft"}
    logits = replay(target, run, "turbo4:block=16,window=0", prompt)
    assert logits.argmax(axis=-1).tolist() == run.tokens


def test_both_caches_take_the_scheme_and_the_text_is_whole(model_dir, prompt):
    model, tokenizer = mlx_lm.load(str(model_dir))
    arguments = {"max_tokens": 24, "draft_model": model, "num_draft_tokens": 3}
    parts = list(mlx_turboquant.stream_generate(model, tokenizer, prompt, kv_scheme="turbo4", **arguments))
    assert any(part.from_draft for part in parts)
    cache = mlx_turboquant.generation.prompt_cache_for(model, "turbo4", draft_model=model)
    text = mlx_turboquant.generate(model, tokenizer, prompt, prompt_cache=cache, **arguments)
    assert text == "".join(part.text for part in parts)
    assert [layer.block_tokens for layer in cache] == [128] * 4


def test_more_drafts_than_a_call_can_verify_are_refused(model_dir):
    model, tokenizer = mlx_lm.load(str(model_dir))
    arguments = {"draft_model": model, "num_draft_tokens": 8}
    with pytest.raises(ValueError, match=r"num_draft_tokens=8 .*Draft at most 7 tokens"):
        mlx_turboquant.generate(model, tokenizer, "w5", kv_scheme="turbo4", **arguments)
    cache = mlx_turboquant.generation.prompt_cache_for(model, "turbo4", draft_model=model)
    with pytest.raises(ValueError, match="Draft at most 7 tokens"):
        mlx_turboquant.generate(model, tokenizer, "w5", prompt_cache=cache, **arguments)
    assert isinstance(mlx_turboquant.generate(model, tokenizer, "w5", kv_scheme="fp16", max_tokens=3, **arguments), str)
