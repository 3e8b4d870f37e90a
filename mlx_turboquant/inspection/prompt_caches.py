"""What a prompt-cache file holds: scheme, model, tokens, and for each layer its bytes by part and its rows' norms."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import QuantizedKVCache

from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cache.file_layout import Layout, layout_of
from mlx_turboquant.cache.file_states import make_caches
from mlx_turboquant.cache.saved_state import FORMAT_VERSION
from mlx_turboquant.files.safetensors import Header, shown
from mlx_turboquant.inspection.decoded_rows import decoded_rows, has_plain_rows
from mlx_turboquant.inspection.norms import NormHistogram

# The first seven are of this package's cache, as `cache.saved_state` has them, the others of mlx-lm's own: raw rows,
# the room for more of them that it writes out too, and what is neither keys nor values.
PARTS = ("sinks", "codes", "scales", "centers", "tail", "learned", "queries", "raw", "spare", "other")
OURS = {"mlx_turboquant_format": "format", "mlx_turboquant_scheme": "scheme", "mlx_turboquant_model": "model"}


def prompt_cache_facts(path: Path, header: Header, norms: bool = True) -> dict[str, Any]:
    """What a prompt-cache file holds; keys as docs/format.md lists them.

    One layer is in memory at a time, and of its decoded rows 4 million numbers.

    Args:
        path: of the file.
        header: of the file, from `read_header`.
        norms: whether rows are decoded for histograms of their norms; without, arrays are not read.

    Raises:
        ValueError: if it is no prompt cache that `load_prompt_cache` would load.
    """
    try:
        layout = layout_of(header)
    except ValueError as error:
        raise _error(path, str(error)) from error
    version = layout.metadata.get("mlx_turboquant_format", str(FORMAT_VERSION))
    if version != str(FORMAT_VERSION):
        raise _error(path, f"wanted format version {FORMAT_VERSION}, got {shown(version)}")
    layers, seen = [], ({"keys": NormHistogram(), "values": NormHistogram()} if norms else None)
    for number, cache in enumerate(_caches(path, layout)):
        mx.clear_cache()  # what the layer before left: MLX keeps it for arrays of the same sizes
        layers.append({"layer": number, **_layer(cache, seen)})
    ours = {key: layout.metadata.get(name) or None for name, key in OURS.items()}
    nbytes = sum((Counter(layer["nbytes"]) for layer in layers), Counter())
    fp16 = sum(_held(layer) if layer["fp16_nbytes"] is None else layer["fp16_nbytes"] for layer in layers)
    total = sum(nbytes.values())
    return {
        "format": None if ours["format"] is None else int(ours["format"]),
        "scheme": ours["scheme"] or _scheme_of(layers),
        "model": ours["model"],
        "metadata": {key: text for key, text in layout.metadata.items() if key not in OURS},
        "tokens": max((layer["tokens"] + layer["dropped_tokens"] for layer in layers), default=0),
        "nbytes": {part: nbytes[part] for part in PARTS if nbytes[part]},
        "fp16_nbytes": fp16,
        "ratio": fp16 / total if total else None,
        "norms": seen and {side: histogram.summary() for side, histogram in seen.items()},
        "layers": layers,
    }


def _caches(path: Path, layout: Layout) -> Iterator[Any]:
    """The layers' caches, each read when what it holds is evaluated and released with it."""
    try:
        arrays = mx.load(str(path), format="safetensors")
        yield from make_caches(layout.kinds, layout.states(arrays))
    except (ValueError, RuntimeError) as error:
        raise _error(path, str(error)) from error


def _layer(cache: Any, seen: dict[str, NormHistogram] | None) -> dict[str, Any]:
    facts = _compressed(cache) if isinstance(cache, TurboQuantKVCache) else _of_mlx_lm(cache)
    sides = None if seen is None else decoded_rows(cache)
    told = None
    if sides is not None:
        told = {}
        for name, pieces in zip(("keys", "values"), sides, strict=True):
            histogram = NormHistogram()
            for rows in pieces:
                histogram.add_rows(rows)
            seen[name].add(histogram)
            told[name] = histogram.summary()
    nbytes = sum(facts["nbytes"].values())
    ratio = facts["fp16_nbytes"] / nbytes if facts["fp16_nbytes"] and nbytes else None
    return {**facts, "ratio": ratio, "norms": told}


def _compressed(cache: TurboQuantKVCache) -> dict[str, Any]:
    """Of this package's cache; the parts of its state are described in `cache.saved_state`."""
    dims, dtype, _, keys, values, learned, queries, _ = cache.state[5:]
    sides = [array for side in (keys, values) for array in side or ()]
    arrays = {part: sides[i::5] for i, part in enumerate(PARTS[:5])}
    arrays["learned"] = [array for side in learned or () for array in side or ()]
    arrays["queries"] = [queries]
    batch, heads, *head_dims = dims or (0, 0, 0, 0)
    return {
        "class": type(cache).__name__,
        "scheme": str(cache.scheme),
        "dtype": dtype,
        "batch": batch,
        "heads": heads,
        "head_dims": head_dims,
        "tokens": cache.size(),
        "dropped_tokens": cache.offset - cache.size(),
        "max_size": cache.max_size,
        "sink_tokens": cache.sink_tokens,
        "block_tokens": cache.block_tokens,
        "tail_tokens": cache.tail_tokens,
        "nbytes": _sizes(arrays),
        "fp16_nbytes": 2 * batch * heads * sum(head_dims) * cache.size(),
    }


def _of_mlx_lm(cache: Any) -> dict[str, Any]:
    facts = {
        "class": type(cache).__name__, "scheme": "raw", "dtype": None, "batch": None, "heads": None, "head_dims": None,
        "tokens": 0, "dropped_tokens": 0, "max_size": getattr(cache, "max_size", None), "sink_tokens": 0,
        "block_tokens": 0, "tail_tokens": 0, "fp16_nbytes": None,
    }  # fmt: skip
    if isinstance(cache, QuantizedKVCache) and not cache.empty():
        sides, room = (cache.keys, cache.values), cache.keys[0].shape[2]
        dims = [side[1].shape[3] * cache.group_size for side in sides]
        facts |= {"scheme": f"mlx{cache.bits}:group={cache.group_size}", "dtype": _name(cache.keys[1].dtype)}
        facts |= {"tokens": cache.offset, "block_tokens": cache.offset}
        arrays = {"codes": [side[0] for side in sides], "scales": [part for side in sides for part in side[1:]]}
    elif has_plain_rows(cache):
        dims, room = [cache.keys.shape[3], cache.values.shape[3]], cache.keys.shape[2]
        tokens = min(cache.offset, room)
        facts |= {"dtype": _name(cache.keys.dtype), "tokens": tokens, "tail_tokens": tokens}
        facts |= {"dropped_tokens": cache.offset - tokens}
        arrays = {"raw": [cache.keys, cache.values]}
    else:
        arrays = [] if cache.empty() else [leaf for _, leaf in tree_flatten(cache.state) if isinstance(leaf, mx.array)]
        return {**facts, "nbytes": _sizes({"other": arrays})}
    batch, heads = next(iter(arrays.values()))[0].shape[:2]
    facts |= {"batch": batch, "heads": heads, "head_dims": dims}
    whole = _sizes(arrays)
    held = {part: size * facts["tokens"] // max(room, 1) for part, size in whole.items()}
    facts["nbytes"] = {**held, "spare": sum(whole.values()) - sum(held.values())}
    return {**facts, "fp16_nbytes": 2 * batch * heads * sum(dims) * facts["tokens"]}


def _sizes(arrays: dict[str, list[mx.array | None]]) -> dict[str, int]:
    sizes = {part: sum(a.nbytes for a in some if a is not None) for part, some in arrays.items()}
    return {part: size for part, size in sizes.items() if size}


def _held(layer: dict[str, Any]) -> int:
    return sum(layer["nbytes"].values())


def _scheme_of(layers: list[dict[str, Any]]) -> str | None:
    """The scheme of a file that mlx-lm's own function wrote: its layers', if they agree."""
    schemes = {layer["scheme"] for layer in layers} - {"raw"}
    return schemes.pop() if len(schemes) == 1 else None


def _error(path: Path, reason: str) -> ValueError:
    reason = reason.rstrip(".")
    return ValueError(f"[inspect] {path} is not a prompt cache that can be loaded: {reason}. Save the prompt again.")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]
