"""How many bytes a prompt cache takes at a given length, from the model's shapes alone."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_turboquant.cache.schedule import tail_room
from mlx_turboquant.mlx_lm_hooks import make_prompt_cache
from mlx_turboquant.quantizers import make_quantizers
from mlx_turboquant.scheme import KVScheme

# Sinks, window and a block of the default scheme, rounded up to the raw buffer's step.
SURELY_COMPRESSED = 256


@dataclass(frozen=True)
class LayerShape:
    """One layer that holds plain keys and values.

    Attributes:
        kv_heads, key_dim, value_dim: of its cache.
        dtype: of its keys and values.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype


def layer_shapes(model: Any) -> list[LayerShape | None]:
    """The shape of each layer's cache, from a pass over one token; None for a layer that holds something else."""
    caches = make_prompt_cache(model, kv_scheme="fp16")
    mx.eval(model(mx.array([[0]]), cache=caches))
    return [
        LayerShape(c.keys.shape[1], c.keys.shape[3], c.values.shape[3], c.keys.dtype) if type(c) is KVCache else None
        for c in caches
    ]


def cache_nbytes(scheme: KVScheme, shape: LayerShape, tokens: int) -> int:
    """Bytes that one layer's cache holds right after compressing a prompt of so many tokens: its `nbytes`.

    Later the packed part has spare room, see `cache.schedule.spare_blocks`. For ``fp16``, the tokens' own bytes.
    """
    itemsize = shape.dtype.size
    row = shape.kv_heads * (shape.key_dim + shape.value_dim) * itemsize
    if scheme.method == "fp16":
        return tokens * row
    blocks = max(tokens - scheme.sinks - scheme.window, 0) // scheme.block
    keys, values = make_quantizers(scheme, shape.key_dim, shape.value_dim, shape.dtype)
    sums = {"": 0, "squares": shape.key_dim, "moments": shape.key_dim**2}[keys.queries_wanted] * shape.kv_heads * 4
    if not blocks:
        return -(-tokens // 256) * 256 * row + sums
    packed = 0
    for side in (keys, values):
        shapes, dtypes = side.layout(1, shape.kv_heads, blocks * scheme.block)
        pairs = [pair for pair in zip(shapes, dtypes, strict=True) if pair[0] is not None]
        packed += sum(dtype.size * prod(each) for each, dtype in [*pairs, *side.learned_layout(1, shape.kv_heads)])
    tail = max(tail_room(scheme), tokens - scheme.sinks - blocks * scheme.block)
    return packed + (scheme.sinks + tail) * row + sums


def context_that_fits(nbytes_at: Callable[[int], int], budget: int, limit: int = 1 << 24) -> int:
    """The largest number of tokens whose `nbytes_at(tokens)` is within the budget.

    It grows with the tokens, but for the drop where a short prompt that fills a raw buffer begins to be compressed;
    from SURELY_COMPRESSED on it only grows, so the search starts there if that much fits.
    """
    low, high = SURELY_COMPRESSED if nbytes_at(SURELY_COMPRESSED) <= budget else 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if nbytes_at(middle) <= budget else (low, middle - 1)
    return low


__all__ = ["LayerShape", "cache_nbytes", "context_that_fits", "layer_shapes"]
