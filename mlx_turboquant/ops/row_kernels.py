"""What the kernels that encode and decode rows share: which rows they take, their small inputs, the warning."""

import warnings
from functools import cache

import mlx.core as mx

from mlx_turboquant.rotation import DenseRotation, HadamardRotation

_DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def reason_against(
    D: int, bits: int, block: int, dtype: mx.Dtype, rotation: HadamardRotation | DenseRotation
) -> str | None:
    """Why kernels cannot take these rows, in words; None if they can."""
    if not isinstance(rotation, HadamardRotation):
        return "the rotation is not one Hadamard transform"
    if D % 16 or D > 256:
        return f"head size {D} is not a multiple of 16 up to 256"
    if bits not in (2, 3, 4, 8):
        return f"codes of {bits} bits have no kernel"
    if block % 16:
        return f"blocks of {block} rows are not a multiple of 16"
    if dtype not in _DTYPES:
        return f"rows are {dtype}"
    return None


@cache
def say_once(operation: str, backend: str, reason: str, does_not: str = "take these rows") -> None:
    """Warn that plain MLX operations do the work of a kernel."""
    warnings.warn(
        f"[{operation}] The {backend} kernel does not {does_not}, because {reason}; plain MLX operations do, slower.",
        stacklevel=3,
    )


@cache
def run_length(D: int, group: int) -> int:
    """PER of kernels/rows.h: how many neighbouring elements a lane takes, at most 32 elements in all."""
    two = D & -D
    per = min(16, two // 2)
    while per > 2 and D // two * per > 32:
        per //= 2
    # A run within one group needs no masks; 32 lanes can hold a row.
    smallest = max(two // 32, 2)
    while per > smallest and group % per:
        per //= 2
    return per if group % per == 0 else min(16, two // 2, max(smallest, 32 // (D // two)))
