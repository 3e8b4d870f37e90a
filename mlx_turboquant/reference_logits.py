"""The fp16 cache's logits on a text, computed once and kept on disk for the next evaluation of the same text."""

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_turboquant.files import written_whole
from mlx_turboquant.fingerprint import fingerprint

# One text of 384 tokens over a vocabulary of 152k is 117 MB in 16 bits. A longer one than FILE is computed each time.
FILE_BYTES, FOLDER_BYTES = 1 << 30, 4 << 30


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
            try:
                self._known = mx.load(str(self._path))
                self._path.touch()  # the least recently used is deleted first
            except RuntimeError:  # damaged: computed again and replaced
                self._known = {}

    def get(self, start: int, compute: Callable[[], mx.array]) -> mx.array:
        """The logits (step, vocabulary) of the call that begins at token `start`."""
        name = str(start)
        if name in self._known:
            return self._known[name]
        logits = compute()
        self._bytes += logits.nbytes
        if self._keep and self._bytes <= FILE_BYTES:
            mx.eval(logits)
            self._new[name] = logits
        else:
            self._new.clear()
        return logits

    def finish(self) -> None:
        """Write what is new, whole or not at all, and delete the oldest files beyond the folder's bound."""
        if not self._new or self._bytes > FILE_BYTES:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path) as aside:
            mx.save_safetensors(aside, self._new)
        files = sorted(self._path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > FOLDER_BYTES:
                path.unlink(missing_ok=True)
