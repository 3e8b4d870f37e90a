"""What the prompt's queries weigh: sums of their squares, or of their outer products, for each key head."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_turboquant.attention import MAX_DIRECT_QUERIES
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import device_ints
from mlx_turboquant.ops.survey import survey

_BLOCK = 64  # queries that one threadgroup sums


class QueryMoments:
    """Sums over the queries of a prompt.

    A call of a few tokens may have been a decode step. Its queries are held back as they are until a prefill loop says
    that it was prompt (`count_newest`), and are forgotten at the next call.

    Attributes:
        sums: (B, Hkv, D) or (B, Hkv, D, D) float32, or None before any.
    """

    def __init__(self) -> None:
        self.sums: mx.array | None = None
        self._newest: tuple[Any, ...] | None = None  # the arguments of `_sums_over`

    def observe(
        self, queries: mx.array, heads: int, wanted: str, counts: Sequence[int] | None = None
    ) -> mx.array | None:
        """Add queries (B, H, L, D).

        Args:
            queries: of a call.
            heads: key heads Hkv.
            wanted: "squares" or "moments", see `Quantizer.queries_wanted`.
            counts: for each sequence, how many of the queries count, from the first on; None for all of them.

        Returns:
            What to evaluate together with the call, so that many queries need not stay; None for a few.
        """
        self._newest = queries, heads, wanted, counts
        if queries.shape[2] <= MAX_DIRECT_QUERIES:
            return None
        self.count_newest()
        return self.sums

    def adopt(self, other: "QueryMoments", wanted: str) -> None:
        """Take over what another cache has summed: squares are the diagonal of moments.

        Raises:
            ValueError: if moments are wanted and it has summed squares.
        """
        self.sums = other.sums
        if self.sums is None or not wanted:
            self.sums = None
        elif wanted == "squares" and self.sums.ndim == 4:
            self.sums = mx.diagonal(self.sums, axis1=-2, axis2=-1)
        elif wanted == "moments" and self.sums.ndim == 3:
            raise ValueError(
                "[TurboQuantKVCache.adopt] This scheme learns from the outer products of the prompt's queries, and the "
                "other cache has summed their squares. Read the prompt with a cache of this scheme."
            )

    def count_newest(self) -> None:
        """What was held back was prompt."""
        newest, self._newest = self._newest, None
        if newest is not None:
            new = _sums_over(*newest)
            self.sums = new if self.sums is None else self.sums + new

    def forget_newest(self) -> None:
        """What was held back was none."""
        self._newest = None


def _sums_over(queries: mx.array, heads: int, wanted: str, counts: Sequence[int] | None) -> mx.array:
    B, H, L, D = queries.shape
    whole = counts is None or min(counts) >= L
    if whole and wanted == "squares" and choose_backend() != "reference":
        return survey(queries, 0, L, block=_BLOCK, squares=True, heads=heads).squares
    rows = queries.astype(mx.float32).reshape(B, heads, H // heads, L, D)
    if not whole:
        counted = mx.arange(L) < device_ints(counts)[:, None]
        rows = mx.where(counted[:, None, None, :, None], rows, 0.0)
    if wanted == "moments":
        rows = rows.reshape(B, heads, -1, D)
        return rows.swapaxes(-1, -2) @ rows
    return mx.square(rows).sum(axis=(2, 3))
