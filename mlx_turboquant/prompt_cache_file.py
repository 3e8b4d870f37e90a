"""Write a prompt cache to a file so that it is never half there, and read one back so that a wrong one is refused."""

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache

from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cache.file_layout import Layout, layout_of
from mlx_turboquant.cache.file_states import KINDS, make_caches
from mlx_turboquant.cache.saved_state import FORMAT_VERSION
from mlx_turboquant.files import open_regular, written_whole
from mlx_turboquant.files.safetensors import MAX_HEADER_BYTES, read_header, shown
from mlx_turboquant.fingerprint import fingerprint
from mlx_turboquant.mlx_lm_hooks import hook
from mlx_turboquant.scheme_file import mismatch, resolve
from mlx_turboquant.shard import rank_files, rank_path, shard_in, shard_of

_FORMAT, _SCHEME, _MODEL = "mlx_turboquant_format", "mlx_turboquant_scheme", "mlx_turboquant_model"


def save_prompt_cache(
    file_name: str | os.PathLike, cache: list[Any], metadata: dict[str, str] | None = None, model: Any = None
) -> Path:
    """Save a prompt cache as ``.safetensors``, readable by mlx-lm's ``load_prompt_cache`` too.

    The file appears whole or not at all: it is written beside its place, flushed to disk and renamed. The scheme, the
    seed in it, the format version and the model's fingerprint go with it.

    Where several processes hold one model (tensor parallel or pipeline), each calls this with the same name and
    writes a file of its own: ``notes.safetensors`` becomes ``notes.rank0of2.safetensors`` on rank 0 of 2.

    Args:
        file_name: ``.safetensors`` is appended if it is missing, as MLX does.
        cache: from `make_prompt_cache` or mlx-lm.
        metadata: text to store with it.
        model: for the fingerprint of a cache without a compressed layer; others carry it.

    Returns:
        The path written.

    Raises:
        OSError: if the folder cannot be written to; an older file of this name is then untouched.
        ValueError: if several processes run together and neither the cache nor `model` says whose share this is, or
            the metadata is too long to be read again.
    """
    path = Path(file_name)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    ours = next((c for c in cache if isinstance(c, TurboQuantKVCache)), None)
    mark = ours.fingerprint if ours is not None else fingerprint(model) if model is not None else ""
    if not mark and (size := mx.distributed.init().size()) > 1:
        raise ValueError(
            f"[save_prompt_cache] {size} processes run together, and a cache without a compressed layer does not say "
            f"which share of the model filled it; the ranks would overwrite each other's {path}. Pass model=."
        )
    shard = shard_in(mark)
    path = rank_path(path, shard.rank, shard.size)
    scheme = ours.scheme.full_text() if ours is not None else ""
    metadata = {**(metadata or {}), _FORMAT: str(FORMAT_VERSION), _SCHEME: scheme, _MODEL: mark}
    if not path.parent.is_dir():
        raise FileNotFoundError(f"[save_prompt_cache] There is no folder {path.parent}.")
    try:
        with written_whole(path) as aside:
            mlx_lm_cache.save_prompt_cache(aside, cache, metadata)
            _check_length(aside)
    except RuntimeError as error:  # MLX reports a failed write this way
        raise OSError(f"[save_prompt_cache] Could not write {path}: {error}") from error
    return path


def load_prompt_cache(
    file_name: str | os.PathLike, return_metadata: bool = False, *, model: Any = None, kv_scheme: Any = None
):
    """Load a prompt cache that `save_prompt_cache` or mlx-lm's function of that name wrote.

    Where several processes hold one model, each calls this with the name given to `save_prompt_cache` and reads its
    own ``.rank0of2.safetensors`` (the share is the model's; without `model`, this process's place in the group that
    ``mlx.launch`` started). If there is no such file, a file of exactly that name is read, and `model` decides.

    Args:
        file_name: the file.
        return_metadata: whether to return (cache, metadata).
        model: if given, the cache must be this model's, and its attention is bound so that it can read it.
        kv_scheme: if given, the cache must have this scheme.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no prompt cache, is cut short or damaged, or is of another version, scheme or model, or
            of another rank or number of ranks. All that the file says of itself is checked before MLX reads it, and
            each layer's state before it becomes a cache; only the numbers in its arrays are taken as they are.
    """
    path = _path_to_read(Path(file_name), model)
    layout = _check_file(path)
    metadata = layout.metadata
    try:
        cache = list(make_caches(layout.kinds, layout.states(mx.load(str(path)))))
        mx.eval([c.state for c in cache])
    except (ValueError, RuntimeError) as error:
        raise _error(path, str(error)) from error
    if kv_scheme is not None:
        wanted, held = resolve(kv_scheme), [c.scheme for c in cache if isinstance(c, TurboQuantKVCache)]
        differ = mismatch(held, wanted) if held else wanted.two_phase and ("fp16", str(wanted))
        if differ:
            raise ValueError(f"[load_prompt_cache] {path} has the scheme '{differ[0]}', '{differ[1]}' was asked for.")
    if model is not None:
        check_model(cache, metadata, model, path)
        hook(model)
    return (cache, metadata) if return_metadata else cache


def check_model(cache: list[Any], metadata: dict[str, str], model: Any, path: Path | str) -> None:
    """Refuse a loaded cache that another model filled, or another rank of this one, or that lacks layers.

    Raises:
        ValueError: with both shares, both fingerprints, or both numbers of layers.
    """
    ours = next((c for c in cache if isinstance(c, TurboQuantKVCache)), None)
    saved = metadata.get(_MODEL, "") if ours is None else ours.fingerprint
    if not saved or saved == (mine := fingerprint(model)):
        _check_layers(cache, model, path)
        return
    held, here = shard_in(saved), shard_in(mine)
    if held != here:
        raise ValueError(
            f"[load_prompt_cache] {path} was filled by {held}; this process holds {here}. A rank reads only what the "
            "same rank of as many wrote: save the prompt again on every rank, and load it by the name without "
            "'.rank...'."
        )
    raise ValueError(
        f"[load_prompt_cache] {path} belongs to a model with fingerprint {saved}, this model's is {mine}. Load the "
        "model that wrote it, with the same quantization and adapters."
    )


def _check_layers(cache: list[Any], model: Any, path: Path | str) -> None:
    """More layers than the model's are a draft model's; of fewer, mlx-lm's models would leave the last layers out."""
    layers = len(mlx_lm_cache.make_prompt_cache(model))
    if len(cache) < layers:
        raise ValueError(
            f"[load_prompt_cache] {path} holds {len(cache)} layers, this model has {layers}. Save the prompt again."
        )


def _path_to_read(path: Path, model: Any) -> Path:
    """This rank's file of that name, or else the path itself."""
    here = mx.distributed.init() if model is None else shard_of(model)
    rank, size = (here.rank(), here.size()) if model is None else (here.rank, here.size)
    own = rank_path(path, rank, size)
    if own.exists() or path.exists():
        return own if own.exists() else path
    others = ", ".join(other.name for other in rank_files(path))
    if others:
        why = f" There is {others}, but this is rank {rank} of {size}: start as many processes as wrote them"
        why += ", or save the prompt again."
    else:
        why = " Every rank saves its own part of the prompt, on its own disk." if size > 1 else ""
    raise FileNotFoundError(f"[load_prompt_cache] There is no {own}.{why}")


def _check_file(path: Path) -> Layout:
    """What a file holds, from its header alone; refused is what MLX would trip over and what is no prompt cache.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no prompt cache of this version.
    """
    with open_regular(path, "load_prompt_cache") as file:
        try:
            if path.suffix != ".safetensors":  # MLX goes by it
                raise ValueError(f"wanted a name that ends with .safetensors, got {path.name}")
            layout = layout_of(read_header(file))
        except ValueError as error:
            raise _error(path, str(error)) from error
    if not layout.kinds or (unknown := [kind for kind in layout.kinds if kind not in KINDS]):
        raise _error(path, f"unknown kinds of cache: {shown(unknown[:5] if layout.kinds else ['none'])}")
    version = layout.metadata.get(_FORMAT, str(FORMAT_VERSION))
    if version != str(FORMAT_VERSION):
        raise _error(path, f"format version {FORMAT_VERSION} is supported, got {shown(version)}")
    return layout


def _check_length(path: str) -> None:
    """Refuse to write a header that would not be read again."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"[save_prompt_cache] wanted metadata that fits into a header of {MAX_HEADER_BYTES:,} bytes, got one of "
            f"{length:,}. Store less text with the cache."
        )


def _error(path: Path, reason: str) -> ValueError:
    reason = reason.rstrip(".")
    return ValueError(
        f"[load_prompt_cache] {path} is not a prompt cache that can be loaded: {reason}. Save the prompt again."
    )
