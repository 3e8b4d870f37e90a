"""Metal kernel text to CUDA text, so that one source runs on both.

What CUDA spells otherwise is renamed here or defined by kernels/cuda_prelude.h: address spaces vanish, arrays declared
`threadgroup` become `__shared__`, tables in program scope become `__constant__`. Nothing else is translated: the
kernels keep to what both languages have.
"""

import hashlib
import re
import tempfile
from functools import cache
from pathlib import Path

from mlx_turboquant.kernel_source import kernel_source

_TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|^[ \t]*\#(?:[^\n\\]|\\\n|\\.)*|[A-Za-z_]\w*|\d[\w.]*|\s+|::|<<|>>|.",
    re.S | re.M,
)
# CUDA has global types of these names, with other members.
_RENAMED = {name: f"metal::{name}_" for name in ("float2", "float4", "uint2", "uint4", "uchar4", "ushort2", "ushort4")}
_USING = "using namespace metal;\n" + "".join(
    f"using metal::{name};\n"
    for name in ("max", "min", "abs", "rint", "clamp", "exp", "exp2", "log", "fma", "rsqrt", "sqrt")
)


def cuda_text(header: str, body: str) -> tuple[str, str]:
    """(header, body) for mx.fast.cuda_kernel from those for mx.fast.metal_kernel.

    The using-declarations hide CUDA's global functions of the same names; a using-directive alone would be ambiguous.
    """
    prelude = kernel_source("cuda_prelude.h").replace("#pragma once", "")
    functions = f"{prelude}\nnamespace turboquant {{\n{_USING}{_translate(header)}\n}}\n"
    return functions, f"{_USING}using namespace turboquant;\n{_translate(body)}"


def launch_bounds(threads: int, resident: int) -> str:
    """Text that keeps the registers of the kernel after it few enough for so many threadgroups on a multiprocessor.

    MLX writes the kernel's signature, so the bounds have to come in with the word `__global__`.
    """
    return (
        "#undef __global__\n"
        f"#define __global__ __attribute__((global)) __attribute__((launch_bounds({threads}, {resident})))\n"
    )


def in_a_file(text: str) -> str:
    """One line that includes the text, which NVRTC then reads from a file of this process's own folder."""
    path = Path(_folder().name) / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.h"
    path.write_text(text)
    return f'#include "{path}"\n'


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="mlx_turboquant_")


def _translate(text: str) -> str:
    tokens, out, previous, depth = _TOKEN.findall(text), [], None, 0
    for i, token in enumerate(tokens):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if token == "threadgroup":
            declares = (previous is None or previous in ";{})") and not _points(tokens[i + 1 :])
            out.append("__shared__" if declares else "")
        elif token == "constant" and depth == 0 and (previous is None or previous in ";}"):
            out.append("__constant__")
        elif token in ("device", "constant", "thread"):
            out.append("")
        else:
            out.append(_RENAMED.get(token, token))
        if not token.isspace() and not token.startswith(("//", "/*", "#")):
            previous = token
    return "".join(out)


def _points(tokens: list[str]) -> bool:
    """Whether the declaration that goes on with these tokens is of a pointer or reference."""
    depth = 0
    for token in tokens:
        depth += {"<": 1, ">": -1, ">>": -2}.get(token, 0)
        if depth == 0 and token in ("*", "&"):
            return True
        if depth == 0 and token in (";", "=", "[", "("):
            return False
    return False
