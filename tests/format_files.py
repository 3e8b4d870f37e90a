"""What the files in tests/data/formats stand for, told so that a later version can be held to it."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_turboquant import TurboQuantIndex, TurboQuantKVCache, load_prompt_cache
from mlx_turboquant.attention import attend
from mlx_turboquant.scheme_file import load as load_schemes

FOLDER = Path(__file__).parent / "data" / "formats"
EXPECTED = FOLDER / "expected.json"


def told(path: Path) -> dict[str, Any]:
    """The meaning of a file of the current formats: hashes of what is stored, and some of the numbers it stands for."""
    kind = path.name.partition("_v")[0]
    return {"prompt_cache": _prompt_cache, "index": _index, "schemes": _schemes, "logits": _logits}[kind](path)


def difference(got: Any, wanted: Any, where: str = "") -> str:
    """Where two told files differ, "" if nowhere. Numbers may be 0.005 apart: decoding rounds, and GPUs otherwise."""
    if isinstance(got, dict) and isinstance(wanted, dict) and got.keys() == wanted.keys():
        return next((d for key in got if (d := difference(got[key], wanted[key], f"{where}.{key}"))), "")
    if isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        pairs = enumerate(zip(got, wanted, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{where}[{i}]"))), "")
    if isinstance(got, float) and isinstance(wanted, float):
        same = math.isclose(got, wanted, rel_tol=5e-3, abs_tol=5e-3)
    else:
        same = type(got) is type(wanted) and got == wanted
    return "" if same else f"{where}: got {got!r:.100}, wanted {wanted!r:.100}"


def _prompt_cache(path: Path) -> dict[str, Any]:
    cache, metadata = load_prompt_cache(path, return_metadata=True)
    return {"metadata": metadata, "layers": [_layer(layer) for layer in cache]}


def _layer(cache: Any) -> dict[str, Any]:
    keys, values = cache.keys_and_values()
    out = {"class": type(cache).__name__, "offset": cache.offset, "stored": _hash(cache.state)}
    if isinstance(cache, TurboQuantKVCache):
        out |= {"scheme": cache.scheme.full_text(), "held": cache.size(), "max_size": cache.max_size}
        out |= {"tokens": [cache.sink_tokens, cache.block_tokens, cache.tail_tokens]}
    queries = mx.cos(mx.arange(keys.shape[1] * keys.shape[3])).reshape(1, keys.shape[1], 1, -1).astype(keys.dtype)
    if isinstance(keys, mx.array):
        attended = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25)
    else:
        attended = attend(queries, keys, values, scale=0.25)
        keys, values = keys.dense(), values.dense()
    return {**out, "keys": _some(keys), "values": _some(values), "attended": _numbers(attended[0, -1, 0])}


def _index(path: Path) -> dict[str, Any]:
    index = TurboQuantIndex.load(path)
    stored = path.read_bytes()
    queries = np.cos(np.arange(2 * index.d, dtype=np.float32)).reshape(2, index.d)
    scores, ids = index.search(queries, k=3, rerank=6 if index.keep else 0)
    return {
        "settings": [index.d, float(index.bits), index.metric, index.seed, index.keep],
        "ids": index.ids.tolist(),
        "stored": hashlib.sha256(stored[8 + int.from_bytes(stored[:8], "little") :]).hexdigest(),
        "vector": _numbers(index.reconstruct(index.ids[:1])[0]),
        "scores": [float(score) for score in scores.reshape(-1)],
        "found": ids.tolist(),
    }


def _schemes(path: Path) -> dict[str, Any]:
    schemes = load_schemes(path)
    return {"model": schemes.model, "layers": [scheme.full_text() for scheme in schemes.layers]}


def _logits(path: Path) -> dict[str, Any]:
    arrays = mx.load(str(path))
    return {name: [list(array.shape), str(array.dtype), _hash(array)] for name, array in sorted(arrays.items())}


def _hash(tree: Any) -> str:
    """Of every array's name, shape, dtype and bits, and of the text and numbers between them."""
    digest = hashlib.sha256()
    for name, leaf in tree_flatten(tree):
        if isinstance(leaf, mx.array):
            bits = leaf.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[leaf.itemsize])
            digest.update(f"{name} {leaf.shape} {leaf.dtype}".encode() + np.array(bits).tobytes())
        else:
            digest.update(f"{name} {leaf!r}".encode())
    return digest.hexdigest()


def _some(rows: mx.array) -> list[list[float]]:
    """The first numbers of the last head's first, middle and last token."""
    T = rows.shape[2]
    return [_numbers(rows[0, -1, t]) for t in (0, T // 2, T - 1)]


def _numbers(row: Any) -> list[float]:
    return [round(float(x), 5) for x in np.array(mx.array(row).astype(mx.float32))[:6]]


def expected() -> dict[str, Any]:
    """What each file is to tell, by its name."""
    return json.loads(EXPECTED.read_text())
