"""Codes to and from 32-bit words, without loss and without a code that straddles two words.

Widths 1, 2, 4 and 8 divide a word: word w holds codes w * (32 / bits) and on, the first in the lowest bits. A 3-bit
code is stored as two planes, its two low bits and then its high bit, so that a kernel reads both with shifts alone.
"""

import mlx.core as mx

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def words_per_row(dim: int, bits: int) -> int:
    """How many uint32 words hold ``dim`` codes of ``bits`` bits (a last word may be padded with zeros)."""
    return sum(_plane_words(dim, width) for width in _planes(bits))


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Pack (..., D) integer codes below 2**bits into (..., words_per_row(D, bits)) uint32.

    Raises:
        ValueError: for bits other than 1, 2, 3, 4, 8.
    """
    codes = codes.astype(mx.uint32)
    planes, shift = [], 0
    for width in _planes(bits):
        planes.append(_pack_plane((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    return planes[0] if len(planes) == 1 else mx.concatenate(planes, axis=-1)


def unpack_codes(words: mx.array, bits: int, dim: int) -> mx.array:
    """The (..., dim) uint32 codes that `pack_codes` packed.

    Raises:
        ValueError: for bits other than 1, 2, 3, 4, 8, or a row of another length.
    """
    if words.shape[-1] != words_per_row(dim, bits):
        raise ValueError(
            f"[unpack_codes] {dim} codes of {bits} bits take {words_per_row(dim, bits)} words, got {words.shape[-1]}."
        )
    codes, shift, start = None, 0, 0
    for width in _planes(bits):
        stop = start + _plane_words(dim, width)
        plane = _unpack_plane(words[..., start:stop], width, dim) << shift
        codes = plane if codes is None else codes | plane
        shift, start = shift + width, stop
    return codes


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise ValueError(f"[packing] bits must be one of {', '.join(map(str, PLANES))}, got {bits}.")
    return PLANES[bits]


def _plane_words(dim: int, width: int) -> int:
    return -(-dim * width // 32)


def _shifts(width: int) -> mx.array:
    return mx.arange(0, 32, width, dtype=mx.uint32)


def _pack_plane(codes: mx.array, width: int) -> mx.array:
    *lead, dim = codes.shape
    words, per_word = _plane_words(dim, width), 32 // width
    if words * per_word != dim:
        codes = mx.pad(codes, [(0, 0)] * len(lead) + [(0, words * per_word - dim)])
    return (codes.reshape(*lead, words, per_word) << _shifts(width)).sum(axis=-1)


def _unpack_plane(words: mx.array, width: int, dim: int) -> mx.array:
    codes = (words[..., None] >> _shifts(width)) & ((1 << width) - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :dim]
