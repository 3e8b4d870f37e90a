"""Attention that reads packed keys and values in a kernel: which shapes it takes, and what a step hands over."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_turboquant.ops.attend_calls import runner
from mlx_turboquant.ops.attend_plan import TILE, Shape, plan_of
from mlx_turboquant.ops.device_ints import device_ints
from mlx_turboquant.rotation import HadamardRotation
from mlx_turboquant.tail_parts import FEW, TailParts
from mlx_turboquant.tensor import PackedTensor


class StoredSide(NamedTuple):
    """Keys or values of one layer, in whole buffers; `lengths` of `Reader` says how much of them is valid.

    Attributes:
        bits: of a code; 0 for raw rows. A sign that is kept beside it does not count.
        packed: codes (B, Hkv, cap, W) uint32, scales (B, Hkv, cap, groups), centers (B, Hkv, cap / block, D) or None.
            With a projection: the words of codes and then those of signs, and [scale, t] for each row.
        sinks: (B, Hkv, S, D), or None.
        tail: (B, Hkv, tcap, D), or None.
        rotation: of packed rows; None for raw rows.
        projection: (D, D) float32 P of keys that keep signs (`QjlKeys.projection_of_rows`): a balanced query x has the
            scores scale * (R x . centroids) + t * (P x . signs). None for others.
    """

    bits: int
    packed: PackedTensor
    sinks: mx.array | None
    tail: mx.array | None
    rotation: object | None
    projection: mx.array | None = None


def why_not(D: int, Dv: int, block: int, keys: Any, values: Any) -> str | None:
    """Why the kernel cannot read these rows, in words; None if it can.

    Args:
        D, Dv: head sizes of keys and values.
        block: tokens per centre.
        keys, values: `StoredSide`, or whatever else has its bits, rotation and projection.
    """
    if Dv != D:
        return f"values have another head size than keys ({Dv}, {D})"
    if D % 16 or D > 256:
        return f"head size {D} is not a multiple of 16 up to 256"
    if block % TILE:
        return f"blocks of {block} tokens are not a multiple of {TILE}"
    for side in (keys, values):
        if side.bits not in (0, 2, 3, 4, 8):
            return f"codes of {side.bits} bits have no kernel"
        if side.bits and not isinstance(side.rotation, HadamardRotation):
            return "the rotation is not one Hadamard transform"
    if values.projection is not None:
        return "values keep signs of their residuals"
    if keys.projection is not None and keys.bits not in (2, 3):
        return f"signs of residuals beside codes of {keys.bits} bits have no kernel"
    return None


def attend(
    queries: mx.array,
    keys: StoredSide,
    values: StoredSide,
    lengths: tuple[tuple[int, int, int], ...],
    *,
    scale: float,
    block: int,
    balance: mx.array | None = None,
    mask: mx.array | None = None,
    causal: bool = False,
    logits: mx.array | None = None,
    backend: str,
) -> mx.array:
    """Scaled dot-product attention over rows that are read once: `Reader` says what it takes and gives."""
    reader = Reader(keys, values, block=block, balance=balance, backend=backend)
    return reader(queries, keys.tail, values.tail, lengths, scale=scale, mask=mask, causal=causal, logits=logits)


class Reader:
    """Scaled dot-product attention over the stored rows of a layer, what is the same in every step being done once.

    A step takes one dispatch for a short cache and two for a long one, whose scratch memory is
    B * H * L * splits * (D + 2) float32, splits at most 512.

    Args:
        keys, values: see `StoredSide`; `why_not` must have no objection. Their tails are given in each call.
        block: tokens per centre.
        balance: (B, Hkv, D) float32, what keys were multiplied with; None for nothing.
        backend: "metal", "cuda", or another that has a builder.

    Attributes:
        joins: whether the next step may leave its token beside the tail, see `tail_parts`; the last one says it.

    Raises:
        ValueError: if keys have a projection and their rows another count of numbers than two.
    """

    def __init__(self, keys: StoredSide, values: StoredSide, *, block: int, balance: mx.array | None, backend: str):
        k, v, signs = keys.packed, values.packed, keys.projection is not None
        if signs and k.scales.shape[-1] != 2:
            raise ValueError(
                f"[attend] wanted a scale and a residual's length in each row of keys that keep signs, got "
                f"{k.scales.shape[-1]} numbers. Quantize them with one scale for a row."
            )
        self.joins = False
        self._dtype = (k.codes if k.scales is None else k.scales).dtype
        self._nothing = nothing = _padding((1, 8), self._dtype)
        sinks = (nothing, nothing) if keys.sinks is None else (keys.sinks, values.sinks)
        stored = (k.codes, k.scales, k.centers, v.codes, v.scales)
        self._stored = (*(nothing if array is None else array for array in stored), *sinks)
        self._balance = nothing if balance is None else balance
        self._rotation, self._projection = keys.rotation or values.rotation, keys.projection
        shape = Shape(
            *(backend, 0, 0, 0, 0, k.codes.shape[1], block, self._dtype, keys.bits, values.bits),
            1 if k.scales is None or signs else k.scales.shape[-1],
            1 if v.scales is None else v.scales.shape[-1],
            *(k.centers is not None, balance is not None, 0, False, False, signs),
        )
        self._kind = _kind(shape, k.codes.shape[2], sinks[0].shape[-2])

    def __call__(
        self,
        queries: mx.array,
        tail_k: mx.array | TailParts | None,
        tail_v: mx.array | TailParts | None,
        lengths: tuple[tuple[int, int, int], ...],
        *,
        scale: float,
        mask: mx.array | None = None,
        causal: bool = False,
        logits: mx.array | None = None,
    ) -> mx.array:
        """Attend.

        Args:
            queries: (B, H, L, D), L at most 8.
            tail_k, tail_v: newest rows (B, Hkv, tcap, D) in buffers with spare room, or None. Parts, which are for one
                query, are told what a kernel made of their few rows and the new one.
            lengths: for each sequence, valid rows of sinks, packed rows and tail.
            scale: factor of the scores.
            mask: (B or 1, H or 1, L or 1, tokens), boolean or added to the scores; -1e30 or less masks.
            causal: query l of L sees tokens up to the sequence's length - L + l.
            logits: (H,) attention-sink logits.

        Returns:
            (B, H, L, D) in the dtype of queries. A row with no token to see is 0.
        """
        if tail_k is None:
            tail_k = tail_v = self._nothing
        beside = tail_k.count + 1 if type(tail_k) is TailParts else 0
        if beside and queries.shape[2] > 1:
            tail_k, tail_v, beside = tail_k.whole(), tail_v.whole(), 0
        kind = None if mask is None else (mask.dtype, mask.shape)
        if mask is not None and mask.size < 8:
            mask = mx.pad(mask, [(0, 0), (0, 0), (0, 0), (0, 8)])
        room = (tail_k.array if beside else tail_k).shape[-2]
        what = self._kind, queries.shape, room, lengths, kind, causal, logits is not None
        run, sizes, self.joins = _prepare(*what, beside)
        if beside and not self.joins:
            tail_k, tail_v, beside = tail_k.whole(), tail_v.whole(), 0
            run, sizes, self.joins = _prepare(*what, beside)
        asked, dtype = queries.dtype, self._dtype
        table = _table(self._rotation, scale)
        rest = [array for array in (mask, logits, self._projection) if array is not None]
        q = queries if asked == dtype else queries.astype(dtype)
        if beside:
            if tail_k.few is None:
                B, Hkv, _, D = tail_k.new.shape
                few = (_padding((B, Hkv, FEW, D), self._dtype),) * 2
            else:
                few = tail_k.few, tail_v.few
            rest[:0] = [*few, tail_k.new, tail_v.new]
            tails = tail_k.array, tail_v.array
            out, tail_k.next, tail_v.next = run(q, *self._stored, *tails, self._balance, table, sizes, *rest)
        else:
            out = run(q, *self._stored, tail_k, tail_v, self._balance, table, sizes, *rest)
        return out if asked == dtype else out.astype(asked)


@dataclass(frozen=True, eq=False)  # equal ones are one and the same, see `_kind`: a step then hashes no fields
class _Kind:
    """What stays the same while rows are stored in the same buffers: all of a shape but what a call brings."""

    shape: Shape
    packed_room: int
    sink_room: int


@lru_cache(maxsize=1024)
def _kind(shape: Shape, packed_room: int, sink_room: int) -> _Kind:
    return _Kind(shape, packed_room, sink_room)


@lru_cache(maxsize=1024)
def _prepare(kind: _Kind, queries, tail_room, lengths, mask, causal, logits, beside):
    """The call, its `sizes`, and whether a next one may have a row of each sequence beside its tail.

    The layers of a model share it in each step, and Python time counts in short caches.
    """
    B, H, L, D = queries
    masked = 0 if mask is None else 1 if mask[0] == mx.bool_ else 2
    shape = kind.shape._replace(B=B, H=H, L=L, D=D, mask=masked, causal=causal and L > 1, logits=logits)
    shape = shape._replace(beside=beside > 0)
    plan = plan_of(shape, max(n[1] for n in lengths), -(-max(n[0] + n[2] for n in lengths) // TILE))
    joins = L == 1 and not plan.tensor_cores
    if beside and not joins:
        return None, None, joins
    strides = (0, 0, 0) if mask is None else _broadcast_strides(mask[1])
    numbers = kind.packed_room, tail_room, kind.sink_room, plan.splits, plan.raw_splits, *strides
    run = runner(shape, plan)
    if mask is not None or L > 1:
        return run, device_ints(_sizes(numbers, lengths, beside)), joins
    step = lengths[0][2] % _STEPS
    first = tuple((sinks, packed, tail - step) for sinks, packed, tail in lengths)
    return run, _sizes_of_steps(numbers, first, (beside - 1 - step) % FEW if beside else None)[step], joins


def _sizes(numbers: tuple[int, ...], lengths: tuple[tuple[int, int, int], ...], beside: int) -> tuple[int, ...]:
    """`sizes` of attend.metal: numbers of the whole call, then four of each sequence."""
    return (*numbers, *(n for one in lengths for n in (*one, beside)))


_STEPS = 32  # whose `sizes` are made together; a multiple of FEW


@lru_cache(maxsize=64)
def _sizes_of_steps(
    numbers: tuple[int, ...], lengths: tuple[tuple[int, int, int], ...], phase: int | None
) -> tuple[mx.array, ...]:
    """`sizes` of attend.metal for steps that each add a token to tails of these lengths, each (n,) int32.

    So many rows are beside a tail in step s: none if phase is None, else (phase + s) % FEW + 1, as `RowBuffer.beside`
    puts them there.
    """
    first = device_ints(_sizes(numbers, lengths, 0))
    arrays = mx.split((first + _growth(len(numbers), first.size, phase)).reshape(-1), _STEPS)
    mx.async_eval(arrays)
    return tuple(arrays)


@lru_cache(maxsize=64)
def _growth(before: int, columns: int, phase: int | None) -> mx.array:
    """(_STEPS, columns): what is added in each step to such numbers; the fours of sequences follow so many others."""
    steps, column = mx.arange(_STEPS)[:, None], mx.arange(columns)
    place = mx.where(column < before, -1, (column - before) % 4)
    out = mx.where(place == 2, steps, 0)
    if phase is not None:
        out = mx.where(place == 3, (steps + phase) % FEW + 1, out)
    mx.async_eval(out)
    return out


def forget_calls() -> None:
    """Prepare calls anew: after the rules of attend_plan.py were changed."""
    _prepare.cache_clear()


def _broadcast_strides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Elements from one sequence, head and query of a mask (.., .., .., tokens) to the next; 0 where there is one."""
    B, H, L, tokens = shape
    return tuple(0 if n == 1 else step for n, step in ((B, H * L * tokens), (H, L * tokens), (L, tokens)))


# MLX hands a kernel inputs of fewer than 8 elements in another address space: none of these has fewer.


@lru_cache(maxsize=32)
def _padding(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return _evaluated(mx.zeros(shape, dtype))


@lru_cache(maxsize=64)
def _table(rotation: HadamardRotation | None, scale: float) -> mx.array:
    turns = () if rotation is None else (rotation.signs, rotation.kernel_hartley)
    return _evaluated(mx.concatenate([mx.array([scale, *[0.0] * 7]), *turns]))


def _evaluated(array: mx.array) -> mx.array:
    """The array, evaluated: a kept one that is not would belong to whatever graph is traced when it is first used."""
    mx.eval(array)
    return array
