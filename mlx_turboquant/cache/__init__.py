"""The caches: what mlx-lm hands a model in place of its own KV cache."""

from mlx_turboquant.cache.two_phase import TurboQuantKVCache

__all__ = ["TurboQuantKVCache"]
