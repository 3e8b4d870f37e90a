"""The trellis code of 2 bits: rows to codes, in a kernel or in numpy, and codes to values.

An element's value is looked up with its own code and the three before it: 256 values for 2 bits. So codes cannot be
chosen one by one; the Viterbi algorithm finds the nearest of all sequences. On Gaussian numbers that leaves a squared
error of .0764 where the best quantizer of single ones leaves .1175 and no code of 2 bits less than .0625.

Source: Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources" (IEEE Trans. Commun.
1990), for quantizing along a trellis with values found by Lloyd's iteration; QTIP (Tseng et al., NeurIPS 2024, arXiv
2406.11235) for the bit-shift trellis, whose state is the last bits of the code itself, so that any element is decoded
from its place. The values, antisymmetric and for rows that start in state 0, are ours (scripts/solve_trellis.py).
"""

from functools import cache

import mlx.core as mx
import numpy as np

from mlx_turboquant.ops import viterbi
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import ints
from mlx_turboquant.ops.kernel import Kernel
from mlx_turboquant.ops.trellis_values import HALF
from mlx_turboquant.packing import words_per_row

_SIMDGROUPS = 4
# Elements that a kernel takes at a time: its back pointers are 16 bytes for each, 64 MiB.
_PIECE_ELEMENTS = 1 << 22

_TRELLIS = Kernel("trellis", ("rows", "sizes"), ("codes", "products", "back"), ("trellis.h",))


@cache
def values() -> np.ndarray:
    """What each window stands for: (256,) float32, read-only, values[255 - w] = -values[w].

    Window w of element i is the codes c of elements i - 3 to i, the oldest in the lowest bits: c[i - 3] + 4 c[i - 2] +
    16 c[i - 1] + 64 c[i], where codes before the row are 0. In a packed row that is bits 2 i - 6 to 2 i + 1.
    """
    half = np.array(HALF, np.float32)
    table = np.concatenate([half, -half[::-1]])
    table.setflags(write=False)
    return table


def encode(rows: mx.array, start: int, stop: int, *, backend: str | None = None) -> tuple[mx.array, mx.array]:
    """The codes whose values are nearest to a part of each row, by squared error.

    Args:
        rows: (n, D) float32, of about unit mean square. Whole rows, since a kernel would have to copy a part of them.
        start, stop: the elements that are encoded, 0 <= start < stop <= D.
        backend: see `choose_backend`.

    Returns:
        codes: (n, words_per_row(stop - start, 2)) uint32, as `packing.pack_codes` packs them.
        products: (n,) float32, the inner product of what was encoded with its values.

    Raises:
        ValueError: for other shapes or dtypes, or an unknown backend.
    """
    if rows.ndim != 2 or rows.dtype != mx.float32 or not 0 <= start < stop <= rows.shape[1]:
        raise ValueError(
            f"[trellis.encode] wanted rows (n, D) float32 and 0 <= start < stop <= D, got {rows.shape} {rows.dtype}, "
            f"{start} and {stop}. Reshape or convert the rows first."
        )
    backend = choose_backend(backend)
    if not rows.shape[0]:
        return mx.zeros((0, words_per_row(stop - start, 2)), mx.uint32), mx.zeros((0,))
    if backend == "reference":
        return _encode_in_numpy(np.asarray(rows)[:, start:stop])
    n, step = rows.shape[0], max(_PIECE_ELEMENTS // (stop - start), 1)
    if n <= step:
        return _encode_in_kernel(rows, start, stop - start, backend)
    pieces = (rows[first : first + step] for first in range(0, n, step))
    done = [_encode_in_kernel(piece, start, stop - start, backend) for piece in pieces]
    return tuple(map(mx.concatenate, zip(*done, strict=True)))


def decode(codes: mx.array, dim: int) -> mx.array:
    """What codes (n, words_per_row(dim, 2)) uint32 stand for: (n, dim) float32.

    Raises:
        ValueError: for rows of another length.
    """
    if codes.shape[1:] != (words_per_row(dim, 2),):
        raise ValueError(
            f"[trellis.decode] wanted codes (n, {words_per_row(dim, 2)}) for dim={dim}, got {codes.shape}. Pass what "
            "trellis.encode gave."
        )
    before = mx.pad(codes[:, :-1], [(0, 0), (1, 0)])
    # Bits of the first three elements' windows lie in the word before.
    first = ((codes << 6) | (before >> 26))[..., None] >> mx.arange(0, 6, 2, dtype=mx.uint32)
    others = codes[..., None] >> mx.arange(0, 26, 2, dtype=mx.uint32)
    windows = (mx.concatenate([first, others], axis=-1) & 255).reshape(codes.shape[0], 16 * codes.shape[1])
    return mx.array(values())[windows[:, :dim]]


def _encode_in_numpy(rows: np.ndarray) -> tuple[mx.array, mx.array]:
    n, dim = rows.shape
    windows = viterbi.windows(rows, values())
    # Four codes are a byte, and the window of the last of them.
    out = np.zeros((n, 4 * words_per_row(dim, 2)), np.uint8)
    whole = dim // 4
    out[:, :whole] = windows[:, 3::4]
    if dim % 4:
        out[:, whole] = windows[:, -1] >> (8 - 2 * (dim % 4))
    products = (rows * values().take(windows)).sum(axis=1)
    return mx.array(out.view(np.uint32)), mx.array(products)


def _encode_in_kernel(rows: mx.array, start: int, dim: int, backend: str) -> tuple[mx.array, mx.array]:
    (n, D), chunks = rows.shape, words_per_row(dim, 2)
    groups = -(-n // (2 * _SIMDGROUPS))
    codes, products, _ = _TRELLIS(
        backend,
        [rows if rows.size >= 8 else mx.pad(rows.reshape(-1), (0, 8 - rows.size)), ints(n, D, start, dim, chunks)],
        template=[("NSG", _SIMDGROUPS)],
        groups=(groups, 1, 1),
        threads=32 * _SIMDGROUPS,
        output_shapes=[(n, chunks), (n,), (groups * 2 * _SIMDGROUPS, chunks, 16, 4)],
        output_dtypes=[mx.uint32, mx.float32, mx.uint32],
    )
    return codes, products
