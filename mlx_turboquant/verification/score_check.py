"""Inner products of queries with coded rows, judged against float64, and trellis codes against the nearest path."""

import mlx.core as mx
import numpy as np

from mlx_turboquant import codebook
from mlx_turboquant.ops import trellis
from mlx_turboquant.ops.score import score
from mlx_turboquant.packing import pack_codes, unpack_codes
from mlx_turboquant.verification.cases import ScoreCase
from mlx_turboquant.verification.row_checks import FLOOR

# Elements of a row between the first and the last that `trellis.encode` is given.
_BESIDE = 3


class ScoreCheck:
    """The error is the largest; 1e-5 of the largest product is allowed.

    Products of normal queries and rows of unit mean square are sums of `dim` numbers of about 1. Rounded in float32 as
    they are added up, in any order, they stay within that up to a dim of some thousands.

    Of an encoded case, all numbers are parts, and the error is the largest of three: that of scores, as a part of the
    largest; how much larger a row's squared error is than the reference's, in squared lengths of rows; and how far the
    row's product is off, in these too.
    """

    def __init__(self, case: ScoreCase):
        self.case = case
        rng = np.random.default_rng(case.dim)
        self.queries = rng.standard_normal((case.m, case.dim), np.float32)
        self.scales = rng.uniform(0.2, 2.0, case.n).astype(np.float32)
        if case.encoded:
            self.rows = rng.standard_normal((case.n, case.dim + 2 * _BESIDE), np.float32)
            self.codes = self._encoded("reference")[0]
        else:
            self.codes = pack_codes(mx.array(rng.integers(0, 2**case.bits, (case.n, case.dim), np.uint8)), case.bits)
        self.inputs = mx.array(self.queries), mx.array(self.scales)
        mx.eval(self.inputs, self.codes)

    def call(self, backend: str) -> tuple[mx.array, ...]:
        """Scores, and of an encoded case codes and products; every case has a kernel."""
        coded = self._encoded(backend) if self.case.encoded else (self.codes,)
        queries, scales = self.inputs
        products = score(queries, coded[0], scales, bits=self.case.bits, dim=self.case.dim, backend=backend)
        return (products, *coded) if self.case.encoded else (products,)

    def judge(self, out: tuple[mx.array, ...], backend: str) -> tuple[float, float]:
        """(error, allowed)."""
        codes = out[1] if self.case.encoded else self.codes
        values = self._values(codes)
        exact = self.queries.astype(np.float64) @ (values * self.scales[:, None]).T
        if out[0].shape != exact.shape:
            raise ValueError(f"[score] wanted {exact.shape}, got {out[0].shape}")
        error, largest = np.abs(np.array(out[0], np.float64) - exact).max(), np.abs(exact).max()
        if not self.case.encoded:
            return error, FLOOR * largest
        rows = self.rows[:, _BESIDE:-_BESIDE].astype(np.float64)
        lengths = np.square(rows).sum(axis=1)
        worse = np.square(rows - values).sum(axis=1) - np.square(rows - self._values(self.codes)).sum(axis=1)
        off = np.abs(np.array(out[2], np.float64) - (rows * values).sum(axis=1))
        return max(error / largest, (worse / lengths).max(), (off / lengths).max()), FLOOR

    def _encoded(self, backend: str) -> tuple[mx.array, mx.array]:
        return trellis.encode(mx.array(self.rows), _BESIDE, _BESIDE + self.case.dim, backend=backend)

    def _values(self, codes: mx.array) -> np.ndarray:
        """(n, dim) float64."""
        if self.case.bits == 2:
            return np.array(trellis.decode(codes, self.case.dim), np.float64)
        numbers = np.array(unpack_codes(codes, self.case.bits, self.case.dim))
        return codebook.gaussian(self.case.bits).astype(np.float64)[numbers]
