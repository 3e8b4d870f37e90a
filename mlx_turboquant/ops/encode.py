"""Whole blocks of keys or values to packed rows, in a kernel or in plain MLX: centre, balance, rotate, quantize."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlx_turboquant.conditioning import block_centers, subtract_centers
from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import ints
from mlx_turboquant.ops.kernel import Kernel
from mlx_turboquant.ops.row_kernels import reason_against, run_length, say_once
from mlx_turboquant.ops.survey import survey
from mlx_turboquant.packing import words_per_row
from mlx_turboquant.rotation import DenseRotation, HadamardRotation
from mlx_turboquant.tensor import PackedTensor

_THREADS = 128  # four rows of 128 elements for each lane that holds a part of one, at blocks of 64
# The plain operations encode so many rows at a time, so that their float32 temporaries stay small beside a long prompt.
_PIECE_ROWS = 4096

_ENCODE = Kernel(
    "encode",
    ("rows", "signs", "balance", "hartley", "tables", "sizes"),
    ("codes", "scales", "centers", "bad"),
    ("codebooks.h", "codes.h", "storing.h", "rows.h"),
)


class Encoded(NamedTuple):
    """What becomes of rows.

    Attributes:
        packed: the encoded rows.
        bad: which rows held NaN or infinities, as `Survey.bad`; evaluated wherever `packed` is.
    """

    packed: PackedTensor
    bad: mx.array


def look_too(
    packed: PackedTensor, rows: mx.array, start: int, stop: int, block: int, backend: str | None = None
) -> Encoded:
    """What was encoded without a look at which rows are bad, with one.

    Whoever evaluates the codes evaluates what was seen: left for later, it would keep the raw rows alive.
    """
    bad = survey(rows, start, stop, block=block, backend=backend).bad
    return Encoded(packed._replace(codes=mx.depends(packed.codes, bad)), bad)


def encode(
    rows: mx.array,
    start: int,
    stop: int,
    *,
    bits: int,
    group: int,
    block: int,
    rotation: HadamardRotation | DenseRotation,
    center: bool,
    balance: mx.array | None = None,
    scalings: int = lloyd_max.SCALINGS,
    backend: str | None = None,
) -> Encoded:
    """Encode the rows from start to stop.

    Args:
        rows: (B, Hkv, capacity, D) float16, bfloat16 or float32: a whole buffer, since a kernel would have to copy a
            slice. Its other rows are not read.
        start, stop: stop - start is a multiple of block.
        bits: 1 (plain MLX only), 2, 3, 4 or 8.
        group: elements per scale, a divisor of D.
        block: rows per centre.
        rotation: applied to every row.
        center: whether to subtract each block's mean row (over finite entries) first.
        balance: (B, Hkv, D) float32 that rows are multiplied with, or None.
        scalings: how many to try, see `lloyd_max.quantize`.
        backend: see `choose_backend`.

    Returns:
        `packed` with codes (B, Hkv, stop - start, W) uint32, scales (B, Hkv, stop - start, D / group) and, with
        center, centers (B, Hkv, (stop - start) / block, D), the last two in the dtype of rows; and which rows are bad.
        NaN and infinities are encoded as 0 (with center: as the centre).

    Raises:
        ValueError: if the rows are not whole blocks, are not in the buffer, or the backend is unknown.
    """
    capacity, D = rows.shape[2:]
    if not (0 <= start < stop <= capacity) or (stop - start) % block:
        raise ValueError(
            f"[encode] wanted whole blocks of {block} rows within {capacity}, got rows from {start} to {stop}."
        )
    backend = choose_backend(backend)
    if backend != "reference":
        reason = reason_against(D, bits, block, rows.dtype, rotation)
        if reason is None:
            arguments = bits, group, block, rotation, center, balance, scalings
            return _encode_in_kernel(rows, start, stop, *arguments, backend)
        say_once("encode", backend, reason)
    packed = in_pieces(
        lambda piece: _encode_reference(piece, bits, group, block, rotation, center, balance, scalings),
        *(rows, start, stop, block),
    )
    return look_too(packed, rows, start, stop, block, backend)


def in_pieces(
    encode_rows: Callable[[mx.array], PackedTensor], rows: mx.array, start: int, stop: int, block: int
) -> PackedTensor:
    """The rows (B, Hkv, .., D) from start to stop, encoded some thousands at a time by a function of such a piece."""
    step = max(_PIECE_ROWS // block, 1) * block
    pieces: list[PackedTensor] = []
    for first in range(start, stop, step):
        piece = rows[:, :, first : min(first + step, stop)]
        if pieces:  # one after the other: MLX would otherwise hold the temporaries of all pieces at once
            piece = mx.depends(piece, pieces[-1].codes)
        pieces.append(encode_rows(piece))
    return PackedTensor.joined(pieces)


def _encode_reference(rows, bits, group, block, rotation, center, balance, scalings) -> PackedTensor:
    centers = block_centers(rows, block) if center else None
    x = subtract_centers(rows, centers)
    if balance is not None:
        x = x * balance[:, :, None]
    return lloyd_max.quantize(rotation.apply(x), bits, group, rows.dtype, scalings)._replace(centers=centers)


def _encode_in_kernel(rows, start, stop, bits, group, block, rotation, center, balance, scalings, backend) -> Encoded:
    B, H, capacity, D = rows.shape
    tables = lloyd_max.kernel_tables(bits, scalings, rows.dtype)
    balanced = balance is not None
    run = _prepared(_ENCODE, backend, rows.dtype, B, H, stop - start, D, bits, group, block, center, balanced, scalings)
    factors = rotation.signs, balance if balanced else rotation.signs
    codes, scales, centers, bad = run([rows, *factors, rotation.kernel_hartley, tables, ints(start, capacity)])
    return Encoded(PackedTensor(codes, scales, centers if center else None), bad)


@lru_cache(maxsize=256)  # the layers of a model share it, and from block to block it stays the same
def _prepared(kernel, backend, dtype, B, H, count, D, bits, group, block, center, balance, scalings):
    return kernel.prepare(
        backend,
        template=[
            ("T", dtype),
            ("D", D),
            ("BITS", bits),
            ("GROUP", group),
            ("BLOCK", block),
            ("CENTER", center),
            ("BALANCE", balance),
            ("SCALINGS", scalings),
            ("TERMS", len(lloyd_max.cell_polynomial(bits))),
            ("PER", run_length(D, group)),
            ("THREADS", _THREADS),
        ],
        groups=(count // block, H, B),
        threads=_THREADS,
        output_shapes=[
            (B, H, count, words_per_row(D, bits)),
            (B, H, count, D // group),
            (B, H, count // block, D) if center else (8,),
            (B, H, count // block, -(-block // 32)),
        ],
        output_dtypes=[mx.uint32, dtype, dtype, mx.uint32],
    )
