"""Finds a clang and a linker, and knows the flags for each use of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import CompileError

HERE = Path(__file__).parent
OLDEST_CLANG = 17  # C++ for OpenCL 2021 and __bf16 arithmetic

_ARCH = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
_CXX = ["-nostdinc", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-w", *_ARCH]
_KERNEL = [
    *("-x", "c++", "-std=c++14", *_CXX, "-fsigned-char"),
    # Metal's literals are float, its casts between pointers are free, and nothing is fused that is not written fused.
    *("-Xclang", "-cl-single-precision-constant", "-fno-strict-aliasing", "-fno-math-errno", "-ffp-contract=off"),
    # Private arrays that are too large meet the guard page below the stack, not a neighbour's stack.
    "-fstack-clash-protection",
    # Every half operation rounds to half.
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
]
FAST = [*_KERNEL, "-O2"]
# The sanitizers' callbacks are the runtime's own checks. Private variables start as a pattern, so that reading one
# too early is loud. Vectorizing would merge accesses, and lanes of one report.
# Loops stay loops, even those marked for unrolling: an attention kernel of 300 lines builds in 0.45 s, not in 1.75 s.
CHECKED = [
    *(*_KERNEL, "-O1", "-gline-tables-only", "-gdwarf-4", "-fno-vectorize", "-fno-slp-vectorize"),
    *("-mllvm", "-unroll-count=1", "-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write", "-ftrivial-auto-var-init=pattern"),
    "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,return",
]
RUNTIME = ["-x", "c++", "-std=c++17", *_CXX, "-O2"]
# C++ for OpenCL has Metal's address spaces. What Metal has not is switched off.
_OFF = ("__opencl_c_program_scope_global_variables", "cl_khr_fp64", "__opencl_c_fp64", "__opencl_c_pipes")
_CL_EXT = ",".join([*("-" + name for name in _OFF), "-__opencl_c_device_enqueue", "+cl_khr_fp16"])
TYPECHECK = [
    "--target=x86_64-unknown-linux-gnu",  # whatever this machine is: nothing is built, and the answers are the same
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc", "-Xclang", "-cl-ext=" + _CL_EXT),
    *("-Wno-unknown-attributes", "-Wno-undefined-internal", "-Wno-undefined-inline", "-Wno-user-defined-literals"),
    *("-Wuninitialized", "-Wsometimes-uninitialized", "-Wconditional-uninitialized", "-Wreturn-type", "-Wno-unused"),
    *("-fno-caret-diagnostics", "-ferror-limit=200"),
]


@dataclass(frozen=True)
class Compiler:
    """The commands that start clang and the linker, and clang's version line."""

    clang: tuple[str, ...]
    linker: tuple[str, ...]
    version: str


def _version(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError:
        return 0, ""
    found = re.search(r"clang version (\d+)", done.stdout)
    return (int(found[1]) if found else 0), done.stdout.split("\n")[0]


def _candidates() -> list[list[str]]:
    forced = os.environ.get("METAL_EMU_CLANG")
    if forced:
        return [shlex.split(forced)]
    names = ["clang", *(f"clang-{number}" for number in range(30, OLDEST_CLANG - 1, -1))]
    found = [[name] for name in names if shutil.which(name)]
    zig = importlib.util.find_spec("ziglang")
    return found + ([[str(Path(zig.origin).parent / "zig"), "clang"]] if zig and zig.origin else [])


@cache
def compiler() -> Compiler:
    """The clang to use: ``$METAL_EMU_CLANG`` (a command line), else one on PATH, else that of the ziglang package.

    Raises ``RuntimeError`` if there is none of version 17 or newer, or no linker.
    """
    for command in _candidates():
        number, version = _version(command)
        if number < OLDEST_CLANG:
            continue
        names = ["ld.lld", *(f"ld.lld-{n}" for n in range(30, OLDEST_CLANG - 1, -1)), "ld"]
        linkers = [[command[0], "ld.lld"]] if command[1:] == ["clang"] else [[n] for n in names if shutil.which(n)]
        if linkers:
            return Compiler(tuple(command), tuple(linkers[0]), version)
    raise RuntimeError(
        f"[metal_emu] wanted a clang of version {OLDEST_CLANG} or newer with a linker, got "
        f"{[shlex.join(c) for c in _candidates()] or 'none'}. Run `pip install ziglang`, or install clang and lld."
    )


@cache
def include_flags() -> list[str]:
    """Where the stand-ins for Metal's own headers and the headers of the installed MLX are."""
    spec = importlib.util.find_spec("mlx.core")
    headers = Path(spec.origin).parent / "include" if spec and spec.origin else None
    if headers is None or not (headers / "mlx/backend/metal/kernels/utils.h").exists():
        raise RuntimeError(f"[metal_emu] wanted MLX's Metal headers, found none in {headers}. Reinstall mlx.")
    return ["-I", str(HERE / "include"), "-isystem", str(headers)]


def clang(*arguments) -> subprocess.CompletedProcess:
    """Run clang on these arguments and return its output, whether it succeeded or not."""
    command = [*compiler().clang, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def link(objects: list[Path], target: Path) -> None:
    """Link object files into a shared object. Raises ``CompileError``."""
    command = [*compiler().linker, "-shared", "-o", str(target), *(str(o) for o in objects)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"[metal_emu] linking failed:\n{done.stderr}")
