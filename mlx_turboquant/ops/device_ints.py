"""Small arrays of integers for a GPU, made without waiting for it.

MLX's CUDA backend takes the memory of an array that the CPU writes from a pool if it has at most 8 bytes. For a larger
one it may reuse memory that the GPU had. Then the CPU waits for a copy of its old content, 0.1 ms as a rule and now and
then until all work before it is done (H200: 5 ms, a whole decode step), and the GPU waits for the page when it reads it
(0.3 ms). Here every array is joined on the GPU from parts of 8 bytes.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx


def device_ints(numbers: Sequence[int]) -> mx.array:
    """(n,) int32 of the numbers."""
    return _joined(tuple(numbers))


def ints(*numbers: int) -> mx.array:
    """int32 numbers, at least 8 of them: MLX hands a kernel inputs of fewer elements in another address space."""
    return _joined((*numbers, *[0] * (8 - len(numbers))))


def advancing_ints(numbers: Sequence[int]) -> mx.array:
    """(n,) int32 of numbers that all grow by the same from step to step, so that one operation makes the next ones."""
    return _advanced(threading.get_ident(), tuple(numbers))


@lru_cache(maxsize=1024)
def _joined(numbers: tuple[int, ...]) -> mx.array:
    pairs = [mx.array(numbers[i : i + 2], mx.int32) for i in range(0, len(numbers), 2)]
    array = mx.concatenate(pairs) if len(pairs) > 1 else pairs[0]
    # Not evaluated it would belong to whatever graph is traced, and to the thread that is running, when it is made.
    mx.async_eval(array)
    return array


@lru_cache(maxsize=64)  # all layers of a step share it, and what is evaluated with the step belongs to its thread
def _advanced(thread: int, numbers: tuple[int, ...]) -> mx.array:
    first = numbers[0]
    return _joined(tuple(n - first for n in numbers)) + first
