"""Encoding and decoding of whole blocks, judged against plain MLX operations in float32."""

from typing import Any

import mlx.core as mx
import numpy as np
from scipy.stats import norm

from mlx_turboquant import codebook
from mlx_turboquant.ops.dequantize import dequantize
from mlx_turboquant.ops.encode import Encoded, encode
from mlx_turboquant.ops.row_kernels import reason_against
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tensor import PackedTensor
from mlx_turboquant.verification.cases import KV_HEADS, DequantizeCase, EncodeCase
from mlx_turboquant.verification.survey_check import bad_rows

# What room beyond the valid rows is filled with, so that a stray read is loud.
LOUD = 3e4
# The least error that is allowed, as a part of the largest number: float32 arithmetic in another order.
FLOOR = 1e-5
# A value on the edge of two cells may get either code, and edges lie up to 0.003 of a cell beside the middle of two
# centroids: a row's squared error then differs. By bits; at 8 one outer cell is half of it (8% was seen).
SLACK = {2: 0.05, 3: 0.05, 4: 0.05, 8: 0.2}
START = 4  # first row that is encoded: after the sinks


def random_rows(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    """Normal rows with other offsets and sizes in each channel, as keys have."""
    keys = mx.random.split(mx.random.key(seed), 3)
    offset = mx.random.normal(shape[-1:], key=keys[0])
    size = mx.random.uniform(0.3, 2.0, shape[-1:], key=keys[1])
    return (offset + size * mx.random.normal(shape, key=keys[2])).astype(dtype)


def random_balance(B: int, D: int) -> mx.array:
    """Factors (B, Hkv, D) float32 as `conditioning.balance_factors` gives them."""
    return mx.random.uniform(0.5, 2.0, (B, KV_HEADS, D), key=mx.random.key(11))


def with_room(rows: mx.array, spare: int) -> mx.array:
    """Rows (B, Hkv, T, n) in a buffer with room for more, which is loud."""
    B, H, _, n = rows.shape
    loud = 2**32 - 1 if rows.dtype == mx.uint32 else LOUD
    return mx.concatenate([rows, mx.full((B, H, spare, n), loud, rows.dtype)], axis=2)


def packed_with_room(packed: PackedTensor, block: int) -> PackedTensor:
    """Packed rows in buffers with room for one block more."""
    parts = zip(packed, (block, block, 1), strict=True)
    return PackedTensor(*(None if part is None else with_room(part, spare) for part, spare in parts))


def in_float32(packed: PackedTensor) -> PackedTensor:
    """With scales and centres in float32, so that decoding rounds nothing."""
    wide = (None if part is None else part.astype(mx.float32) for part in packed[1:])
    return PackedTensor(packed.codes, *wide)


def distortion(bits: int) -> float:
    """Mean squared error of the Lloyd-Max codebook for N(0, 1), see `codebook.gaussian`."""
    centroids = codebook.gaussian(bits).astype(np.float64)
    edges = np.concatenate([[-np.inf], codebook.boundaries(centroids), [np.inf]])
    return float(1 - np.diff(norm.cdf(edges)) @ centroids**2)


class _RowCheck:
    def __init__(self, case: EncodeCase | DequantizeCase):
        self.case, self.dtype = case, getattr(mx, case.dtype)
        self.rotation = make_rotation("hadamard", case.D)
        self.balance = random_balance(1, case.D) if case.balance else None
        rows = random_rows((1, KV_HEADS, 3 * case.block, case.D), self.dtype, seed=5)
        if getattr(case, "nonfinite", False):
            for at, bad in (((0, 0, 3, 1), mx.nan), ((0, 0, 3, 2), -mx.inf), ((0, 1, case.block, 7), mx.inf)):
                rows[at] = bad
        before = mx.full((1, KV_HEADS, START, case.D), LOUD, self.dtype)
        self.rows = with_room(mx.concatenate([before, rows], axis=2), 8)

    def encoded(self, backend: str) -> Encoded:
        case = self.case
        return encode(
            self.rows,
            START,
            START + 3 * case.block,
            bits=case.bits,
            group=case.group or case.D,
            block=case.block,
            rotation=self.rotation,
            center=case.center,
            balance=self.balance,
            scalings=getattr(case, "scalings", 2),
            backend=backend,
        )

    def decoded(self, packed: PackedTensor, start: int, stop: int, backend: str = "reference", balance: bool = True):
        case = self.case
        return dequantize(
            packed,
            start,
            stop,
            bits=case.bits,
            dim=case.D,
            block=case.block,
            rotation=self.rotation,
            balance=self.balance if balance else None,
            backend=backend,
        )

    def refuse_fallback(self, backend: str) -> None:
        reason = reason_against(self.case.D, self.case.bits, self.case.block, self.dtype, self.rotation)
        if backend != "reference" and reason is not None:
            raise ValueError(f"[{self.case.operation}] no kernel runs, because {reason}")


class EncodeCheck(_RowCheck):
    """Codes may differ from the reference's where a value lies on the edge of two cells, so rows are judged decoded.

    The error is the largest, over rows, of two: the squared error over that of the reference's row, less 1; and the
    difference of norms, before balance and centre, as a part. `SLACK` is allowed; it is infinite if a row with NaN or
    infinities is missed or invented. The reference itself is judged by its
    mean squared error, as a part of the rows, against what theory gives for its codebook, and 10% more.
    """

    def __init__(self, case: EncodeCase):
        super().__init__(case)
        self.reference = self.encoded("reference").packed
        mx.eval(self.rows, self.balance, self.reference)

    def call(self, backend: str) -> Encoded:
        """The operation."""
        self.refuse_fallback(backend)
        return self.encoded(backend)

    def judge(self, out: Encoded, backend: str) -> tuple[Any, float]:
        """(error, allowed)."""
        out, bad = out
        rows = np.array(self.rows.astype(mx.float32))[:, :, START : START + 3 * self.case.block]
        if not np.array_equal(bad_rows(bad, self.case.block), ~np.isfinite(rows).all(axis=-1)):
            return float("inf"), SLACK[self.case.bits]
        if backend == "reference":
            target, decoded = self._target(), self._decoded(out)
            plain = target if out.centers is None else target - self._spread(out.centers)
            if self.balance is not None:  # where the quantizer works
                decoded, target = decoded * self.balance[:, :, None], target * self.balance[:, :, None]
                plain = plain * self.balance[:, :, None]
            part = mx.square(decoded - target).sum() / mx.square(plain).sum()
            return part.item(), 1.1 * distortion(self.case.bits)
        worse = self._squared_error(out) / self._squared_error(self.reference) - 1
        longer = self._norms(out) / self._norms(self.reference) - 1
        return mx.maximum(worse.max(), mx.abs(longer).max()).item(), SLACK[self.case.bits]

    def _target(self) -> mx.array:
        rows = self.rows[:, :, START : START + 3 * self.case.block].astype(mx.float32)
        centers = self.reference.centers
        return mx.where(mx.isfinite(rows), rows, 0.0 if centers is None else self._spread(centers))

    def _spread(self, centers: mx.array) -> mx.array:
        return mx.repeat(centers.astype(mx.float32), self.case.block, axis=2)

    def _decoded(self, packed: PackedTensor, balance: bool = True) -> mx.array:
        return self.decoded(in_float32(packed), 0, 3 * self.case.block, balance=balance)

    def _squared_error(self, packed: PackedTensor) -> mx.array:
        target = self._target()
        least = 1e-9 * mx.square(target).sum(axis=-1)
        return mx.square(self._decoded(packed) - target).sum(axis=-1) + least

    def _norms(self, packed: PackedTensor) -> mx.array:
        return mx.linalg.norm(self._decoded(packed._replace(centers=None), balance=False), axis=-1) + 1e-30


class DequantizeCheck(_RowCheck):
    """The error is the largest; twice that of rounding exact rows to the dtype is allowed, and 1e-5 of the largest."""

    def __init__(self, case: DequantizeCase):
        super().__init__(case)
        packed = self.encoded("reference").packed
        self.packed = packed_with_room(packed, case.block)
        self.exact = self.decoded(in_float32(packed), case.block, 3 * case.block)
        mx.eval(self.packed, self.exact, self.balance)

    def call(self, backend: str) -> mx.array:
        """The operation."""
        self.refuse_fallback(backend)
        return self.decoded(self.packed, self.case.block, 3 * self.case.block, backend)

    def judge(self, out: mx.array, backend: str) -> tuple[Any, Any]:
        """(error, allowed)."""
        error = mx.abs(out.astype(mx.float32) - self.exact).max()
        rounding = mx.abs(self.exact.astype(self.dtype).astype(mx.float32) - self.exact).max()
        return error.item(), (2 * rounding + FLOOR * mx.abs(self.exact).max()).item()
