"""The guard: measure what compressing a prompt does to the model while it is still raw, and leave raw what costs.

The next-token distributions of the prompt's last tokens are computed twice, over the raw cache and over compressed
copies of its layers. Where their divergence is above the bound, each layer is compressed alone, and the layers that
cost most stay raw until the rest is within it.
"""

import copy
import math
import warnings
from typing import Any

import mlx.core as mx

from mlx_turboquant.attention import MAX_DIRECT_QUERIES
from mlx_turboquant.cache import RawLayerCache, TurboQuantKVCache
from mlx_turboquant.cache.schedule import due

REPLAYED = MAX_DIRECT_QUERIES  # tokens that are computed twice: compressed rows are read directly, as in decoding


def check_bound(bound: Any) -> float:
    """The bound as a number.

    Raises:
        ValueError: if it is none of at least 0.
    """
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound >= 0 or math.isinf(bound):
        raise ValueError(f"[generate] wanted kv_guard (--kv-guard) a KLD in nats of at least 0, got {bound!r}.")
    return float(bound)


def read_guarded(
    model: Any, prompt: mx.array, cache: list[Any], bound: float, prefill_step_size: int = 2048
) -> tuple[mx.array, list[Any]]:
    """Read all but the last tokens of a prompt, and keep raw the layers that would cost too much.

    Args:
        model: an mlx-lm model.
        prompt: (T,) token ids.
        cache: empty, from `make_prompt_cache`. Layers that stay raw are replaced in it, with the reason for `report`.
        bound: mean KLD in nats, of the raw cache's next-token distributions from the compressed one's, over the last
            tokens of the prompt but one (`REPLAYED` of them).
        prefill_step_size: tokens of a chunk.

    Returns:
        (the tokens that are left to read, the cache). Everything is still raw, and is compressed in the first decode
        step as without a guard. A prompt too short to be compressed is not measured, which is said.

    Raises:
        ValueError: for a scheme that compresses while the prompt is read.
    """
    if any(isinstance(layer, TurboQuantKVCache) and layer.scheme.prefill == "compressed" for layer in cache):
        raise ValueError(
            "[generate] kv_guard (--kv-guard) compares with the raw prompt, and prefill=compressed keeps none. Leave "
            "out one of the two."
        )
    head, tail = prompt[: -REPLAYED - 1], prompt[-REPLAYED - 1 :]
    ours = [i for i, layer in enumerate(cache) if isinstance(layer, TurboQuantKVCache)]
    if not ours or not any(_blocks(cache[i].scheme, head.size) for i in ours):
        warnings.warn(
            f"[generate] kv_guard measured nothing: of this prompt's {prompt.size} tokens none is compressed yet.",
            RuntimeWarning,
            stacklevel=3,
        )
        return prompt, cache
    for start in range(0, head.size, prefill_step_size):
        model(head[None, start : start + prefill_step_size], cache=cache)
        for i in ours:
            cache[i].end_chunk()
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
    kept = _Guard(model, cache, tail[:-1], bound).layers_to_keep_raw(ours)
    for i, kld in kept.items():
        cache[i] = _as_raw(cache[i], f"the guard kept it raw: alone it changes the KLD by {kld:.2g}, bound {bound:g}")
    return tail, cache


class _Guard:
    def __init__(self, model: Any, cache: list[Any], tokens: mx.array, bound: float):
        self.model, self.cache, self.tokens, self.bound = model, cache, tokens[None], bound
        self.raw = self._distributions(cache)

    def layers_to_keep_raw(self, ours: list[int]) -> dict[int, float]:
        """Numbers of the layers, with the KLD of each alone: the costliest, until the rest is within the bound."""
        compressed = {i: _compressed(self.cache[i]) for i in ours}
        total = self._kld(compressed)
        if total <= self.bound:
            return {}
        alone = {i: self._kld({i: layer}) for i, layer in compressed.items()}
        order = sorted(ours, key=alone.get, reverse=True)
        kept: dict[int, float] = {}
        while total > self.bound and len(kept) < len(order):
            # So many that the others' share of what was measured would be within the bound; then measured again.
            left, share = [i for i in order if i not in kept], total
            sum_left = max(sum(alone[i] for i in left), 1e-30)
            for i in left:
                kept[i] = alone[i]
                share -= total * alone[i] / sum_left
                if share <= self.bound:
                    break
            rest = {i: layer for i, layer in compressed.items() if i not in kept}
            total = self._kld(rest) if rest else 0.0
        return kept

    def _kld(self, compressed: dict[int, Any]) -> float:
        other = self._distributions([compressed.get(i, layer) for i, layer in enumerate(self.cache)])
        kld = (mx.exp(self.raw) * (self.raw - other)).sum(axis=-1).mean().item()
        return kld if math.isfinite(kld) else math.inf

    def _distributions(self, cache: list[Any]) -> mx.array:
        """(tokens, vocabulary) log probabilities; the caches are as before afterwards."""
        # A copy of a raw layer that is written to would be a second one in memory; other layers cannot all go back.
        used = [layer if isinstance(layer, TurboQuantKVCache) else copy.deepcopy(layer) for layer in cache]
        logits = self.model(self.tokens, cache=used)[0].astype(mx.float32)
        out = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(out)
        for layer in used:
            if isinstance(layer, TurboQuantKVCache):
                layer.unread(self.tokens.shape[1])
        return out


def _blocks(scheme: Any, tokens: int) -> bool:
    start, stop = due(scheme, tokens, True)
    return stop > start


def _compressed(layer: TurboQuantKVCache) -> TurboQuantKVCache:
    other = copy.deepcopy(layer)
    other.compress()
    return other


def _as_raw(layer: TurboQuantKVCache, reason: str) -> RawLayerCache:
    raw = RawLayerCache(layer.layer)
    raw.keys, raw.values = (mx.contiguous(rows) for rows in layer.keys_and_values())
    raw.offset = raw.keys.shape[2]
    raw.turboquant_why_raw = reason
    return raw
