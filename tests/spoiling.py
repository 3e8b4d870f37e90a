"""Files in parts, put together again with something in them that does not belong there."""

import json
import math
import random
import struct
from typing import Any

import numpy as np


def parts_of(data: bytes) -> tuple[dict, bytes]:
    """The parsed header and the bytes behind it."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header: text, bytes or what JSON makes of it."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def with_arrays(metadata: dict, arrays: dict[str, tuple[str, list, bytes]]) -> bytes:
    """A file of arrays (dtype, shape, bytes) that follow each other as they must."""
    header, body = {"__metadata__": metadata}, b""
    for name, (dtype, shape, data) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return with_header(header, body)


def arrays_of(data: bytes) -> tuple[dict, dict[str, tuple[str, list, bytes]]]:
    """The metadata and the arrays of a whole file."""
    header, body = parts_of(data)
    metadata = header.pop("__metadata__")
    arrays = {n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items()}
    return metadata, arrays


def number(value: int) -> tuple:
    """An array that stands for a whole number."""
    return "I64", [], struct.pack("<q", value)


def text(letters: str) -> tuple:
    """An array that stands for text."""
    return "I32", [len(letters)], np.array([ord(c) for c in letters], np.int32).tobytes()


def zeros(*shape: int, dtype: str = "F32") -> tuple:
    """An array of zeros."""
    return dtype, list(shape), bytes(int(np.prod(shape)) * {"F32": 4, "F16": 2, "U32": 4, "I32": 4}[dtype])


# --- spoiling

_VALUES = (
    -1, 0, 1, 2, 3, 4, 64, 4095, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 64, 10**400, 0.5,
    1e308, float("nan"), True, None, "", "0", "-1", "x" * 5000, "\0", "\ud800", "F64", "F8_E4M3", "I32", "U8", "BF16",
    "turbo4", "turbo99", "fp16", "mlx4", "KVCache", "ArraysCache", "CacheList", "RotatingKVCache", "TurboQuantKVCache",
    "PromptTrie", "mx", "scalar", "string", "none", [], {}, [[]], [0, 0], [0, 1 << 62], [-8, 0], [1 << 31] * 3,
)  # fmt: skip
_NAMES = ("0", "0.0", "0.0.0", "1.0", "0.99", "0.9999.9999", "0.1e3", "0.-1", "00", "2.0", "2.1.0", "__metadata__", "",
          "../x", "0." * 500 + "0", "0.\u0661", "data_offsets", "shape", "codes", "ids")  # fmt: skip
_DTYPES = {"U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "U32": 4, "I64": 8}


def spoil(rng: random.Random, data: bytes, suffix: str) -> bytes:
    """A file that differs from a whole one in some ways, chosen by the generator."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        ways = [_flip, _cut, _insert]
        if suffix in (".safetensors", ".tqi"):
            ways += [_spoil_header] * 6 + [_spoil_arrays] * 8
        if suffix == ".json":
            ways += [_spoil_json] * 6
        if suffix == ".npy":
            ways += [_spoil_npy] * 6
        if suffix in (".fvecs", ".ivecs"):
            ways += [_spoil_word] * 3
        try:
            data = rng.choice(ways)(rng, data)
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error):
            data = _flip(rng, data)  # spoiled too much already for another way
    return data


def _flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data or b"\0")
    head = min(len(out), rng.choice((8, 64, 1 << 14, 1 << 30)))
    for _ in range(rng.choice((1, 1, 3, 30))):
        out[rng.randrange(head)] = rng.choice((0, 255, 0x22, 0x7B, 0x2C, 0x3A, 0x5D, rng.randrange(256)))
    return bytes(out)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), len(data) // 4096 * 4096, len(data) - 1, 8))]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return (
        data[:at]
        + rng.choice((b"\0", b"[", b'{"a":', b"\xff\xfe", b'"', b"9" * 5000)) * rng.choice((1, 5000))
        + data[at:]
    )


def _spoil_header(rng: random.Random, data: bytes) -> bytes:
    header, body = parts_of(data)
    text = json.dumps(_spoil_tree(rng, header)).encode()
    return with_header(text, body, rng.choice((None, None, None, None, len(text) + rng.choice((-1, 1, 64)))))


def _spoil_json(rng: random.Random, data: bytes) -> bytes:
    return json.dumps(_spoil_tree(rng, json.loads(data))).encode()


def _spoil_tree(rng: random.Random, tree: Any) -> Any:
    """Change, remove, rename or exchange a value somewhere in a tree of JSON."""
    places = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    way = rng.randrange(5)
    if way == 0 and isinstance(node, dict):
        del node[key]
    elif way == 1 and isinstance(node, dict):
        node[rng.choice(_NAMES + tuple(node))] = node.pop(key)
    elif way == 2:
        other, place = rng.choice(places)
        node[key], other[place] = other[place], node[key]
    elif way == 3 and type(node[key]) is int:
        node[key] += rng.choice((-64, -1, 1, 64, 1 << 31, 1 << 62))
    else:
        node[key] = rng.choice(_VALUES)
    json.dumps(tree)  # an exchange may have made a circle: no file then
    return tree


def _spoil_arrays(rng: random.Random, data: bytes) -> bytes:
    """A file that is whole as a safetensors file, but of other arrays: what is behind the header's check is met."""
    metadata, arrays = arrays_of(data)
    name = rng.choice(list(arrays))
    dtype, shape, content = arrays[name]
    way = rng.randrange(9)
    if way == 0:
        del arrays[name]
    elif way == 1:
        arrays[rng.choice(_NAMES[:9] + tuple(arrays))] = arrays.pop(name)
    elif way == 2:
        other = rng.choice(list(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    elif way == 3:
        layers = [key for key in metadata if key.startswith("1.")]
        metadata[rng.choice(layers)] = rng.choice([v for v in _VALUES if isinstance(v, str)])
    elif way == 4:
        stands = [key for key in metadata if key.startswith("2.") and key.endswith(".1")]
        metadata[rng.choice(stands)] = rng.choice(("scalar", "string", "none", "array"))
    elif way == 5 and len(content) <= 8:  # a number
        value = rng.choice([v for v in _VALUES if type(v) is int and abs(v) < 1 << 63])
        arrays[name] = ("I64", shape, struct.pack("<q", value)) if rng.randrange(2) else (
            "I32", shape, struct.pack("<i", value % (1 << 31)))  # fmt: skip
    elif way == 6 and dtype == "I32" and len(shape) == 1:  # text
        text = rng.choice([v for v in _VALUES if isinstance(v, str)])
        arrays[name] = ("I32", [len(text)], np.array([ord(c) for c in text], np.int32).tobytes())
    elif way == 7:
        dtype = rng.choice(list(_DTYPES))
        if math.prod(shape) >= 1 << 20:
            raise ValueError("too large a file")
        arrays[name] = (dtype, shape, bytes(math.prod(shape) * _DTYPES[dtype]))
    elif shape:
        axis = rng.randrange(len(shape))
        shape = [*shape[:axis], rng.choice((0, 1, 2, shape[axis] + 1, shape[axis] - 1, 4096)), *shape[axis + 1 :]]
        if 0 <= math.prod(shape) < 1 << 20:
            arrays[name] = (dtype, shape, bytes(math.prod(shape) * _DTYPES[dtype]))
    return with_arrays(metadata, arrays)


def _spoil_npy(rng: random.Random, data: bytes) -> bytes:
    length = struct.unpack("<H", data[8:10])[0]
    text = data[10 : 10 + length].decode("latin1")
    old = rng.choice(("<f2", "False", "(5, 3)", "descr", "shape", "'", "{", ","))
    new = rng.choice(
        ("|O", "<f4", "<i8", ">f8", "V8", "f999", "(3,)f4", "[('a','<f4')]", "True", "(-1, 3)", "()", "(0, 3)", "(5,)",
         "(4611686018427387904, 4)", "(5, 3, 1)", "(" * 5000, "-" * 4000 + "1", " " * 9000, "\xff")
    )  # fmt: skip
    text = text.replace(old, new).encode("latin1")
    version = rng.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\4\0"))
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) % (1 << 16))
    return data[:6] + version + size + text + data[10 + length :]


def _spoil_word(rng: random.Random, data: bytes) -> bytes:
    words = np.frombuffer(data[: len(data) // 4 * 4], np.int32).copy()
    words[rng.choice((0, rng.randrange(len(words))))] = rng.choice(
        (-1, 0, 1, 2, 4, 19, 1 << 30, -(1 << 31), (1 << 31) - 1)
    )
    return words.tobytes()
