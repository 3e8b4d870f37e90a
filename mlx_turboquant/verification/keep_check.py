"""The rows that stay raw when blocks are encoded, judged bit for bit."""

import mlx.core as mx
import numpy as np

from mlx_turboquant.ops.keep_rows import Kept, keep_rows
from mlx_turboquant.verification.cases import KV_HEADS, KeepCase

_ALLOWED = 0.5
_BITS = {2: mx.uint16, 4: mx.uint32}


class KeepCheck:
    """The error is how many numbers differ in a bit, those behind the rows included; half of one is allowed."""

    def __init__(self, case: KeepCase):
        self.case, rng = case, np.random.default_rng(case.D)
        self.start = max(case.first, 5) + 3
        self.rows = []
        for D, behind in ((case.D, 9), (case.Dv, 2)):
            rows = rng.standard_normal((2, KV_HEADS, self.start + case.newest + behind, D))
            rows[rng.random(rows.shape) < 0.01] = np.nan
            rows[rng.random(rows.shape) < 0.01] = -np.inf
            self.rows.append(mx.array(rows.astype(np.float32)).astype(getattr(mx, case.dtype)))
        mx.eval(self.rows)

    def call(self, backend: str) -> Kept:
        """The operation; every case has a kernel."""
        stop = self.start + self.case.newest
        how = {"first": self.case.first, "start": self.start, "stop": stop, "room": self.case.room}
        return keep_rows(*self.rows, **how, backend=backend)

    def judge(self, out: Kept, backend: str) -> tuple[float, float]:
        """(error, allowed)."""
        case, wrong = self.case, 0
        if (out.first is None) != (case.first == 0):
            return float("inf"), _ALLOWED
        for rows, newest, first in zip(self.rows, out.newest, out.first or (None, None), strict=True):
            B, H, _, D = rows.shape
            behind = mx.zeros((B, H, case.room - case.newest, D), rows.dtype)
            wanted = mx.concatenate([rows[:, :, self.start : self.start + case.newest], behind], axis=2)
            for got, right in ((newest, wanted), (first, rows[:, :, : case.first])):
                if got is not None:
                    if got.shape != right.shape or got.dtype != right.dtype:
                        return float("inf"), _ALLOWED
                    kind = _BITS[rows.itemsize]
                    wrong += (mx.contiguous(got).view(kind) != mx.contiguous(right).view(kind)).sum().item()
        return float(wrong), _ALLOWED
