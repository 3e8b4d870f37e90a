"""Write kernels/codebooks.h: the Lloyd-Max centroids of N(0, 1) as Metal constants.

python scripts/solve_codebooks.py           writes the file
python scripts/solve_codebooks.py --check   exits with 1 if the file differs from what would be written
"""

import sys
from pathlib import Path

from mlx_turboquant import codebook
from mlx_turboquant.packing import PLANES

TARGET = Path(__file__).resolve().parents[1] / "kernels" / "codebooks.h"
HEADER = """\
// Lloyd-Max centroids of N(0, 1), ascending, for every width that codes are packed in.
// Written by scripts/solve_codebooks.py from mlx_turboquant/codebook.py; a test holds the two together.
"""


def text() -> str:
    """The header file's text."""
    parts = [HEADER]
    for bits in PLANES:
        numbers = [f"{float(c):.9g}" for c in codebook.gaussian(bits)]
        numbers = [n if "." in n or "e" in n else f"{n}.0" for n in numbers]
        lines = [", ".join(f"{n}f" for n in numbers[i : i + 8]) for i in range(0, len(numbers), 8)]
        body = ",\n    ".join(lines)
        parts.append(f"constant constexpr float codebook_{bits}[{2**bits}] = {{\n    {body}}};\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.read_text() == text() else f"{TARGET} is out of date: run python {sys.argv[0]}")
    TARGET.write_text(text())
    print("wrote", TARGET)
