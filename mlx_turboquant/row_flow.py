"""Where the keys and values that a cache returns go, followed through the source of a model's classes.

A small interpreter of Python source, whose values are those of `row_values`. It walks every branch, and a
loop until its names hold nothing new. Rows may be passed to mlx-lm's attention function, to another of the model's
modules (which is followed), to a cache, kept in local names, tuples and lists, and asked for ``shape`` and ``dtype``.
Any other use is a `RowsReadError`.
"""

import ast
from typing import Any

import mlx.nn as nn

from mlx_turboquant.binding import ATTENTION
from mlx_turboquant.row_values import (
    ROWS,
    ListOf,
    Modules,
    RowsReadError,
    as_value,
    function_of,
    holds_rows,
    joined,
)

_FETCHES = ("update_and_fetch", "keys_and_values")
_HARMLESS = ("len", "isinstance", "print")


class Flow:
    """Follows rows through the classes of a model, or of one class alone if no model is given.

    Attributes:
        fetched: classes that were seen to fetch rows from a cache.
        attended: classes that were seen to pass rows to the attention function.
    """

    def __init__(self, model: nn.Module | None = None):
        self.fetched: set[type] = set()
        self.attended: set[type] = set()
        self._returned: dict[tuple, Any] = {}
        self._held: dict[tuple, Any] = {}
        self._instances: dict[type, list[nn.Module]] = {}
        for part in () if model is None else model.modules():
            self._instances.setdefault(type(part), []).append(part)

    def call(self, kind: type, method: str, args: list[Any], named: dict[str, Any]) -> Any:
        """What a method returns.

        Raises:
            RowsReadError: for the first use that is not allowed, in it or in what it calls.
        """
        function = function_of(kind, method)
        if function is None:
            raise RowsReadError(kind, f"{method}, which has no source")
        names = [a.arg for a in [*function.args.posonlyargs, *function.args.args]]
        if not any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list):
            args = [Modules(frozenset({kind})), *args]
        given = dict(zip(names, args, strict=False)) | named
        known = {*names, *(a.arg for a in function.args.kwonlyargs)}
        if any(map(holds_rows, [*args[len(names) :], *(named[n] for n in named.keys() - known)])):
            raise RowsReadError(kind, f"{method}, in an argument that it does not name")
        key = (kind, method, frozenset(given.items()))
        if key not in self._returned:
            self._returned[key] = None  # while it is being walked: recursion adds nothing
            self._returned[key] = _Body(self, kind, given).run(function.body)
        return self._returned[key]

    def attribute(self, modules: Modules, name: str) -> Any:
        """What an attribute of these modules holds, as far as it is modules."""
        if (modules.kinds, name) not in self._held:
            held = [getattr(part, name, None) for kind in modules.kinds for part in self._instances.get(kind, ())]
            found = joined(*map(as_value, held))
            methods = {k for k in modules.kinds if function_of(k, name) and not isinstance(getattr(k, name), property)}
            self._held[modules.kinds, name] = Modules(frozenset(methods), name) if methods and not found else found
        return self._held[modules.kinds, name]


class _Body:
    """The body of one function, with what its local names hold."""

    def __init__(self, flow: Flow, kind: type, names: dict[str, Any]):
        self.flow, self.kind, self.names = flow, kind, names
        self.returned: Any = None
        self.place: ast.AST | None = None

    def run(self, body: list[ast.stmt]) -> Any:
        self.walk(body)
        return self.returned

    def walk(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.place = statement
            self.statement(statement)

    def either(self, *bodies: list[ast.stmt]) -> None:
        before, after = self.names, {}
        for body in bodies:
            self.names = dict(before)
            self.walk(body)
            after = {n: joined(after.get(n), self.names.get(n)) for n in after.keys() | self.names.keys()}
        self.names = after

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Assign() | ast.AnnAssign(value=ast.expr()):
                value = self.value(node.value)
                for target in getattr(node, "targets", None) or [node.target]:
                    self.bind(target, value)
            case ast.Return(value=ast.expr()):
                self.returned = joined(self.returned, self.value(node.value))
            case ast.Expr():
                self.value(node.value)
            case ast.If():
                self.condition(node.test)
                self.either(node.body, node.orelse)
            case ast.For() | ast.While():
                before = None
                while before != self.names:  # ends: what a name may hold is only ever joined with more
                    before, self.place = dict(self.names), node
                    if isinstance(node, ast.For):
                        self.bind(node.target, self.element(self.value(node.iter)))
                    else:
                        self.condition(node.test)
                    self.either(node.body, [])
                self.walk(node.orelse)
            case ast.Try():
                self.either([*node.body, *node.orelse], *([*node.body, *h.body] for h in node.handlers))
                self.walk(node.finalbody)
            case ast.With():
                for item in node.items:
                    self.bare(item.context_expr)
                self.walk(node.body)
            case ast.FunctionDef():
                if holds_rows(_Body(self.flow, self.kind, dict(self.names)).run(node.body)):
                    raise self.read()
            case ast.Delete():
                pass
            case _:
                for part in ast.iter_child_nodes(node):
                    self.bare(part)

    def bind(self, target: ast.expr, value: Any) -> None:
        match target:
            case ast.Name():
                self.names[target.id] = value
            case ast.Tuple() | ast.List():
                same = isinstance(value, tuple) and len(value) == len(target.elts)
                parts = value if same else [self.element(value)] * len(target.elts)
                for name, part in zip(target.elts, parts, strict=True):
                    self.bind(name, part)
            case ast.Subscript(value=ast.Name()) if self.names.get(target.value.id) != ROWS:
                self.bare(target.slice)
                held = self.names.get(target.value.id)
                if holds_rows(value) or holds_rows(held):
                    self.names[target.value.id] = ListOf(joined(self.element(held), value))
            case _:
                if holds_rows(value):
                    raise self.read()
                self.bare(target)

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name():
                return self.names.get(node.id)
            case ast.Tuple() | ast.List():
                parts = tuple(self.value(part) for part in node.elts)
                return parts if any(part is not None for part in parts) else None
            case ast.Attribute():
                held = self.value(node.value)
                if isinstance(held, Modules):
                    return self.flow.attribute(held, node.attr)
                if holds_rows(held) and not (held == ROWS and node.attr in ("shape", "dtype")):
                    raise self.read()
                return None
            case ast.Subscript():
                held = self.value(node.value)
                self.bare(node.slice)
                if held == ROWS:
                    raise self.read()
                if isinstance(node.slice, ast.Slice):
                    return ListOf(self.element(held)) if held is not None else None
                if isinstance(held, tuple) and isinstance(node.slice, ast.Constant):
                    return held[node.slice.value] if -len(held) <= node.slice.value < len(held) else None
                return self.element(held)
            case ast.Call():
                return self.called(node)
            case ast.IfExp():
                self.condition(node.test)
                return joined(self.value(node.body), self.value(node.orelse))
            case ast.BoolOp():
                return joined(*(self.value(part) for part in node.values))
            case ast.NamedExpr():
                self.bind(node.target, value := self.value(node.value))
                return value
            case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
                self.condition(node)
                return None
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                outer = dict(self.names)
                for part in node.generators:
                    self.bind(part.target, self.element(self.value(part.iter)))
                    for test in part.ifs:
                        self.condition(test)
                element = self.value(node.elt)
                self.names = outer
                return None if element is None else ListOf(element)
        for part in ast.iter_child_nodes(node):
            self.bare(part)
        return None

    def called(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        plain = isinstance(node.func, ast.Name) and node.func.id not in self.names
        args = [self.value(a.value if isinstance(a, ast.Starred) else a) for a in node.args]
        named = {k.arg or "**": self.value(k.value) for k in node.keywords}
        everything = [*args, *named.values()]
        if name in _FETCHES and not plain:
            # Rows given to a cache: a layer that is handed rows has no cache of its own, and ours refuse them.
            self.flow.fetched.add(self.kind)
            return ROWS, ROWS
        if plain and name == ATTENTION:
            rows = [*args[1:3], named.pop("keys", None), named.pop("values", None)]
            if ROWS in rows:
                self.flow.attended.add(self.kind)
            everything = [*args[:1], *args[3:], *named.values(), *(v for v in rows if v != ROWS)]
        elif plain and name in ("zip", "enumerate", "list", "tuple", "reversed"):
            elements = tuple(self.element(a) for a in args)
            if all(e is None for e in elements):
                return None
            return ListOf(elements if name == "zip" else (None, elements[0]) if name == "enumerate" else elements[0])
        elif plain and name in _HARMLESS:
            return None
        elif name == "append" and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            held = self.names.get(node.func.value.id)
            if held != ROWS and len(everything) == 1:
                self.names[node.func.value.id] = joined(ListOf(self.element(held)), ListOf(args[0]))
                return None
        elif isinstance(callee := self.value(node.func), Modules):
            return self.followed(callee, node, args, named)
        elif holds_rows(callee):
            raise self.read()
        if any(self.gives_rows(value) for value in everything):
            raise self.read()
        return None

    def followed(self, callee: Modules, node: ast.Call, args: list[Any], named: dict[str, Any]) -> Any:
        """What a call of the model's own modules returns."""
        known = {kind for kind in callee.kinds if function_of(kind, callee.method)}
        spread = any(isinstance(a, ast.Starred) for a in node.args)
        blind = [*args, *named.values()] if spread or known != callee.kinds else [named.get("**")]
        if any(self.gives_rows(value) for value in blind):
            raise self.read()
        args, named = [] if spread else args, {name: value for name, value in named.items() if name != "**"}
        place, results = self.place, [self.flow.call(kind, callee.method, args, named) for kind in known]
        self.place = place
        return joined(*results)

    def bare(self, node: ast.AST) -> None:
        """Walk a part that must not be rows."""
        if isinstance(node, ast.stmt):
            self.statement(node)
        elif isinstance(node, ast.expr):
            if holds_rows(self.value(node)):
                raise self.read()
        else:
            for part in ast.iter_child_nodes(node):
                self.bare(part)

    def element(self, value: Any) -> Any:
        """What one element of a value may be."""
        if value == ROWS:
            raise self.read()
        if isinstance(value, tuple):
            return joined(*value)
        return value.element if isinstance(value, ListOf) else None

    def condition(self, node: ast.expr) -> None:
        """Walk a test; whether rows are there at all may be asked."""
        match node:
            case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
                self.value(node.left)
            case ast.BoolOp():
                for part in node.values:
                    self.condition(part)
            case _:
                self.bare(node)

    def gives_rows(self, value: Any) -> bool:
        """Whether code that is not followed would get rows with this value, or by calling it."""
        if isinstance(value, Modules):
            followed = [k for k in value.kinds if function_of(k, value.method)]
            return any(holds_rows(self.flow.call(k, value.method, [], {})) for k in followed)
        if isinstance(value, (tuple, ListOf)):
            return any(self.gives_rows(v) for v in (value if isinstance(value, tuple) else (value.element,)))
        return value == ROWS

    def read(self) -> RowsReadError:
        place = self.place
        head = next((getattr(place, f) for f in ("test", "iter") if hasattr(place, f)), place)
        return RowsReadError(self.kind, ast.unparse(place if isinstance(place, ast.FunctionDef) else head))
