"""Which array of a prompt-cache file is which part of which layer's state, as mlx-lm's function lays it out.

An array's name is its place in the list of states, ``3.8.1``. Metadata has the user's text as ``0.NAME``, each layer's
class as ``1.LAYER``, and as ``2.N.0`` and ``2.N.1`` the names of arrays that stand for a number, for text or for None,
and for which of them (``2.0`` is empty).
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_turboquant.files.safetensors import Entry, Header, shown

# At most 10 numbers of 4 digits: no name makes long lists or deep ones.
_PLACE = re.compile(r"(0|[1-9][0-9]{0,3})(\.(0|[1-9][0-9]{0,3})){0,9}")
_MAX_LETTERS = 4096
_SCALARS = ("BOOL", "I32", "I64", "U32", "F32")


class Layout(NamedTuple):
    """What a prompt-cache file holds.

    Attributes:
        metadata: the user's text by name.
        kinds: each layer's class.
        places: each layer's arrays by name.
        stand_ins: "scalar", "string" or "none" by name, for arrays that stand for something else.
    """

    metadata: dict[str, str]
    kinds: list[str]
    places: list[dict[str, Entry]]
    stand_ins: dict[str, str]

    def states(self, arrays: dict[str, mx.array]) -> Iterator[Any]:
        """Each layer's state, made when it is asked for: nested lists of arrays, text, numbers and None.

        `arrays` has those of the file and is emptied layer by layer, so that nothing is held longer than its state.

        Raises:
            ValueError: with the reason alone, if the layer's arrays leave a gap in its lists.
        """
        for layer, places in enumerate(self.places):
            tree: dict[str, Any] = {}
            for name in places:
                _put(tree, name.split(".")[1:], self._value(name, arrays.pop(name)))
            yield _as_lists(layer, tree.get("", tree))

    def _value(self, name: str, array: mx.array) -> Any:
        kind = self.stand_ins.get(name)
        if kind == "string":
            try:
                return "".join(map(chr, array.tolist()))
            except ValueError:
                raise ValueError(f"wanted the numbers of letters in array {shown(name)}, got others") from None
        return array.item() if kind == "scalar" else None if kind == "none" else array


def layout_of(header: Header) -> Layout:
    """The layout that a header describes.

    Raises:
        ValueError: with the reason alone, if it describes none.
    """
    found = dict(header.metadata)
    kinds = list(_numbered(found, "1.{}", 0))
    if found.pop("2.0", None) != "":
        raise ValueError("wanted the metadata of a prompt cache, got other")
    names = list(_numbered(found, "2.{}.0", 1))
    stand_ins = dict(zip(names, _numbered(found, "2.{}.1", 1), strict=False))
    if other := [key for key in found if not key.startswith("0.")]:
        raise ValueError(f"wanted the metadata of a prompt cache, got {shown(other[0])} in it")
    for name in names:
        if name not in header.arrays or len(stand_ins) < len(names):
            raise ValueError(f"wanted an array {shown(name)} and what it stands for, got not both")
        _check_stand_in(name, stand_ins[name], header.arrays[name])
    places: list[dict[str, Entry]] = [{} for _ in kinds]
    for name, entry in header.arrays.items():
        layer = int(name.partition(".")[0]) if _PLACE.fullmatch(name) else len(kinds)
        if layer >= len(kinds):
            raise ValueError(f"wanted arrays of {len(kinds)} layers, got one named {shown(name)}")
        places[layer][name] = entry
    if not all(places):
        raise ValueError(f"wanted arrays of {len(kinds)} layers, got none of layer {places.index({})}")
    return Layout({key[2:]: text for key, text in found.items()}, kinds, places, stand_ins)


def _numbered(found: dict[str, str], pattern: str, first: int) -> Iterator[str]:
    """Take the texts of numbered names out, up to the first number that is missing."""
    for number in itertools.count(first):
        if (text := found.pop(pattern.format(number), None)) is None:
            return
        yield text


def _check_stand_in(name: str, kind: str, entry: Entry) -> None:
    fits = {
        "scalar": entry.shape == () and entry.dtype in _SCALARS,
        # Of no letters MLX makes an array of float32, as of None.
        "string": len(entry.shape) == 1 and entry.dtype == "I32" and entry.shape[0] <= _MAX_LETTERS,
        "none": entry.shape == (0,),
    }
    fits["string"] |= entry.shape == (0,)
    if not fits.get(kind):
        raise ValueError(
            f"wanted an array that stands for one of {', '.join(fits)}, got {shown(name)}, {entry.dtype} "
            f"{list(entry.shape)}, for {shown(kind)}"
        )


def _put(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Hang a value in nested dicts; without a path, the state is the value."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError("wanted arrays or lists of them, got a place that is both")
    last = path[-1] if path else ""
    if last in tree:
        raise ValueError("wanted arrays or lists of them, got a place that is both")
    tree[last] = value


def _as_lists(layer: int, tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if missing := [i for i in range(len(tree)) if str(i) not in tree]:
        raise ValueError(f"wanted a list of {len(tree)} parts in layer {layer}, got one without part {missing[0]}")
    return [_as_lists(layer, tree[str(i)]) for i in range(len(tree))]
