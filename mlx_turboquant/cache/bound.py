"""The bound of a cache: how many tokens it may hold, how many of the oldest it drops, and the mask for what is left.

A bounded cache keeps its sinks and drops the oldest tokens after them, as StreamingLLM and mlx-lm's
``RotatingKVCache(keep=4)`` do. It drops whole blocks, several at once, since the rows behind them move to a new array:

    positions held    0 .. sinks,  sinks + dropped .. offset

A step that decodes n tokens first drops until they fit, so a decoded token sees at most max_size tokens and at least
max_size less the larger of a block and 1/16 (both rounded up to blocks). A prompt's chunk is added after room was made
for one token, whatever its length: its first query sees as many as a decoded token, the later ones what the chunk has
before them besides, and until the next call the cache holds up to max_size - 1 and the chunk.

The cost: a drop copies what is kept, at most max_size packed tokens of a layer, and happens once in max_size / 16 steps
or once in a block's, whichever is more: at most 16 packed tokens are copied per decoded one.
"""

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from mlx_turboquant.attention import MAX_DIRECT_QUERIES
from mlx_turboquant.scheme import KVScheme

DROP_SHARE = 16  # at least 1/16 of the bound is dropped at once


def least_size(scheme: KVScheme) -> int:
    """The smallest bound: sinks, a block that stays encoded, a tail about to be encoded and the largest decode step."""
    return scheme.sinks + 2 * scheme.block + scheme.window + MAX_DIRECT_QUERIES


def check_max_size(max_size: int | None, scheme: KVScheme, where: str) -> None:
    """Refuse a bound that a scheme cannot keep; None is no bound.

    Args:
        max_size: tokens.
        scheme: a turbo scheme.
        where: how the message names the bound, as "[make_prompt_cache] max_kv_size".

    Raises:
        ValueError: if it is no whole number or smaller than `least_size`.
    """
    if max_size is None:
        return
    if type(max_size) is not int:
        raise ValueError(f"{where} must be a whole number or None, got {max_size!r}.")
    if max_size < (least := least_size(scheme)):
        raise ValueError(
            f"{where}={max_size} is too small for '{scheme}': it must hold {scheme.sinks} sinks, two blocks of "
            f"{scheme.block}, a window of {scheme.window} and {MAX_DIRECT_QUERIES} tokens of a step, at least {least}. "
            "Give more, or a scheme with a smaller block or window."
        )


def tokens_to_drop(held: int, new: int, max_size: int | None, scheme: KVScheme) -> int:
    """How many tokens, in whole blocks, a cache that holds `held` drops so that `new` more fit into max_size.

    At least one whole block before the window is left, encoded or about to be. `new` is at most MAX_DIRECT_QUERIES.
    """
    if max_size is None or held + new <= max_size:
        return 0
    block = scheme.block
    wanted = max(held + new - max_size, max_size // DROP_SHARE)
    blocks = (held - scheme.sinks - scheme.window) // block
    return min(-(-wanted // block), blocks - 1) * block


def attention_mask(
    N: int, offset: int, held: int, sinks: int, return_array: bool = False, window_size: int | None = None
) -> mx.array | str | None:
    """The mask for the next N tokens, as mlx-lm's ``create_attention_mask`` makes it, over the tokens held.

    Args:
        N: queries, at positions offset .. offset + N.
        offset: tokens seen before them.
        held: tokens still held when they arrive: positions 0 .. sinks and the newest.
        sinks: how many of those are the first ones.
        return_array: an array where "causal" would do.
        window_size: positions that a query may look back, itself included.

    Returns:
        None (one query sees all), "causal", or (N, held + N) boolean, True where a query attends.
    """
    if held == offset or (window_size is None and (N == 1 or not return_array)):
        return create_attention_mask(N, offset=offset, return_array=return_array, window_size=window_size)
    queries = mx.arange(offset, offset + N)[:, None]
    keys = mx.concatenate([mx.arange(sinks), mx.arange(sinks + offset - held, offset + N)])
    mask = queries >= keys
    return mask if window_size is None else mask & (queries < keys + window_size)
