"""The k best rows for each query, over all blocks, in bounded memory."""

import mlx.core as mx
import numpy as np

from mlx_turboquant.index import top
from mlx_turboquant.index.blocks import Block, Blocks
from mlx_turboquant.index.codec import IndexCodec

# Scores per call: 64 MiB, so many queries are scored a few at a time against a block.
_SCORES = 1 << 24
# A block of which less than this share is searched is read row by row.
_SPARSE = 1 / 8


def search(
    blocks: Blocks, codec: IndexCodec, rotated: mx.array, k: int, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (m, k) float32, best first, and row numbers (m, k) int64, -inf and -1 where rows are too few.

    Memory: two blocks of codes (`blocks.BLOCK_CODES`) where they are mapped from a file, two calls' scores (`_SCORES`)
    and the k best so far. The next block is read while a device works on the last one.

    Args:
        blocks: the rows.
        codec: of the index.
        rotated: queries (m, d) float32, prepared and rotated.
        k: at least 1.
        wanted: (total,) bool, the rows that may be found.
    """
    m, found = rotated.shape[0], min(k, int(np.count_nonzero(wanted)))
    scores, rows = np.full((m, k), -np.inf, np.float32), np.full((m, k), -1, np.int64)
    if not found or not m:
        return scores, rows
    step = max(_SCORES // max(block.count for _, block in blocks), 1)
    tiles = [rotated[start : start + step] for start in range(0, m, step)]
    best = [top.no_keys(tile.shape[0], found) for tile in tiles]
    waiting = best[0]
    for start, block in blocks:
        here = wanted[start : start + block.count]
        count = int(np.count_nonzero(here))
        if not count:
            continue
        arrays, places, mask = _to_search(block, here, count)
        numbers = mx.array(places + start)
        for i, tile in enumerate(tiles):
            best[i] = top.best_keys(best[i], _masked(codec.score(tile, arrays), mask), numbers)
            mx.async_eval(best[i])
            mx.eval(waiting)  # at most one call's scores wait behind those that are worked on
            waiting = best[i]
    parts = [top.sorted_keys(keys) for keys in best]
    scores[:, :found] = np.concatenate([part[0] for part in parts])
    rows[:, :found] = np.concatenate([part[1] for part in parts])
    return scores, rows


def distances(metric: str, scores: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """D and I in Faiss's conventions.

    Args:
        metric: of the index.
        scores: (m, k) float32; for l2 they are <q, x> - ||x||^2 / 2, or half the squared distance, negative.
        ids: (m, k) int64.
        offsets: (m, 1) float64, what is missing from a squared distance: ||q||^2, or 0.
    """
    if metric != "l2":
        return scores, ids
    # Estimates of distances near 0 fall below it; they were ordered before that is taken off.
    return np.maximum(offsets - 2 * scores.astype(np.float64), 0).astype(np.float32), ids


def _to_search(block: Block, here: np.ndarray, count: int) -> tuple[dict[str, mx.array], np.ndarray, mx.array | None]:
    """Arrays to score, the places of their rows in the block (int64), and which of them may be found (None: all)."""
    if count >= _SPARSE * block.count:
        mask = None if count == block.count else mx.array(here)
        return block.in_mlx(), np.arange(block.count), mask
    places = np.flatnonzero(here)
    return block.some_in_mlx(places), places, None


def _masked(scores: mx.array, mask: mx.array | None) -> mx.array:
    return scores if mask is None else mx.where(mask, scores, -np.inf)
