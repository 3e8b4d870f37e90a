"""A bound for all layers of a prompt cache: compressed ones, those that mlx-lm bounds, those that nothing bounds."""

import warnings
from typing import Any

from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache

from mlx_turboquant.cache.bound import check_max_size
from mlx_turboquant.cache.two_phase import TurboQuantKVCache

KEEP = 4  # first tokens that mlx-lm's make_prompt_cache lets a rotating cache keep
_BOUNDED = (TurboQuantKVCache, RotatingKVCache, ChunkedKVCache, ArraysCache)


def bound_layers(model: Any, caches: list[Any], max_kv_size: int) -> list[Any]:
    """The empty caches of a model's layers, bounded to so many tokens.

    Compressed layers drop their oldest blocks (`bound`). Where mlx-lm makes the caches itself, plain layers become its
    rotating cache, as without a scheme. Where the model makes them (``make_cache``), mlx-lm ignores ``max_kv_size``:
    sliding and recurrent layers are bounded anyway, and a warning names those that stay unbounded.

    Raises:
        ValueError: if the bound is too small for a layer's scheme, or if a model whose layers share one mask would have
            rotating and compressed layers, which hold different tokens.
    """
    ours = [cache for cache in caches if isinstance(cache, TurboQuantKVCache)]
    for cache in ours:
        check_max_size(max_kv_size, cache.scheme, "[make_prompt_cache] max_kv_size")
        cache.max_size = max_kv_size
    rest = [i for i, cache in enumerate(caches) if not isinstance(cache, _BOUNDED)]
    reasons = "; ".join(sorted({_why_plain(caches[i]) for i in rest}))
    if rest and hasattr(model, "make_cache"):
        warnings.warn(
            f"[make_prompt_cache] max_kv_size={max_kv_size} does not bound layers {_listed(rest)}, which stay raw "
            f"({reasons}): this model makes its own caches, and mlx-lm ignores max_kv_size there.",
            RuntimeWarning,
            stacklevel=3,
        )
        return caches
    if rest and ours:
        raise ValueError(
            f"[make_prompt_cache] max_kv_size={max_kv_size} cannot bound this mixture: layers {_listed(rest)} stay raw "
            f"({reasons}) and would rotate token by token, the compressed layers drop whole blocks, and the model may "
            "make one mask for all of them. Leave out max_kv_size (--max-kv-size), or compress every layer."
        )
    return [_rotating(cache, max_kv_size) if i in rest else cache for i, cache in enumerate(caches)]


def _rotating(plain: KVCache, max_size: int) -> RotatingKVCache:
    cache = RotatingKVCache(max_size=max_size, keep=KEEP)
    cache.turboquant_why_raw = _why_plain(plain)
    return cache


def _why_plain(cache: Any) -> str:
    return getattr(cache, "turboquant_why_raw", type(cache).__name__)


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
