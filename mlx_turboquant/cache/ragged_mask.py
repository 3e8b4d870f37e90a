"""The mask of several sequences of unequal lengths, each from column 0 on."""

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from mlx_turboquant.ops.device_ints import device_ints


def ragged_mask(
    N: int, held: Sequence[int], dropped: Sequence[int], sinks: int, window_size: int | None = None
) -> mx.array:
    """Which of its tokens each of N queries sees.

    Args:
        N: new tokens of each sequence.
        held: tokens that each sequence holds before them.
        dropped: tokens right behind the sinks that each no longer holds.
        sinks: how many first tokens stay.
        window_size: positions that a query may look back, itself included.

    Returns:
        Boolean (B, 1, N, max(held) + N), True where a query attends; (N, held + N) where all sequences are alike.
    """
    if len(set(held)) == 1 and not any(dropped):
        return create_causal_mask(N, held[0], window_size=window_size)
    columns = mx.arange(max(held) + N)
    queries = (device_ints(held)[:, None] + mx.arange(N))[:, None, :, None]
    mask = columns <= queries
    if window_size is None:
        return mask
    gaps = device_ints(dropped)[:, None, None, None]
    positions = columns + mx.where(columns < sinks, 0, gaps)
    return mask & (queries + gaps < positions + window_size)
