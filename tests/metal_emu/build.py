# ruff: noqa: E501
"""Compiler discovery, compilation and caching."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
INC = HERE / "include"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_turboquant" / "metal_emu"


class CompileError(RuntimeError):
    pass


@lru_cache(None)
def clang():
    """A clang >= 17: $METAL_EMU_CLANG, clang-NN / clang on PATH, or pip's ziglang (`python -m ziglang clang`)."""
    env = os.environ.get("METAL_EMU_CLANG")
    if env:
        return env.split()
    for v in range(23, 16, -1):
        if shutil.which(f"clang-{v}"):
            return [f"clang-{v}"]
    if importlib.util.find_spec("ziglang"):
        z = Path(importlib.util.find_spec("ziglang").origin).parent / "zig"
        return [str(z), "clang"]
    raise RuntimeError("no clang found: apt-get install clang-19, or pip install ziglang")


@lru_cache(None)
def mlx_include():
    env = os.environ.get("METAL_EMU_MLX_INCLUDE")
    if env:
        return env
    spec = importlib.util.find_spec("mlx.core")
    for base in [Path(spec.origin).parent] if spec and spec.origin else []:
        if (base / "include/mlx/backend/metal/kernels/utils.h").exists():
            return str(base / "include")
    raise RuntimeError("MLX headers not found (set METAL_EMU_MLX_INCLUDE)")


def _run(cmd, **kw):
    return subprocess.run(cmd, capture_output=True, text=True, **kw)


def link_shared(objs, out):
    ld = shutil.which("ld") or shutil.which("ld.lld") or shutil.which("ld.lld-19")
    cmd = [ld, "-shared", "-o", out, *objs] if ld else [clang()[0], "ld.lld", "-shared", "-o", out, *objs]
    r = _run(cmd)
    if r.returncode:
        raise CompileError(r.stderr)


ARCH = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []
COMMON = [
    "-x",
    "c++",
    "-nostdinc",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-DMSL_ERASE_AS",
    "-Xclang",
    "-cl-single-precision-constant",
    "-fno-math-errno",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    *ARCH,
]
FAST = ["-O2"]
CHECK = [
    "-O1",
    "-g1",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-fsanitize=thread",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-read-before-write",
    "-fsanitize=bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,return",
    "-ftrivial-auto-var-init=pattern",
]
WARN = [
    "-Wno-unknown-attributes",
    "-Wno-user-defined-literals",
    "-Wno-c++17-extensions",
    "-Wno-ignored-attributes",
    "-Wno-psabi",
]


def _key(*parts):
    h = hashlib.sha256()
    for p in parts:
        h.update(str(p).encode())
        h.update(b"\0")
    return h.hexdigest()[:24]


@lru_cache(None)
def _shim_key():
    h = hashlib.sha256()
    for f in sorted(INC.rglob("*")):
        if f.is_file():
            h.update(f.read_bytes())
    h.update((HERE / "runtime.cpp").read_bytes())
    return h.hexdigest()


@lru_cache(None)
def runtime():
    CACHE.mkdir(parents=True, exist_ok=True)
    so = CACHE / f"rt_{_key(_shim_key(), clang())}.so"
    if not so.exists():
        tmp = str(so) + f".{os.getpid()}"
        src = str(HERE / "runtime.cpp")
        r = _run(
            [*clang(), "-x", "c++", "-std=c++17", "-O2", "-g0", "-nostdinc", "-fPIC", "-fno-exceptions", "-fno-rtti", *ARCH, "-c", src, "-o", tmp + ".o"]
        )
        if r.returncode:
            raise CompileError(r.stderr)
        link_shared([tmp + ".o"], tmp)
        os.unlink(tmp + ".o")
        os.replace(tmp, so)
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(so), mode=ctypes.RTLD_GLOBAL)


def elf_symbols(path):
    """(sections {name: (addr, size)}, symbols [(name, value, size, shndx)]) of a 64-bit little-endian ELF file."""
    b = Path(path).read_bytes()
    (shoff,) = struct.unpack_from("<Q", b, 0x28)
    shent, shnum, shstr = struct.unpack_from("<HHH", b, 0x3A)
    sh = [struct.unpack_from("<IIQQQQIIQQ", b, shoff + i * shent) for i in range(shnum)]
    def nm(off):
        return b[off : b.index(b"\0", off)].decode()
    secs = {nm(sh[shstr][4] + s[0]): (s[3], s[5], i) for i, s in enumerate(sh)}
    syms = []
    for s in sh:
        if s[1] == 2:
            stro = sh[s[6]][4]
            for k in range(s[5] // 24):
                n, _info, _oth, shn, val, size = struct.unpack_from("<IBBHQQ", b, s[4] + k * 24)
                syms.append((nm(stro + n), val, size, shn))
    return secs, syms


def elf_end(path):
    """One past the last address that the shared object occupies, from its own base."""
    b = Path(path).read_bytes()
    (phoff,) = struct.unpack_from("<Q", b, 0x20)
    phent, phnum = struct.unpack_from("<HH", b, 0x36)
    heads = [struct.unpack_from("<IIQQQQQQ", b, phoff + i * phent) for i in range(phnum)]
    return max(h[3] + h[6] for h in heads if h[0] == 1)


def compile_run(src, mode, std="c++14", math_mode="safe"):
    """-> path of a cached .so"""
    flags = (
        COMMON
        + (FAST if mode == "fast" else CHECK)
        + WARN
        + [f"-std={std}"]
        + (["-ffast-math"] if math_mode == "fast" else [])
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    so = CACHE / f"k_{mode}_{_key(_shim_key(), clang(), flags, mlx_include(), src)}.so"
    if not so.exists():
        base = f"{so}.{os.getpid()}"
        Path(base + ".cpp").write_text(src)
        r = _run(clang() + flags + ["-I", str(INC), "-isystem", mlx_include(), "-c", base + ".cpp", "-o", base + ".o"])
        if r.returncode:
            raise CompileError(_clean(r.stderr, base))
        link_shared([base + ".o"], base + ".so")
        os.replace(base + ".cpp", str(so)[:-3] + ".cpp")
        os.unlink(base + ".o")
        os.replace(base + ".so", so)
    return str(so)


def _clean(err, base):
    return err.replace(base + ".cpp", "<generated>")


CLEXT = "-__opencl_c_program_scope_global_variables,-cl_khr_fp64,-__opencl_c_fp64,-__opencl_c_pipes,-__opencl_c_device_enqueue,+cl_khr_fp16"
CHECKF = [
    "-x",
    "clcpp",
    "-cl-std=clc++2021",
    "-cl-no-stdinc",
    "-nostdinc",
    "-Xclang",
    "-cl-ext=" + CLEXT,
    "-fsyntax-only",
    "-Wno-unknown-attributes",
    "-Wno-undefined-internal",
    "-Wno-undefined-inline",
    "-Wuninitialized",
    "-Wsometimes-uninitialized",
    "-Wconditional-uninitialized",
    "-Wreturn-type",
    "-Wimplicit-float-conversion",
    "-Wno-user-defined-literals",
    "-Wno-unused",
    "-fno-caret-diagnostics",
    "-ferror-limit=200",
]


def syntax_check(src, want_ast=True):
    with tempfile.TemporaryDirectory() as d:
        f = Path(d) / "k.clcpp"
        f.write_text(src)
        cmd = clang() + CHECKF + ["-I", str(INC), "-isystem", mlx_include(), str(f)]
        if want_ast:
            cmd += ["-Xclang", "-ast-dump=json"]
        r = _run(cmd)
        return r.returncode, r.stderr.replace(str(f), "<generated>"), r.stdout
