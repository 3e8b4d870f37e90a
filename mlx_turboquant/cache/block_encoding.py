"""Rows of a tail to blocks: both sides and what stays raw, one call of Python for a block where kernels do the work."""

import copy
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.attention import in_kernels
from mlx_turboquant.cache.schedule import tail_room
from mlx_turboquant.ops.backend import BACKENDS, choose_backend
from mlx_turboquant.ops.keep_rows import Kept, keep_rows
from mlx_turboquant.quantizers import make_quantizers
from mlx_turboquant.quantizers.base import KeyQuantizer, ValueQuantizer
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tensor import PackedTensor


class Blocks(NamedTuple):
    """What becomes of a tail. Of `packed` and `bad` keys are the first, values the second."""

    packed: tuple[PackedTensor, PackedTensor]
    bad: tuple[mx.array, mx.array]
    kept: Kept


def encode_tail(
    scheme: KVScheme,
    quantizers: tuple[KeyQuantizer, ValueQuantizer],
    tails: tuple[mx.array, mx.array],
    first: int,
    start: int,
    stop: int,
) -> Blocks:
    """Encode the rows before `start`, but for the first ones, which stay raw as those from start to stop do.

    Args:
        scheme: of the quantizers.
        quantizers: of keys and of values, which have learned.
        tails: keys (B, Hkv, capacity, D) and values (B, Hkv, capacity, Dv).
        first: sinks at the front; 0 but for a prompt.
        start: first row + whole blocks.
        stop: rows that are valid.
    """
    backend = choose_backend()
    if first or start > scheme.block or not in_kernels(backend, *quantizers):
        return _encode(scheme, quantizers, tails, first, start, stop)  # of many lengths, each would be compiled
    dims, dtype = (quantizers[0].dim, quantizers[1].dim), quantizers[0].dtype
    run = _one_call(scheme, dims, dtype, backend, start, stop)
    keys, values, bad, newest = run(*tails, *(quantizers[0].learned or ()), *(quantizers[1].learned or ()))
    return Blocks((PackedTensor(*keys), PackedTensor(*values)), tuple(bad), Kept(tuple(newest), None))


def _encode(scheme, quantizers, tails, first, start, stop) -> Blocks:
    kept = keep_rows(*tails, first=first, start=start, stop=stop, room=tail_room(scheme))
    sides = zip(quantizers, tails, strict=True)
    packed, bad = zip(*(side.encode_and_look(rows, first, start, scheme.block) for side, rows in sides), strict=True)
    return Blocks(packed, bad, kept)


@lru_cache(maxsize=256)
def _one_call(scheme: KVScheme, dims: tuple[int, int], dtype: mx.Dtype, backend: str, start: int, stop: int):
    """`_encode` as a function of the arrays alone, for all layers alike. In a compiled graph MLX keeps what three calls
    of kernels build anew otherwise, and Python has one call to make instead of twenty."""
    quantizers = make_quantizers(scheme, *dims, dtype)

    def run(keys: mx.array, values: mx.array, *learned: mx.array):
        n = len(learned) - len(quantizers[1].learned_layout(1, 1))
        sides = tuple(copy.copy(side) for side in quantizers)
        sides[0].learned, sides[1].learned = learned[:n], learned[n:]
        packed, bad, kept = _encode(scheme, sides, (keys, values), 0, start, stop)
        # Codes; codes and scales; codes, scales and centres: in this order, the others are None.
        return *([array for array in side if array is not None] for side in packed), list(bad), list(kept.newest)

    return mx.compile(run) if backend in BACKENDS else run
