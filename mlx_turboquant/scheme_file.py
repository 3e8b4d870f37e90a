"""A scheme for each layer, kept in a JSON file that ``--kv-scheme @file.json`` accepts.

    {"format": 1, "model": "<fingerprint>", "layers": ["turbo4v3", "fp16", ...], ...}

Other keys are for the reader and ignored. ``fp16`` keeps a layer raw.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_turboquant.files import open_regular, written_whole
from mlx_turboquant.files.safetensors import shown, strict_json
from mlx_turboquant.scheme import KVScheme

FORMAT = 1
_MAX_BYTES, _MAX_LAYERS, _MAX_LETTERS = 1 << 20, 4096, 200


@dataclass(frozen=True)
class LayerSchemes:
    """One scheme per layer, each ``fp16`` or one that this package's cache holds.

    Attributes:
        layers: in the order of the model's prompt cache.
        model: fingerprint of the model they were chosen for; "" for any.
        name: how messages call it.
    """

    layers: tuple[KVScheme, ...]
    model: str = ""
    name: str = "per-layer schemes"
    method = "layers"
    two_phase = True

    def __str__(self) -> str:
        return self.name


def resolve(kv_scheme: Any) -> KVScheme | LayerSchemes:
    """What a scheme argument means: text as `KVScheme.parse` takes it, ``@file.json``, or either class.

    Raises:
        ValueError: if the text or the file does not parse.
        OSError: if the file cannot be read.
    """
    if isinstance(kv_scheme, LayerSchemes):
        return kv_scheme
    if isinstance(kv_scheme, str) and kv_scheme.startswith("@"):
        return load(kv_scheme[1:])
    return KVScheme.parse(kv_scheme)


def load(path: str | os.PathLike) -> LayerSchemes:
    """Read a scheme file; errors as for `resolve`."""
    path = Path(path)
    with open_regular(path, "scheme file") as file:
        raw = file.read(_MAX_BYTES + 1)
    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"wanted at most {_MAX_BYTES:,} bytes, got more")
        data = strict_json(raw)
        if type(data["format"]) is not int or data["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} is supported, got {shown(data['format'])}")
        layers, model = data["layers"], data.get("model", "")
        if not isinstance(layers, list) or not layers or not all(isinstance(text, str) for text in layers):
            raise ValueError("'layers' must be a list of scheme texts")
        if len(layers) > _MAX_LAYERS or any(len(text) > _MAX_LETTERS or not text.isprintable() for text in layers):
            raise ValueError(
                f"'layers' must be at most {_MAX_LAYERS} printable texts of at most {_MAX_LETTERS} letters"
            )
        if not isinstance(model, str) or not model.isprintable() or len(model) > _MAX_LETTERS:
            raise ValueError(f"'model' must be printable text of at most {_MAX_LETTERS} letters")
        schemes = tuple(KVScheme.parse(text) for text in layers)
        if any(scheme.method == "mlx" for scheme in schemes):
            raise ValueError("a layer's scheme must be fp16 or one that compresses, and not mlx-lm's own cache (mlx)")
    except (ValueError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(
            f"[scheme file] {path} is not a scheme file: {what}. Write one with mlx_turboquant.plan."
        ) from error
    return LayerSchemes(schemes, model, f"@{path}")


def save(path: str | os.PathLike, schemes: LayerSchemes, **notes: Any) -> None:
    """Write a scheme file, whole or not at all; notes are stored beside the schemes."""
    path = Path(path)
    data = {"format": FORMAT, "model": schemes.model, "layers": [str(s) for s in schemes.layers], **notes}
    with written_whole(path) as aside:
        Path(aside).write_text(json.dumps(data, indent=1))


def for_model(scheme: KVScheme | LayerSchemes, mark: str) -> KVScheme | LayerSchemes:
    """The scheme, checked against the model's fingerprint and then good for any expansion of that model's weights.

    Raises:
        ValueError: if it was chosen for another model.
    """
    if isinstance(scheme, KVScheme):
        return scheme
    if scheme.model and scheme.model != mark:
        # A share's fingerprint (see `fingerprint`) says nothing of the whole model's.
        share = "If it was planned for all of the model that this is a share of, take 'model' out of the file."
        raise ValueError(
            f"[scheme file] '{scheme}' was chosen for a model with fingerprint {scheme.model}, this model's is {mark}. "
            + (share if "." in mark else "Plan again for this model.")
        )
    return replace(scheme, model="")


def mismatch(held: list[KVScheme], wanted: KVScheme | LayerSchemes) -> tuple[str, str] | None:
    """(held, wanted) as text if a cache's compressed layers are not what was asked for."""
    if isinstance(wanted, LayerSchemes):
        layers = [scheme for scheme in wanted.layers if scheme.two_phase]
    else:
        layers = [wanted] * len(held)
    if held == layers:
        return None
    return ", ".join(dict.fromkeys(map(str, held))), str(wanted)
