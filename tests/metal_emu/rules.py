"""Metal's rules that clang does not know: words it has not, and findings in clang's printed syntax tree."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .rewrite import is_space, tokens

_NOT_METAL = {
    "double": "Metal has no double",
    "float64_t": "Metal has no double",
    "goto": "Metal has no goto",
    "new": "Metal has no dynamic allocation",
    "delete": "Metal has no dynamic allocation",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "dynamic_cast": "Metal has no run-time types",
    "typeid": "Metal has no run-time types",
    "virtual": "Metal has no virtual functions",
    "thread_local": "not in Metal",
    "register": "not in Metal",
    "printf": "not in Metal",
    "asm": "Metal has no inline assembly",
    "std": "use metal::, there is no std::",
    "__global": "OpenCL's word for device",
    "__local": "OpenCL's word for threadgroup",
    "__private": "OpenCL's word for thread",
    "__constant": "OpenCL's word for constant",
    "__shared__": "CUDA's word for threadgroup",
    "__syncthreads": "CUDA's threadgroup_barrier",
}
_LONG_DOUBLE = re.compile(r"[\d.]+(e[-+]?\d+)?[lL]")


def token_findings(name: str, part: str, text: str) -> list[str]:
    """Errors for words and literals that Metal has not. ``part`` is "metal" or "header"."""
    out, line = [], 1
    for token in tokens(text):
        where = f"{name}.{part}:{line}: error:"
        if token in _NOT_METAL and not is_space(token):
            out.append(f"{where} `{token}`: {_NOT_METAL[token]}")
        if "." in token and _LONG_DOUBLE.fullmatch(token):
            out.append(f"{where} `{token}`: Metal has no long double")
        line += token.count("\n")
    return out


# A line of clang's -ast-dump: indentation by two characters a level, kind, address, places, types, details. Each
# place leaves out the file, then the line, if it is the one printed last.
_NODE = re.compile(r"^([| `-]*)(\w+) (0x[0-9a-f]+) (.*)$")
_PLACE = re.compile(r"\b(?:line:(?P<line>\d+):|col:|(?P<file>[^\s<>,:]+):(?P<file_line>\d+):)(?P<column>\d+)")
_TYPES = re.compile(r"'([^']*)'(?::'([^']*)')?")
_QUALIFIERS = re.compile(r"\b(const|volatile|__private|__global|__local|__constant|__generic)\b")
_DECLARATIONS = ("VarDecl", "ParmVarDecl", "FieldDecl")
_EXPLICIT_CASTS = ("CXXStaticCastExpr", "CStyleCastExpr", "CXXFunctionalCastExpr")
_IMPLICIT_MEMBERS = ("CXXConstructorDecl", "CXXMethodDecl", "CXXDestructorDecl", "CXXConversionDecl")


@dataclass
class _Node:
    depth: int
    kind: str
    address: str
    rest: str
    where: str
    children: int = 0
    callee: str = ""

    def types(self) -> tuple[str, str]:
        """The type as written, and without its typedefs."""
        found = _TYPES.search(self.rest)
        return (found[1], found[2] or found[1]) if found else ("", "")

    def is_bfloat(self) -> bool:
        return _QUALIFIERS.sub("", self.types()[1]).strip() == "__bf16"


def _declaration(node: _Node) -> str | None:
    if " implicit " in node.rest or "__generic" not in "".join(node.types()):
        return None
    name = re.search(r"(\w+) '", node.rest)
    return (
        f"error: pointer or reference `{name[1] if name else ''}` ({node.types()[0]}) needs an address space: "
        "device, threadgroup, constant or thread"
    )


def _conversion(node: _Node, child: _Node, parent: _Node | None) -> str | None:
    """The finding of an implicit conversion to bfloat, now that what it converts is known."""
    if not node.is_bfloat() or child.is_bfloat() or (parent and parent.kind in _EXPLICIT_CASTS):
        return None
    integer = "<IntegralToFloating>" in node.rest
    if integer and parent and parent.kind == "CallExpr" and re.match(r"(simd|quad)_", parent.callee):
        return f"error: {parent.callee} has no overload for {child.types()[0]}; it would go through MLX's for bfloat"
    if integer or "<FloatingCast>" in node.rest:
        severity = "warning" if integer else "error"
        return f"{severity}: implicit conversion from {child.types()[0]} to bfloat; write static_cast<bfloat16_t>(...)"
    return None


def syntax_tree_findings(dump: str) -> list[str]:
    """Errors and warnings, as ``place: error: ...``, in the output of clang's ``-ast-dump``."""
    out: dict[str, None] = {}
    path: list[_Node] = []
    file, line, skip_below = "", "0", None
    for text in dump.splitlines():
        match = _NODE.match(text)
        if not match:
            continue
        indent, kind, address, rest = match.groups()
        depth, begin = len(indent) // 2, None
        for place in _PLACE.finditer(rest.split("'", 1)[0]):
            if place["file"]:
                file = place["file"].rsplit("/", 1)[-1]
            line = place["line"] or place["file_line"] or line
            begin = begin or f"{file}:{line}:{place['column']}"
        if skip_below is not None and depth > skip_below:
            continue
        skip_below = depth if kind in _IMPLICIT_MEMBERS and " implicit " in rest else None
        while path and path[-1].depth >= depth:
            path.pop()
        node = _Node(depth, kind, address, rest, begin or f"{file}:{line}")
        parent = path[-1] if path else None
        if parent:
            parent.children += 1
        finding = None
        if kind in _DECLARATIONS:
            finding = _declaration(node)
        elif kind == "LambdaExpr":
            finding = "warning: lambda expressions are not part of Metal before version 4"
        elif kind == "DeclRefExpr" and " Function 0x" in rest:
            called, name = re.search(r" Function (0x[0-9a-f]+) '([^']*)'", rest).groups()
            for outer in reversed(path):
                if outer.kind == "CallExpr":
                    outer.callee = outer.callee if outer.children > 1 else name
                    break
            if any(outer.kind == "FunctionDecl" and outer.address == called for outer in path):
                finding = f"warning: `{name}` calls itself"
        if parent and parent.kind == "ImplicitCastExpr" and " part_of_explicit_cast" not in parent.rest:
            finding = _conversion(parent, node, path[-2] if len(path) > 1 else None) or finding
        path.append(node)
        if finding and re.search(r"\.(metal|header):", node.where):
            out[f"{node.where}: {finding}"] = None
    return list(out)
