"""mlx-lm's generate and stream_generate with one more argument: kv_scheme."""

import importlib
from collections.abc import Generator
from typing import Any

import mlx.core as mx

from mlx_turboquant.attention import MAX_DIRECT_QUERIES
from mlx_turboquant.cache import TurboQuantKVCache, link_drafts
from mlx_turboquant.guard import check_bound, read_guarded
from mlx_turboquant.mlx_lm_hooks import make_prompt_cache
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.scheme_file import LayerSchemes, mismatch, resolve

GUARD_NEEDS = (
    "[generate] kv_guard (--kv-guard) needs kv_scheme (--kv-scheme) and a prompt that was not read yet. Leave out "
    "prompt_cache (--prompt-cache-file)."
)
# As an attribute of its package this name is a function that hides the module.
_mlx_lm = importlib.import_module("mlx_lm.generate")


def generate(model: Any, tokenizer: Any, prompt: Any, verbose: bool = False, **kwargs: Any) -> str:
    """The text that the model generates, as ``mlx_lm.generate``.

    Args:
        model, tokenizer, prompt, verbose, kwargs: as for ``mlx_lm.generate``.
        kv_scheme: a `KVScheme` or its text; without it nothing is compressed. A draft model's cache takes it too.
        kv_guard: a bound in nats, see `guard.read_guarded`: layers whose compression changes the model's next-token
            distributions by more stay raw, and `report` says so. mlx-lm's count of prompt tokens then has the last few.

    Raises:
        ValueError: for an unknown scheme, an empty prompt, kv_bits beside a scheme, a max_kv_size that is too small for
            it or comes with a draft model, a prompt_cache that has another scheme, or a kv_guard without kv_scheme or
            with a draft model, a prompt_cache or input_embeddings.
    """
    prompt, kwargs = _with_cache(model, tokenizer, prompt, kwargs)
    return _mlx_lm.generate(model, tokenizer, prompt, verbose=verbose, **kwargs)


def stream_generate(model: Any, tokenizer: Any, prompt: Any, **kwargs: Any) -> Generator[Any, None, None]:
    """A generator of responses, as ``mlx_lm.stream_generate``; arguments and errors as for `generate`."""
    prompt, kwargs = _with_cache(model, tokenizer, prompt, kwargs)
    return _mlx_lm.stream_generate(model, tokenizer, prompt, **kwargs)


def prompt_cache_for(model: Any, kv_scheme: Any, draft_model: Any = None, **kwargs: Any) -> list[Any]:
    """The cache that `generate` makes: the model's layers, then the draft model's.

    Raises:
        ValueError: for an unknown scheme, or a kv_bits or max_kv_size in kwargs that conflicts with it; for max_kv_size
            with a draft model, whose rejected drafts a bounded cache could not take back once it has dropped tokens.
    """
    scheme = resolve(kv_scheme)
    if scheme.method != "fp16":
        _refuse_kv_bits(scheme, kwargs.get("kv_bits"))
    if scheme.two_phase and draft_model is not None and kwargs.get("max_kv_size") is not None:
        raise ValueError(
            f"[generate] max_kv_size={kwargs['max_kv_size']} (--max-kv-size) does not go with a draft model: rejected "
            "drafts are trimmed, and mlx-lm does not trim a cache that has dropped tokens. Leave out one of the two."
        )
    if draft_model is not None:
        check_draft_tokens(scheme, kwargs.get("num_draft_tokens"))
    cache = make_prompt_cache(model, kwargs.get("max_kv_size"), kv_scheme=scheme)
    return cache if draft_model is None else cache + make_prompt_cache(draft_model, kv_scheme=scheme)


def check_prompt_cache(cache: list[Any], kv_scheme: Any = None, kv_bits: int | None = None) -> None:
    """Refuse a prompt cache that has another scheme than the one asked for, or that kv_bits would quantize again.

    Raises:
        ValueError: naming both.
    """
    held = [c.scheme for c in cache if isinstance(c, TurboQuantKVCache)]
    if held:
        _refuse_kv_bits(held[0], kv_bits)
    if held and kv_scheme is not None and (differ := mismatch(held, resolve(kv_scheme))):
        raise ValueError(
            f"[generate] The prompt cache has the scheme '{differ[0]}', '{differ[1]}' was asked for. "
            "Leave out kv_scheme (--kv-scheme) to go on with the cache's own."
        )


def check_draft_tokens(scheme: KVScheme | LayerSchemes, num_draft_tokens: int | None) -> None:
    """Refuse so many draft tokens that no call would be taken for decoding, and nothing would ever be compressed.

    Raises:
        ValueError: with the most there can be.
    """
    most = MAX_DIRECT_QUERIES - 1  # the token before them is verified with them
    if scheme.two_phase and num_draft_tokens is not None and num_draft_tokens > most:
        raise ValueError(
            f"[generate] num_draft_tokens={num_draft_tokens} (--num-draft-tokens) is more than '{scheme}' can verify "
            f"over compressed rows. Draft at most {most} tokens at a time."
        )


def _refuse_kv_bits(scheme: KVScheme | LayerSchemes, kv_bits: int | None) -> None:
    if kv_bits is not None:
        raise ValueError(
            f"[generate] kv_bits={kv_bits} (--kv-bits) conflicts with the scheme '{scheme}': both say how to store the "
            "KV cache. Leave out one of the two."
        )


def guarded(model: Any, tokenizer: Any, prompt: Any, bound: Any, kwargs: dict[str, Any]) -> mx.array:
    """Read the prompt under a guard into the cache in kwargs, which is empty; the tokens that are left to read.

    Raises:
        ValueError: for what does not go with a guard.
    """
    bound = check_bound(bound)
    for name in ("draft_model", "input_embeddings", "max_kv_size"):
        if kwargs.get(name) is not None:
            raise ValueError(f"[generate] kv_guard (--kv-guard) does not go with {name}. Leave out one of the two.")
    if isinstance(prompt, str):  # as mlx-lm encodes it
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=special)
    step = {"prefill_step_size": kwargs["prefill_step_size"]} if kwargs.get("prefill_step_size") else {}
    left, kwargs["prompt_cache"] = read_guarded(model, mx.array(prompt), kwargs["prompt_cache"], bound, **step)
    return left


def _with_cache(model: Any, tokenizer: Any, prompt: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    kwargs = dict(kwargs)
    kv_scheme, kv_guard = kwargs.pop("kv_scheme", None), kwargs.pop("kv_guard", None)
    if kv_guard is not None and (kv_scheme is None or kwargs.get("prompt_cache") is not None):
        raise ValueError(GUARD_NEEDS)
    if len(prompt) == 0 and kwargs.get("input_embeddings") is None:
        raise ValueError("[generate] The prompt is empty; give at least one token.")
    if kwargs.get("prompt_cache") is not None:
        check_prompt_cache(kwargs["prompt_cache"], kv_scheme, kwargs.get("kv_bits"))
        ours = next((c for c in kwargs["prompt_cache"] if isinstance(c, TurboQuantKVCache)), None)
        if ours is not None and kwargs.get("draft_model") is not None:
            check_draft_tokens(ours.scheme, kwargs.get("num_draft_tokens"))
    elif kv_scheme is not None:
        kwargs["prompt_cache"] = prompt_cache_for(model, kv_scheme, **kwargs)
    if kwargs.get("prompt_cache") is not None:
        link_drafts(kwargs["prompt_cache"], model, kwargs.get("draft_model"))
    return prompt if kv_guard is None else guarded(model, tokenizer, prompt, kv_guard, kwargs), kwargs
