"""Attention that reads packed keys and values in a kernel: which shapes it takes, how it is cut, and the calls."""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.ops.kernel import Kernel
from mlx_turboquant.rotation import HadamardRotation
from mlx_turboquant.tensor import PackedTensor

MAX_QUERIES = 8
MAX_SPLITS = 512  # of attend_merge.metal
TILE = 16  # tokens that one simdgroup takes at a time
# Threadgroups to aim at. H200 (132 multiprocessors): see benchmarks/LOG.md. Apple GPUs have 8 to 80 cores and were not
# measured: enough for the largest.
_THREADGROUPS = {"cuda": 528, "metal": 320}
_SIMDGROUPS = 4
# Up to so many tiles of packed tokens one threadgroup per KV head does everything, in one dispatch.
_SINGLE_PASS_TILES = 64
_SINGLE_PASS_SIMDGROUPS = 8

_HEADERS = ("codebooks.h", "codes.h", "rotation.h")
_ATTEND = Kernel(
    "attend",
    (
        *("q", "k_codes", "k_scales", "k_centers", "v_codes", "v_scales", "sink_k", "sink_v", "tail_k", "tail_v"),
        *("balance", "signs", "hartley", "mask", "logits", "lengths", "sizes", "factors"),
    ),
    ("out", "out_ml"),
    _HEADERS,
)
_MERGE = Kernel("attend_merge", ("sums", "tops", "signs", "hartley", "logits", "sizes"), ("out",), ("rotation.h",))


class StoredSide(NamedTuple):
    """Keys or values of one layer, in whole buffers; `lengths` of `attend` says how much of them is valid.

    Attributes:
        bits: of a code; 0 for raw rows.
        packed: codes (B, Hkv, cap, W) uint32, scales (B, Hkv, cap, groups), centers (B, Hkv, cap / block, D) or None.
        sinks: (B, Hkv, S, D), or None.
        tail: (B, Hkv, tcap, D), or None.
        rotation: of packed rows; None for raw rows.
    """

    bits: int
    packed: PackedTensor
    sinks: mx.array | None
    tail: mx.array | None
    rotation: object | None


def why_not(D: int, Dv: int, block: int, keys: StoredSide, values: StoredSide) -> str | None:
    """Why the kernel cannot read these rows, in words; None if it can."""
    if Dv != D:
        return f"values have another head size than keys ({Dv}, {D})"
    if D % 16 or D > 256 or D & -D < 16:
        return f"head size {D} is not a multiple of 16 up to 256"
    if block % TILE:
        return f"blocks of {block} tokens are not a multiple of {TILE}"
    for side in (keys, values):
        if side.bits not in (0, 2, 3, 4, 8):
            return f"codes of {side.bits} bits have no kernel"
        if side.bits and not isinstance(side.rotation, HadamardRotation):
            return "the rotation is a dense matrix"
    return None


def attend(
    queries: mx.array,
    keys: StoredSide,
    values: StoredSide,
    lengths: tuple[tuple[int, int, int], ...],
    *,
    scale: float,
    block: int,
    balance: mx.array | None = None,
    mask: mx.array | None = None,
    causal: bool = False,
    logits: mx.array | None = None,
    backend: str,
) -> mx.array:
    """Scaled dot-product attention over stored rows, in one dispatch for a short cache and in two for a long one.

    Args:
        queries: (B, H, L, D), L at most 8.
        keys, values: see `StoredSide`; `why_not` must have no objection.
        lengths: for each sequence, valid rows of sinks, packed rows and tail.
        scale: factor of the scores.
        block: tokens per centre.
        balance: (B, Hkv, D) float32, what keys were multiplied with.
        mask: (B or 1, H or 1, L or 1, tokens), boolean or added to the scores; -1e30 or less masks.
        causal: query l of L sees tokens up to the sequence's length - L + l.
        logits: (H,) attention-sink logits.
        backend: "metal", "cuda", or another that has a builder.

    Returns:
        (B, H, L, D) in the dtype of queries. A row with no token to see is 0.

    Scratch memory of the second form: B * H * L * splits * (D + 2) float32, splits at most 512.
    """
    B, H, L, D = queries.shape
    Hkv, capacity = keys.packed.codes.shape[1:3]
    dtype = (keys.tail if keys.tail is not None else keys.packed.scales).dtype
    signs, hartley = _rotation_arrays(keys.rotation or values.rotation)
    nothing = _padding(dtype)
    tails = [nothing if side.tail is None else side.tail for side in (keys, values)]
    sinks = [nothing if side.sinks is None else side.sinks for side in (keys, values)]
    key_groups = 1 if keys.bits == 0 else keys.packed.scales.shape[-1]
    plan = _plan(
        *(B, Hkv, H // Hkv * L, D, D // key_groups),
        *(max(n[1] for n in lengths), max(n[0] + n[2] for n in lengths), backend),
    )
    strides = (0, 0, 0)
    if mask is not None:
        strides = _broadcast_strides(mask.shape)
    template = (
        ("T", dtype),
        ("O", dtype if plan.single else mx.float32),
        ("D", D),
        ("HKV", Hkv),
        ("G", H // Hkv),
        ("L", L),
        ("BLOCK", block),
        ("KB", keys.bits),
        ("VB", values.bits),
        ("KG", key_groups),
        ("VG", 1 if values.bits == 0 else values.packed.scales.shape[-1]),
        ("CENTER", keys.packed.centers is not None),
        ("BALANCE", balance is not None),
        ("MASK", 0 if mask is None else 1 if mask.dtype == mx.bool_ else 2),
        ("CAUSAL", causal and L > 1),
        ("LOGITS", logits is not None),
        ("SINGLE", plan.single),
        ("RC", plan.rows),
        ("KD", plan.key_elements),
        ("VD", plan.value_elements),
        ("NSG", plan.simdgroups),
    )
    run = _runner(backend, plan, template, B, H, Hkv, L, D)
    return run(
        queries,
        keys.packed.codes,
        nothing if keys.packed.scales is None else keys.packed.scales,
        nothing if keys.packed.centers is None else keys.packed.centers,
        values.packed.codes,
        nothing if values.packed.scales is None else values.packed.scales,
        *(*sinks, *tails),
        signs if balance is None else balance,
        *(signs, hartley),
        nothing if mask is None else mask,
        nothing if logits is None else logits,
        _ints(*(n for one in lengths for n in (*one, 0))),
        _ints(capacity, tails[0].shape[-2], sinks[0].shape[-2], plan.splits, plan.raw_splits, *strides),
        _floats(scale),
    )


@lru_cache(maxsize=256)
def _runner(backend: str, plan: "_Plan", template: tuple, B: int, H: int, Hkv: int, L: int, D: int):
    """The calls as one function of arrays, compiled: building the arguments of two kernels takes 60 us in Python."""
    rows, splits = B * H * L, plan.splits + plan.raw_splits
    groups = (1 if plan.single else splits, Hkv * -(-(H // Hkv * L) // plan.rows), B)
    dtype = template[0][1]

    def run(*inputs: mx.array) -> mx.array:
        out, tops = _ATTEND(
            backend,
            [inputs[0].astype(dtype), *inputs[1:]],
            template=template,
            groups=groups,
            threads=32 * plan.simdgroups,
            output_shapes=[(B, H, L, D), (8,)] if plan.single else [(rows, splits, D), (rows, splits, 2)],
            output_dtypes=[dtype if plan.single else mx.float32, mx.float32],
        )
        if not plan.single:
            assert out.size + tops.size <= rows * MAX_SPLITS * (D + 2), "scratch is bounded"
            constants = dict(template)
            (out,) = _MERGE(
                backend,
                [out, tops, *inputs[11:13], inputs[14], _ints(splits, plan.raw_splits)],
                template=[("T", dtype), *((n, constants[n]) for n in ("D", "L", "VB", "LOGITS")), ("H", H), ("NSG", 8)],
                groups=(rows, 1, 1),
                threads=256,
                output_shapes=[(B, H, L, D)],
                output_dtypes=[dtype],
            )
        return out.astype(inputs[0].dtype)

    return mx.compile(run) if backend in ("metal", "cuda") else run


def _broadcast_strides(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Elements from one sequence, head and query of a mask (.., .., .., tokens) to the next; 0 where there is one."""
    B, H, L, tokens = shape
    return tuple(0 if n == 1 else step for n, step in ((B, H * L * tokens), (H, L * tokens), (L, tokens)))


class _Plan(NamedTuple):
    single: bool
    splits: int  # over packed tiles
    raw_splits: int  # over raw tiles; in a single pass: simdgroups
    rows: int  # query rows of a threadgroup
    key_elements: int
    value_elements: int
    simdgroups: int


@lru_cache(maxsize=4096)
def _plan(B: int, Hkv: int, rows: int, D: int, group: int, packed: int, raw: int, backend: str) -> _Plan:
    """How the work is cut: rows of queries per threadgroup, lanes per key, splits over tokens."""
    most = 4 if D > 128 else 8
    per_group = min(most, 1 << (rows - 1).bit_length())
    # Eight rows of queries leave registers for 8 elements of a key in each lane, fewer rows for 16.
    key_elements = 8 if per_group == 8 or group < 16 else 16
    tiles, raw_tiles = packed // TILE, -(-raw // TILE)
    heads = B * Hkv * -(-rows // per_group)
    if tiles + raw_tiles <= _SINGLE_PASS_TILES:
        # Their sums, one float for each query row and element, must fit in half the threadgroup memory.
        simdgroups = _SINGLE_PASS_SIMDGROUPS if per_group * D <= 512 else _SIMDGROUPS
        mine = round(simdgroups * raw_tiles / max(tiles + raw_tiles, 1))
        raw_share = min(max(mine, 1 if raw_tiles else 0), simdgroups - (1 if tiles else 0))
        return _Plan(True, 1, raw_share, per_group, key_elements, 8, simdgroups)
    raw_splits = min(-(-raw_tiles // (2 * _SIMDGROUPS)), MAX_SPLITS // 2)
    splits = max(_THREADGROUPS.get(backend, 64) // heads, 1)
    splits = min(splits, _power_of_two(-(-tiles // _SIMDGROUPS)), MAX_SPLITS - raw_splits)
    return _Plan(False, splits, raw_splits, per_group, key_elements, 8, _SIMDGROUPS)


def _power_of_two(n: int) -> int:
    """The largest one that is at most n: a cache that grows must not compile a new graph at every length."""
    return 1 << (n.bit_length() - 1)


# MLX hands a kernel inputs of fewer than 8 elements in another address space, so the small ones are padded to 8.


@lru_cache(maxsize=1024)
def _ints(*numbers: int) -> mx.array:
    return mx.array([*numbers, *[0] * (8 - len(numbers))], mx.int32)


@lru_cache(maxsize=64)
def _floats(*numbers: float) -> mx.array:
    return mx.array([*numbers, *[0.0] * (8 - len(numbers))], mx.float32)


@lru_cache(maxsize=8)
def _padding(dtype: mx.Dtype) -> mx.array:
    return mx.zeros((1, 8), dtype)


def _rotation_arrays(rotation: HadamardRotation) -> tuple[mx.array, mx.array]:
    return rotation.signs, rotation.kernel_hartley
