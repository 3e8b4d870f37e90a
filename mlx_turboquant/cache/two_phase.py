"""The cache of one sequence: raw while the prompt is read, compressed from the first decode step on.

`held` says where its tokens lie.
"""

import sys
from typing import Any

import mlx.core as mx

from mlx_turboquant.attention import MAX_DIRECT_QUERIES, in_kernels
from mlx_turboquant.binding import ATTENTION, bind, is_bound
from mlx_turboquant.cache import drafts, saved_state, trimming
from mlx_turboquant.cache.block_encoding import encode_tail
from mlx_turboquant.cache.bound import attention_mask, check_max_size, tokens_to_drop
from mlx_turboquant.cache.buffers import PackedBuffer
from mlx_turboquant.cache.checks import check_rows
from mlx_turboquant.cache.held import HeldTokens
from mlx_turboquant.cache.schedule import due
from mlx_turboquant.quantizers import make_quantizers
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.settling import start_settling

# mlx-lm's prefill loops evaluate `[c.state for c in prompt_cache]` after each chunk of a prompt and never while
# decoding. That tells a chunk of one token from a decode step, whatever the chunk size.
PREFILL_LOOPS = ("mlx_lm.generate", "mlx_lm.evaluate")


class TurboQuantKVCache(HeldTokens):
    """A KV cache for one layer with the interface of mlx-lm's ``KVCache``.

    Args:
        scheme: a scheme that compresses (any but ``fp16`` and ``mlx``), or its text.
        layer: this layer's number, for messages and reports.
        module: name of the module whose attention reads this cache; made by `make_prompt_cache`.
        fingerprint: of the model, see `fingerprint`; stored with the cache.
        max_size: the most tokens it holds while decoding, the oldest but the sinks being dropped; None for no bound.

    When it compresses: in the first decode step, and then one block each `block` steps. A call with one token is a
    decode step unless a prefill loop of mlx-lm read `state` since the last call. A call with 2 to 8 tokens is a
    decode step (verifying a draft) if `trim` was called since the last call. Everything else is prompt. `compress`
    does it at once. With the scheme's ``prefill=compressed`` a chunk of a prompt is encoded as soon as it was read:
    when a prefill loop of mlx-lm reads `state` after it, or else at the next call.
    """

    def __init__(
        self,
        scheme: KVScheme | str,
        layer: int = 0,
        module: str = "",
        fingerprint: str = "",
        max_size: int | None = None,
    ):
        self.scheme = KVScheme.parse(scheme)
        if not self.scheme.two_phase:
            raise ValueError(
                f"[TurboQuantKVCache] '{self.scheme}' is a cache of mlx-lm's own; make_prompt_cache gives it."
            )
        check_max_size(max_size, self.scheme, "[TurboQuantKVCache] max_size")
        self.layer, self.module, self.fingerprint, self.max_size = layer, module, fingerprint, max_size
        self._must_bind = False  # a loaded cache binds its model's attention when it is first used
        self._draft: Any = None  # a weak reference to the draft model's first cache, see `drafts.link_drafts`
        self._reset()

    # --- what a model calls -------------------------------------------------------------------------------------

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        """Add the keys (B, Hkv, L, D) and values (B, Hkv, L, Dv) of L tokens.

        Returns:
            The keys and values of all tokens held: arrays before anything is compressed, `CompressedRows` after,
            `SplitRows` where a block falls due between the tokens.

        Raises:
            ValueError: for shapes or dtypes that do not fit this cache, a head size that does not suit the scheme, or
                no tokens.
            RuntimeError: if the attention that can read compressed rows has been removed from the model.
        """
        plain = self._plain.take(self, keys, values)
        if plain is not None:
            return plain
        self._plain.stop()
        self._admit(keys, values)
        L = keys.shape[2]
        self._undo = []
        self._queries.forget_newest()
        verify = drafts.is_first_verification(self, L)
        decode = verify or self._is_decode(L)
        encode = decode or self.scheme.prefill == "compressed"
        if encode:
            self._check_bound()
        self._drop_oldest(L if decode else 1)
        if encode and not (verify and self._chunk_ended):
            # Before the new token is added: a cache that joins a batch between two steps is encoded alike.
            self.compress()
        inside = drafts.boundary(self, L, self._chunk_ended) if decode else 0
        self._chunk_ended = self._trimmed = False
        if inside:
            return drafts.split(self, keys, values, inside)
        if decode and L == 1:
            self._plain.start(self)
            plain = self._plain.take(self, keys, values)
            if plain is not None:
                return plain
        self._append_to_tail(keys, values)
        self._nonfinite.step(self.layer)
        self._plain.start(self)
        return self.keys_and_values()

    def observe_queries(self, queries: mx.array) -> mx.array | None:
        """Add up what a prompt's queries (B, H, L, D) weigh; returns what to evaluate, if anything."""
        wanted = "" if self._quantizers is None else self._quantizers[0].queries_wanted
        return self._queries.observe(queries, self._tail[0].array.shape[1], wanted) if wanted else None

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        """The mask for the next N tokens, as mlx-lm's ``KVCache`` makes it, over the tokens held then."""
        held = self.size()
        if self.max_size is not None:
            held -= tokens_to_drop(held, N if self._is_decode(N) else 1, self.max_size, self.scheme)
        return attention_mask(N, self.offset, held, self.scheme.sinks, return_array, window_size)

    # --- what mlx-lm asks a cache ---------------------------------------------------------------------------------

    def adopt(self, other: "TurboQuantKVCache") -> None:
        """Take over the prompt that another cache, of any scheme, holds raw.

        Raises:
            ValueError: if this cache is not empty, or the other is compressed already or has dropped tokens, or has not
                kept of the prompt's queries what this scheme learns from.
        """
        if not self.empty() or other._blocks is not None or other._dropped:
            raise ValueError("[TurboQuantKVCache.adopt] Only an empty cache can adopt, and only a raw and whole one.")
        self.update_and_fetch(*(mx.array(rows) for rows in other.keys_and_values()))
        wanted = self._quantizers[0].queries_wanted
        self._queries.adopt(other._queries, wanted)

    def trim(self, n: int) -> int:
        """Forget the newest n tokens (or all, if there are fewer) and return how many that was.

        A block that is cut is decoded and its remaining tokens return to the tail.

        Raises:
            ValueError: if a bounded cache would have to go back to a token that it dropped.
        """
        return trimming.trim(self, n)

    def end_chunk(self) -> None:
        """Say that what was read last is part of a prompt, as a prefill loop of mlx-lm does by reading `state`."""
        self._chunk_ended = True
        self._queries.count_newest()
        if self.scheme.prefill == "compressed":
            self.compress()  # now, so that what the loop evaluates no longer needs the raw chunk

    def unread(self, n: int) -> None:
        """Forget the newest n tokens of a prompt, of which more is to come, as if they had not been read yet.

        What their queries weigh is forgotten too if they came in a call of at most 8 tokens, the last one.

        Raises:
            ValueError: as `trim`.
        """
        trimming.trim(self, n)
        self._queries.forget_newest()
        self._trimmed, self._chunk_ended = False, not self.empty()

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> None:
        """mlx-lm calls this for ``kv_bits``, which cannot be combined with a scheme.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"[TurboQuantKVCache] This cache already has the scheme '{self.scheme}'; kv_bits={bits} would quantize it "
            "again. Leave out --kv-bits (kv_bits), or the scheme."
        )

    # --- compression ----------------------------------------------------------------------------------------------

    def compress(self) -> int:
        """Encode every whole block that is older than the window, now; return how many tokens were encoded.

        A bounded cache first drops what a next token would leave no room for.
        """
        self._drop_oldest(1)
        return self._encode()

    def _encode(self) -> int:
        first = self._blocks is None
        skip, stop = due(self.scheme, self.tail_tokens, first)
        if stop == skip:
            return 0
        self._plain.stop()
        raw = tuple(rows.array for rows in self._tail)
        if first:
            for quantizer, rows in zip(self._quantizers, raw, strict=True):
                quantizer.fit(rows[:, :, skip:stop], self._queries.sums, quantizer.squares(rows, skip, stop))
        packed, bad, kept = encode_tail(self.scheme, self._quantizers, raw, skip, stop, self.tail_tokens)
        if first:
            self._sinks = kept.first
            self._blocks = tuple(PackedBuffer(self.scheme.block) for _ in range(2))
        for blocks, new in zip(self._blocks, packed, strict=True):
            blocks.append(new, stop - skip)
        self._nonfinite.add(*bad)
        for rows, newest in zip(self._tail, kept.newest, strict=True):
            rows.array, rows.length = newest, rows.length - stop
        raw_bytes = sum(rows.nbytes // rows.shape[2] for rows in raw) * (stop - skip)
        start_settling(raw_bytes, self._arrays, lean=in_kernels(None, *self._quantizers))
        return stop - skip

    def _drop_oldest(self, new: int) -> None:
        """Make room for so many tokens in a bounded cache."""
        if self.max_size is None:
            return
        n = tokens_to_drop(self.size(), new, self.max_size, self.scheme)
        if n == 0:
            return
        self._plain.stop()
        self._undo = []  # it would bring back what is dropped now
        if self._blocks is None:
            for rows in self._tail:
                rows.drop(self.scheme.sinks, self.scheme.sinks + n)
        else:
            if n >= self.block_tokens:  # a later turn's prompt, raw behind the blocks, is what must go
                self._encode()
            for blocks in self._blocks:
                blocks.drop(n)
        self._dropped += n

    def _is_decode(self, tokens: int) -> bool:
        if self.empty() or self._chunk_ended or tokens > MAX_DIRECT_QUERIES:
            return False
        return tokens == 1 or self._trimmed

    # --- checks ---------------------------------------------------------------------------------------------------

    def _admit(self, keys: mx.array, values: mx.array) -> None:
        check_rows(self.layer, self._tail, keys, values)
        if self._quantizers is None:
            try:
                self._quantizers = make_quantizers(self.scheme, keys.shape[3], values.shape[3], keys.dtype)
            except ValueError as error:
                raise ValueError(
                    f"[TurboQuantKVCache] layer {self.layer}: scheme '{self.scheme}' cannot store this layer. {error}"
                ) from error
        if self._must_bind:
            self._must_bind = False
            if hasattr(sys.modules.get(self.module), ATTENTION):
                bind(sys.modules[self.module])
        if self._blocks is not None:
            self._check_bound()

    def _check_bound(self) -> None:
        if self.module and not is_bound(self.module):
            raise RuntimeError(
                f"[TurboQuantKVCache] layer {self.layer}: the attention of {self.module} cannot read compressed rows "
                "(it was unhooked, or this is another model's cache). Call mlx_turboquant.hook(model) first."
            )

    # --- saving ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> tuple:
        """Everything that it is, as nested tuples of arrays, text and numbers; layout in `saved_state`.

        A prefill loop of mlx-lm, which only evaluates it, gets the arrays as they are held: packing them takes half as
        long as all else that a chunk asks of a layer.
        """
        if sys._getframe(1).f_globals.get("__name__") in PREFILL_LOOPS:
            self.end_chunk()
            return tuple(self._arrays())
        return saved_state.pack(self)

    @state.setter
    def state(self, state: Any) -> None:
        saved_state.restore(self, state)

    @classmethod
    def from_state(cls, state: Any) -> "TurboQuantKVCache":
        """The cache that `state` describes.

        Raises:
            ValueError: if it describes none: another format version, missing parts, shapes that do not fit.
        """
        cache = cls.__new__(cls)
        cache.state = state
        return cache
