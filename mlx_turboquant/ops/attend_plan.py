"""How one call of the attention kernels is cut: which body, how many splits, rows and lanes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

MAX_SPLITS = 512  # of attend_merge.metal
TILE = 16  # tokens that one simdgroup takes at a time
# Threadgroups to aim at: one wave. Of the Metal text's, three fit on each of an H200's multiprocessors if its registers
# are held down to that, and two of the tensor-core body's; other counts take 10 to 30% longer. Apple GPUs have 8 to 80
# cores and were not measured: enough for the largest.
_MULTIPROCESSORS = 132
_THREADGROUPS = 320
# Backends whose GPUs give a lane up to 255 registers. Apple's have 128: docs/kernels.md, "Registers".
MANY_REGISTERS = {"cuda", "cuda-metal"}
# Tensor cores pay from so many packed tokens of all KV heads on (H200: 16,384 tokens of 8 heads); below, their body's
# start, which fills tables, takes longer than the rest.
_TENSOR_CORE_TOKENS = 1 << 17
_SIMDGROUPS = 4
# With fewer tiles than this for each simdgroup a wave that is not quite full is better (H200, 8 heads, GPU us of both
# kernels): 8,192 tokens in 16, 32, 48, 64 splits 19.8, 14.2, 15.9, 21.1; 4,096 tokens 13.7, 11.2, 13.5, 16.3. Then raw
# tiles are what is waited for: 1,024 tokens inside a model in 1 and 2 splits of raw rows 15.3, 13.0.
_SHORT_WALK = 4
# Up to so many tiles of packed tokens one threadgroup per KV head does everything, in one dispatch.
_SINGLE_PASS_TILES = 32
_SINGLE_PASS_SIMDGROUPS = 8


class Shape(NamedTuple):
    """What decides which kernel is compiled."""

    backend: str
    B: int
    H: int
    L: int
    D: int
    Hkv: int
    block: int
    dtype: mx.Dtype
    key_bits: int
    value_bits: int
    key_groups: int
    value_groups: int
    center: bool
    balance: bool
    mask: int
    causal: bool
    logits: bool
    signs: bool = False  # keys keep signs of their residuals
    beside: bool = False  # the newest rows lie beside their tail, see `tail_parts`


class Plan(NamedTuple):
    """How the work is cut."""

    single: bool
    splits: int  # over packed tiles
    raw_splits: int  # over raw tiles; in a single pass: simdgroups
    rows: int  # query rows of a threadgroup
    key_elements: int  # that one lane reads of a key
    simdgroups: int
    resident: int = 0  # CUDA: threadgroups that must fit on a multiprocessor at once; 0: no bound
    tensor_cores: bool = False  # kernels/attend_mma.cu; key_elements is then its tokens per tile


@lru_cache(maxsize=4096)
def plan_of(shape: Shape, packed: int, raw_tiles: int) -> Plan:
    """The plan for the longest sequence of a batch: so many packed tokens, so many tiles of raw ones."""
    D, tiles = shape.D, packed // TILE
    rows = shape.H // shape.Hkv * shape.L
    # A lane keeps its elements of all query rows in registers; with signs, those of their sketches too.
    most = 4 if D > 128 or shape.signs else 8
    per_group = min(most, 1 << (rows - 1).bit_length())
    # Eight rows of queries leave registers for 8 elements of a key in each lane, fewer rows for 16. Four with sketches
    # take what eight take; of 256 elements the two threadgroups that fit have registers for 16 all the same. Of 128
    # registers four rows leave room for 8; with 256 elements many are spilled either way.
    few_registers = shape.backend not in MANY_REGISTERS
    crowded = per_group == 8 or (per_group == 4 and D <= 128 and (shape.signs or few_registers))
    key_elements = 8 if crowded or D // shape.key_groups < 16 else 16
    heads = shape.B * shape.Hkv * -(-rows // per_group)
    if tiles + raw_tiles <= _SINGLE_PASS_TILES:
        # Their sums, one float for each query row and element, must fit in half the threadgroup memory.
        simdgroups = _SINGLE_PASS_SIMDGROUPS if per_group * D <= 512 else _SIMDGROUPS
        mine = round(simdgroups * raw_tiles / max(tiles + raw_tiles, 1))
        raw_share = min(max(mine, 1 if raw_tiles else 0), simdgroups - (1 if tiles else 0))
        return Plan(True, 1, raw_share, per_group, key_elements, simdgroups)
    if _has_tensor_body(shape) and packed * heads >= _TENSOR_CORE_TOKENS:
        return _tensor_core_plan(shape, packed, raw_tiles)
    # With more query rows or longer ones a threadgroup needs so many registers that only two fit.
    resident = 0 if shape.backend not in ("cuda", "cuda-metal") else 3 if per_group <= 4 and D <= 128 else 2
    wave = _MULTIPROCESSORS * resident if resident else _THREADGROUPS
    raw_splits = min(-(-raw_tiles // (2 * _SIMDGROUPS)), MAX_SPLITS // 2)
    splits = _splits_of_a_wave(wave, heads, raw_splits)
    # A cache that grows must not compile a new graph at every length.
    splits = min(splits, _power_of_two(tiles // (2 * _SIMDGROUPS)), MAX_SPLITS - raw_splits)
    if tiles < _SHORT_WALK * _SIMDGROUPS * splits:
        splits = _power_of_two(splits)
        raw_splits = min(2 * raw_splits, MAX_SPLITS // 2)
    return Plan(False, splits, raw_splits, per_group, key_elements, _SIMDGROUPS, resident)


def _power_of_two(n: int) -> int:
    """The largest that is at most n, or 1."""
    return 1 << max(n.bit_length() - 1, 0)


def _splits_of_a_wave(wave: int, heads: int, raw_splits: int) -> int:
    """Splits of packed tokens so that all threadgroups run at once; of many heads, the short raw ones may come late."""
    splits = wave // heads
    return max(splits - raw_splits if splits > 8 else splits, 1)


@contextmanager
def tensor_cores_for_any_length() -> Iterator[None]:
    """Inside, CUDA uses tensor cores for short caches too, where they are slower: to check them on small inputs."""
    global _TENSOR_CORE_TOKENS
    before, _TENSOR_CORE_TOKENS = _TENSOR_CORE_TOKENS, 0
    plan_of.cache_clear()
    try:
        yield
    finally:
        _TENSOR_CORE_TOKENS = before
        plan_of.cache_clear()


def _has_tensor_body(shape: Shape) -> bool:
    """Whether kernels/attend_mma.cu takes this: two-byte elements, one scale per row, head sizes it has lanes for."""
    return (
        shape.backend == "cuda"
        and shape.D in (64, 128, 256)
        and shape.dtype in (mx.float16, mx.bfloat16)
        and (shape.key_groups, shape.value_groups) == (1, 1)
        and not shape.signs
        and shape.block == 64
    )


def _tensor_core_plan(shape: Shape, packed: int, raw_tiles: int) -> Plan:
    rows = shape.H // shape.Hkv * shape.L
    tile = 64 if shape.D <= 128 and shape.key_bits and shape.value_bits else 16
    heads = shape.B * shape.Hkv * -(-rows // 8)
    raw_splits = min(-(-raw_tiles // (2 * _SIMDGROUPS)), MAX_SPLITS // 2)
    splits = _splits_of_a_wave(2 * _MULTIPROCESSORS, heads, raw_splits)
    splits = min(splits, _power_of_two(packed // tile // _SIMDGROUPS), MAX_SPLITS - raw_splits)
    return Plan(False, splits, raw_splits, 8, tile, _SIMDGROUPS, 2, True)
