"""The fp16 cache's logits on a text, computed once and kept on disk for the next evaluation of the same text."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_turboquant.files import open_regular, written_whole
from mlx_turboquant.files.safetensors import read_header
from mlx_turboquant.fingerprint import fingerprint

# One text of 384 tokens over a vocabulary of 152k is 117 MB in 16 bits. A longer one than FILE is computed each time.
FILE_BYTES, FOLDER_BYTES = 1 << 30, 4 << 30
# A header of so many calls is 3 MB; `read_header` takes 4 MiB.
FILE_CALLS = 20_000


def folder() -> Path:
    """Where they are kept: the user's cache folder, at most FOLDER_BYTES of it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_turboquant" / "logits"


class ReferenceLogits:
    """Logits by position, from the disk if this model has read this text in these steps before.

    Args:
        model: an mlx-lm model.
        ids: the text.
        prompt_tokens, step: how it is read; other steps round differently.
        keep: whether the disk is used at all.
    """

    def __init__(self, model: Any, ids: list[int], prompt_tokens: int, step: int, keep: bool = True):
        what = [fingerprint(model), ids, prompt_tokens, step, version("mlx"), str(mx.default_device())]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        self._path = folder() / f"{key}.safetensors"
        self._keep, self._bytes = keep, 0
        self._new: dict[str, mx.array] = {}
        self._known: dict[str, mx.array] = {}
        if keep and self._path.exists():
            rows = {str(i): min(step, len(ids) - 1 - i) for i in range(prompt_tokens, len(ids) - 1, step)}
            try:
                self._known = _read(self._path, rows, max(ids))
                self._path.touch()  # the least recently used is deleted first
            except (ValueError, RuntimeError, OSError) as error:
                _warn(f"{self._path} cannot be read ({error}). The logits are computed again and the file replaced.")

    def get(self, start: int, compute: Callable[[], mx.array]) -> mx.array:
        """The logits (step, vocabulary) of the call that begins at token `start`."""
        name = str(start)
        if name in self._known:
            return self._known[name]
        logits = compute()
        self._bytes += logits.nbytes
        self._keep = self._keep and self._bytes <= FILE_BYTES and len(self._new) < FILE_CALLS
        if self._keep:
            mx.eval(logits)
            self._new[name] = logits
        else:
            self._new.clear()
        return logits

    def finish(self) -> None:
        """Write what is new, whole or not at all, and delete the oldest files beyond the folder's bound.

        The evaluation is worth more than its reference: what cannot be written is a warning.
        """
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self._path) as aside:
                mx.save_safetensors(aside, self._new)
        except (OSError, RuntimeError) as error:  # MLX reports a failed write as the latter
            _warn(f"{self._path} cannot be written ({error}). The logits will be computed again next time.")
            return
        files = sorted(self._path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > FOLDER_BYTES:
                path.unlink(missing_ok=True)


def _read(path: Path, rows: dict[str, int], largest_id: int) -> dict[str, mx.array]:
    """The logits of all calls; those of some alone would be of no use, as the cache then lacks the others' tokens."""
    with open_regular(path, "ReferenceLogits") as file:
        arrays = read_header(file).arrays
    shapes = {name: entry.shape for name, entry in arrays.items()}
    vocabulary = max((shape[-1] for shape in shapes.values() if shape), default=0)
    if vocabulary <= largest_id or shapes != {name: (count, vocabulary) for name, count in rows.items()}:
        raise ValueError(f"wanted logits of {len(rows)} calls, got others")
    if other := {entry.dtype for entry in arrays.values()} - {"F16", "BF16", "F32"}:
        raise ValueError(f"wanted logits in F16, BF16 or F32, got {', '.join(sorted(other))}")
    return mx.load(str(path))


def _warn(text: str) -> None:
    warnings.warn(f"[ReferenceLogits] {text}", stacklevel=3)
