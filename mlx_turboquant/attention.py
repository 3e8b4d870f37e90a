"""Attention over compressed keys and values: in a kernel where there is one, else blockwise in plain MLX operations."""

from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlx_turboquant.ops import attend as kernel
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import device_ints
from mlx_turboquant.ops.row_kernels import say_once
from mlx_turboquant.plain_attention import PIECE_TOKENS, attend_pieces, four_axes
from mlx_turboquant.settling import settle
from mlx_turboquant.tensor import CompressedRows, RaggedRows, SplitRows

# Up to so many queries (decoding, verifying a draft) read the packed rows piece by piece. More (the next turn's
# prompt) are served by decoding one layer into a buffer that is dropped after use, where mlx's fast kernel wins.
MAX_DIRECT_QUERIES = 8


def attend(
    queries: mx.array,
    keys: CompressedRows | RaggedRows | SplitRows,
    values: CompressedRows | RaggedRows | SplitRows,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    backend: str | None = None,
) -> mx.array:
    """Scaled dot-product attention with compressed keys and values.

    Args:
        queries: (B, H, L, D), the newest L tokens; H a multiple of Hkv.
        keys: T rows of D per head; the queries' own tokens are the last L of them (of each sequence, where they are
            ragged; T is then the longest one's).
        values: T rows of Dv per head.
        scale: factor of the scores.
        mask: None, "causal", or an array that broadcasts to (B, H, L, T): boolean (True attends) or added to scores.
        sinks: (H,) attention-sink logits, each one more term in its head's softmax denominator.
        backend: "metal", "cuda" or "reference"; None for what `choose_backend` says.

    Returns:
        (B, H, L, Dv) in the dtype of queries. A row whose keys are all masked is 0. Scores and sums are float32, and
        NaN or infinite entries of raw keys and values count as 0, as they do once they are encoded.
    """
    if mask is None and not isinstance(keys, SplitRows) and queries.shape[2] == 1 and keys.readers:
        reader = keys.readers.get(backend)
        if reader is not None:  # a decode step like the one before it
            return _read(reader, queries, keys, values, scale, None, False, sinks)
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f"[attend] mask must be None, 'causal' or an array, got {mask!r}.")
    if isinstance(keys, SplitRows):
        return _attend_split(queries, keys, values, scale, mask, sinks, backend)
    if isinstance(keys, RaggedRows):
        return _attend_ragged(queries, keys, values, scale, mask, sinks, backend)
    raw = keys.quantizer.bits == 0 and values.quantizer.bits == 0
    if queries.shape[2] > MAX_DIRECT_QUERIES or raw:
        chosen = choose_backend(backend)
        k, v = (side.dense(None if in_kernels(chosen, side.quantizer) else PIECE_TOKENS) for side in (keys, values))
        out = mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=mask, sinks=sinks)
        # Now, so that one layer's decoded rows are gone before the next one's are made.
        settle(k.nbytes + v.nbytes, out)
        return out
    fused = _attend_in_kernel(queries, keys, values, scale, mask, sinks, backend)
    return attend_pieces(queries, keys, values, scale, mask, sinks) if fused is None else fused


def _attend_split(queries, keys: SplitRows, values: SplitRows, scale, mask, sinks, backend) -> mx.array:
    out, start = [], 0
    for (k, n), (v, _) in zip(keys.parts, values.parts, strict=True):
        part, mine = queries[:, :, start : start + n], _part_of(mask, 2, slice(start, start + n), k.shape[2])
        if isinstance(k, mx.array):
            out.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale, mask=mine, sinks=sinks))
        else:
            out.append(attend(part, k, v, scale, mine, sinks, backend))
        start += n
    return mx.concatenate(out, axis=2)


def _attend_ragged(queries, keys: RaggedRows, values: RaggedRows, scale, mask, sinks, backend) -> mx.array:
    L, T = queries.shape[2], keys.shape[2]
    if keys.is_raw and L <= MAX_DIRECT_QUERIES:
        seen = _within_lengths(keys.tokens, L, causal=isinstance(mask, str))
        if isinstance(mask, mx.array):
            seen = mask & seen if mask.dtype == mx.bool_ else mx.where(seen, mask, -mx.inf).astype(queries.dtype)
        k, v = keys.newest[:, :, :T], values.newest[:, :, :T]
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale, mask=seen, sinks=sinks)
    if L <= MAX_DIRECT_QUERIES and (keys.quantizer.bits or values.quantizer.bits):
        fused = _attend_in_kernel(queries, keys, values, scale, mask, sinks, backend)
        if fused is not None:
            return fused
    # One after the other: no room is taken for what the shorter ones do not have.
    out = []
    for b, (_, packed, tokens) in enumerate(keys.lengths):
        query, mine = queries[b : b + 1], _part_of(mask, 0, slice(b, b + 1), keys.tokens[b])
        if packed:
            out.append(attend(query, keys.sequence(b), values.sequence(b), scale, mine, sinks, backend))
        else:
            k, v = (side.newest[b : b + 1, :, :tokens] for side in (keys, values))
            out.append(mx.fast.scaled_dot_product_attention(query, k, v, scale=scale, mask=mine, sinks=sinks))
    return mx.concatenate(out)


@lru_cache(maxsize=16)  # all layers of a step share it
def _within_lengths(tokens: tuple[int, ...], L: int, causal: bool) -> mx.array:
    """(B, 1, L, T) boolean: whether query l of L may see a token of its sequence, which has so many."""
    ends = device_ints(tokens)[:, None, None, None]
    if causal:
        ends = ends + mx.arange(1 - L, 1)[:, None]
    mask = mx.arange(max(tokens)) < ends
    mx.async_eval(mask)  # kept beyond this call, so it must not belong to a graph that is being traced
    return mask


def why_not_fused(keys: Any, values: Any, block: int) -> str | None:
    """Why no kernel reads what these quantizers store, in words; None if one does."""
    for side in (keys, values):
        if isinstance(side.fused, str):
            return side.fused
    return kernel.why_not(keys.dim, values.dim, block, keys.fused, values.fused)


def how_attended(keys: Any, values: Any, block: int) -> str:
    """What reads rows that these quantizers store: a kernel, or plain MLX operations and why."""
    if keys.bits == 0 and values.bits == 0:
        return "mlx's own: both sides are raw"
    backend = choose_backend()
    reason = "no GPU that has kernels is in use" if backend == "reference" else why_not_fused(keys, values, block)
    return f"{backend} kernel" if reason is None else f"plain MLX: {reason}"


def in_kernels(backend: str | None, *quantizers: Any) -> bool:
    """Whether rows are encoded and decoded in kernels, without large temporary arrays."""
    return choose_backend(backend) != "reference" and all(quantizer.in_kernels for quantizer in quantizers)


def _attend_in_kernel(queries, keys, values, scale, mask, sinks, backend: str | None) -> mx.array | None:
    """Attention in one call of the backend's kernel; None, said once, if it cannot read these rows."""
    reader = _reader(keys, values, backend)
    if reader is None:
        return None
    causal = isinstance(mask, str)
    mask = None if mask is None or causal else _all_tokens(four_axes(mask), keys.shape[2])
    return _read(reader, queries, keys, values, scale, mask, causal, sinks)


def _reader(keys, values, backend: str | None) -> kernel.Reader | None:
    """What reads these stored rows in kernels, kept beside them; None, said once, if nothing does."""
    if keys.readers and backend in keys.readers:
        return keys.readers[backend]
    chosen = choose_backend(backend)
    if chosen == "reference":
        return None
    reason = why_not_fused(keys.quantizer, values.quantizer, keys.block)
    if reason is not None:
        say_once("attend", chosen, reason, "read this cache")
        return None
    sides = (
        kernel.StoredSide(fused[0], rows.stored, rows.sinks, None, *fused[1:])
        for rows, fused in ((keys, keys.quantizer.fused), (values, values.quantizer.fused))
    )
    reader = kernel.Reader(*sides, block=keys.block, balance=keys.quantizer.balance, backend=chosen)
    if keys.readers is not None:
        keys.readers[backend] = reader
    return reader


def _read(reader: kernel.Reader, queries, keys, values, scale, mask, causal: bool, sinks) -> mx.array:
    ragged = isinstance(keys, RaggedRows)
    lengths = keys.lengths if ragged else (keys.lengths,) * queries.shape[0]
    tail = (keys.newest, values.newest) if ragged or keys.newest_length else (None, None)
    return reader(queries, *tail, lengths, scale=scale, mask=mask, causal=causal, logits=sinks)


def _part_of(mask, axis: int, which: slice, tokens: int):
    """The mask for some of the queries (axis 2) or sequences (axis 0), and the first so many tokens."""
    if not isinstance(mask, mx.array):
        return mask
    mask = four_axes(mask)
    if mask.shape[axis] > 1:
        mask = mask[:, :, which] if axis == 2 else mask[which]
    return mask[..., :tokens] if mask.shape[3] > 1 else mask


def _all_tokens(mask: mx.array, tokens: int) -> mx.array:
    return mask if mask.shape[-1] == tokens else mx.broadcast_to(mask, (*mask.shape[:3], tokens))
