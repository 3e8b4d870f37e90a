"""CUDA text from Metal text, and how MLX is given it. What CUDA makes of it, the kernels' tests show on a GPU."""

import re
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest

from mlx_turboquant.ops import attend_calls, balance, dequantize, encode, keep_rows, score, survey, trellis
from mlx_turboquant.ops import kernel as kernels
from mlx_turboquant.ops.cuda_text import cuda_text, in_a_file

KERNELS = [
    attend_calls._ATTEND,
    attend_calls._ATTEND_MMA,
    attend_calls._MERGE,
    encode._ENCODE,
    dequantize._DEQUANTIZE,
    score._SCORE,
    survey._SURVEY,
    trellis._TRELLIS,
    balance._BALANCE,
    keep_rows._KEEP,
]


@pytest.mark.parametrize(
    ("metal", "cuda"),
    [
        ("device const float* x = y;", " const float* x = y;"),
        ("threadgroup float rows[4];", "__shared__ float rows[4];"),
        ("threadgroup float* rows = all + 1;", " float* rows = all + 1;"),
        ("float4 v = *(const device uint4*)at;", "metal::float4_ v = *(const  metal::uint4_*)at;"),
        ("f(a, (thread float*)b);", "f(a, ( float*)b);"),
        ('asm("device %0");  // device', 'asm("device %0");  // device'),
    ],
)
def test_words_that_cuda_spells_otherwise(metal, cuda):
    assert cuda_text("", metal)[1].split("using namespace turboquant;\n")[1] == cuda


def test_tables_in_program_scope_are_constant_memory():
    header, _ = cuda_text("constant constexpr float t[2] = {1, 2};\nfloat f(constant float* x);", "")
    assert "__constant__ constexpr float t[2] = {1, 2};\nfloat f( float* x);" in header


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_mlx_is_given_short_text_that_includes_the_rest(kernel):
    template = (("T", mx.float16), ("D", 64), ("NSG", 4), ("RESIDENT", 2), ("SHARED_BYTES", 1024))
    header, body = cuda_text(*kernel.specialised(template, by_exchange=True))
    with mock.patch.object(mx.fast, "cuda_kernel", create=True) as made:
        kernels._cuda(kernel, template)
    given = made.call_args.kwargs
    included = [re.fullmatch(r'#include "([^"]+)"\n', given[part])[1] for part in ("header", "source")]
    assert Path(included[0]).read_text().startswith(header) and Path(included[1]).read_text() == body
    assert "launch_bounds(128, 2)" in Path(included[0]).read_text()
    assert len(given["header"] + given["source"] + given["name"]) < 500
    assert given["shared_memory"] == 1024


@pytest.mark.parametrize("kernel", [attend_calls._ATTEND, encode._ENCODE], ids=lambda kernel: kernel.name)
def test_only_the_backend_cuda_looks_codes_up_by_exchange(kernel):
    """And the two texts for CUDA have names of their own, by which MLX keeps what it compiled."""
    template, macro = (("T", mx.float16), ("D", 64), ("NSG", 4)), "#define TURBOQUANT_LOOKUP_BY_EXCHANGE 1\n"
    texts, names = {}, {}
    for backend, maker in (("metal", "metal_kernel"), ("cuda", "cuda_kernel"), ("cuda-metal", "cuda_kernel")):
        with mock.patch.object(mx.fast, maker, create=True) as made:
            kernels.BUILDERS[backend](kernel, template)
        header, names[backend] = made.call_args.kwargs["header"], made.call_args.kwargs["name"]
        texts[backend] = Path(header.split('"')[1]).read_text() if backend != "metal" else header
    assert {backend for backend, text in texts.items() if macro in text} == {"cuda"}
    assert texts["cuda"].replace(macro, "") == texts["cuda-metal"] and names["cuda"] != names["cuda-metal"]
    assert all("#ifdef TURBOQUANT_LOOKUP_BY_EXCHANGE" in text for text in texts.values())


def test_one_text_has_one_file_and_another_text_another():
    assert in_a_file("int a;") == in_a_file("int a;") != in_a_file("int b;")


def test_spaces_go_where_no_signs_meet():
    assert kernels._compact("a = b - -c;\nfor (int i = 0; i < n; i++) { x[i] += y * 2; }\n#define A (1 + 2)\n") == (
        "a=b- -c;\nfor(int i=0;i<n;i++){x[i] +=y*2;}\n#define A (1 + 2)\n"
    )
    assert kernels._compact('asm("add %0, %1;" : "=r"(a));') == 'asm("add %0, %1;" : "=r"(a));\n'
