"""Rewrites the few Metal constructs that clang's C++ cannot take, keeping every line where it was."""

from __future__ import annotations

import re
from functools import lru_cache

_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"  # comments, literals
    r"|^[ \t]*\#(?:[^\n\\]|\\\n|\\.)*"  # preprocessor lines
    r"|[A-Za-z_]\w*|0[xX][0-9a-fA-F]+\w*|\d[\w.]*|\s+|::|<<|>>|&&|.",
    re.S | re.M,
)
_DEPTH = {"<": 1, ">": -1, ">>": -2}


@lru_cache(64)
def tokens(text: str) -> tuple[str, ...]:
    """The text cut into tokens; white space and comments are tokens too, so that joining them gives it back."""
    return tuple(match.group(0) for match in _TOKEN.finditer(text))


def is_space(token: str) -> bool:
    """True for white space and comments."""
    return token.isspace() or token.startswith(("//", "/*"))


def _declares_storage(rest) -> bool:
    """After the word ``threadgroup``: does an array or variable follow, and not a pointer or reference?"""
    depth = 0
    for token in rest:
        if is_space(token):
            continue
        if token in _DEPTH:
            depth += _DEPTH[token]
        elif depth == 0 and token in "*&()":
            return False
        elif depth == 0 and token in (";", "=", "[", ",", "{"):
            return token in (";", "[", ",", "=")
    return False


def threadgroup_to_static(text: str, first: int = 0) -> tuple[str, int]:
    """``threadgroup T x[N];`` as static storage in a section of its own, behind a red zone that no access may touch.

    All threads of a group run on one OS thread, so static storage is shared as threadgroup memory is. Returns the
    text and the number after the last red zone; ``first`` is the number of the first.
    """
    cut, out, previous = tokens(text), [], None
    for i, token in enumerate(cut):
        starts = previous is None or previous in ";{})" or previous in ("const", "volatile") or previous[0] == "#"
        if token == "threadgroup" and starts and _declares_storage(cut[i + 1 :]):
            out.append(f"EMU_RED_ZONE({first}) static EMU_THREADGROUP ")
            first += 1
        out.append(token)
        if not is_space(token):
            previous = token.lstrip()
    return "".join(out), first


def vector_constructors(text: str) -> str:
    """``vec<T, N>(...)`` as a call: clang's vectors have no constructor with several arguments."""
    cut, out, i = tokens(text), [], 0
    while i < len(cut):
        if cut[i] == "vec":
            j, depth = i + 1, 0
            while j < len(cut):
                depth += _DEPTH.get(cut[j], 0)
                j += 1
                if depth <= 0:
                    break
            k = j
            while k < len(cut) and is_space(cut[k]):
                k += 1
            if j > i + 2 and k < len(cut) and cut[k] == "(":
                if out[-2:] == ["metal", "::"]:
                    del out[-2:]
                out.append("::metal::__make_vector")
                i += 1
                continue
        out.append(cut[i])
        i += 1
    return "".join(out)
