"""When rows are encoded: how many of a tail are due, and the room that a tail needs between two encodings."""

from mlx_turboquant.attention import MAX_DIRECT_QUERIES
from mlx_turboquant.scheme import KVScheme

_FEW_SPARE = 192  # tokens


def due(scheme: KVScheme, tail: int, first: bool) -> tuple[int, int]:
    """The rows of a raw tail that are to be encoded: whole blocks that are older than the window.

    Args:
        scheme: says how many tokens a block, the window and the sinks have.
        tail: rows in the tail.
        first: whether nothing was encoded yet, so that the tail begins with the sinks.

    Returns:
        (start, stop), equal if nothing is due.
    """
    start = sinks_in(scheme, tail, first)
    return start, start + max(tail - start - scheme.window, 0) // scheme.block * scheme.block


def until_due(scheme: KVScheme, tail: int, first: bool) -> int:
    """How many tokens a tail lacks until a block is due; 0 or less if one is."""
    return sinks_in(scheme, tail, first) + scheme.window + scheme.block - tail


def sinks_in(scheme: KVScheme, tail: int, first: bool) -> int:
    """How many rows at the front of a tail are sinks."""
    return min(scheme.sinks, tail) if first else 0


def spare_blocks(blocks: int, block: int) -> int:
    """How many more blocks of so many tokens there is to be room for when packed rows must move.

    1/32 of them; while they are few, up to 1/8 or 192 tokens, so that not every block moves them.
    """
    return max(blocks // 32, min(blocks // 8, -(-_FEW_SPARE // block)))


def tail_room(scheme: KVScheme) -> int:
    """Rows that the tail of a compressed cache may come to have while it decodes."""
    return scheme.block + scheme.window + MAX_DIRECT_QUERIES
