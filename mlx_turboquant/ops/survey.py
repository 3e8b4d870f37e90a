"""One look at rows before they are encoded, or at queries: squares per channel, and which rows are not finite."""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_turboquant.conditioning import block_centers, finite_or_zero, subtract_centers
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import ints
from mlx_turboquant.ops.kernel import Kernel

_THREADS = 128
_DTYPES = (mx.float16, mx.bfloat16, mx.float32)

_SURVEY = Kernel("survey", ("rows", "sizes"), ("squares", "bad"), ("storing.h", "rows.h"))


class Survey(NamedTuple):
    """What was seen.

    Attributes:
        squares: (B, heads, D) float32, for each channel the sum of squares over all rows and finite entries; with a
            centre, of deviations from the mean of each block. None if they were not wanted.
        bad: (B, H, n, W) uint32, for each of n blocks W words of 32 rows: a bit is set where a row holds a NaN or an
            infinity.
    """

    squares: mx.array | None
    bad: mx.array


def survey(
    rows: mx.array,
    start: int,
    stop: int,
    *,
    block: int,
    center: bool = False,
    squares: bool = False,
    heads: int | None = None,
    backend: str | None = None,
) -> Survey:
    """Look at the rows from start to stop.

    Args:
        rows: (B, H, capacity, D) float16, bfloat16 or float32: a whole buffer, since a kernel would copy a slice.
        start, stop: which rows; the last block may be shorter if there is no centre.
        block: rows per mean, and per group of words in `bad`.
        center: whether squares are those of deviations from each block's mean. The mean is not rounded to the rows'
            dtype, as that which is stored is: their difference is noise beside the squares.
        squares: whether they are wanted.
        heads: how many heads they are for, a divisor of H: neighbouring heads are added up; None for all H.
        backend: see `choose_backend`.
    """
    backend = choose_backend(backend)
    B, H, capacity, D = rows.shape
    heads = heads or H
    if backend == "reference" or D % 8 or D > 256 or rows.dtype not in _DTYPES:
        return _survey_reference(rows[:, :, start:stop], block, center, squares, heads)
    run = _prepared(_SURVEY, backend, rows.dtype, B, H, -(-(stop - start) // block), D, block, center, squares)
    sums, bad = run([rows, ints(start, capacity, stop - start)])
    return Survey(sums.reshape(B, heads, -1, D).sum(axis=2) if squares else None, bad)


@lru_cache(maxsize=256)
def _prepared(kernel, backend, dtype, B, H, blocks, D, block, center, squares):
    return kernel.prepare(
        backend,
        template=[
            *(("T", dtype), ("D", D), ("BLOCK", block), ("CENTER", center), ("SQUARES", squares)),
            ("THREADS", _THREADS),
        ],
        groups=(blocks, H, B),
        threads=_THREADS,
        output_shapes=[(B, H, blocks, D) if squares else (8,), (B, H, blocks, -(-block // 32))],
        output_dtypes=[mx.float32, mx.uint32],
    )


def bad_tokens(keys: mx.array, values: mx.array) -> int:
    """How many tokens have a bit in `Survey.bad` of their keys or their values, in any head; waits for both."""
    any_head = [np.bitwise_or.reduce(np.array(side), axis=1) for side in (keys, values)]
    return int(np.bitwise_count(any_head[0] | any_head[1]).sum())


def _survey_reference(rows: mx.array, block: int, center: bool, squares: bool, heads: int) -> Survey:
    B, H, T, D = rows.shape
    blocks, words = -(-T // block), -(-block // 32)
    bad = ~mx.isfinite(rows).all(axis=-1)
    bad = mx.pad(bad, [(0, 0), (0, 0), (0, blocks * block - T)]).reshape(B, H, blocks, block)
    bad = mx.pad(bad, [(0, 0)] * 3 + [(0, words * 32 - block)]).reshape(B, H, blocks, words, 32)
    bits = (bad.astype(mx.uint32) << mx.arange(32, dtype=mx.uint32)).sum(axis=-1)
    if not squares:
        return Survey(None, bits)
    x = subtract_centers(rows, block_centers(rows, block)) if center else finite_or_zero(rows)
    return Survey(mx.square(x).reshape(B, heads, -1, D).sum(axis=2), bits)
