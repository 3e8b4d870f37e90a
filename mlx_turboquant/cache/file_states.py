"""The caches that a file's arrays describe, each state checked before a cache of mlx-lm or ours is made of it.

mlx-lm's own caches take any state: an offset beyond the rows, keys of another length than values, or text where numbers
belong would end in wrong text or in an error far from the file. What is checked is what their methods rely on; the
numbers in arrays are not looked at.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlx_turboquant.cache.raw_layer import RawLayerCache, SingleKVCache
from mlx_turboquant.cache.saved_state import check_text
from mlx_turboquant.cache.two_phase import TurboQuantKVCache
from mlx_turboquant.files.safetensors import shown
from mlx_turboquant.scheme import KVScheme

_FLOATS = (mx.float16, mx.bfloat16, mx.float32)
_INTEGERS = (mx.int32, mx.int64)
_MAX_TOKENS = 1 << 31
# What mlx-lm sets where a cache is made and its `from_state` leaves out: without it the first call ends in an error.
_NOT_SAVED = {BatchKVCache: ("_right_padding",), BatchRotatingKVCache: ("_lengths",)}
_MAX_HEAD_SIZE = 1024  # 576 is the largest that a model has
_MAX_MATRICES = 1 << 20  # layers share those of one method, seed and head size: 64 different ones at 128


def make_caches(kinds: list[str], states: Iterable[Any]) -> Iterator[Any]:
    """The caches of these classes in these states, each made when it is asked for.

    Args:
        kinds: names of classes, of those in `KINDS`.
        states: as the classes' ``state`` gives them, with lists for tuples.

    Raises:
        ValueError: with the reason alone, if there is no such class or a state is none of its.
    """
    made: dict[tuple, int] = {}  # numbers in the matrices of a scheme, which layers share
    for layer, (kind, state) in enumerate(zip(kinds, states, strict=True)):
        try:
            yield _make(kind, state, made)
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise ValueError(f"layer {layer}: {error}") from error


def _make(kind: Any, state: Any, made: dict[tuple, int]) -> Any:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind of cache {shown(kind)}")
    cls, parts, check = KINDS[kind]
    if cls is CacheList:
        _check(isinstance(state, list) and state, kind, "a list of caches", state)
        for pair in state:
            _check(isinstance(pair, list) and len(pair) == 2, kind, "pairs of a state and a kind", pair)
        return CacheList(*(_make(inner, part, made) for part, inner in state))
    _check(isinstance(state, list), kind, "a list", state)
    if cls is TurboQuantKVCache:
        _matrices(kind, state, made)
    else:
        _check(len(state) == parts, kind, f"a state of {parts} parts", state)
        check(kind, *state)
    cache = cls.from_state(state)
    for name in _NOT_SAVED.get(cls, ()):
        setattr(cache, name, None)
    return cache


def _matrices(kind: str, state: list, made: dict[tuple, int]) -> None:
    """Bound what a small file can make a loader compute: a scheme's matrices are as large as the head size squared."""
    text, dims = state[1] if len(state) > 1 else None, state[5] if len(state) > 5 else None
    if not isinstance(text, str) or not isinstance(dims, list) or not all(type(n) is int for n in dims):
        return  # none yet, or refused by the cache itself
    _check(max(dims[2:], default=0) <= _MAX_HEAD_SIZE, kind, f"head sizes up to {_MAX_HEAD_SIZE}", dims)
    check_text(text)
    scheme = KVScheme.parse(text)
    for dim in dims[2:]:
        if scheme.rotation == "dense" or scheme.method in ("qjl", "outlier") or dim & (dim - 1):
            made[scheme.method, scheme.rotation, scheme.seed, dim] = dim * dim
    numbers = sum(made.values())
    _check(numbers <= _MAX_MATRICES, kind, f"at most {_MAX_MATRICES:,} numbers in matrices of all schemes", numbers)


def _plain(kind: str, keys: Any, values: Any, offset: Any) -> None:
    tokens = _rows(kind, keys, values)
    _number(kind, "the offset", offset, 0, tokens)


def _concatenated(kind: str, keys: Any, values: Any) -> None:
    _check(keys is not None, kind, "keys and values", "none")  # it takes its offset from them
    _rows(kind, keys, values)


def _quantized(kind: str, keys: Any, values: Any, offset: Any, group: Any, bits: Any) -> None:
    _check(group in (32, 64, 128) and type(group) is int, kind, "a group of 32, 64 or 128", group)
    _check(bits in (2, 3, 4, 5, 6, 8) and type(bits) is int, kind, "2, 3, 4, 5, 6 or 8 bits", bits)
    if keys is None and values is None:
        return _number(kind, "the offset", offset, 0, 0)
    for side in (keys, values):
        _check(isinstance(side, list) and len(side) == 3, kind, "codes, scales and biases of keys and values", side)
        codes, scales, biases = (_array(kind, part, (None,) * 4) for part in side)
        fits = codes.dtype == mx.uint32 and scales.dtype in _FLOATS and biases.dtype == scales.dtype
        fits = fits and codes.shape[:3] == scales.shape[:3] and scales.shape == biases.shape
        fits = fits and 32 * codes.shape[3] == bits * group * scales.shape[3]
        _check(fits, kind, f"codes of {bits} bits with a scale and a bias for {group}", [*side])
    _check(keys[0].shape[:3] == values[0].shape[:3], kind, "equally many keys and values", [keys[0], values[0]])
    _number(kind, "the offset", offset, 0, keys[0].shape[2])


def _rotating(kind: str, keys: Any, values: Any, offset: Any, keep: Any, max_size: Any, index: Any) -> None:
    tokens = _rows(kind, keys, values)
    _number(kind, "the largest size", max_size, 1, _MAX_TOKENS)
    _number(kind, "the tokens to keep", keep, 0, max_size)
    _number(kind, "the offset", offset, 0, _MAX_TOKENS)
    _number(kind, "the next row", index, 0, tokens)
    _check(min(offset, max_size) <= tokens, kind, f"rows of {min(offset, max_size)} tokens", tokens)


def _chunked(kind: str, keys: Any, values: Any, offset: Any, chunk: Any, start: Any) -> None:
    tokens = _rows(kind, keys, values)
    _number(kind, "the chunk", chunk, 1, _MAX_TOKENS)
    _number(kind, "the first token", start, 0, _MAX_TOKENS)
    _number(kind, "the offset", offset, start, start + tokens)


def _arrays(kind: str, arrays: Any, padding: Any, lengths: Any) -> None:
    _check(isinstance(arrays, list) and arrays, kind, "a list of arrays", arrays)
    held = [array for array in arrays if array is not None]
    for array in held:
        _check(isinstance(array, mx.array) and array.ndim > 0, kind, "arrays of a batch", array)
        _check(len(array) == len(held[0]), kind, f"a batch of {len(held[0])}", array)
    for counts in (padding, lengths):
        if counts is not None:
            _array(kind, counts, (len(held[0]) if held else None,), _INTEGERS)


def _batch(kind: str, keys: Any, values: Any, offset: Any, padding: Any, index: Any) -> None:
    tokens = _batched_rows(kind, keys, values, offset, padding)
    _number(kind, "the next row", index, 0, tokens)


def _rotating_batch(kind: str, keys: Any, values: Any, offset: Any, padding: Any, *rest: Any) -> None:
    max_size, held, index, rotated = rest
    tokens = _batched_rows(kind, keys, values, offset, padding)
    _number(kind, "the largest size", max_size, 1, _MAX_TOKENS)
    _number(kind, "the offset", held, 0, _MAX_TOKENS)
    _number(kind, "the next row", index, 0, tokens)
    _check(min(held, max_size) <= tokens, kind, f"rows of {min(held, max_size)} tokens", tokens)
    _check(isinstance(rotated, bool), kind, "whether it is rotated", rotated)


# Class, parts of its state, and what checks them; none where the class or `_make` does it.
KINDS: dict[str, tuple[type, int, Callable | None]] = {
    cls.__name__: (cls, parts, check)
    for cls, parts, check in (
        (KVCache, 3, _plain),
        (RawLayerCache, 3, _plain),
        (SingleKVCache, 3, _plain),
        (ConcatenateKVCache, 2, _concatenated),
        (QuantizedKVCache, 5, _quantized),
        (RotatingKVCache, 6, _rotating),
        (ChunkedKVCache, 5, _chunked),
        (ArraysCache, 3, _arrays),
        (BatchKVCache, 5, _batch),
        (BatchRotatingKVCache, 8, _rotating_batch),
        (CacheList, 0, None),
        (TurboQuantKVCache, 0, None),
    )
}


def _rows(kind: str, keys: Any, values: Any) -> int:
    """How many tokens keys (B, H, T, D) and values (B, H, T, Dv) hold; 0 if both are None."""
    if keys is None and values is None:
        return 0
    keys, values = (_array(kind, rows, (None,) * 4, _FLOATS) for rows in (keys, values))
    _check(keys.shape[:3] == values.shape[:3], kind, "equally many keys and values", [keys, values])
    return keys.shape[2]


def _batched_rows(kind: str, keys: Any, values: Any, offset: Any, padding: Any) -> int:
    tokens = _rows(kind, keys, values)
    batch = None if keys is None else len(keys)
    offset = _array(kind, offset, (batch,), _INTEGERS)
    _array(kind, padding, (len(offset),), _INTEGERS)
    return tokens


def _array(kind: str, array: Any, shape: tuple, dtypes: tuple = ()) -> mx.array:
    """The array itself, if it has this shape, None standing for any length, and one of these dtypes."""
    fits = isinstance(array, mx.array) and array.ndim == len(shape) and (not dtypes or array.dtype in dtypes)
    fits = fits and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    names = " or ".join(str(dtype).removeprefix("mlx.core.") for dtype in dtypes) or "any dtype"
    axes = ", ".join("any" if n is None else str(n) for n in shape)
    _check(fits, kind, f"an array ({axes}) of {names}", array)
    return array


def _number(kind: str, name: str, number: Any, least: int, most: int) -> None:
    fits = type(number) is int and least <= number <= most
    _check(fits, kind, f"{name} as a whole number from {least} to {most}", number)


def _check(fits: Any, kind: str, wanted: str, got: Any) -> None:
    if not fits:
        raise ValueError(f"wanted {wanted} in a {kind}, got {_described(got)}")


def _described(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"{value.shape} {str(value.dtype).removeprefix('mlx.core.')}"
    if isinstance(value, list):
        return f"[{', '.join(map(_described, value[:6]))}{', ...' if len(value) > 6 else ''}]"
    return shown(value, 60)
