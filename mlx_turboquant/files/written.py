"""A file that appears whole or not at all, whenever the process that writes it ends.

It is written beside its place, as ``.NAME.xxxxxxxx.mlx_turboquant.SUFFIX``, flushed to disk and renamed. Whoever writes
it holds a lock on it, which ends with the process, however that ends. So the next save into a folder, of any name, can
tell what a killed one left there, and deletes it: leftovers do not add up.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_ASIDE = re.compile(r"\..*\.[0-9a-f]{8}\.mlx_turboquant(\..*)?", re.DOTALL)
_STEM_LETTERS = 50  # of the name, so that a long one stays below the 255 bytes of a file's name


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[str]:
    """A name beside `path` to write to: flushed to disk and renamed to `path` at the end, deleted on an error.

    The file must be written in place, and not be replaced by another, which would not be locked.

    Raises:
        OSError: if the folder cannot be written to; an older file of this name is then untouched.
    """
    _delete_leftovers(path.parent)
    aside, lock = _locked_file(path)
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    _flush(path.parent)


def _locked_file(path: Path) -> tuple[str, int]:
    """A new file beside `path`, with the permissions that a new file gets, and the descriptor that holds its lock."""
    while True:
        name = f".{path.stem[:_STEM_LETTERS]}.{secrets.token_hex(4)}.mlx_turboquant{path.suffix}"
        aside = str(path.with_name(name))
        try:
            descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        # Some network file systems know no locks. Nobody can then lock it either, so nobody deletes it.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_file_of(descriptor, aside):
            return aside, descriptor
        os.close(descriptor)  # another save took it for a leftover before it was locked


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed saves left: files of our kind that nobody holds the lock of."""
    with os.scandir(folder) as entries:
        names = [
            entry.path for entry in entries if _ASIDE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
        ]
    for name in names:
        # Locked by who writes it, deleted by another save meanwhile, or somebody else's: all are left alone.
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_file_of(descriptor, name):
                    os.unlink(name)
            finally:
                os.close(descriptor)


def _is_file_of(descriptor: int, path: str) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _flush(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
