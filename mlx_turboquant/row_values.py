"""What a name in a model's source may hold, as far as keys and values are concerned, and the source itself.

Rows (keys or values), tuples and lists that hold rows, the model's own modules, and None for everything else.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.nn as nn

ROWS = "rows"


@dataclass(frozen=True)
class ListOf:
    """A list, or anything iterated, and what each of its elements may be."""

    element: Any


@dataclass(frozen=True)
class Modules:
    """Some of the model's modules, by their classes, and the method that a call of this value runs."""

    kinds: frozenset
    method: str = "__call__"


class RowsReadError(Exception):
    """Rows are used where only an array will do.

    Attributes:
        kind: the class whose source does it.
        use: the statement.
    """

    def __init__(self, kind: type, use: str):
        super().__init__(f"{kind.__name__}: {use}")
        self.kind, self.use = kind, use


def holds_rows(value: Any) -> bool:
    """Whether a value is rows or holds some."""
    if isinstance(value, (tuple, ListOf)):
        return any(map(holds_rows, value if isinstance(value, tuple) else (value.element,)))
    return value == ROWS


def as_value(held: Any) -> Any:
    """The value that stands for an object: modules, and lists of them."""
    if isinstance(held, nn.Module):
        return Modules(frozenset({type(held)}))
    if isinstance(held, (list, tuple)):
        element = joined(*map(as_value, held))
        return None if element is None else ListOf(element)
    return None


def joined(*values: Any) -> Any:
    """What may be any of these. Rows allow the least, so a name that may be rows counts as rows."""
    found = None
    for value in values:
        if found is None or value is None or found == value:
            found = value if found is None else found
        elif isinstance(found, tuple) and isinstance(value, tuple) and len(found) == len(value):
            found = tuple(map(joined, found, value))
        elif isinstance(found, ListOf) and isinstance(value, ListOf):
            found = ListOf(joined(found.element, value.element))
        elif isinstance(found, Modules) and isinstance(value, Modules) and found.method == value.method:
            found = Modules(found.kinds | value.kinds, found.method)
        else:
            found = ROWS
    return found


@cache
def source_of(kind: type) -> str:
    """The source of a class; "" for one that is built in or made at run time."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


@cache
def functions(kind: type) -> dict[str, ast.FunctionDef]:
    """The functions that a class's source defines; none for MLX's own layers, whose calls need arrays."""
    if not source_of(kind) or kind.__module__.startswith("mlx."):
        return {}
    tree = ast.parse(textwrap.dedent(source_of(kind)))
    return {node.name: node for node in tree.body[0].body if isinstance(node, ast.FunctionDef)}


def function_of(kind: type, name: str) -> ast.FunctionDef | None:
    """The function that a class has under this name, its own or inherited; None where `functions` has none."""
    owner = next((k for k in kind.__mro__ if name in vars(k)), object)
    return functions(owner).get(name)
