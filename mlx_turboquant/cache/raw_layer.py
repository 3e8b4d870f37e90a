"""The cache of a layer that a scheme keeps raw, in a model whose other layers are compressed."""

from typing import Any

from mlx_lm.models.cache import KVCache


class RawLayerCache(KVCache):
    """mlx-lm's ``KVCache``, of which a batch lies as the compressed layers' batches do: from row 0, not left-padded.

    All layers of a model share one mask, so they must agree on where a sequence's tokens lie.

    Args:
        layer: this layer's number, for messages.
    """

    def __init__(self, layer: int = 0):
        super().__init__()
        self.layer = layer

    @classmethod
    def merge(cls, caches: list[Any]) -> Any:
        """A batch of the sequences of these caches; errors as of `BatchTurboQuantKVCache.merge`."""
        from mlx_turboquant.cache.ragged_batch import BatchTurboQuantKVCache  # which extracts this class

        return BatchTurboQuantKVCache.merge(caches)
