"""How attention calls its kernels: how many, of which types, with how much scratch, up to a million tokens."""

import itertools
import re
from unittest import mock

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from attend_cases import BACKEND, ON_GPU, UNSUPPORTED, Case, forced, make, rotation_matrix

from mlx_turboquant.codebook import gaussian
from mlx_turboquant.ops import attend as ops
from mlx_turboquant.ops import attend_calls, attend_plan
from mlx_turboquant.ops import kernel as kernels
from mlx_turboquant.ops.attend_plan import Shape
from mlx_turboquant.packing import words_per_row
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tensor import PackedTensor

emulated = pytest.mark.skipif(ON_GPU or bool(metal_emu.UNSUPPORTED), reason="the Metal text, read on a CPU")
GPUS = ["metal", "cuda", "cuda-metal"]
WIDTHS = [0, 2, 3, 4, 8]
HALF, BRAIN, FULL = mx.float16, mx.bfloat16, mx.float32


def attend(backend, lengths=(4, 1024, 20), bits=(4, 4), D=128, dtype=HALF, Hkv=8, G=4, L=1, B=1, **other):
    """Attention over arrays that are never computed; lengths are sinks, packed tokens and tail of each sequence.

    Other: block, groups, center, balance, causal, and the dtypes of a mask and of logits.
    """
    block, groups, mask, logits = (other.get(name) or 0 for name in ("block", "groups", "mask", "logits"))
    block, groups = block or 64, groups or 1
    (sinks, _, tail), room = lengths, lengths[1] + 2 * block

    def side(bits, center):
        rows = (B, Hkv, room)
        codes = mx.zeros((*rows, words_per_row(D, bits)), mx.uint32) if bits else mx.zeros((*rows, D), dtype)
        scales = mx.zeros((*rows, groups), dtype) if bits else None
        centers = mx.zeros((B, Hkv, room // block, D), dtype) if bits and center else None
        raw = (mx.zeros((B, Hkv, n, D), dtype) if n else None for n in (sinks, tail))
        return ops.StoredSide(bits, PackedTensor(codes, scales, centers), *raw, make_rotation("hadamard", D))

    return ops.attend(
        mx.zeros((B, Hkv * G, L, D), dtype),
        side(bits[0], other.get("center", True)),
        side(bits[1], False),
        (lengths,) * B,
        scale=1.0,
        block=block,
        balance=mx.zeros((B, Hkv, D)) if other.get("balance", True) and bits[0] else None,
        mask=mx.zeros((B, 1, L, sum(lengths)), mask) if mask else None,
        causal=other.get("causal", False),
        logits=mx.zeros(Hkv * G, logits) if logits else None,
        backend=backend,
    )


class Noted:
    """A kernel that computes nothing and notes its calls."""

    calls: list = []  # noqa: RUF012

    def __init__(self, kernel, template):
        self.kernel, self.template = kernel, template

    def __call__(self, **call):
        Noted.calls.append((self.kernel, self.template, call))
        return [mx.zeros(*pair) for pair in zip(call["output_shapes"], call["output_dtypes"], strict=True)]


@pytest.fixture
def calls():
    """The list of (kernel, template, call) that a GPU's backend is given."""

    def forget():
        for kept in (attend_plan.plan_of, ops._prepare, attend_calls.runner, kernels._build):
            kept.cache_clear()

    forget()
    with (
        mock.patch.dict(kernels.BUILDERS, dict.fromkeys(GPUS, Noted)),
        mock.patch.object(Noted, "calls", []),
        mock.patch.object(mx, "compile", lambda function: function),  # arrays, where it would show their shapes
    ):
        yield Noted.calls
    forget()


def library(kernel, template, call):
    """What MLX compiles once: the text, the types of the arrays, and which of them are small."""
    types = tuple((x.dtype, x.ndim, x.size < 8) for x in call["inputs"])
    return kernel.name, template, types, tuple(call["output_dtypes"])


def libraries(calls):
    return {name: {key for key in itertools.starmap(library, calls) if key[0] == name} for name in set(names(calls))}


def names(calls):
    return [kernel.name for kernel, _, _ in calls]


@pytest.mark.parametrize("backend", GPUS)
def test_a_step_is_one_kernel_call_and_over_a_long_cache_two(backend, calls):
    for packed in (0, 64, 128, 256, 2048, 1 << 14, 1 << 17, 1 << 20):
        calls.clear()
        attend(backend, (4, packed, 20), L=2, causal=True, mask=mx.bool_, logits=FULL)
        if packed <= 256:
            assert names(calls) == ["attend"]
        else:
            assert len(calls) == 2 and names(calls)[1] == "attend_merge"


@pytest.mark.parametrize("backend", GPUS)
def test_scratch_is_a_sum_and_two_numbers_for_each_row_and_split(backend, calls):
    sizes = itertools.product((1, 3), (1, 8, 64), (1, 5), (1, 8), (64, 96, 256), (1 << 12, 1 << 16, 1 << 20))
    for B, Hkv, G, L, D, packed in sizes:
        calls.clear()
        attend(backend, (4, packed, 20), B=B, Hkv=Hkv, G=G, L=L, D=D)
        ((rows, splits, width),) = calls[0][2]["output_shapes"]
        assert (rows, width) == (B * Hkv * G * L, D + 2) and splits <= attend_plan.MAX_SPLITS
        # With one row for a token it would be a copy of the cache; it is a small part of what is read.
        assert splits * 16 <= packed


@pytest.mark.parametrize("backend", GPUS)
def test_no_kernel_is_compiled_for_a_length(backend, calls):
    """Over a cache that grows token by token; the merge has the numbers of splits in its text: one doubles."""
    for tokens in [*range(20, 1100, 3), *range(1100, 1 << 16, 61), 1 << 18, 1 << 20]:
        tail = 16 + (tokens - 20) % 64
        attend(backend, (4, tokens - 4 - tail, tail) if tokens > 100 else (4, 0, tokens - 4))
    short = [call for call in calls if call[0].name == "attend" and dict(call[1])["SINGLE"]]
    assert len(libraries(short)["attend"]) == 1
    found = libraries(calls)
    assert len(found["attend"]) == 2 and len(found.get("attend_mma", ())) <= 1
    assert len(found["attend_merge"]) <= 7


@pytest.mark.parametrize("backend", GPUS)
def test_sizes_of_a_million_tokens_fit_their_32_bits(backend, calls):
    attend(backend, (4, 1 << 20, 20), bits=(0, 0), D=256, Hkv=8, G=16, L=8, B=1, mask=mx.bool_)
    kernel, _, call = calls[0]
    sizes = dict(zip(kernel.inputs, call["inputs"], strict=True))["sizes"]
    assert sizes.dtype == mx.int32 and sizes[0] == (1 << 20) + 128 and sizes[7] == (1 << 20) + 24
    assert np.array(sizes).min() >= 0


def plan_for(backend, D, G, L=1, packed=1 << 14, signs=False, key_groups=1):
    shape = Shape(backend, 1, 8 * G, L, D, 8, 64, HALF, 3, 4, key_groups, 1, True, True, 0, False, False, signs)
    return attend_plan.plan_of(shape, packed, 2)


@pytest.mark.parametrize("packed", [256, 1 << 14])
def test_with_four_query_rows_a_lane_of_an_apple_gpu_takes_half_as_much_of_a_key(packed):
    for D, G, L in itertools.product((64, 96, 128), (1, 2, 3, 4, 6, 8, 16), (1, 2, 8)):
        own, cuda = (plan_for(backend, D, G, L, packed) for backend in ("metal", "cuda-metal"))
        assert own.rows == cuda.rows == min(1 << (G * L - 1).bit_length(), 8) and own.simdgroups == cuda.simdgroups
        assert own.key_elements == (8 if own.rows >= 4 else 16)
        assert cuda.key_elements == (8 if cuda.rows == 8 else 16)


def test_long_heads_and_sketches_have_one_plan_everywhere():
    # Heads of 256 spill either way, with 16 elements in fewer exchanges.
    for D, signs, G in ((256, False, 8), (256, True, 4), (128, True, 2), (128, True, 8)):
        plans = [plan_for(backend, D, G, signs=signs) for backend in ("metal", "cuda-metal")]
        assert plans[0][3:6] == plans[1][3:6]  # rows, key_elements, simdgroups


@emulated
def test_every_kind_of_call_has_valid_types():
    """Each width with each, in each dtype and one pass or two; then each dtype of mask and logits, small and not."""
    turns = [
        *(("D", [64, 80, 96, 128, 256]), ("G", [1, 3, 8, 4, 2, 16, 7]), ("L", [1, 2, 8]), ("block", [16, 64, 256])),
        *(("groups", [1, 4, 2]), ("center", [True, False]), ("balance", [False, True]), ("causal", [True, False])),
        *(("mask", [None, mx.bool_, HALF, None, FULL]), ("logits", [FULL, None, HALF, BRAIN])),
    ]
    others = zip(*(itertools.cycle(values) for _, values in turns), strict=False)
    heads = itertools.cycle([1, 8, 1])
    with kernel_emulator.noting() as calls:
        for bits, dtype, packed in itertools.product(
            itertools.product(WIDTHS, WIDTHS), (HALF, BRAIN, FULL), (256, 1024)
        ):
            options = dict(zip((name for name, _ in turns), next(others), strict=True))
            attend("emulator", (4, packed, 20), bits, dtype=dtype, **options)
        kinds = zip(
            itertools.cycle([None, mx.bool_, HALF, BRAIN, FULL]),
            itertools.cycle([None, HALF, BRAIN, FULL]),
            strict=False,
        )
        for dtype, (mask, logits) in itertools.product((HALF, BRAIN, FULL), itertools.islice(kinds, 8)):
            for lengths in ((2, 0, 3), (4, 1024, 20)):
                attend("emulator", lengths, dtype=dtype, mask=mask, logits=logits, Hkv=next(heads), G=1)
    assert len(calls) > 250
    assert all(warnings == [] for warnings in metal_emu.typecheck(calls))


@pytest.mark.parametrize("packed", [256, 4096])
def test_the_generated_text_is_what_mlx_compiles(packed, calls, capfd):
    """And the text with its constants written in, as a Mac gets it, has valid types."""
    attend("metal", (4, packed, 20), L=3, causal=True, mask=mx.bool_, logits=HALF)
    assert len(calls) == (1 if packed == 256 else 2)
    for kernel, template, call in calls:
        mlx_kernel = kernels._metal(kernel, template)
        arguments = {name: value for name, value in call.items() if name != "inputs"}
        inputs = [mx.zeros(x.shape, x.dtype) for x in call["inputs"]]
        printed = kernel_emulator.text_of_mlx(mlx_kernel, inputs, arguments, capfd)
        ours = emulated_kernel(kernel, template)
        assert ours.metal_source(**call) == printed
        if not metal_emu.UNSUPPORTED:
            assert ours.typecheck(**call) == []


def emulated_kernel(kernel, template):
    """The kernel with its constants written in, for the emulator."""
    header, source = kernel.specialised(template)
    name = kernel.specialised_name(template)
    return metal_emu.metal_kernel(name, list(kernel.inputs), list(kernel.outputs), source, header)


@emulated
@pytest.mark.parametrize("number", [0, 1, 2], ids=["packed", "tail", "sinks"])
def test_offsets_have_64_bits(number, calls):
    """Heads 2^32 words apart are far outside of small buffers; with 32 bits the offset would be 0, and inside."""
    case = Case(key_bits=0, value_bits=0, D=256, dtype="float32")
    made = make(case)
    with forced(1):
        ops.attend(made.queries, made.keys, made.values, **made.options, backend="metal")
    ((kernel, template, call),) = calls
    inputs = dict(zip(kernel.inputs, call["inputs"], strict=True))
    inputs["sizes"] = np.array(inputs["sizes"])
    inputs["sizes"][number] = 1 << 24
    emulator = emulated_kernel(kernel, template)
    emulator(**call | {"inputs": list(inputs.values())}, check=True, raise_errors=False)
    report = emulator.reports[0]
    assert report.kind == "out-of-bounds" and int(re.search(r"byte offset (\d+)", report.text)[1]) > 1 << 33


@pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)
@pytest.mark.parametrize("passes", [1, 2] if ON_GPU else [1])
def test_each_of_a_million_tokens_counts_once(passes):
    """The keys of a head are equal, so the answer is its mean value; on a GPU, the codes of all heads take 4.5 GiB."""
    D, tokens, heads = 64, 1 << 20, 72 if ON_GPU else 1
    codes = (mx.arange(heads, dtype=mx.uint32) + 128) * 0x01010101
    codes = mx.contiguous(mx.broadcast_to(codes[:, None, None], (1, heads, tokens, D // 4)))
    scales = np.random.default_rng(0).uniform(0.5, 1.5, (1, heads, tokens, 1)).astype(np.float32)
    side = ops.StoredSide(8, PackedTensor(codes, mx.array(scales)), None, None, make_rotation("hadamard", D))
    with forced(passes):
        queries = mx.ones((1, heads, 1, D))
        keys = side._replace(packed=side.packed._replace(scales=mx.ones(scales.shape)))
        out = ops.attend(queries, keys, side, ((0, tokens, 0),), scale=1.0, block=64, backend=BACKEND)
    rows = gaussian(8)[128 : 128 + heads, None] * rotation_matrix(D).sum(axis=0)
    expected = scales.mean(axis=2, dtype=np.float64) * rows
    assert np.abs(np.array(out)[:, :, 0] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("backend", ["metal", "cuda"])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("mask", "logits", "signs"),
    [("", False, False), ("boolean", False, True), ("", True, True), ("additive", True, False), ("", False, True)],
)
def test_a_compiled_call_captures_no_array(backend, passes, mask, logits, signs):
    """MLX refuses to compile a function that takes an array from outside which is one of its inputs, too."""
    case = Case(
        key_bits=3, signs=signs, mask=mask, logits=logits, passes=passes, center=False, balance=signs and logits
    )
    made = make(case)

    def build(kernel, template):
        def call(inputs, output_shapes, output_dtypes, **_):
            kept = sum(x.astype(mx.float32).sum() * 0 for x in inputs)
            return [(mx.zeros(n) + kept).astype(d) for n, d in zip(output_shapes, output_dtypes, strict=True)]

        return call

    kernels._build.cache_clear()
    with mock.patch.dict(kernels.BUILDERS, {backend: build}), forced(passes):
        attend_calls.runner.cache_clear()
        ops._padding.cache_clear()
        out = ops.attend(made.queries, made.keys, made.values, **made.options, backend=backend)
        mx.eval(out)
        assert out.shape == made.queries.shape
    attend_calls.runner.cache_clear()
    kernels._build.cache_clear()
