"""What a cache's `state` holds, so that mlx-lm's save and load functions carry it whole.

They store nested lists of arrays, text, whole numbers, booleans and None, and hand them back as lists. The parts, in
order: format version; the scheme's full text; layer; module; model fingerprint; [batch, heads, key size, value size];
dtype; [a prefill loop ended a chunk, trim was called]; key side; value side; [learned for keys, learned for values] or
None; sums over the prompt's queries; [bound or None, tokens dropped]. A side is [sinks, codes, scales, centers, tail],
each an array or None; what is learned for a side is a list of arrays, or None if nothing is (mlx-lm's functions drop an
empty list).
"""

import re
from typing import Any

import mlx.core as mx

from mlx_turboquant.cache.buffers import PackedBuffer, RowBuffer
from mlx_turboquant.cache.schedule import tail_room
from mlx_turboquant.files.safetensors import shown
from mlx_turboquant.quantizers import make_quantizers
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tensor import PackedTensor

# 2: the high bits of 3-bit codes lie in another order; 3: the bound is a part; 4: what is learned stands in lists
FORMAT_VERSION = 4
_PARTS = 13
_MAX_LETTERS = 200  # of a scheme's text and a fingerprint
# A decoding cache's room is made again, but not a thousandfold: a window may be 65536 where a file has a row.
_MAX_ROOM = 8
# The module whose attention a loaded cache will read: any but MLX's own, which all models of the process share.
_MODULE = re.compile(r"(?!mlx(\.|$))[\w.]{0,200}")
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def pack(cache: Any) -> tuple:
    """The state of a cache; arrays are cut to the tokens held, so that trimmed ones are not written out."""
    head = (FORMAT_VERSION, cache.scheme.full_text(), cache.layer, cache.module, cache.fingerprint)
    if cache._tail[0].array is None:
        return (*head, None, None, None, None, None, None, None, (cache.max_size, cache._dropped))
    B, H, _, D = cache._tail[0].array.shape
    dtype = next(name for name, dtype in _DTYPES.items() if dtype == cache._tail[0].array.dtype)
    sides = []
    for i, tail in enumerate(cache._tail):
        packed = (None, None, None) if cache._blocks is None else tuple(cache._blocks[i].view())
        sides.append((cache._sinks and cache._sinks[i], *packed, tail.view() if tail.length else None))
    flags = (cache._chunk_ended, cache._trimmed)
    dims = (B, H, D, cache._tail[1].array.shape[3])
    bound = cache.max_size, cache._dropped
    learned = None if cache._blocks is None else tuple(side.learned or None for side in cache._quantizers)
    return (*head, dims, dtype, flags, *sides, learned, cache._queries.sums, bound)


def restore(cache: Any, state: Any) -> None:
    """Make `cache` what `state` describes.

    Raises:
        ValueError: naming the part that is missing or does not fit; `cache` is then not usable.
    """
    if not isinstance(state, (list, tuple)) or not state or type(state[0]) is not int:
        raise _error("a state begins with its format version")
    if state[0] != FORMAT_VERSION:
        raise _error(f"format version {FORMAT_VERSION} is supported, got {state[0]}")
    if len(state) != _PARTS:
        raise _error(f"a state has {_PARTS} parts, got {len(state)}")
    _, text, layer, module, fingerprint, dims, dtype, flags, keys, values, learned, queries, bound = state
    if not all(isinstance(part, str) for part in (text, module, fingerprint)) or type(layer) is not int:
        raise _error("scheme, module and fingerprint must be text and the layer a whole number")
    check_text(text)
    check_text(fingerprint)
    if layer < 0:
        raise _error(f"the layer must be at least 0, got {layer}")
    if not _MODULE.fullmatch(module):
        raise _error(f"module must be the name of a model's module, got {shown(module)}")
    max_size, dropped = _bound(bound)
    cache.__init__(KVScheme.parse(text), layer, module, fingerprint, max_size)
    cache._must_bind = bool(module)
    if dims is None:
        return

    B, H, key_dim, value_dim = _whole_numbers("dimensions", dims, 4)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _error(f"dtype must be one of {', '.join(_DTYPES)}, got {shown(dtype)}")
    if not isinstance(flags, (list, tuple)) or len(flags) != 2 or not all(isinstance(f, bool) for f in flags):
        raise _error("the phase must be two booleans")
    dtype = _DTYPES[dtype]
    cache._chunk_ended, cache._trimmed = flags
    cache._quantizers = make_quantizers(cache.scheme, key_dim, value_dim, dtype)
    lengths = []
    sides = (("keys", keys, key_dim), ("values", values, value_dim))
    for i, (name, side, dim) in enumerate(sides):
        if not isinstance(side, (list, tuple)) or len(side) != 5:
            raise _error(f"{name} must have five parts")
        sinks, codes, scales, centers, tail = side
        _shaped(f"{name}: sinks", sinks, (B, H, None, dim), dtype)
        _shaped(f"{name}: tail", tail, (B, H, None, dim), dtype)
        packed = None if codes is None else PackedTensor(codes, scales, centers)
        if packed is not None:
            _check_packed(name, packed, cache, i, B, H)
        _fill(cache, i, sinks, packed, tail, mx.zeros((B, H, 0, dim), dtype))
        lengths.append([0 if a is None else a.shape[2] for a in (sinks, codes, tail)])
        if lengths[i][0] > cache.scheme.sinks:
            raise _error(f"{name}: at most {cache.scheme.sinks} sinks belong to scheme {text}, got {lengths[i][0]}")
    if lengths[0] != lengths[1]:
        raise _error(f"keys and values must have equally many tokens, got {lengths[0]} and {lengths[1]}")
    if lengths[0][0] and not lengths[0][1]:
        raise _error("sinks are set apart only where blocks are encoded")
    if cache._blocks is not None and None in cache._blocks:
        raise _error("blocks must be encoded for both keys and values")
    _learn(cache, learned, B, H)
    moments = cache._quantizers[0].queries_wanted == "moments"
    _shaped("sums over queries", queries, (B, H, key_dim, key_dim) if moments else (B, H, key_dim), mx.float32)
    if dropped and sum(lengths[0]) <= cache.scheme.sinks:
        raise _error(f"more than {cache.scheme.sinks} tokens must be held where {dropped} were dropped")
    cache._dropped = dropped
    cache._queries.sums = queries


def check_text(text: str) -> None:
    """Refuse a scheme or a fingerprint that would fill a message, or an hour's search for the nearest known name.

    Raises:
        ValueError: if it is long or has letters that do not print.
    """
    if len(text) > _MAX_LETTERS or not text.isprintable():
        raise _error(f"scheme and fingerprint must be printable text of at most {_MAX_LETTERS} letters")


def _fill(cache: Any, side: int, sinks, packed, tail, no_rows) -> None:
    scheme = cache.scheme
    if sinks is not None:
        cache._sinks = (*(cache._sinks or ()), sinks)
    if packed is not None:
        blocks = PackedBuffer(scheme.block)
        blocks.append(packed)
        cache._blocks = (blocks, None) if side == 0 else ((cache._blocks or (None,))[0], blocks)
    rows: RowBuffer = cache._tail[side]
    rows.append(no_rows if tail is None else tail)
    if rows.length < (room := tail_room(scheme)) <= _MAX_ROOM * rows.length:
        rows.keep(0, rows.length, room)


def _learn(cache: Any, learned: Any, B: int, H: int) -> None:
    if (learned is None) != (cache._blocks is None):
        raise _error("what was learned from the prompt must be there where blocks are encoded, and only there")
    if learned is None:
        return
    if not isinstance(learned, (list, tuple)) or len(learned) != 2:
        raise _error("what was learned must be two lists")
    for name, quantizer, arrays in zip(("keys", "values"), cache._quantizers, learned, strict=True):
        layout, arrays = quantizer.learned_layout(B, H), arrays or ()
        if not isinstance(arrays, (list, tuple)) or len(arrays) != len(layout):
            raise _error(f"{name}: {len(layout)} learned arrays belong to scheme {cache.scheme}, got {shown(arrays)}")
        for array, (shape, dtype) in zip(arrays, layout, strict=True):
            if array is None:
                raise _error(f"{name}: a learned array is missing")
            _shaped(f"{name}: learned array", array, shape, dtype)
        quantizer.learned = tuple(arrays)


def _check_packed(name: str, packed: PackedTensor, cache: Any, side: int, B: int, H: int) -> None:
    quantizer, block = cache._quantizers[side], cache.scheme.block
    if not isinstance(packed.codes, mx.array) or packed.codes.ndim != 4:
        raise _error(f"{name}: codes must be an array of four axes")
    T = packed.codes.shape[2]
    if T == 0 or T % block:
        raise _error(f"{name}: codes must cover whole blocks of {block} tokens, got {T}")
    shapes, dtypes = quantizer.layout(B, H, T)
    for part, array, shape, kind in zip(PackedTensor._fields, packed, shapes, dtypes, strict=True):
        if (array is None) != (shape is None):
            raise _error(f"{name}: {part} {'missing' if array is None else 'not expected'} in scheme {cache.scheme}")
        if shape is not None:
            _shaped(f"{name}: {part}", array, shape, kind)


def _shaped(name: str, array: Any, shape: tuple, dtype: mx.Dtype) -> None:
    if array is None:
        return
    fits = isinstance(array, mx.array) and array.dtype == dtype and array.ndim == len(shape)
    if not fits or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        got = f"{array.shape} {array.dtype}" if isinstance(array, mx.array) else type(array).__name__
        wanted = ", ".join("tokens" if n is None else str(n) for n in shape)
        raise _error(f"{name} must be ({wanted}) {dtype}, got {got}")


def _whole_numbers(name: str, numbers: Any, count: int) -> list[int]:
    right = isinstance(numbers, (list, tuple)) and len(numbers) == count
    if not right or not all(type(n) is int and 0 < n < 2**31 for n in numbers):
        raise _error(f"{name} must be {count} whole numbers above 0, got {shown(numbers)}")
    return list(numbers)


def _bound(bound: Any) -> tuple[int | None, int]:
    pair = isinstance(bound, (list, tuple)) and len(bound) == 2
    whole = pair and all(type(n) is int and 0 <= n < 2**31 for n in bound if n is not None) and bound[1] is not None
    if not whole or (bound[0] is None and bound[1] > 0):
        raise _error(f"the bound must be [tokens or None, tokens dropped], got {shown(bound)}")
    return tuple(bound)


def _error(reason: str) -> ValueError:
    return ValueError(f"[TurboQuantKVCache.from_state] Not a cache that this version wrote: {reason}.")
