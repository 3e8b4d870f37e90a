"""Write kernels/codebooks.h: the Lloyd-Max centroids of N(0, 1) and polynomials through them, as Metal constants.

python scripts/solve_codebooks.py           writes the file
python scripts/solve_codebooks.py --check   exits with 1 if the file differs from what would be written
"""

import sys
from pathlib import Path

import numpy as np

from mlx_turboquant import codebook
from mlx_turboquant.packing import PLANES

TARGET = Path(__file__).resolve().parents[1] / "kernels" / "codebooks.h"
HEADER = """\
// Lloyd-Max centroids of N(0, 1), ascending, for every width that codes are packed in, and polynomials through them.
// Written by scripts/solve_codebooks.py from mlx_turboquant/codebook.py; a test holds the two together.
"""
TERMS = """\
// A code's centroid without a table: u (t[0] + t[1] u^2 + t[2] u^4 ..) with u = code - (2^bits - 1) / 2, by Horner's
// rule in float32 with fma. At 3 bits these are the centroids, at 4 too but +-0.942340434, one unit in the last place
// too near to 0. With 7 terms centroids would be up to 26 units off, with 6 432, with 5 3414.
"""
POLYNOMIALS = (3, 4)  # bits


def centroid_terms(bits: int) -> np.ndarray:
    """The coefficients of the odd polynomial through the centroids: (2**(bits - 1),) float32.

    The exact ones rounded to float32 would put a few centroids one unit in the last place off; of all their neighbours
    within 4 units that are tried, those are taken that put the fewest off.
    """
    wanted = codebook.gaussian(bits)[2 ** (bits - 1) :]
    u = np.arange(wanted.size) + 0.5
    powers = u[:, None] ** np.arange(1, 2 * wanted.size, 2)
    terms = np.linalg.solve(powers / powers[-1], wanted.astype(np.float64)) / powers[-1]
    # RandomState, since numpy promises that its numbers never change.
    steps = np.random.RandomState(0).randint(-4, 5, (10_000, wanted.size))
    steps[0] = 0
    tried = (terms.astype(np.float32) + steps * np.spacing(terms.astype(np.float32)).astype(np.float64)).astype(
        np.float32
    )
    return tried[np.abs(_evaluated(tried, u.astype(np.float32)) - wanted).sum(axis=1).argmin()]


def _evaluated(terms: np.ndarray, u: np.ndarray) -> np.ndarray:
    """(n, len(u)) float32: polynomials `terms` (n, k) at u, as the kernels evaluate them."""
    square, total = u * u, np.repeat(terms[:, -1:], u.size, axis=1)
    for term in reversed(terms.T[:-1]):
        # Two float32 multiplied are exact in float64, so that this is an fma but for sums halfway between two floats.
        total = (total.astype(np.float64) * square + term[:, None].astype(np.float64)).astype(np.float32)
    return u * total


def text() -> str:
    """The header file's text."""
    tables = [_array(f"codebook_{bits}", codebook.gaussian(bits)) for bits in PLANES]
    terms = [_array(f"centroid_terms_{bits}", centroid_terms(bits)) for bits in POLYNOMIALS]
    return "\n".join([HEADER, *tables, TERMS, *terms])


def _array(name: str, values: np.ndarray) -> str:
    numbers = [f"{float(x):.9g}" for x in values]
    numbers = [n if "." in n or "e" in n else f"{n}.0" for n in numbers]
    lines = [", ".join(f"{n}f" for n in numbers[i : i + 8]) for i in range(0, len(numbers), 8)]
    body = ",\n    ".join(lines)
    return f"constant constexpr float {name}[{len(numbers)}] = {{\n    {body}}};\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.read_text() == text() else f"{TARGET} is out of date: run python {sys.argv[0]}")
    TARGET.write_text(text())
    print("wrote", TARGET)
