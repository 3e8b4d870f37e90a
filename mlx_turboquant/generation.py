"""mlx-lm's generate and stream_generate with one more argument: kv_scheme."""

import importlib
from collections.abc import Generator
from typing import Any

from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.mlx_lm_hooks import make_prompt_cache
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.scheme_file import LayerSchemes, mismatch, resolve

# As an attribute of its package this name is a function that hides the module.
_mlx_lm = importlib.import_module("mlx_lm.generate")


def generate(model: Any, tokenizer: Any, prompt: Any, verbose: bool = False, **kwargs: Any) -> str:
    """The text that the model generates, as ``mlx_lm.generate``.

    Args:
        model, tokenizer, prompt, verbose, kwargs: as for ``mlx_lm.generate``.
        kv_scheme: a `KVScheme` or its text; without it nothing is compressed. A draft model's cache takes it too.

    Raises:
        ValueError: for an unknown scheme, an empty prompt, kv_bits or max_kv_size beside a scheme, or a prompt_cache
            that has another one.
    """
    return _mlx_lm.generate(model, tokenizer, prompt, verbose=verbose, **_with_cache(model, prompt, kwargs))


def stream_generate(model: Any, tokenizer: Any, prompt: Any, **kwargs: Any) -> Generator[Any, None, None]:
    """A generator of responses, as ``mlx_lm.stream_generate``; arguments and errors as for `generate`."""
    return _mlx_lm.stream_generate(model, tokenizer, prompt, **_with_cache(model, prompt, kwargs))


def prompt_cache_for(model: Any, kv_scheme: Any, draft_model: Any = None, **kwargs: Any) -> list[Any]:
    """The cache that `generate` makes: the model's layers, then the draft model's.

    Raises:
        ValueError: for an unknown scheme, or a kv_bits or max_kv_size in kwargs that conflicts with it.
    """
    scheme = resolve(kv_scheme)
    if scheme.method != "fp16":
        _refuse_kv_bits(scheme, kwargs.get("kv_bits"))
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


def _refuse_kv_bits(scheme: KVScheme | LayerSchemes, kv_bits: int | None) -> None:
    if kv_bits is not None:
        raise ValueError(
            f"[generate] kv_bits={kv_bits} (--kv-bits) conflicts with the scheme '{scheme}': both say how to store the "
            "KV cache. Leave out one of the two."
        )


def _with_cache(model: Any, prompt: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = dict(kwargs)
    kv_scheme = kwargs.pop("kv_scheme", None)
    if len(prompt) == 0 and kwargs.get("input_embeddings") is None:
        raise ValueError("[generate] The prompt is empty; give at least one token.")
    if kwargs.get("prompt_cache") is not None:
        check_prompt_cache(kwargs["prompt_cache"], kv_scheme, kwargs.get("kv_bits"))
    elif kv_scheme is not None:
        kwargs["prompt_cache"] = prompt_cache_for(model, kv_scheme, **kwargs)
    return kwargs
