"""The caches: what mlx-lm hands a model in place of its own KV cache."""

from mlx_turboquant.cache.ragged_batch import BatchTurboQuantKVCache
from mlx_turboquant.cache.raw_layer import RawLayerCache
from mlx_turboquant.cache.two_phase import TurboQuantKVCache

TurboQuantKVCache.merge = BatchTurboQuantKVCache.merge

__all__ = ["BatchTurboQuantKVCache", "RawLayerCache", "TurboQuantKVCache"]
