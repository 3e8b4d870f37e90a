"""The look at rows before they are encoded, and the balance made from it, judged against float64."""

import mlx.core as mx
import numpy as np

from mlx_turboquant.conditioning import BALANCE_FLOOR
from mlx_turboquant.ops.balance import balance
from mlx_turboquant.ops.survey import Survey, survey
from mlx_turboquant.verification.cases import KV_HEADS, BalanceCase, SurveyCase

START, BLOCKS = 5, 3
# Of deviations from a block's first row, whose mean may be some standard deviations; of that row, should it be NaN, 0
# takes the place.
_ALLOWED = 1e-4


def bad_rows(bad: mx.array, block: int) -> np.ndarray:
    """Which rows (B, H, n * block) bool are marked in `Survey.bad` of n blocks."""
    words = np.array(bad)
    bits = ((words[..., None] >> np.arange(32, dtype=np.uint32)) & 1).reshape(*words.shape[:3], -1)
    return bits[..., :block].reshape(*words.shape[:2], -1).astype(bool)


class SurveyCheck:
    """The error is the largest of a channel's squares, as a part of it; infinite if a bad row is missed or invented."""

    def __init__(self, case: SurveyCase):
        self.case = case
        rng = np.random.default_rng(case.D)
        count = BLOCKS * case.block - (0 if case.center else case.block // 3)
        rows = rng.standard_normal((1, KV_HEADS, START + count + 7, case.D)) + 5 * rng.standard_normal(case.D)
        if case.nonfinite:
            for at, bad in (((0, 0, START, 1), np.nan), ((0, 1, START + 9, 7), np.inf), ((0, 1, START - 1, 2), np.nan)):
                rows[at] = bad
        self.rows, self.count = mx.array(rows.astype(np.float32)).astype(getattr(mx, case.dtype)), count
        self.exact = np.array(self.rows.astype(mx.float32), np.float64)[:, :, START : START + count]
        mx.eval(self.rows)

    def call(self, backend: str) -> Survey:
        """The operation; every case has a kernel."""
        case = self.case
        how = {"block": case.block, "center": case.center and case.squares, "squares": case.squares}
        seen = survey(self.rows, START, START + self.count, **how, backend=backend)
        return seen if case.squares else seen._replace(squares=mx.zeros((8,)))

    def judge(self, out: Survey, backend: str) -> tuple[float, float]:
        """(error, allowed)."""
        fine = np.isfinite(self.exact)
        if not np.array_equal(bad_rows(out.bad, self.case.block)[..., : self.count], ~fine.all(axis=-1)):
            return float("inf"), _ALLOWED
        if not self.case.squares:
            return 0.0, _ALLOWED
        x = np.where(fine, self.exact, 0.0)
        if self.case.center:
            blocks, counts = (a.reshape(1, KV_HEADS, BLOCKS, -1, self.case.D) for a in (x, fine))
            means = blocks.sum(axis=3, keepdims=True) / np.maximum(counts.sum(axis=3, keepdims=True), 1)
            x = np.where(counts, blocks - means, 0.0).reshape(x.shape)
        wanted = np.square(x).sum(axis=2)
        rounding = 0.0 if backend != "reference" else float(2 * mx.finfo(self.rows.dtype).eps * 25)
        return float((np.abs(np.array(out.squares, np.float64) - wanted) / wanted).max()), _ALLOWED + rounding


class BalanceCheck:
    """The error is the largest of a factor, as a part of it."""

    def __init__(self, case: BalanceCase):
        rng = np.random.default_rng(case.D)
        queries, keys = rng.uniform(0.01, 4.0, (2, 2, KV_HEADS, case.D))
        queries[1, 0] = 0.0  # saw no query
        keys[0, 1, 5] = 1e6
        queries[0, 1, 3] = 0.0
        self.exact = np.ones_like(keys)
        for head in np.ndindex(2, KV_HEADS):
            if queries[head].any():
                logs = [np.log(e + BALANCE_FLOOR * e.mean()) for e in (queries[head], keys[head])]
                ratio = 0.25 * (logs[0] - logs[1])
                self.exact[head] = np.exp(ratio - ratio.mean())
        self.inputs = [mx.array(x.astype(np.float32)) for x in (queries, keys)]
        mx.eval(self.inputs)

    def call(self, backend: str) -> mx.array:
        """The operation; every case has a kernel."""
        return balance(*self.inputs, backend)

    def judge(self, out: mx.array, backend: str) -> tuple[float, float]:
        """(error, allowed)."""
        return float((np.abs(np.array(out, np.float64) - self.exact) / self.exact).max()), 1e-5
