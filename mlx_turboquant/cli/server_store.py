"""The server's store of finished conversations and prompt checkpoints: mlx-lm's, holding compressed caches."""

import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache


class CompressedPromptStore(LRUPromptCache):
    """mlx-lm's ``LRUPromptCache``, which compresses what it is given to keep.

    A checkpoint at the end of a prompt arrives raw. Kept raw it would cost several times the bytes of the running
    conversation beside it, for as long as that runs; so it is encoded, and a conversation that starts from it reads
    the rest of its prompt over compressed rows, as a second turn does.

    Args:
        max_size: how many entries it keeps.
        max_bytes: how many bytes they may have together; None for no limit.
        left: tells how many bytes are free for them at this moment; None for no such limit.

    Attributes:
        most_nbytes: an entry whose copy has more bytes is not given out; None for no limit. (The copy of a long
            conversation that is cut to a short beginning still has most of its room.)
    """

    def __init__(self, max_size: int = 10, max_bytes: int | None = None, left: Callable[[], int] | None = None):
        self.most_nbytes: int | None = None
        self._left = left
        super().__init__(max_size, 1 << 63 if max_bytes is None else max_bytes)
        self._entries: list[weakref.ref[_Entry]] = []
        self._measure()

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """A copy of the entry that covers most of `tokens`, and the tokens that it lacks: at least the last one.

        Two of mlx-lm's answers are not taken. For a prompt that it holds whole it lacks none, and then there is nothing
        to start generating with: here the last token is read again. And an entry of which less than a block is left
        once it is cut to what it shares with the prompt (a chat template's first words, say) would bring decoded rows
        and another conversation's balance; so few tokens are soon read anew, exactly.
        """
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or (self.most_nbytes is not None and sum(c.nbytes for c in cache) > self.most_nbytes):
            return None, tokens
        if not rest:
            if not can_trim_prompt_cache(cache):
                return None, tokens
            trim_prompt_cache(cache, 1)
            return cache, tokens[-1:]
        whole = self._trie.search(model, tokens).shorter or ()
        cut = len(whole) != len(tokens) - len(rest)
        if cut and any(getattr(layer, "block_tokens", None) == 0 for layer in cache):
            return None, tokens
        return cache, rest

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep a cache for these tokens, compressed."""
        tokens = _tokens_in_all(tokens, prompt_cache)
        if not tokens:
            return
        for layer in prompt_cache:
            if hasattr(layer, "compress"):
                layer.compress()
        mx.eval([layer.state for layer in prompt_cache])  # or the raw rows stay alive behind what is to be encoded
        entry = _Entry(prompt_cache)
        self._entries.append(weakref.ref(entry))
        super().insert_cache(model, tokens, entry, cache_type=cache_type)
        del entry  # the store may have forgotten it already
        if self._left is not None:
            super().trim_to(n_bytes=self._left())
        self._measure()

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Forget entries, the least useful first, until no more than so many sequences or bytes are left."""
        super().trim_to(n_sequences=n_sequences, n_bytes=n_bytes)
        self._measure()

    def _measure(self) -> None:
        # One new dictionary at a time: /health reads it from another thread.
        held = [entry for ref in self._entries if (entry := ref()) is not None]
        self._entries = [weakref.ref(entry) for entry in held]
        raw = sum(entry.raw_nbytes for entry in held)
        self.held = {"sequences": len(self), "nbytes": self.nbytes, "raw_nbytes": raw}


class _Entry(list):
    """An entry's caches in a list that only the store holds, so it goes with the entry, whoever has the caches."""

    def __init__(self, caches: list[Any] = ()):
        super().__init__(caches)
        self.raw_nbytes = sum(raw_nbytes(layer) for layer in caches)


def raw_nbytes(layer: Any) -> int:
    """Bytes of a layer's tokens in the model's dtype; of a cache that does not tell, the bytes it has."""
    return getattr(layer, "raw_nbytes", layer.nbytes)


def _tokens_in_all(tokens: list[int], prompt_cache: list[Any]) -> list[int]:
    """The tokens that every layer's cache holds, and the caches cut to them.

    Speculative decoding can end with a token that the model's cache does not hold yet, and one more that the draft
    model's lacks. Kept under all of its tokens, such an entry would skip one when a conversation goes on from it.
    """
    offsets = [layer.offset for layer in prompt_cache if isinstance(getattr(layer, "offset", None), int)]
    held = min(offsets, default=len(tokens))
    if all(offset == len(tokens) for offset in offsets) or not can_trim_prompt_cache(prompt_cache):
        return tokens
    for layer in prompt_cache:
        layer.trim(layer.offset - held)
    return tokens[:held]
