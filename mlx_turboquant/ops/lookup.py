"""Packed codes read by tables that a byte indexes: the numbers that they stand for, and their products with vectors."""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_turboquant.packing import code_bytes, unpack_codes

# More vectors are multiplied with decoded rows: each pair of them walks over all codes again, and tables take 1 KiB for
# each vector and byte of a row.
MOST_BY_TABLE = 8


class Prepared(NamedTuple):
    """Vectors that are to meet coded rows.

    Attributes:
        vectors: (B, Hkv, R, D) float32.
        tables: (B, Hkv, ceil(R / 2), n, 256) complex64, their products with each value of each of the n bytes of a row.
            Of two vectors, one is the real part and the other the imaginary part, so that one look-up serves both.
            None where rows are decoded instead.
    """

    vectors: mx.array
    tables: mx.array | None


class Codebook:
    """The numbers that codes of one width stand for, and on a CPU tables of what whole bytes of codes stand for.

    There, a byte of 4-bit codes is looked up once and gives two numbers, which are moved as one of 64 bits; unpacking
    and looking up each code would be two passes over four times the bytes and twice the look-ups. Products with fewer
    than 8 bits are sums of look-ups: with a table of the products of a vector's elements and all 256 values of a byte,
    no code becomes a number, and nothing is multiplied. (MLX's CPU build multiplies float32 matrices at 2 to 4 GFLOP/s;
    benchmarks/LOG.md has both ways.) At 8 bits a table serves one element only and costs more than it saves. On a GPU
    products cost little and look-ups much.

    Args:
        numbers: (2**bits,) finite.
        bits: 1, 2, 3, 4 or 8.

    Attributes:
        numbers: (2**bits,) float32.
    """

    def __init__(self, numbers: np.ndarray, bits: int):
        numbers = np.asarray(numbers, np.float32)
        self.bits, self.numbers = bits, mx.array(numbers)
        width = 4 if bits == 3 else bits  # of a code in `code_bytes`
        self._per_byte = 8 // width
        numbers = np.pad(numbers, (0, 2**width - numbers.size))
        table = numbers[(np.arange(256)[:, None] >> (width * np.arange(self._per_byte))) & (2**width - 1)]
        self._table = mx.array(table if self._per_byte == 1 else table.view(np.uint64))  # (256, numbers or pairs)
        self._factors = mx.array(numbers.astype(np.complex64))

    def look_up(self, codes: mx.array) -> mx.array:
        """The numbers (...) float32 that unsigned codes (...) stand for."""
        if not on_cpu():
            return self.numbers[codes]
        # Along an axis: the general form is ten times slower in MLX's CPU build.
        return mx.take_along_axis(self.numbers, codes.reshape(-1), axis=0).reshape(codes.shape)

    def rows(self, words: mx.array, dim: int) -> mx.array:
        """The numbers (..., dim) float32 that packed codes (..., words_per_row(dim, bits)) uint32 stand for."""
        if not on_cpu():
            return self.numbers[unpack_codes(words, self.bits, dim)]
        codes = code_bytes(words, self.bits)
        found = mx.take_along_axis(self._table, codes.reshape(-1, 1), axis=0)
        return found.view(mx.float32).reshape(*codes.shape[:-1], -1)[..., :dim]

    def prepare(self, vectors: mx.array) -> Prepared:
        """Vectors (B, Hkv, R, D) float32, finite, as `products` wants them."""
        pays = on_cpu() and self.bits < 8 and vectors.shape[2] <= MOST_BY_TABLE
        return Prepared(vectors, self._tables(vectors) if pays else None)

    def products(self, prepared: Prepared, words: mx.array) -> mx.array:
        """Inner products (B, Hkv, R, T) float32 of the vectors with the numbers of T rows of packed codes.

        Args:
            prepared: what `prepare` gave for R vectors of D elements.
            words: (B, Hkv, T, words_per_row(D, bits)) uint32.
        """
        vectors, tables = prepared
        B, H, R, D = vectors.shape
        if tables is not None:
            codes = code_bytes(words, self.bits).swapaxes(-1, -2)[:, :, None]
            found = mx.take_along_axis(tables, codes, axis=-1)  # (B, Hkv, R / 2, n, T)
            pairs = found.view(mx.float32).sum(axis=-2).reshape(B, H, -1, words.shape[2], 2)
            return pairs.swapaxes(-1, -2).reshape(B, H, -1, words.shape[2])[:, :, :R]
        if on_cpu() and self._per_byte == 1:
            # Looked up in the transposed order: the product then runs along the tokens and waits for no sum.
            codes = code_bytes(words, self.bits).swapaxes(-1, -2)
            return vectors @ mx.take_along_axis(self._table.reshape(1, 1, 1, -1), codes, axis=-1)[:, :, :D]
        return vectors @ self.rows(words, D).swapaxes(-1, -2)

    def _tables(self, vectors: mx.array) -> mx.array:
        B, H, R, D = vectors.shape
        whole = 16 if self.bits == 3 else 32 // self.bits  # codes are stored in whole words of the first plane
        vectors = mx.pad(vectors, [(0, 0), (0, 0), (0, R % 2), (0, -D % whole)])
        pairs = vectors.reshape(B, H, -1, 2, vectors.shape[-1]).swapaxes(-1, -2)
        products = mx.contiguous(pairs).view(mx.complex64) * self._factors  # (B, Hkv, R / 2, D, 2^width)
        while products.shape[-1] < 256:
            low, high = products[..., 0::2, None, :], products[..., 1::2, :, None]
            products = (low + high).reshape(*low.shape[:-2], -1)
        return products


def on_cpu() -> bool:
    """Whether operations run on a CPU as things stand."""
    return mx.default_device().type == mx.DeviceType.cpu
