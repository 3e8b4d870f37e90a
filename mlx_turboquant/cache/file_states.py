"""The caches that a file's arrays describe, each state checked before a cache of mlx-lm or ours is made of it.

mlx-lm's own caches take any state: an offset beyond the rows, keys of another length than values, or text where numbers
belong would end in wrong text or in an error far from the file. What is checked is what their methods rely on; the
numbers in arrays are not looked at.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

_FLOATS = (mx.float16, mx.bfloat16, mx.float32)
_INTEGERS = (mx.int32, mx.int64)
_MAX_TOKENS = 1 << 31
_MAX_LISTS = 4  # of caches in lists of caches


def make_cache(kind: Any, state: Any, depth: int = 0) -> Any:
    """The cache of a class that `KINDS` names, in the state that a file holds.

    Args:
        kind: name of the class.
        state: as the class's ``state`` gives it, with lists for tuples.
        depth: in how many `CacheList` it stands.

    Raises:
        ValueError: with the reason alone, if there is no such class or the state is none of its.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kinds of cache: {ascii(kind):.80}")
    if kind == "CacheList":
        _check(depth < _MAX_LISTS, kind, f"lists of caches at most {_MAX_LISTS} deep", "deeper ones")
        _check(isinstance(state, list) and state, kind, "a list of caches", state)
        for pair in state:
            _check(isinstance(pair, list) and len(pair) == 2, kind, "pairs of a state and a kind", pair)
        return mlx_lm_cache.CacheList(*(make_cache(inner, part, depth + 1) for part, inner in state))
    parts, check = KINDS[kind]
    if parts:
        _check(isinstance(state, list) and len(state) == parts, kind, f"a state of {parts} parts", state)
        check(kind, *state)
    return getattr(mlx_lm_cache, kind).from_state(state)


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


# Parts of a state, and what checks them; 0 where the class checks its state itself.
KINDS: dict[str, tuple[int, Callable | None]] = {
    "KVCache": (3, _plain),
    "RawLayerCache": (3, _plain),
    "SingleKVCache": (3, _plain),
    "ConcatenateKVCache": (2, _concatenated),
    "QuantizedKVCache": (5, _quantized),
    "RotatingKVCache": (6, _rotating),
    "ChunkedKVCache": (5, _chunked),
    "ArraysCache": (3, _arrays),
    "CacheList": (0, None),
    "BatchKVCache": (5, _batch),
    "BatchRotatingKVCache": (8, _rotating_batch),
    "TurboQuantKVCache": (0, None),
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
    return f"{ascii(value):.60}"
