"""Histograms of row norms that can be added up, so that no more than one layer's rows are in memory."""

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np

PER_OCTAVE = 4  # bins: a norm and one 19% larger fall into neighbouring ones


class NormHistogram:
    """Norms of rows counted in logarithmic bins, four to an octave; histograms of several layers add up exactly.

    Bin i counts norms from 2^(i / 4) to 2^((i + 1) / 4). Zeros, and rows with NaN or infinities, are counted apart.

    Attributes:
        bins: rows by bin number.
        zeros, nonfinite: rows of norm 0, and rows with NaN or infinities.
        least, most: the smallest and the largest norm of the other rows; None without any.
        total: sum of the finite norms, zeros included.
    """

    def __init__(self) -> None:
        self.bins: Counter[int] = Counter()
        self.zeros = self.nonfinite = 0
        self.least: float | None = None
        self.most: float | None = None
        self.total = 0.0

    @property
    def rows(self) -> int:
        """All rows counted."""
        return sum(self.bins.values()) + self.zeros + self.nonfinite

    @property
    def mean(self) -> float | None:
        """The mean of the finite norms; None without any."""
        finite = self.rows - self.nonfinite
        return self.total / finite if finite else None

    def add_rows(self, rows: mx.array) -> None:
        """Count the norms of rows (..., D), any float dtype."""
        self.add_norms(np.array(_norms(rows)))

    def add_norms(self, norms: np.ndarray) -> None:
        """Count norms, any shape."""
        norms = norms.astype(np.float64).reshape(-1)
        finite = norms[np.isfinite(norms)]
        self.nonfinite += norms.size - finite.size
        self.total += float(finite.sum())
        above = finite[finite > 0]
        self.zeros += finite.size - above.size
        if above.size:
            numbers, counts = np.unique(np.floor(PER_OCTAVE * np.log2(above)).astype(int), return_counts=True)
            self.bins.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
            self._widen(float(above.min()), float(above.max()))

    def add(self, other: "NormHistogram") -> None:
        """Count what another histogram counted."""
        self.bins.update(other.bins)
        self.zeros += other.zeros
        self.nonfinite += other.nonfinite
        self.total += other.total
        if other.least is not None and other.most is not None:
            self._widen(other.least, other.most)

    def merged(self, most: int) -> list[tuple[float, float, int]]:
        """At most so many bins (from, to, rows), neighbouring ones put together until they are no more."""
        if not self.bins:
            return []
        first, last, width = min(self.bins), max(self.bins), 1
        while last // width - first // width >= most:
            width *= 2
        counts: Counter[int] = Counter()
        for number, count in self.bins.items():
            counts[number // width] += count
        numbers = range(first // width, last // width + 1)
        return [(_edge(n * width), _edge((n + 1) * width), counts[n]) for n in numbers]

    def summary(self) -> dict[str, Any]:
        """The counts as JSON has them: rows, zeros, nonfinite, least, mean, most, bins [[from, to, rows], ...]."""
        bins = [[_edge(number), _edge(number + 1), self.bins[number]] for number in sorted(self.bins)]
        return {
            "rows": self.rows, "zeros": self.zeros, "nonfinite": self.nonfinite, "least": self.least,
            "mean": self.mean, "most": self.most, "bins": bins,
        }  # fmt: skip

    @classmethod
    def from_summary(cls, summary: dict[str, Any]) -> "NormHistogram":
        """The histogram that `summary` told."""
        out = cls()
        out.bins.update({round(PER_OCTAVE * math.log2(low)): rows for low, _, rows in summary["bins"]})
        out.zeros, out.nonfinite = summary["zeros"], summary["nonfinite"]
        out.least, out.most = summary["least"], summary["most"]
        out.total = (summary["mean"] or 0.0) * (out.rows - out.nonfinite)
        return out

    def text(self, width: int = 40, most: int = 12) -> str:
        """Lines of ``from - to  rows  bar``, the longest bar `width` long."""
        bins = self.merged(most)
        longest = max((count for _, _, count in bins), default=1)
        lines = [f"{low:>9.3g} - {high:<9.3g} {count:>11,}  {_bar(count, longest, width)}" for low, high, count in bins]
        for name, count in (("zero", self.zeros), ("NaN or infinite", self.nonfinite)):
            if count:
                lines.append(f"{name:>21} {count:>11,}")
        return "\n".join(lines) if lines else "no rows"

    def _widen(self, least: float, most: float) -> None:
        self.least = least if self.least is None else min(self.least, least)
        self.most = most if self.most is None else max(self.most, most)


def _norms(rows: mx.array) -> mx.array:
    """Norms (...) float32 of rows (..., D); squares are taken of what lies in [-1, 1], so that none overflows."""
    rows = rows.astype(mx.float32)
    largest = mx.abs(rows).max(axis=-1, keepdims=True)
    scaled = rows / mx.where(largest > 0, largest, 1.0)
    return largest[..., 0] * mx.sqrt(mx.square(scaled).sum(axis=-1))


def _edge(number: int) -> float:
    return 2.0 ** (number / PER_OCTAVE)


def _bar(count: int, longest: int, width: int) -> str:
    return "#" * (-(-count * width // longest))
