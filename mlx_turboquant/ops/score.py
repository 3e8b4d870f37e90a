"""Inner products of queries with packed vectors, without unpacking all vectors at once."""

import mlx.core as mx
import numpy as np

from mlx_turboquant.ops import host
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import ints
from mlx_turboquant.ops.kernel import Kernel
from mlx_turboquant.packing import PLANES, words_per_row

# Elements that the plain version decodes at a time: half a MiB of float32, which stays in a core's cache until then.
# From 1/8 to 4 times as many, 1,000 queries on 60,000 rows take the same time within 15%.
_PIECE_ELEMENTS = 1 << 17
_SIMDGROUPS = 4
# Queries of a threadgroup at most: 8 times 4 rows are 32 sums of a lane, beside as many registers for all the rest.
_MOST_QUERIES = 8
# Sums of queries and rows from which a lane takes 4 rows. Below, there would be fewer than 512 threadgroups, which is
# 4 for each multiprocessor of an H200; with one row there are four times as many.
_MANY = 1 << 18

_SCORE = Kernel("score", ("queries", "codes", "scales", "sizes"), ("out",), ("codebooks.h", "trellis.h", "codes.h"))


def score(
    queries: mx.array, codes: mx.array, scales: mx.array, *, bits: int, dim: int, backend: str | None = None
) -> mx.array:
    """Inner products of queries with the vectors scale * values(codes).

    Args:
        queries: (m, dim) float32, rotated as the vectors were.
        codes: (n, words_per_row(dim, bits)) uint32, packed by `packing.pack_codes`.
        scales: (n,) float32, one per vector.
        bits: 1, 3, 4 or 8 for the centroids `codebook.gaussian(bits)`, or 2 for the values of `trellis.decode`.
        dim: elements of a vector, at least 1.
        backend: see `choose_backend`.

    Returns:
        (m, n) float32, summed in float32. A vector's product does not depend on where it stands among the n, nor on how
        many there are; in numpy, as far as that is true of its BLAS for matrices of one size (of OpenBLAS it is).

    Raises:
        ValueError: for other shapes, dtypes or bits, or an unknown backend.
    """
    _check(queries, codes, scales, bits, dim)
    backend = choose_backend(backend)
    if backend == "reference":
        return _score_reference(queries, codes, scales, bits, dim)
    return _score_in_kernel(queries, codes, scales, bits, dim, backend)


def _check(queries, codes, scales, bits, dim) -> None:
    if bits not in PLANES:
        raise ValueError(f"[score] wanted bits {', '.join(map(str, PLANES))}, got {bits}. Score other widths in parts.")
    if dim < 1:
        raise ValueError(f"[score] wanted a dim of at least 1, got {dim}. Pass the number of elements of a vector.")
    n = codes.shape[:1]
    wanted = {
        "queries": (queries, (*queries.shape[:1], dim), mx.float32),
        "codes": (codes, (*n, words_per_row(dim, bits)), mx.uint32),
        "scales": (scales, n, mx.float32),
    }
    for name, (array, shape, dtype) in wanted.items():
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"[score] wanted {name} {shape} {dtype}, got {array.shape} {array.dtype}. Pass what "
                f"pack_codes gave for dim={dim}, bits={bits}."
            )


def _score_reference(queries, codes, scales, bits, dim) -> mx.array:
    queries, codes, scales = map(np.asarray, (queries, codes, scales))
    m, n, step = len(queries), len(codes), host.rows_of_product(dim, _PIECE_ELEMENTS)
    out = np.empty((m, n), np.float32)
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = host.decoded(host.filled(codes[start:stop], step), bits, dim)
        np.multiply(host.product(queries, values.T)[:, : stop - start], scales[start:stop], out=out[:, start:stop])
    return mx.array(out)


def _score_in_kernel(queries, codes, scales, bits, dim, backend) -> mx.array:
    m, n = queries.shape[0], codes.shape[0]
    if m == 0 or n == 0:
        return mx.zeros((m, n))
    of_tile = min(1 << (m - 1).bit_length(), _MOST_QUERIES)
    tiles = -(-m // of_tile)
    of_lane = 4 if tiles * n >= _MANY else 1
    (out,) = _SCORE(
        backend,
        [*map(_at_least_8, (queries, codes, scales)), ints(m, n, dim, codes.shape[1], tiles)],
        template=[
            ("BITS", bits),
            ("TM", of_tile),
            ("TN", of_lane),
            ("NSG", _SIMDGROUPS),
            ("TABLES", bits == 1 and of_tile <= 2),
            ("VEC", codes.shape[1] % 4 == 0 and (bits != 3 or dim % 64 == 0)),
        ],
        groups=(tiles * -(-n // (32 * _SIMDGROUPS * of_lane)), 1, 1),
        threads=32 * _SIMDGROUPS,
        output_shapes=[(m, n)],
        output_dtypes=[mx.float32],
    )
    return out


def _at_least_8(x: mx.array) -> mx.array:
    """With 8 numbers more if there are fewer than 8: MLX would hand those to a kernel in another address space."""
    return x if x.size >= 8 else mx.concatenate([x.reshape(-1), mx.zeros(8, x.dtype)])
