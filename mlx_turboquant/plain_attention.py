"""Attention over compressed rows in plain MLX operations, one piece of the tokens after the other."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.conditioning import finite_or_zero, in_dtype
from mlx_turboquant.ops.lookup import on_cpu
from mlx_turboquant.tensor import CompressedRows, PackedTensor

# Tokens decoded at a time. 1,024 rows of 8 heads of 128 are 4 MiB in float32, small beside any cache worth packing.
PIECE_TOKENS = 1024
# On a CPU so many bytes of float32 rows. Twice as many take 9% less time at 16k tokens of 8 heads of 128, 6 MiB more;
# half as many take 18% more time, since every operation costs something by itself (benchmarks/LOG.md).
CPU_PIECE_BYTES = 1 << 20
# So many pieces are kept before they are merged, which bounds memory for any number of tokens.
_MOST_PIECES = 16


class _Piece(NamedTuple):
    """Softmax over some of the keys.

    Attributes:
        top: (B, Hkv, R, 1) the largest score; -inf if all are masked.
        total: (B, Hkv, R, 1) the sum of the weights exp(score - top).
        sums: (B, Hkv, R, E) values times weights, as the value quantizer stores them or as the model has them.
    """

    top: mx.array
    total: mx.array
    sums: mx.array


def attend_pieces(
    queries: mx.array,
    keys: CompressedRows,
    values: CompressedRows,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """`attention.attend` with one piece of keys or values decoded at a time; arguments and result as there."""
    B, H, L, D = queries.shape
    _, Hkv, T, Dv = values.shape
    G = H // Hkv
    rows = (queries.astype(mx.float32) * scale).reshape(B, Hkv, G * L, D)
    prepared = keys.quantizer.prepare(rows)
    mask = _grouped_mask(mask, L, T, Hkv)

    tokens = _piece_tokens(B * Hkv * max(D, Dv), G * L)
    packed, raw = [], []
    for (start, stop, k), (_, _, v) in zip(keys.segments(tokens), values.segments(tokens), strict=True):
        if isinstance(k, PackedTensor):
            if packed:  # one piece after the other: MLX would otherwise decode several at the same time
                k = k._replace(codes=mx.depends(k.codes, list(packed[-1])))
            scores = keys.quantizer.scores(prepared, k)
        else:
            scores = rows @ finite_or_zero(k).swapaxes(-1, -2)
        if mask is not None:
            scores = _masked(scores.reshape(B, Hkv, G, L, -1), mask[..., start:stop]).reshape(scores.shape)
        top = scores.max(axis=-1, keepdims=True)
        weights = _exp_of_difference(scores, top)
        total = weights.sum(axis=-1, keepdims=True)
        if isinstance(v, PackedTensor):
            packed.append(_Piece(top, total, values.quantizer.weighted_sum(weights, v)))
            if len(packed) == _MOST_PIECES:
                packed = [_merged(packed)]
        else:
            raw.append(_Piece(top, total, weights @ finite_or_zero(v)))
    if packed:
        top, total, sums = _merged(packed)
        raw.append(_Piece(top, total, values.quantizer.finish(sums)))
    if sinks is not None:
        logits = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, Hkv, G, 1), (B, Hkv, G, L)).reshape(B, Hkv, -1, 1)
        raw.append(_Piece(logits, mx.ones_like(logits), mx.zeros((B, Hkv, G * L, Dv))))
    _, total, sums = _merged(raw)
    return in_dtype(sums / mx.maximum(total, 1e-37), queries.dtype).reshape(B, H, L, Dv)


def _piece_tokens(numbers: int, queries: int) -> int:
    """Tokens of a piece, where one token's rows have so many numbers and so many queries read each of them."""
    if not on_cpu():
        return PIECE_TOKENS
    return max(1, CPU_PIECE_BYTES // (4 * numbers * -(-queries // 8)))  # with many queries, scores take room too


def _exp_of_difference(scores: mx.array, top: mx.array) -> mx.array:
    """exp(scores - top), and 0 where both are -inf, which would be NaN."""
    return mx.exp(scores - mx.maximum(top, mx.finfo(mx.float32).min))


def _merged(pieces: Sequence[_Piece]) -> _Piece:
    """Softmax over the keys of all pieces, whose sums must be in the same space."""
    if len(pieces) == 1:
        return pieces[0]
    tops = mx.concatenate([piece.top for piece in pieces], axis=-1)
    top = tops.max(axis=-1, keepdims=True)
    factors = _exp_of_difference(tops, top)
    total = (mx.concatenate([piece.total for piece in pieces], axis=-1) * factors).sum(axis=-1, keepdims=True)
    sums = (mx.stack([piece.sums for piece in pieces], axis=-2) * factors[..., None]).sum(axis=-2)
    return _Piece(top, total, sums)


def _grouped_mask(mask, L: int, T: int, Hkv: int) -> mx.array | None:
    """The mask with five axes (B, Hkv, G, L, T), any of the first three of length 1."""
    if mask is None or (isinstance(mask, str) and L == 1):
        return None
    if isinstance(mask, str):
        mask = mx.arange(T - L, T)[:, None] >= mx.arange(T)[None]
    mask = four_axes(mask)
    heads = mask.shape[1]
    split = (1, 1) if heads == 1 else (Hkv, heads // Hkv)
    return mask.reshape(mask.shape[0], *split, *mask.shape[2:])


def four_axes(mask: mx.array) -> mx.array:
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def _masked(scores: mx.array, mask: mx.array) -> mx.array:
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, -mx.inf)
    return scores + mask.astype(mx.float32)
