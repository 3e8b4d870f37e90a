"""Solve the table of the 2-bit trellis code and write it as Python and as Metal constants.

python scripts/solve_trellis.py            writes kernels/trellis.h from mlx_turboquant/ops/trellis_values.py
python scripts/solve_trellis.py --solve    finds the table anew first (3 minutes on one core) and writes both files
python scripts/solve_trellis.py --check    exits with 1 if kernels/trellis.h differs from what would be written

Lloyd's iteration: encode Gaussian rows along the trellis, then move every value to the mean of what it stands for. It
is repeated from several random tables, since it ends in the nearest minimum, and the best goes on with more rows. Steps
go 1.7 times as far as the mean, which needs half the rounds; the last ones go to it. Rows begin in state 0, as those of
an index do, and values[255 - w] = -values[w] throughout: with rows turned about, the same data count twice.
"""

import sys
from pathlib import Path

import numpy as np

from mlx_turboquant.ops import viterbi

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "kernels" / "trellis.h"
MODULE = ROOT / "mlx_turboquant" / "ops" / "trellis_values.py"
DIM = 384
STEP = 1.7
# How many tables go on, rows, rounds and how far a step goes: a start's first rounds do not tell where it will end.
STAGES = ((20, 512, 60, STEP), (4, 2048, 60, STEP), (1, 2048, 250, STEP), (1, 8192, 25, 1.0))
FRESH_ROWS = 8192
PYTHON = '''\
"""The values of the 2-bit trellis code for windows 0 to 127, found by scripts/solve_trellis.py; see `ops.trellis`."""

HALF = (
    {numbers},
)  # fmt: skip
'''
HEADER = """\
// What the windows of the 2-bit trellis code stand for, see mlx_turboquant/ops/trellis.py.
// Written by scripts/solve_trellis.py from mlx_turboquant/ops/trellis_values.py; a test holds the two together.

constant constexpr float trellis_half[128] = {{
    {numbers}}};

METAL_FUNC float trellis_value(uint window) {{
  return window < 128 ? trellis_half[window & 127u] : -trellis_half[(255 - window) & 127u];
}}
"""


def gaussian_rows(n: int, seed: int) -> np.ndarray:
    """(n, DIM) float32."""
    return np.random.default_rng(seed).standard_normal((n, DIM), np.float32)


def improved(table: np.ndarray, rows: np.ndarray, rounds: int, step: float) -> tuple[np.ndarray, float]:
    """The table after so many rounds, and the squared error before the last."""
    for _ in range(rounds):
        found = viterbi.windows(rows, table)
        error = float(np.square(rows - table[found]).mean(dtype=np.float64))
        sums = np.bincount(found.reshape(-1), rows.reshape(-1).astype(np.float64), 256)
        counts = np.bincount(found.reshape(-1), minlength=256)
        sums, counts = sums - sums[::-1], counts + counts[::-1]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), table)
        table = (table + step * (means - table)).astype(np.float32)
    return table, error


def solve() -> np.ndarray:
    """The table (256,) float32."""
    starts = (np.random.default_rng(seed).standard_normal(256) for seed in range(STAGES[0][0]))
    tables = [((start - start[::-1]) / np.sqrt(2)).astype(np.float32) for start in starts]
    for number, (count, rows, rounds, step) in enumerate(STAGES):
        data = gaussian_rows(rows, 100 + number)
        found = [improved(table, data, rounds, step) for table in tables[:count]]
        order = sorted(range(len(found)), key=lambda i: found[i][1])
        tables = [found[i][0] for i in order]
        print(f"{rows} rows, {rounds} rounds:", " ".join(f"{found[i][1]:.5f}" for i in order), flush=True)
    fresh = gaussian_rows(FRESH_ROWS, 99)
    error = np.square(fresh - tables[0][viterbi.windows(fresh, tables[0])]).mean(dtype=np.float64)
    print(f"on fresh rows: {error:.5f}", flush=True)
    return tables[0]


def numbers(half: np.ndarray | tuple[float, ...], ending: str) -> str:
    """In lines of eight."""
    texts = [f"{float(np.float32(value)):.9g}{ending}" for value in half]
    lines = [", ".join(texts[i : i + 8]) for i in range(0, len(texts), 8)]
    return ",\n    ".join(lines)


def text() -> str:
    """The header file's text."""
    from mlx_turboquant.ops.trellis_values import HALF

    return HEADER.format(numbers=numbers(HALF, "f"))


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.read_text() == text() else f"{TARGET} is out of date: run python {sys.argv[0]}")
    if "--solve" in sys.argv[1:]:
        MODULE.write_text(PYTHON.format(numbers=numbers(solve()[:128], "")))
        print("wrote", MODULE)
    TARGET.write_text(text())
    print("wrote", TARGET)
