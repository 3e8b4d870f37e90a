"""Codes to and from 32-bit words, without loss and without a code that straddles two words.

Widths 1, 2, 4 and 8 divide a word: word w holds codes w * (32 / bits) and on, the first in the lowest bits. A 3-bit
code is stored as two planes, its two low bits and then its high bit. The high bits of 32 codes lie in their word so
that they meet the low bits of eight codes at a time: those of codes 2 k and 2 k + 1 at bits 4 k + 2 and 4 k + 3 for the
first 16 codes, at bits 4 k and 4 k + 1 for the other 16. Then `(low & 0x33333333) | (high & 0x44444444)` is eight
codes, the even ones of 16, in fields of four bits; both words shifted right, by two bits and by one, give the odd ones.
Codes of 5, 6 and 7 bits are stored as planes too, the lowest bits first, each plane in the order of its codes.
"""

import mlx.core as mx

# kernels/codebooks.h holds a codebook for each of these widths; the others have no kernel.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
_ALL_PLANES = PLANES | {5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def words_per_row(dim: int, bits: int) -> int:
    """How many uint32 words hold ``dim`` codes of ``bits`` bits (a last word may be padded with zeros)."""
    return sum(_plane_words(dim, width) for width in _planes(bits))


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Pack (..., D) integer codes below 2**bits into (..., words_per_row(D, bits)) uint32.

    Raises:
        ValueError: for bits other than 1 to 8.
    """
    codes = codes.astype(mx.uint32)
    planes, shift = [], 0
    for width in _planes(bits):
        plane = _pack_plane((codes >> shift) & ((1 << width) - 1), width)
        planes.append(_spread(plane) if bits == 3 and width == 1 else plane)
        shift += width
    return planes[0] if len(planes) == 1 else mx.concatenate(planes, axis=-1)


def unpack_codes(words: mx.array, bits: int, dim: int) -> mx.array:
    """The (..., dim) uint32 codes that `pack_codes` packed.

    Raises:
        ValueError: for bits other than 1 to 8, or a row of another length.
    """
    if words.shape[-1] != words_per_row(dim, bits):
        raise ValueError(
            f"[unpack_codes] {dim} codes of {bits} bits take {words_per_row(dim, bits)} words, got {words.shape[-1]}."
        )
    codes, shift, start = None, 0, 0
    for width in _planes(bits):
        stop = start + _plane_words(dim, width)
        plane = words[..., start:stop]
        plane = _unpack_plane(_gather(plane) if bits == 3 and width == 1 else plane, width, dim) << shift
        codes = plane if codes is None else codes | plane
        shift, start = shift + width, stop
    return codes


def code_bytes(words: mx.array, bits: int) -> mx.array:
    """The codes of `pack_codes` as bytes of whole codes, for tables that are indexed with a byte.

    Args:
        words: (..., words_per_row(dim, bits)) uint32.
        bits: 1, 2, 3, 4 or 8.

    Returns:
        (..., n) uint8. A byte holds 8 / bits codes, the first in the lowest bits; of 3 bits two, as of 4 bits. The
        zeros that fill up the last words are there too.

    Raises:
        ValueError: for other bits.
    """
    if bits not in PLANES:
        raise ValueError(
            f"[code_bytes] wanted codes of {', '.join(map(str, PLANES))} bits, got {bits}. Take `unpack_codes`."
        )
    return (_in_nibbles(words) if bits == 3 else words).view(mx.uint8)


def _in_nibbles(words: mx.array) -> mx.array:
    """3-bit codes as 4-bit codes in their order: two words for each word of low bits."""
    count = 2 * words.shape[-1] // 3  # low words, of 16 codes; a high word serves two of them
    low, high = words[..., :count, None], words[..., count:]
    high = mx.stack([high, high << 2], axis=-1).reshape(*high.shape[:-1], -1)[..., :count, None]
    even, odd = (low & 0x33333333) | (high & 0x44444444), ((low >> 2) & 0x33333333) | ((high >> 1) & 0x44444444)
    # Fields k = 0, 2, 4, 6 and k = 1, 3, 5, 7 of both, as bytes (even k, odd k); then the bytes in turn.
    first, second = (even & 0x0F0F0F0F) | ((odd & 0x0F0F0F0F) << 4), ((even >> 4) & 0x0F0F0F0F) | (odd & 0xF0F0F0F0)
    turns = mx.stack([first.view(mx.uint8), second.view(mx.uint8)], axis=-1)
    return turns.reshape(*words.shape[:-1], -1).view(mx.uint32)


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in _ALL_PLANES:
        raise ValueError(f"[packing] bits must be 1 to 8, got {bits}. Choose a whole number of bits from 1 to 8.")
    return _ALL_PLANES[bits]


def _plane_words(dim: int, width: int) -> int:
    return -(-dim * width // 32)


def _spread(words: mx.array) -> mx.array:
    """High bits of 3-bit codes from the order of the codes to the order in which they are stored."""
    return (_spread_pairs(words & 0xFFFF) << 2) | _spread_pairs(words >> 16)


def _gather(words: mx.array) -> mx.array:
    """The inverse of `_spread`."""
    return _gather_pairs(words >> 2) | (_gather_pairs(words) << 16)


def _spread_pairs(words: mx.array) -> mx.array:
    for step, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)):
        words = (words | (words << step)) & mask
    return words


def _gather_pairs(words: mx.array) -> mx.array:
    words = words & 0x33333333
    for step, mask in ((2, 0x0F0F0F0F), (4, 0x00FF00FF), (8, 0x0000FFFF)):
        words = (words | (words >> step)) & mask
    return words


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
