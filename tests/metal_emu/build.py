"""Builds what runs: the runtime once, a precompiled prelude per set of flags, one shared object per instantiation."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from functools import cache
from pathlib import Path

from . import cache as disk
from .compiler import CHECKED, FAST, HERE, RUNTIME, clang, compiler, include_flags, link
from .errors import CompileError
from .instance import Instance
from .sources import run_source


@cache
def toolchain_key() -> str:
    """A hash of everything but the kernel that a build depends on: clang, our sources, MLX's headers."""
    digest = hashlib.sha256(f"{compiler()}{include_flags()}".encode())
    files = [path for folder in ("include", "runtime") for path in (HERE / folder).rglob("*")]
    mlx = Path(include_flags()[3]) / "mlx/backend/metal/kernels"
    files += [mlx / name for name in ("utils.h", "bf16.h", "bf16_math.h", "defines.h", "logging.h", "complex.h")]
    for path in sorted(files):
        if path.is_file():
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def precompiled(flags: list[str]) -> Path:
    """The prelude of every kernel (Metal's and MLX's headers), parsed once for these flags.

    Parsing it is two thirds of the time of a small kernel's build: 0.30 s without, 0.10 s with (clang 22, 2 cores).
    """

    def make(path: Path) -> None:
        done = clang(*flags, *include_flags(), *_EMIT, HERE / "include/metal_emu/prelude.h", "-o", path)
        if done.returncode:
            raise CompileError(f"[metal_emu] the prelude does not compile:\n{done.stderr}")

    return disk.get(f"prelude_{disk.key(toolchain_key(), flags)}.pch", make)


# The file's time says nothing: the key has its content.
_EMIT = ("-Xclang", "-fno-pch-timestamp", "-Xclang", "-emit-pch", "-c")


def use_precompiled(flags: list[str]) -> list[str]:
    """Clang arguments that start a text after the precompiled prelude."""
    return ["-Xclang", "-include-pch", "-Xclang", str(precompiled(flags))]


def run_flags(instance: Instance, checked: bool) -> list[str]:
    """The flags with which this instantiation is compiled."""
    flags = CHECKED if checked else FAST
    return [*flags, "-ffast-math"] if instance.math_mode == "fast" else flags


def shared_object(instance: Instance, checked: bool) -> Path:
    """The built instantiation, from the cache if it is there. Raises ``CompileError``."""
    flags, source = run_flags(instance, checked), run_source(instance)

    def make(path: Path) -> None:
        text, built = path.with_suffix(".cpp"), path.with_suffix(".o")
        try:
            text.write_text(source)
            done = clang(*flags, *include_flags(), *use_precompiled(flags), "-c", text, "-o", built)
            if done.returncode:
                message = done.stderr.replace(str(text), "<generated>")
                raise CompileError(f"[{instance.name}] wanted a body that compiles for the CPU, got:\n{message}")
            link([built], path)
        finally:
            text.unlink(missing_ok=True)
            built.unlink(missing_ok=True)

    return disk.get(f"kernel_{disk.key(toolchain_key(), flags, source)}.so", make)


@cache
def runtime() -> ctypes.CDLL:
    """The loaded runtime, whose functions the kernels call."""

    def make(path: Path) -> None:
        built = path.with_suffix(".o")
        try:
            done = clang(*RUNTIME, "-I", HERE / "include", "-c", HERE / "runtime/run.cpp", "-o", built)
            if done.returncode:
                raise CompileError(f"[metal_emu] the runtime does not compile:\n{done.stderr}")
            link([built], path)
        finally:
            built.unlink(missing_ok=True)

    path = disk.get(f"runtime_{disk.key(toolchain_key(), RUNTIME)}.so", make)
    with contextlib.suppress(OSError):  # where there is no separate libm, its functions are loaded already
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
