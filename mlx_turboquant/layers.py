"""Which layers of a model can read compressed keys and values, decided from their source before anything runs.

A layer can if what it fetches from its cache goes to mlx-lm's ``scaled_dot_product_attention`` and nowhere else (its
``shape`` and ``dtype`` may be read). Where it hands keys and values on, as in models whose later layers attend with an
earlier layer's, the whole model is followed in the same way. Any other use, such as a matrix product with the keys,
needs an array, so that layer keeps a raw cache.
"""

import ast
import sys
import textwrap
from functools import cache
from types import ModuleType
from typing import Any

from mlx_turboquant.binding import ATTENTION
from mlx_turboquant.row_flow import Flow
from mlx_turboquant.row_values import RowsReadError, functions, holds_rows, source_of

# Words for what the expression in a reason is part of, by what the source of such attention mentions.
_KINDS_OF_ATTENTION = {
    "kv_lora_rank": "multi-head latent attention, whose cache is small already",
    "logit_softcapping": "soft-capped scores",
}


def attention_modules(layer: Any, model: Any = None) -> tuple[list[ModuleType], str | None]:
    """The modules whose attention must be bound for one layer, or a reason why the layer must stay raw.

    Args:
        layer: an ``mlx.nn.Module``: a layer, or a whole model.
        model: the model it is part of, needed to follow keys and values that a layer hands to others.

    Returns:
        (modules, None), or ([], reason).
    """
    found: dict[str, ModuleType] = {}
    for kind in dict.fromkeys(map(type, layer.modules())):
        if "update_and_fetch" not in source_of(kind):
            continue
        kinds, reason = _attending(kind, layer if model is None else model)
        if reason is not None:
            return [], reason
        found |= {kind.__module__: sys.modules[kind.__module__] for kind in kinds}
    if not found:
        return [], "no attention that calls update_and_fetch was found in this layer"
    return list(found.values()), None


def attention_of_layers(model: Any, layers: list[Any]) -> list[tuple[list[ModuleType], str | None]]:
    """`attention_modules` of each layer of a model; layers of the same classes are looked at once."""
    found: dict[frozenset[type], Any] = {}
    every = []
    for layer in layers:
        kinds = frozenset(map(type, layer.modules()))
        if kinds not in found:
            found[kinds] = attention_modules(layer, model)
        every.append(found[kinds])
    return every


@cache
def why_not(kind: type) -> str | None:
    """Why a class of attention layer cannot read compressed rows by itself; None if it can."""
    reason = _why_never(kind)
    if reason is not None:
        return reason
    flow = Flow()
    for function in functions(kind):
        try:
            result = flow.call(kind, function, [], {})
        except RowsReadError as found:
            return f"{_name(kind)} also reads its keys or values in '{found.use}'{_hint(kind)}"
        if holds_rows(result):
            return f"{_name(kind)} hands its keys and values to its caller"
    return None if kind in flow.fetched else f"{_name(kind)} calls update_and_fetch in a way that is not understood"


@cache
def _why_never(kind: type) -> str | None:
    """Why no model's other classes can make this class of attention able to read compressed rows."""
    if not hasattr(sys.modules[kind.__module__], ATTENTION):
        return f"{_name(kind)} does not call mlx-lm's {ATTENTION}, so nothing can stand in for it{_hint(kind)}"
    for node in ast.walk(ast.parse(textwrap.dedent(source_of(kind)))):
        if isinstance(node, ast.Attribute) and node.attr in ("keys", "values") and ast.unparse(node.value) == "cache":
            return f"{_name(kind)} reads '{ast.unparse(node)}' itself{_hint(kind)}"
    return None


def _attending(kind: type, model: Any) -> tuple[set[type], str | None]:
    """The classes that attend with what a class of attention layer fetches, or why it must stay raw."""
    reason = why_not(kind)
    if reason is None:
        return {kind}, None
    if _why_never(kind) is not None:
        return set(), reason
    flow = Flow(model)
    try:
        result = flow.call(type(model), "__call__", [], {})
    except RowsReadError as found:
        if found.kind is not kind:
            reason = f"{_name(kind)} hands its keys and values on, and {_name(found.kind)} reads them in '{found.use}'"
        return set(), reason
    return (set(), reason) if holds_rows(result) or kind not in flow.fetched else (flow.attended, None)


def _hint(kind: type) -> str:
    hints = [words for text, words in _KINDS_OF_ATTENTION.items() if text in source_of(kind)]
    return f" ({'; '.join(hints)})" if hints else ""


def _name(kind: type) -> str:
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
