"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """A name beside `path` to write to: flushed to disk and renamed to `path` at the end, deleted on an error.

    Raises:
        OSError: if the folder cannot be written to; an older file of this name is then untouched.
    """
    handle, aside = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}.", dir=path.parent)
    os.close(handle)
    try:
        yield aside
        _flush(aside)
        os.chmod(aside, 0o666 & ~_umask())  # mkstemp makes it private; a saved file gets the usual permissions
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
