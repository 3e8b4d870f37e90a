"""Open a file that somebody named, unless it is something that would never end or never answer."""

import os
import stat
from typing import BinaryIO

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


def open_regular(path: str | os.PathLike, where: str) -> BinaryIO:
    """A regular file, open for reading bytes.

    Args:
        path: of the file; links are followed.
        where: opens the message, as ``load_prompt_cache``.

    Raises:
        OSError: if it is not there, may not be read, or its links go in a circle; the path is in the message.
        ValueError: if it is a folder, a pipe, a socket or a device, or the path holds a NUL byte.
    """
    if "\0" in os.fspath(path):
        raise ValueError(f"[{where}] wanted a path, got one with a NUL byte, {os.fspath(path)!r}. Name a file.")
    _check_kind(os.stat(path), path, where)  # before it is opened: opening a device may do something
    # The path may have become a pipe in between, and opening one waits for who writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(os.fstat(descriptor), path, where)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_kind(status: os.stat_result, path: str | os.PathLike, where: str) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "a device")
    raise ValueError(f"[{where}] wanted a regular file, got {kind}, {os.fspath(path)}. Name a file.")
