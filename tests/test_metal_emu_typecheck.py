"""What is not Metal does not pass the type check, what is Metal does; compilers are found, builds kept and shared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from metal_emu import CompileError, cache, compiler, metal_kernel, prebuild, typecheck

pytestmark = pytest.mark.skipif(bool(metal_emu.UNSUPPORTED), reason=metal_emu.UNSUPPORTED)

COPY = "uint i = thread_position_in_grid.x; out[i] = inp[i];"


def check(body, header="", dtype="float32", size=1000, out=None):
    """The warnings of a kernel with one input and output, T and N = 4."""
    kernel = metal_kernel("k", ["inp"], ["out"], body, header=header)
    template = [("T", dtype), ("N", 4)]
    return kernel.typecheck(inputs=[((size,), dtype)], output_dtypes=[out or dtype], template=template)


METAL = {
    "a copy": dict(body=COPY),
    "explicit conversion to bfloat": dict(body="float v = inp[0]; out[0] = static_cast<T>(v);", dtype="bfloat16"),
    "implicit conversion to half": dict(body="float v = inp[0]; out[0] = v;", dtype="float16"),
    "constant table": dict(body="out[0] = t[N - 1];", header="constant float t[4] = {1, 2, 3, 4};"),
    "constexpr constant": dict(body="out[0] = three;", header="static constexpr constant int three = 3;"),
    "vector constructors": dict(
        body="float4 v = float4(1.0f); half4 w = half4(v); vec<float, 4> u = vec<float, 4>(1, 2, 3, 4); "
        "out[0] = w.x + u.y;"
    ),
    "if constexpr": dict(body="if constexpr (N == 4) { out[0] = 1; }"),
    "structure in device memory": dict(
        body="S s = *(const device S*)inp; out[0] = s.a;", header="struct S { float a, b; };"
    ),
    "atomic": dict(
        body="device atomic_uint* a = (device atomic_uint*)out; atomic_fetch_add_explicit(a, 1u, memory_order_relaxed);"
    ),
    "helper in every address space": dict(
        body="float own[2] = {1, 2}; threadgroup float shared[2]; shared[0] = 1; out[0] = f(own) + f(shared) + f(inp);",
        header="template <typename P> float f(P p) { return p[0]; }",
    ),
    "shuffle of bfloat": dict(body="out[0] = simd_shuffle(inp[0], ushort(3));", dtype="bfloat16"),
}


@pytest.mark.parametrize("case", METAL)
def test_metal_passes(case):
    assert check(**METAL[case]) == []


NOT_METAL = {
    "pointer without address space": (dict(body=COPY + " float v = 0; float* z = &v; z[0] = 1;"), "`z`.*address space"),
    "reference without address space": (
        dict(body=COPY, header="float h(float& r) { return r; }"),
        "`r`.*address space",
    ),
    "threadgroup as device": (
        dict(body=COPY + " threadgroup float s[32]; device float* z = s;"),
        "__global float.*__local float",
    ),
    "threadgroup cast to device": (
        dict(body=COPY + " threadgroup float s[32]; device float* z = (device float*)s;"),
        "mismatching address spaces",
    ),
    "device to a thread parameter": (
        dict(body="out[0] = h(out);", header="float h(thread float* r) { return r[0]; }"),
        "no matching function",
    ),
    "const dropped": (dict(body="device T* p = inp; p[0] = 1;"), "const"),
    "input written": (dict(body="inp[0] = 1;"), "read-only|const"),
    "7 elements are constant": (
        dict(body="out[0] = h(inp);", header="float h(const device float* r) { return r[0]; }", size=7),
        "no matching function",
    ),
    "double": (dict(body="double z = inp[0]; out[0] = z;"), "no double"),
    "long double literal": (dict(body="out[0] = 1.0L;"), "no long double"),
    "product to bfloat": (
        dict(body="T v = inp[0] * 2.0f; out[0] = v;", dtype="bfloat16"),
        "conversion from float to bfl",
    ),
    "float to bfloat": (
        dict(body="float v = inp[0]; out[0] = v;", dtype="bfloat16"),
        "conversion from float to bfloat",
    ),
    "unknown function": (dict(body="out[0] = metal::erf(inp[0]);"), "erf"),
    "std": (dict(body="out[0] = std::exp(inp[0]);"), "there is no std::"),
    "max of half and float": (dict(body="half h = 1.0h; out[0] = max(h, 1.0f);"), "ambiguous"),
    "max of int and uint": (dict(body="uint u = 1; int i = 2; out[0] = max(u, i);"), "ambiguous"),
    "simd_sum of bool": (dict(body="out[0] = simd_sum(inp[0] > 0);"), "no overload for bool"),
    "threadgroup array in a helper": (
        dict(body=COPY, header="void h() { threadgroup float q[4]; q[0] = 1; }"),
        "error",
    ),
    "threadgroup array in a branch": (
        dict(body=COPY + " if (i) { threadgroup float q[4]; q[0] = 1; }"),
        "outermost scope",
    ),
    "global variable": (dict(body=COPY, header="int counter = 3;"), "program scope variable"),
    "goto": (dict(body="goto x; x: out[0] = 1;"), "no goto"),
    "new": (dict(body="thread int* p = new int; out[0] = 1;"), "no dynamic allocation"),
    "function pointer": (
        dict(body="float (*f)(float) = &g; out[0] = f(1);", header="float g(float x) { return x; }"),
        "pointers to functions",
    ),
    "virtual": (dict(body=COPY, header="struct A { virtual int f(); };"), "no virtual functions"),
    "too few components": (dict(body="float4 v = float4(1.0f, 2.0f); out[0] = v.x;"), "error"),
    "int4 from float4": (
        dict(body="float4 v = float4(1.0f); int4 w = v; out[0] = w.x;"),
        "cannot initialize.*int.*float",
    ),
    "half4 from float4": (dict(body="float4 v = float4(1.0f); half4 w = v; out[0] = w.x;"), "half"),
    "as_type of another size": (dict(body="out[0] = as_type<ushort>(inp[0]);"), "sizes differ"),
    "variable never set": (dict(body="float x; out[0] = x;"), "uninitialized"),
    "missing semicolon": (dict(body="out[0] = 1"), "k.metal:1:.*expected"),
    "undeclared name": (dict(body="out[thread_id] = 1;"), "undeclared identifier 'thread_id'"),
    "unknown memory flag": (dict(body="threadgroup_barrier(mem_flags::mem_shared);"), "mem_shared"),
    "barrier without flags": (dict(body="threadgroup_barrier();"), "no matching function"),
    "missing return": (dict(body=COPY, header="float g(float x) { if (x > 0) return 1; }"), "k.header:1.*return"),
    "stronger memory order": (
        dict(
            body="device atomic_uint* a = (device atomic_uint*)out; "
            "atomic_fetch_add_explicit(a, 1u, memory_order_seq_cst);"
        ),
        "memory_order_seq_cst|no matching",
    ),
}


@pytest.mark.parametrize("case", NOT_METAL)
def test_what_is_not_metal_does_not_pass(case):
    arguments, message = NOT_METAL[case]
    with pytest.raises(CompileError) as caught:
        check(**arguments)
    assert re.search(message, str(caught.value)), caught.value


def test_doubtful_metal_is_a_warning():
    (warning,) = check("auto f = [](int a) { return a; }; out[0] = f(1);")
    assert "lambda" in warning
    (warning,) = check("out[0] = f(3);", "int f(int n) { return n < 2 ? 1 : n * f(n - 1); }")
    assert "k.header:1" in warning and "`f` calls itself" in warning


def test_errors_name_the_line_of_the_body_and_the_header():
    with pytest.raises(CompileError, match=r"k\.metal:3:\d+: error: use of undeclared identifier 'nothing'"):
        check("\n\nout[0] = nothing;")
    with pytest.raises(CompileError, match=r"error: no matching function .*\n +k\.header:1:\d+: note: .*address space"):
        check("out[0] = h(inp);", "float h(threadgroup float* r) { return r[0]; }")
    with pytest.raises(CompileError, match=r"k\.header:2:\d+: error: use of undeclared identifier 'nothing'"):
        check(COPY, "\nfloat f() { return nothing; }")


def test_many_instantiations_are_checked_at_once():
    kernel = metal_kernel("many", ["x"], ["o"], "o[0] = x[0] * T(N); if (N == 7) o[0] = float(x[0]);")

    def call(dtype, n):
        return kernel, dict(inputs=[((64,), dtype)], output_dtypes=[dtype], template=[("T", dtype), ("N", n)])

    dtypes = (mx.float32, mx.float16)
    assert typecheck([call(dtype, n) for dtype in dtypes for n in range(10)]) == [[]] * 20
    with pytest.raises(CompileError, match=r"many\.metal:1:\d+: .*bfloat"):
        typecheck([call(dtype, n) for dtype in (mx.float32, mx.bfloat16) for n in range(3)])


def test_prebuilt_kernels_are_not_built_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path)
    kernel = metal_kernel("pre", ["x"], ["o"], "o[thread_position_in_grid.x] = x[thread_position_in_grid.x] + T(N);")
    sizes = dict(grid=(9, 1, 1), threadgroup=(9, 1, 1), output_shapes=[(9,)], output_dtypes=[np.float32])
    calls = [
        (kernel, dict(inputs=[((size,), np.float32)], template=[("T", np.float32), ("N", n)], **sizes))
        for n in range(3)
        for size in (9, 10)  # the size of an input of 8 elements or more changes nothing
    ]
    assert prebuild(calls) == 3
    built = sorted(tmp_path.glob("kernel_*.so"))
    assert len(built) == 3
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".o", ".cpp", ".clcpp")]
    call = calls[2][1] | {"inputs": [np.zeros(9, np.float32)]}
    assert (kernel(**call, check=True)[0] == 1).all()
    assert sorted(tmp_path.glob("kernel_*.so")) == built


def test_the_cache_drops_the_oldest(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path)
    monkeypatch.setattr(cache, "MAX_BYTES", 2500)
    for age, name in enumerate(["new", "middle", "old", "oldest"]):
        (tmp_path / name).write_bytes(bytes(1000))
        os.utime(tmp_path / name, times=(1e9 - 1e5 * age, 1e9 - 1e5 * age))
    monkeypatch.setattr(cache, "_dropped", False)
    cache.get("newest", lambda path: path.write_bytes(b"1"))
    assert {path.name for path in tmp_path.iterdir()} == {"new", "middle", "newest"}


def test_the_cache_keeps_nothing_of_a_build_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path)

    def fail(path):
        path.write_bytes(b"half")
        raise CompileError("no")

    with pytest.raises(CompileError):
        cache.get("kernel.so", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_said_once_with_what_to_install(monkeypatch):
    monkeypatch.setenv("METAL_EMU_CLANG", "/nowhere/clang")
    with pytest.raises(RuntimeError, match=r"version 17 or newer.*/nowhere/clang.*pip install ziglang"):
        compiler.compiler.__wrapped__()


def test_a_clang_can_be_forced(tmp_path):
    """A build by another command, from an empty cache, in a process of its own."""
    found = compiler.compiler()
    script = tmp_path / "my-clang"
    script.write_text(f'#!/bin/sh\nexec {" ".join(found.clang)} "$@"\n')
    script.chmod(0o755)
    program = (
        "import numpy as np; from metal_emu import metal_kernel, compiler; "
        "k = metal_kernel('k', ['x'], ['o'], 'o[0] = x[0] + 1;'); "
        "print(k(inputs=[np.full(8, 2, np.float32)], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], "
        "output_dtypes=[np.float32], check=True), compiler.compiler().clang[0])"
    )
    environment = os.environ | {"METAL_EMU_CLANG": str(script), "XDG_CACHE_HOME": str(tmp_path)}
    linker = tmp_path / "ld"
    linker.write_text(f'#!/bin/sh\nexec {" ".join(found.linker)} "$@"\n')
    linker.chmod(0o755)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    folder = Path(metal_emu.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.stdout.startswith("[array([3.]") and str(script) in done.stdout, done.stderr
