"""Packed rows back to rows in the model's dtype, in a kernel or in plain MLX."""

from functools import cache

import mlx.core as mx
import numpy as np

from mlx_turboquant import codebook
from mlx_turboquant.conditioning import in_dtype
from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.device_ints import ints
from mlx_turboquant.ops.kernel import Kernel
from mlx_turboquant.ops.row_kernels import reason_against, run_length, say_once
from mlx_turboquant.rotation import DenseRotation, HadamardRotation
from mlx_turboquant.tensor import PackedTensor

_THREADS = 128

_DEQUANTIZE = Kernel(
    "dequantize",
    ("codes", "scales", "centers", "factors", "hartley", "book", "sizes"),
    ("out",),
    ("storing.h", "rows.h"),
)


def dequantize(
    packed: PackedTensor,
    start: int,
    stop: int,
    *,
    bits: int,
    dim: int,
    block: int,
    rotation: HadamardRotation | DenseRotation,
    balance: mx.array | None = None,
    backend: str | None = None,
) -> mx.array:
    """The rows from start to stop that `encode` encoded.

    Args:
        packed: whole buffers, that may have room for more rows than are valid: codes (B, Hkv, .., W), scales
            (B, Hkv, .., groups), centers (B, Hkv, .., dim) or None.
        start, stop: multiples of block.
        bits, block, rotation, balance: those of `encode`.
        dim: elements of a row.
        backend: see `choose_backend`.

    Returns:
        (B, Hkv, stop - start, dim) in the dtype of the scales.

    Raises:
        ValueError: if the rows are not whole blocks, are not in the buffers, or the backend is unknown.
    """
    if not (0 <= start < stop <= packed.length) or start % block or stop % block:
        raise ValueError(
            f"[dequantize] wanted whole blocks of {block} rows within {packed.length}, got rows {start} to {stop}."
        )
    dtype = packed.scales.dtype
    backend = choose_backend(backend)
    if backend != "reference":
        reason = reason_against(dim, bits, block, dtype, rotation)
        if reason is None:
            return _dequantize_in_kernel(packed, start, stop, bits, dim, block, rotation, balance, backend)
        say_once("dequantize", backend, reason)
    return _dequantize_reference(packed.rows(start, stop, block), bits, dim, block, rotation, balance)


def _dequantize_reference(packed, bits, dim, block, rotation, balance) -> mx.array:
    x = rotation.invert(lloyd_max.dequantize(packed, bits, dim))
    if balance is not None:
        x = x / balance[:, :, None]
    if packed.centers is not None:
        B, H, T, D = x.shape
        x = x.reshape(B, H, -1, block, D) + packed.centers[:, :, :, None].astype(mx.float32)
        x = x.reshape(B, H, T, D)
    return in_dtype(x, packed.scales.dtype)


def _dequantize_in_kernel(packed, start, stop, bits, dim, block, rotation, balance, backend) -> mx.array:
    B, H = packed.codes.shape[:2]
    dtype, centers = packed.scales.dtype, packed.centers
    group = dim // packed.scales.shape[-1]
    # The rotation's signs over the balance, and elements from one head's to the next one's.
    factors, stride = (rotation.signs, 0) if balance is None else (rotation.signs / balance, balance.shape[-1])
    (out,) = _DEQUANTIZE(
        backend,
        [
            packed.codes,
            packed.scales,
            _nothing(dtype) if centers is None else centers,
            factors,
            rotation.kernel_hartley,
            _book(bits),
            ints(
                *(start, packed.codes.shape[2], packed.scales.shape[2], 0 if centers is None else centers.shape[2]),
                stride,
            ),
        ],
        template=[
            ("T", dtype),
            ("D", dim),
            ("BITS", bits),
            ("GROUP", group),
            ("BLOCK", block),
            ("CENTER", centers is not None),
            ("PER", run_length(dim, group)),
            ("THREADS", _THREADS),
        ],
        groups=((stop - start) // block, H, B),
        threads=_THREADS,
        output_shapes=[(B, H, stop - start, dim)],
        output_dtypes=[dtype],
    )
    return out


@cache
def _book(bits: int) -> mx.array:
    centroids = codebook.gaussian(bits)
    return mx.array(np.pad(centroids, (0, max(8 - centroids.size, 0))))


@cache
def _nothing(dtype: mx.Dtype) -> mx.array:
    return mx.zeros((1, 1, 1, 8), dtype)
