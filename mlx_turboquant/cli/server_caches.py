"""The caches of the server's requests: made by the scheme, and measured while they are in use."""

import contextlib
import copy
import time
import weakref
from collections.abc import Iterator
from typing import Any

from mlx_lm import server
from mlx_lm.generate import GenerationBatch

from mlx_turboquant.cache import link_drafts
from mlx_turboquant.cli.server_store import raw_nbytes
from mlx_turboquant.generation import prompt_cache_for
from mlx_turboquant.scheme_file import resolve

_stream_generate = server.stream_generate  # kept here, since `server_parts.parts` puts ours under this name


class PromptCaches:
    """Makes the prompt caches of one scheme. A model is looked at once; each call copies its empty caches."""

    def __init__(self, kv_scheme: str, kv_bits: int | None):
        self.scheme, self._kv_bits = resolve(kv_scheme), kv_bits
        self._made: list[tuple[weakref.ref, list[Any]]] = []

    def make(self, model: Any) -> list[Any]:
        """Empty caches for a model, as `make_prompt_cache` makes them."""
        self._made = [(ref, empty) for ref, empty in self._made if ref() is not None]
        for ref, empty in self._made:
            if ref() is model:
                return copy.deepcopy(empty)
        empty = prompt_cache_for(model, self.scheme, kv_bits=self._kv_bits)
        self._made.append((weakref.ref(model), empty))
        return copy.deepcopy(empty)


class Active:
    """Sequences and bytes of the requests being served: written by the thread that generates, read by /health."""

    INTERVAL = 0.25  # seconds between two measurements while nothing begins or ends

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is being served."""
        self._last = 0.0
        self.now = {"sequences": 0, "nbytes": 0, "raw_nbytes": 0}

    def measure(self, sequences: int, layers: list[Any], always: bool = False) -> None:
        """Take note of what the caches of these layers hold, unless that was done just before."""
        if always or time.monotonic() - self._last > self.INTERVAL:
            self._last = time.monotonic()
            self.now = {
                "sequences": sequences,
                "nbytes": sum(layer.nbytes for layer in layers),
                "raw_nbytes": sum(raw_nbytes(layer) for layer in layers),
            }


class EncodingBatch(GenerationBatch):
    """mlx-lm's batch of decoding sequences, which takes a new one in as soon as its prompt is encoded.

    mlx-lm puts a sequence into the batch one step before its prompt would be encoded. All sequences of a batch have
    the same room, so for that step each had room for the raw prompt: 7 sequences 22.5 MB instead of 4.5, where one had
    1,500 tokens (float32, 2 layers, 2 key heads of 64). The next step would encode just the same rows.
    """

    def extend(self, batch: GenerationBatch) -> None:
        """Take in the sequences of another batch."""
        for layer in batch.prompt_cache:
            if hasattr(layer, "compress"):
                layer.compress()
        super().extend(batch)


class SchemeBatchGenerator(server.BatchGenerator):
    """mlx-lm's continuous batching, whose new sequences get the scheme's caches."""

    def __init__(self, caches: PromptCaches, active: Active, budget: Any, model: Any, **kwargs: Any):
        self._caches, self._active, self._budget = caches, active, budget
        super().__init__(model, **kwargs)
        self._generation_batch = EncodingBatch.empty(self.model, self.sampler)

    def insert_segments(
        self, segments: list, max_tokens: list | None = None, caches: list | None = None, **kwargs: Any
    ):
        """Queue prompts; one without a cache gets an empty one of the scheme."""
        caches = [None] * len(segments) if caches is None else caches
        made = [self._caches.make(self.model) if cache is None else cache for cache in caches]
        uids = super().insert_segments(segments, max_tokens, made, **kwargs)
        if self._budget is not None:
            self._budget.begin(*uids)  # mlx-lm's server inserts one at a time
        return uids

    def next(self):
        """The next responses of every sequence."""
        prompts, generated = super().next()
        self._measure(always=bool(prompts) or any(r.finish_reason is not None for r in generated))
        return prompts, generated

    def remove(self, uids: list[int], return_prompt_caches: bool = False):
        """Forget sequences."""
        removed = super().remove(uids, return_prompt_caches)
        self._measure(always=True)
        return removed

    def _measure(self, always: bool) -> None:
        waiting, prompts, decoding = self._unprocessed_sequences, self._prompt_batch, self._generation_batch
        layers = [layer for sequence in waiting for layer in sequence[3]]
        layers += [*prompts.prompt_cache, *decoding.prompt_cache]
        if self._budget is not None:
            reading = [sequence[0] for sequence in waiting] + prompts.uids
            self._budget.keep([*reading, *decoding.uids], reading)
        self._active.measure(len(waiting) + len(prompts) + len(decoding), layers, always)


def stream_generate(
    active: Active, budget: Any, *args: Any, model: Any, prompt_cache: list[Any], draft_model: Any = None, **kwargs: Any
) -> Iterator[Any]:
    """mlx-lm's stream_generate, for a request that is served alone, measured as it goes."""
    link_drafts(prompt_cache, model, draft_model)
    kwargs |= {"model": model, "draft_model": draft_model}
    with contextlib.closing(_stream_generate(*args, prompt_cache=prompt_cache, **kwargs)) as responses:
        if budget is not None:
            budget.begin("alone")
        try:
            for response in responses:
                active.measure(1, prompt_cache)
                yield response
        finally:
            active.clear()
            if budget is not None:
                budget.keep([], [])
