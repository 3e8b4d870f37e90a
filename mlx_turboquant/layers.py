"""Which layers of a model can read compressed keys and values, decided from their source before anything runs.

A layer can if, wherever it calls ``cache.update_and_fetch``, what comes back goes to the module's own
``scaled_dot_product_attention`` and nowhere else (its ``shape`` and ``dtype`` may be read). Any other use, such as a
matrix product with the keys, needs an array, so that layer keeps a raw cache.
"""

import ast
import inspect
import sys
import textwrap
from functools import cache
from types import ModuleType
from typing import Any

from mlx_turboquant.binding import ATTENTION

_ALLOWED_ATTRIBUTES = ("shape", "dtype")


def attention_modules(layer: Any) -> tuple[list[ModuleType], str | None]:
    """The modules whose attention must be bound for one layer, or a reason why the layer must stay raw.

    Args:
        layer: an ``mlx.nn.Module``: a layer, or a whole model.

    Returns:
        (modules, None), or ([], reason).
    """
    found: dict[str, ModuleType] = {}
    for part in layer.modules():
        if not _source_of(type(part)).count("update_and_fetch"):
            continue
        if reason := why_not(type(part)):
            return [], reason
        found[type(part).__module__] = sys.modules[type(part).__module__]
    if not found:
        return [], "no attention that calls update_and_fetch was found in this layer"
    return list(found.values()), None


@cache
def why_not(kind: type) -> str | None:
    """Why a class of attention layer cannot read compressed rows; None if it can."""
    module = sys.modules[kind.__module__]
    name = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
    if not hasattr(module, ATTENTION):
        return f"{name} does not call mlx-lm's {ATTENTION}, so nothing can stand in for it"
    tree = ast.parse(textwrap.dedent(_source_of(kind)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("keys", "values") and ast.unparse(node.value) == "cache":
            return f"{name} reads '{ast.unparse(node)}' itself"
    called = False
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for names, later in _fetches(function.body, []):
            called = True
            if names is None:
                return f"{name} does not take keys and values apart where it calls update_and_fetch"
            if use := _other_use(names, later):
                return f"{name} also reads its keys or values in '{use}'"
    return None if called else f"{name} calls update_and_fetch in a way that is not understood"


@cache
def _source_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # built in, or made at run time
        return ""


def _fetches(body: list[ast.stmt], after: list[ast.stmt]):
    """(names bound, statements that run later) for each call of update_and_fetch; names are None if not two names."""
    for i, statement in enumerate(body):
        later = body[i + 1 :] + after
        inner = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
        inner += [handler.body for handler in getattr(statement, "handlers", [])]
        if any(inner):
            again = statement.body if isinstance(statement, (ast.For, ast.While)) else []
            for part in inner:
                yield from _fetches(part, later + again)
        elif any(isinstance(n, ast.Attribute) and n.attr == "update_and_fetch" for n in ast.walk(statement)):
            yield _bound_names(statement), later


def _bound_names(statement: ast.stmt) -> set[str] | None:
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call) and len(statement.targets) == 1:
        names = getattr(statement.targets[0], "elts", [])
        if len(names) == 2 and all(isinstance(name, ast.Name) for name in names):
            return {name.id for name in names}
    return None


def _other_use(names: set[str], statements: list[ast.stmt]) -> str | None:
    """The source of the first use that is not an argument of the attention call or a read of shape or dtype."""
    allowed: set[int] = set()
    for node in (n for s in statements for n in ast.walk(s)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == ATTENTION:
            allowed.update(id(a) for a in node.args[1:3])
            allowed.update(id(k.value) for k in node.keywords if k.arg in ("keys", "values"))
        if isinstance(node, ast.Attribute) and node.attr in _ALLOWED_ATTRIBUTES:
            allowed.add(id(node.value))
    simple = [n for s in statements for n in ast.walk(s) if isinstance(n, ast.stmt) and not hasattr(n, "body")]
    compound = [n for s in statements for n in ast.walk(s) if hasattr(n, "body") and isinstance(n, ast.stmt)]
    heads = [part for n in compound for part in ast.iter_child_nodes(n) if isinstance(part, (ast.expr, ast.withitem))]
    for place in simple + heads:
        for node in ast.walk(place):
            if isinstance(node, ast.Name) and node.id in names and id(node) not in allowed:
                return ast.unparse(place)
    return None
