"""The text of the Metal sources: beside the package in a checkout, inside it in a wheel."""

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PLACES = (_PACKAGE / "_metal", _PACKAGE.parent / "kernels")


@cache
def kernel_source(name: str) -> str:
    """The text of one file of kernels/, such as 'codebooks.h'.

    Raises:
        FileNotFoundError: if there is no such file, with the ones there are.
    """
    folder = next((place for place in _PLACES if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"[kernel_source] Neither {_PLACES[0]} nor {_PLACES[1]} exists; reinstall the package.")
    path = folder / name
    if path.parent != folder or not path.is_file():
        known = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise FileNotFoundError(f"[kernel_source] No kernel source {name!r}. Known: {known}.")
    return path.read_text()
