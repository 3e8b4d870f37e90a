"""Vectors on their way into an index, piece by piece: each is encoded while the one before is checked and stored."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_turboquant.index.codec import MAX_NORM, Array, IndexCodec
from mlx_turboquant.index.upload import uploaded
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.vectors import rows

# Sizes of pieces beside `rows.CHUNK_ELEMENTS`. A device's kernels, up to a hundred for a piece, are to be long beside
# the time it takes to start one; arrays of the host are to stay in its caches.
_ON_DEVICE, _ON_HOST = 4, 0.5
_CUDA = ("cuda", "cuda-metal")  # where arrays of the host arrive as files: see `upload`


def encoded(where: str, codec: IndexCodec, x: mx.array | np.ndarray) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """The rows of x (n, d), n at least 1, in order and in pieces: which they are, and what `codec.encode` makes of it.

    Nothing is looked at on the host but norms: those of bad rows are not finite, or too large.

    Raises:
        ValueError: for NaN, infinity or a number beyond float32, with the first positions; for a vector longer than
            `codec.MAX_NORM`, for cosine than float32 holds.
    """
    n, d = x.shape
    backend = choose_backend()
    on_host = backend == "reference"
    step = max(int(rows.CHUNK_ELEMENTS * (_ON_HOST if on_host else _ON_DEVICE)) // d, 1)
    before = None
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            vectors = _float32(x[part], backend)
            arrays = codec.encode(vectors)
            if not on_host:
                mx.async_eval(arrays)
                if arrays.get("prepared") is vectors and isinstance(x, np.ndarray):
                    arrays["prepared"] = _float32(x[part], "reference")  # the host has them: they need not come back
        if before:
            yield _checked(where, codec, x, *before)
        before = part, arrays
    yield _checked(where, codec, x, *before)


def _float32(x: mx.array | np.ndarray, backend: str) -> Array:
    """Where it is encoded: in numpy on the host, in MLX on a device."""
    on_host = backend == "reference"
    if isinstance(x, mx.array):
        return np.asarray(x.astype(mx.float32)) if on_host else x.astype(mx.float32)
    # Sums of columns that lie together would be rounded otherwise. A device widens float16 itself.
    x = np.ascontiguousarray(x, np.float16 if x.dtype == np.float16 and not on_host else np.float32)
    if on_host:
        return x
    return (uploaded(x) if backend in _CUDA else mx.array(x)).astype(mx.float32)


def _checked(
    where: str, codec: IndexCodec, x: mx.array | np.ndarray, part: slice, arrays: dict[str, Array]
) -> tuple[slice, dict[str, np.ndarray]]:
    out = {name: np.asarray(array) for name, array in arrays.items()}
    bound = np.inf if codec.settings.metric == "cosine" else MAX_NORM
    if not (np.isfinite(out["norms"]) & (out["norms"] <= bound)).all():
        for piece in rows.chunks(where, x[: part.stop]):  # the first bad row says what is wrong, and where
            codec.prepare(where, piece)
    return part, out
