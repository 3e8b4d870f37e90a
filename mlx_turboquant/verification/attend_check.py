"""Attention over a random compressed layer, judged against float64 over the rows that the layer stands for."""

import copy

import mlx.core as mx
import numpy as np

from mlx_turboquant import attention
from mlx_turboquant.ops import attend as kernel
from mlx_turboquant.ops.attend_plan import tensor_cores_for_any_length
from mlx_turboquant.ops.dequantize import dequantize
from mlx_turboquant.ops.encode import encode
from mlx_turboquant.quantizers import make_quantizers
from mlx_turboquant.quantizers.coded import CodedKeys
from mlx_turboquant.quantizers.qjl import QjlKeys
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tail_parts import FEW, TailParts
from mlx_turboquant.tensor import CompressedRows, PackedTensor
from mlx_turboquant.verification.cases import KV_HEADS, AttendCase
from mlx_turboquant.verification.row_checks import (
    FLOOR,
    in_float32,
    packed_with_room,
    random_balance,
    random_rows,
    with_room,
)


class AttendCheck:
    """The error is the largest. Allowed is twice the largest that plain MLX operations make in the same dtype over
    rows rounded to it (against float64 over those same rows), and 1e-5 of the largest number beside that.
    """

    def __init__(self, case: AttendCase):
        self.case, self.dtype = case, getattr(mx, case.dtype)
        self.B, self.heads, self.scale = len(case.lengths), case.G * KV_HEADS, case.D**-0.5
        self.balance = random_balance(self.B, case.D) if case.balance and case.key_bits else None
        shape = self.B, self.heads, case.L, case.D
        self.queries = (2 * mx.random.normal(shape, key=mx.random.key(1))).astype(self.dtype)
        options = {"block": case.block, "group": case.group, "center": case.center, "balance": self.balance is not None}
        scheme = KVScheme("turbo", case.key_bits, case.value_bits, **options)
        key_side, value_side = make_quantizers(scheme, case.D, case.D, self.dtype)
        if case.signs:
            key_side = CodedKeys(QjlKeys(scheme, case.key_bits + 1, case.D, self.dtype), scheme)
        if self.balance is not None:
            key_side.learned = (self.balance,)
        self.keys, keys = self._side(key_side, 2, case.center, self.balance)
        self.values, values = self._side(value_side, 3, False, None)
        self.rows = [(self._valid(keys, b), self._valid(values, b)) for b in range(self.B)]
        self.mask = self._mask()
        self.logits = mx.random.uniform(-2.0, 6.0, (self.heads,), key=mx.random.key(4)) if case.logits else None
        mx.eval(self.queries, self.mask, self.logits, self.balance)

    def _side(self, quantizer, seed: int, center: bool, balance) -> tuple[CompressedRows, tuple]:
        """One side, and its (sinks, packed, tail) as float32 rows."""
        case, lead = self.case, (self.B, KV_HEADS)
        sinks, packed, tail = (max(n[i] for n in case.lengths) for i in range(3))
        rows = random_rows((*lead, sinks + packed + tail, case.D), self.dtype, seed)
        first, last = rows[:, :, :sinks], rows[:, :, sinks + packed :]
        if quantizer.bits == 0:
            stored = PackedTensor(rows[:, :, sinks : sinks + packed])
            exact = stored.codes.astype(mx.float32)
        elif quantizer.fused.projection is not None:
            stored = quantizer.encode(rows, sinks, sinks + packed)
            precise = copy.copy(quantizer)
            precise.dtype = mx.float32
            exact = precise.decode(in_float32(stored))
        else:
            rotation = make_rotation("hadamard", case.D)
            options = {"bits": quantizer.bits, "block": case.block, "rotation": rotation, "balance": balance}
            group = case.group or case.D
            how = {"group": group, "center": center, "backend": "reference", **options}
            stored = encode(rows, sinks, sinks + packed, **how).packed
            exact = dequantize(in_float32(stored), 0, packed, dim=case.D, backend="reference", **options)
        stored = packed_with_room(stored, case.block)
        parts = mx.contiguous(first) if sinks else None, with_room(last, 9) if tail else None
        mx.eval(stored, parts, exact)
        side = CompressedRows(parts[0], stored, packed, parts[1], tail, quantizer, case.block)
        return side, tuple(np.array(part.astype(mx.float32)) for part in (first, exact, last))

    def _valid(self, parts: tuple, b: int) -> np.ndarray:
        """One sequence's rows (H, T, D), for each query head, in float64."""
        rows = [part[b, :, :n] for part, n in zip(parts, self.case.lengths[b], strict=True)]
        return np.repeat(np.concatenate(rows, axis=1).astype(np.float64), self.case.G, axis=0)

    def _mask(self) -> mx.array | None:
        """A random mask (B, H, L, T); the last query of the first head of each sequence sees nothing."""
        case, tokens = self.case, max(map(sum, self.case.lengths))
        if case.mask not in ("boolean", "added"):
            return None
        shape = self.B, self.heads, case.L, tokens
        keep = mx.random.bernoulli(0.7, shape, key=mx.random.key(6))
        keep[:, :1, -1:] = False
        if case.mask == "boolean":
            return keep
        return mx.where(keep, mx.random.normal(shape, key=mx.random.key(7)), -mx.inf).astype(self.dtype)

    def call(self, backend: str) -> mx.array:
        """The operation; on CUDA with tensor cores wherever they can, since the inputs are small."""
        kernel.forget_calls()
        with tensor_cores_for_any_length():
            try:
                return self._call(backend)
            finally:
                kernel.forget_calls()

    def _call(self, backend: str) -> mx.array:
        case, mask = self.case, "causal" if self.case.mask == "causal" else self.mask
        if backend != "reference":
            sides = self._stored(self.keys), self._stored(self.values)
            if (reason := kernel.why_not(case.D, case.D, case.block, *sides)) is not None:
                raise ValueError(f"[attend] no kernel runs, because {reason}")
            if case.ragged or case.beside:
                out = kernel.attend(
                    self.queries,
                    *sides,
                    case.lengths,
                    scale=self.scale,
                    block=case.block,
                    balance=self.balance,
                    mask=self.mask,
                    causal=case.mask == "causal",
                    logits=self.logits,
                    backend=backend,
                )
                for side in sides if case.beside else ():
                    self._check_joined(side.tail)
                return out
        if case.ragged:
            alone = []
            for b in range(self.B):
                rows = self._alone(self.keys, b), self._alone(self.values, b)
                own = mask[b : b + 1, ..., : rows[0].shape[2]] if isinstance(mask, mx.array) else mask
                alone.append(attention.attend(self.queries[b : b + 1], *rows, self.scale, own, self.logits, backend))
            return mx.concatenate(alone)
        return attention.attend(self.queries, self.keys, self.values, self.scale, mask, self.logits, backend)

    def _stored(self, side: CompressedRows) -> kernel.StoredSide:
        bits, *turned = side.quantizer.fused
        tail = self._in_parts(side.newest) if self.case.beside else side.newest
        return kernel.StoredSide(bits, side.stored, side.sinks, tail, *turned)

    def _in_parts(self, tail: mx.array) -> TailParts:
        """The tail with its last rows beside it, and zeros in their places."""
        held = self.case.tail - self.case.beside
        loose = tail[:, :, held : self.case.tail]
        few = mx.pad(loose[:, :, :-1], [(0, 0), (0, 0), (0, FEW + 1 - self.case.beside), (0, 0)])
        array = mx.where(mx.arange(tail.shape[2])[:, None] < held, tail, 0).astype(tail.dtype)
        few = few if self.case.beside > 1 else None
        return TailParts(array, held, few, self.case.beside - 1, mx.contiguous(loose[:, :, -1:]))

    def _check_joined(self, parts: TailParts) -> None:
        """Raise a ValueError unless the kernel put the new row behind the few, to the bit."""
        wanted = TailParts(parts.array, parts.joined, parts.few, parts.count, parts.new).loose()
        if parts.next is None or not mx.array_equal(parts.loose(), wanted):
            raise ValueError("[attend] the kernel did not put the new row behind the few beside the tail")

    def _alone(self, side: CompressedRows, b: int) -> CompressedRows:
        """Sequence b's rows: the reference knows one length for all."""
        sinks, packed, tail = self.case.lengths[b]
        quantizer = side.quantizer.sequences(slice(b, b + 1))
        stored = side.stored.map(lambda part: part[b : b + 1])
        first = side.sinks[b : b + 1, :, :sinks] if sinks else None
        return CompressedRows(first, stored, packed, side.newest[b : b + 1], tail, quantizer, side.block)

    def judge(self, out: mx.array, backend: str) -> tuple[float, float]:
        """(error, allowed)."""
        out = np.array(out.astype(mx.float32), np.float64)
        error = largest = allowed = 0.0
        for b, (keys, values) in enumerate(self.rows):
            added = self._added(b, keys.shape[1])
            exact = self._exact(b, keys, values, added)
            # NaN must stay: max() would lose it.
            error, largest = np.maximum(error, np.abs(out[b] - exact).max()), max(largest, np.abs(exact).max())
            allowed = max(allowed, 2 * self._plain_error(b, keys, values, added))
        return error, allowed + FLOOR * largest

    def _added(self, b: int, T: int) -> np.ndarray:
        """What is added to sequence b's scores (H, L, T): -inf hides a token."""
        added = np.zeros((self.heads, self.case.L, T))
        if self.mask is not None:
            mask = np.array(self.mask[b, ..., :T].astype(mx.float32), np.float64)
            added = np.where(mask > 0, 0.0, -np.inf) if self.mask.dtype == mx.bool_ else mask
        if self.case.mask == "causal":
            added = np.where(np.arange(T - self.case.L, T)[:, None] >= np.arange(T), added, -np.inf)
        return added

    def _exact(self, b: int, keys: np.ndarray, values: np.ndarray, added: np.ndarray) -> np.ndarray:
        """(H, L, D) in float64; 0 for a query that sees nothing."""
        queries = np.array(self.queries[b].astype(mx.float32), np.float64)
        scores = self.scale * queries @ keys.swapaxes(-1, -2) + added
        logits = np.full(self.heads, -np.inf) if self.logits is None else np.array(self.logits, np.float64)
        top = np.maximum(np.maximum(scores.max(axis=-1, keepdims=True), logits[:, None, None]), -1e300)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(logits[:, None, None] - top)
        return weights @ values / np.where(total > 0, total, 1.0)

    def _plain_error(self, b: int, keys: np.ndarray, values: np.ndarray, added: np.ndarray) -> float:
        k, v = (mx.array(rows.astype(np.float32)).astype(self.dtype) for rows in (keys, values))
        scores = (self.queries[b] * self.scale) @ k.swapaxes(-1, -2)
        scores = scores + mx.array(added.astype(np.float32)).astype(self.dtype)
        if self.logits is not None:
            column = mx.broadcast_to(self.logits[:, None, None], (*scores.shape[:2], 1))
            scores = mx.concatenate([scores, column.astype(self.dtype)], axis=-1)
        weights = mx.softmax(scores, axis=-1, precise=True)[..., : k.shape[1]]
        out = np.array((weights @ v).astype(mx.float32), np.float64)
        rounded = (np.array(rows.astype(mx.float32), np.float64) for rows in (k, v))
        seen = np.isfinite(added).any(axis=-1)
        return np.abs(out - self._exact(b, *rounded, added))[seen].max(initial=0.0)
