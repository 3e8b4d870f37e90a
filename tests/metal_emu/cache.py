"""Compiled kernels on disk: by content hash, written aside and renamed, oldest dropped above a bound."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_turboquant" / "metal_emu"
MAX_BYTES = 256 << 20  # a built kernel takes 15 to 150 KB
# Another process may be about to load what it found, so nothing used in the last hour is dropped.
MIN_AGE_S = 3600


def key(*parts) -> str:
    """A hash of the text of all parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def get(name: str, make: Callable[[Path], None]) -> Path:
    """The cached file ``name``; if it is missing, ``make(path)`` writes it under another name first."""
    path = FOLDER / name
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: the oldest are dropped first
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    aside = FOLDER / f"{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}"
    try:
        make(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _drop_oldest_once()
    return path


_dropped = False


def _drop_oldest_once() -> None:
    """Once per process, keep the newest files within ``MAX_BYTES``."""
    global _dropped
    if _dropped:
        return
    _dropped = True
    files = []
    for path in FOLDER.iterdir():
        with contextlib.suppress(OSError):  # another process may have removed it
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for used, size, path in sorted(files):
        if total <= MAX_BYTES or used > time.time() - MIN_AGE_S:
            return
        path.unlink(missing_ok=True)
        total -= size
