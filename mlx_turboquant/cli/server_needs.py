"""How many KV bytes requests will need, from the shapes of the model's caches and the requests' lengths."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList

from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cache.schedule import spare_blocks
from mlx_turboquant.sizes import LayerShape, cache_nbytes

_STEP = 256  # rows by which raw buffers grow, mlx-lm's and ours
_SEGMENTS = 3  # into so many parts mlx-lm cuts a prompt, each of which may pad the others of a raw batch


class Need(NamedTuple):
    """Tokens of a request: of its prompt, and with all that it may generate."""

    prompt: int
    total: int


class KVNeeds:
    """Upper bounds of the KV bytes of requests that are served together, for one model (and its draft model).

    A batch gives every sequence the room of its longest, so n sequences need n times what the longest does; one whose
    prompt is still read has its raw rows on top. Rows of a prompt lie behind the longest prompt read beside it: where
    prompts of 2,000 and 500 tokens are read together, the first may have got 500 rows of padding.

    Args:
        layers: empty caches of each layer, of all models that serve a request, after one token went through them.
        step: tokens of a prompt that are read at a time (--prefill-step-size).
        at_once: prompts that are read at a time (--prompt-concurrency).

    Raises:
        ValueError: for a layer whose cache tells nothing to estimate from.

    Source: derived from `ragged_store` and mlx-lm 0.32's BatchKVCache; tests compare it with what servers hold.
    """

    def __init__(self, layers: Sequence[Any], step: int, at_once: int):
        self._layers = [part for layer in layers for part in _parts(layer)]
        self._step, self._at_once = step, at_once

    def nbytes(self, running: Sequence[Need], reading: Sequence[Need]) -> int:
        """Bytes that these requests hold at most, together.

        Args:
            running: every request, those of `reading` among them.
            reading: those whose prompt is not read yet.
        """
        if not running:
            return 0
        total = max(need.total for need in running)
        need = len(running) * sum(part.kept(total) for part in self._layers)
        if reading:
            prompts = sorted((request.prompt for request in reading), reverse=True)
            beside = min(prompts[1], self._step) if len(prompts) > 1 else 0
            raw = sum(part.reading(total, prompts[0], beside, self._step) for part in self._layers)
            need += min(len(prompts), self._at_once) * raw
        return need


class _Compressed:
    """A layer that is compressed once its prompt is read.

    Like the kinds below it tells bytes of one sequence: `kept` for so many tokens once the prompt is read, and what it
    has on top of that while it is still `reading` a prompt beside which others are read.
    """

    def __init__(self, layer: TurboQuantKVCache):
        self._scheme = layer.scheme
        keys, values = layer.keys_and_values()
        self._shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        self._sums = cache_nbytes(self._scheme, self._shape, 0)
        self._first = self._scheme.sinks + self._scheme.window + self._scheme.block  # tokens when a block is encoded
        self._short = cache_nbytes(self._scheme, self._shape, self._first - 1)  # the most before that

    def _packed(self, tokens: int) -> int:
        if tokens < self._first:
            return 0
        scheme = self._scheme
        blocks = (tokens - scheme.sinks - scheme.window) // scheme.block
        return cache_nbytes(scheme, self._shape, tokens + spare_blocks(blocks, scheme.block) * scheme.block)

    def kept(self, tokens: int) -> int:
        return max(self._packed(tokens), self._short)

    def reading(self, tokens: int, prompt: int, beside: int, step: int) -> int:
        if self._scheme.prefill == "compressed":
            prompt = min(prompt, step) + self._first
        rows = -(-(prompt + beside) // _STEP) * _STEP
        row = self._shape.kv_heads * (self._shape.key_dim + self._shape.value_dim) * self._shape.dtype.size
        return self._packed(tokens) + rows * row + self._sums - self.kept(tokens)


class _Rows:
    """A layer of mlx-lm's that holds rows as they are, or quantized as they come; all, or the newest `most`."""

    def __init__(self, layer: Any):
        arrays = [array for _, array in tree_flatten([layer.keys, layer.values])]
        self._row = sum(array.nbytes // array.shape[2] for array in arrays)
        self._most = getattr(layer, "max_size", None)

    def kept(self, tokens: int) -> int:
        held = tokens if self._most is None else min(tokens, self._most)
        return (-(-held // _STEP) + 1) * _STEP * self._row

    def reading(self, tokens: int, prompt: int, beside: int, step: int) -> int:
        chunk = 0 if self._most is None else min(prompt, step)  # a window lets go of old rows after a chunk
        return (chunk + _SEGMENTS * beside) * self._row


class _State:
    """A layer whose state does not grow."""

    def __init__(self, layer: Any):
        self._nbytes = layer.nbytes

    def kept(self, tokens: int) -> int:
        return self._nbytes

    def reading(self, tokens: int, prompt: int, beside: int, step: int) -> int:
        return 0


def _parts(layer: Any) -> list[Any]:
    if isinstance(layer, TurboQuantKVCache):
        return [_Compressed(layer)]
    if isinstance(layer, CacheList):
        return [part for one in layer.caches for part in _parts(one)]
    if isinstance(layer, ArraysCache):
        return [_State(layer)]
    if getattr(layer, "keys", None) is None or getattr(layer, "values", None) is None:
        raise ValueError(
            f"[--kv-memory-limit] wanted layers whose bytes can be estimated, got a {type(layer).__name__} without "
            "keys and values. Do without --kv-memory-limit for this model."
        )
    return [_Rows(layer)]


def used_layers(model: Any, empty: list[Any]) -> list[Any]:
    """The empty caches of a model after one token."""
    mx.eval(model(mx.array([[0]]), cache=empty))
    return empty
