"""When arrays are evaluated before somebody asks for them: to let large ones go, and to keep a GPU busy meanwhile."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import mlx.core as mx

# Temporary arrays of so many bytes are worth waiting for: MLX may hold those of many layers, which are under way at the
# same time (H200, 16 layers of 32k tokens: 7.3 GB at once without waiting).
LARGE_BYTES = 1 << 25


def settle(nbytes: int, *arrays: mx.array | None) -> None:
    """Evaluate arrays now if what they are made from is large, so that it can be released."""
    if nbytes >= LARGE_BYTES:
        mx.eval(*(array for array in arrays if array is not None))


_started = threading.local()  # an array is evaluated only in the thread that made it


def start_settling(nbytes: int, arrays: Callable[[], Sequence[mx.array]], lean: bool = False) -> None:
    """The same for the arrays that a function returns, but wait for those of the call before.

    So a GPU works on one layer while Python prepares the next. What two layers are made from is then held at once. Lean
    are kernels, which need no room beside what they read and write: of theirs as many layers are started together as
    hold 1/256 of the memory. The first token of a short prompt is shown after the next step was started, and would wait
    for these layers (H200: 30 ms behind 8,192 tokens).
    """
    large = LARGE_BYTES
    if lean:
        _started.nbytes = nbytes = nbytes + getattr(_started, "nbytes", 0)
        large = max(large, mx.get_memory_limit() // 256)
    if nbytes >= large:
        some = arrays()
        mx.async_eval(*some)
        before = getattr(_started, "array", None)
        _started.nbytes = 0
        _started.array = min(some, key=lambda array: array.nbytes)  # all are done when one is; it is kept meanwhile
        if before is not None:
            mx.eval(before)


# Of a chunk of so many tokens a GPU reads the first layers while Python builds the graph of the others.
CHUNK = 128


def start_layer(rows: mx.array, tokens: int) -> None:
    """Have what a layer holds computed if many tokens were added, and go on; inside a transformation nothing can be."""
    if tokens >= CHUNK:
        with suppress(ValueError):  # not before somebody asks for it, then
            mx.async_eval(rows)
