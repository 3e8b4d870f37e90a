"""Forget the newest tokens of a cache: rows of its tail, or blocks, of which one that is cut becomes raw again."""

from typing import Any


def trim(cache: Any, n: int) -> int:
    """Forget the newest n tokens (or all, if there are fewer) and return how many that was.

    Raises:
        ValueError: if a bounded cache would have to go back to a token that it dropped.
    """
    n = min(n, cache.offset)
    kept = cache.size() - n
    if cache._dropped and kept <= cache.scheme.sinks and n < cache.offset:
        first = cache.scheme.sinks
        raise ValueError(
            f"[TurboQuantKVCache] layer {cache.layer}: cannot go back to {cache.offset - n} tokens: bounded to "
            f"{cache.max_size}, this cache has dropped those from {first} to {first + cache._dropped}. "
            "Read the prompt again."
        )
    cache._trimmed = True
    cache._plain.stop()
    undo = next((before for before in cache._undo if before[0] > cache.offset - n), None)
    cache._undo = []
    if n == cache.offset:
        cache._reset()
        return n
    if undo is not None:
        _undo(cache, *undo[1:])
    newest = cache.size() - kept
    if newest <= cache.tail_tokens:
        for rows in cache._tail:
            rows.truncate(rows.length - newest)
    else:
        _cut_blocks(cache, kept)
    return n


def _undo(cache: Any, tails: list[tuple], blocks: int) -> None:
    """Go back to before something was encoded inside the last call: single steps would not have encoded it yet."""
    for rows, (array, length) in zip(cache._tail, tails, strict=True):
        rows.array, rows.length = array, length
    if blocks:
        for packed in cache._blocks:
            packed.truncate(blocks)
    else:
        cache._sinks = cache._blocks = None
        cache._forget_learned()


def _cut_blocks(cache: Any, kept: int) -> None:
    """Keep the first `kept` tokens held, which end in a block or in the sinks."""
    block = cache.scheme.block
    sinks = cache._sinks or (None, None)
    whole, rest = divmod(max(kept - cache.sink_tokens, 0), block)
    tails = []
    for side, (blocks, quantizer) in enumerate(zip(cache._blocks, cache._quantizers, strict=True)):
        rows = []
        if whole == 0 and sinks[side] is not None:  # no block is left: raw again from the first token
            rows.append(sinks[side][:, :, :kept])
        if rest:
            cut = quantizer.decode(blocks.stored(), whole * block, (whole + 1) * block)
            rows.append(cut[:, :, :rest])
        tails.append(rows)
        blocks.truncate(whole * block)
    for tail, rows in zip(cache._tail, tails, strict=True):
        tail.truncate(0)
        for part in rows:
            tail.append(part)
    if whole == 0:
        cache._sinks = cache._blocks = None
        cache._forget_learned()
