"""The balance of a layer's keys, in one dispatch or in plain MLX."""

import mlx.core as mx

from mlx_turboquant.conditioning import balance_factors
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.kernel import Kernel

_BALANCE = Kernel("balance", ("queries", "keys"), ("factors",))


def balance(query_squares: mx.array, key_squares: mx.array, backend: str | None = None) -> mx.array:
    """What `conditioning.balance_factors` gives, (B, Hkv, D) float32, for the same arguments.

    A kernel takes heads of 8 to 256 elements.
    """
    backend = choose_backend(backend)
    B, H, D = query_squares.shape
    if backend == "reference" or not 8 <= D <= 256:
        return balance_factors(query_squares, key_squares)
    (factors,) = _BALANCE(
        backend,
        [query_squares, key_squares],
        template=[("D", D)],
        groups=(1, H, B),
        threads=32,
        output_shapes=[(B, H, D)],
        output_dtypes=[mx.float32],
    )
    return factors
