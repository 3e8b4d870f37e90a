"""Look-ups by the byte, against one code at a time and products in float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_turboquant import codebook
from mlx_turboquant.ops import lookup
from mlx_turboquant.ops.lookup import MOST_BY_TABLE, Codebook
from mlx_turboquant.packing import PLANES, code_bytes, pack_codes

BITS = sorted(PLANES)
each_width = pytest.mark.parametrize("bits", BITS)


def random_codes(bits, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


def random_rows(bits, dim, R=1, T=70, seed=0):
    """A codebook, the words and the numbers of T rows of 2 heads, and R vectors for each head."""
    codes = random_codes(bits, (1, 2, T, dim), seed)
    numbers = codebook.gaussian(bits)
    vectors = np.random.default_rng(seed + 1).standard_normal((1, 2, R, dim)).astype(np.float32)
    return Codebook(numbers, bits), pack_codes(mx.array(codes), bits), numbers[codes], mx.array(vectors)


@given(bits=st.sampled_from(BITS), dim=st.integers(1, 150), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_bytes_hold_the_codes_in_their_order_and_then_zeros(bits, dim, seed):
    codes = random_codes(bits, (3, dim), seed)
    width = 4 if bits == 3 else bits
    held = np.array(code_bytes(pack_codes(mx.array(codes), bits), bits))
    fields = np.stack([(held >> shift) & (2**width - 1) for shift in range(0, 8, width)], axis=-1).reshape(3, -1)
    assert np.array_equal(fields[:, :dim], codes) and not fields[:, dim:].any()


@pytest.mark.parametrize("bits", [0, 5, 6, 7, 9])
def test_bytes_of_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=rf"wanted codes of 1, 2, 3, 4, 8 bits, got {bits}"):
        code_bytes(mx.zeros((2, 7), mx.uint32), bits)


@given(bits=st.sampled_from(BITS), dim=st.integers(1, 150), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_rows_are_the_numbers_of_the_codes(bits, dim, seed):
    book, words, rows, _ = random_rows(bits, dim, T=5, seed=seed)
    assert np.array_equal(np.array(book.rows(words, dim)), rows)


@given(
    bits=st.sampled_from(BITS), dim=st.integers(1, 150), R=st.integers(1, MOST_BY_TABLE + 2), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=80)
def test_products_are_those_of_the_numbers(bits, dim, R, seed):
    book, words, rows, vectors = random_rows(bits, dim, R, seed=seed)
    x = np.array(vectors, np.float64)
    wanted, size = (a @ b.swapaxes(-1, -2) for a, b in ((x, rows.astype(np.float64)), (np.abs(x), np.abs(rows))))
    # A sum of D products in float32, in any order, is at most D 2^-24 of the sum of their sizes off, and no better
    # is asked of tables, whose entries are rounded too.
    assert np.all(np.abs(np.array(book.products(book.prepare(vectors), words)) - wanted) <= (dim + 2) * 2**-24 * size)


@each_width
def test_few_vectors_meet_tables_on_a_cpu_and_rows_elsewhere(bits, monkeypatch):
    book, words, rows, vectors = random_rows(bits, 48, R=3)
    prepared = book.prepare(vectors)
    assert (prepared.tables is not None) == (bits < 8)
    by_table = book.products(prepared, words)
    many = mx.repeat(vectors, 1 + MOST_BY_TABLE // 3, axis=2)
    assert book.prepare(many).tables is None
    codes = mx.array(random_codes(bits, (2, 9)))
    looked_up = book.look_up(codes)

    monkeypatch.setattr(lookup, "on_cpu", lambda: False)
    prepared = book.prepare(vectors)
    assert prepared.tables is None
    assert mx.allclose(book.products(prepared, words), by_table, rtol=0, atol=1e-4)
    assert np.array_equal(np.array(book.rows(words, 48)), rows)
    assert mx.array_equal(book.look_up(codes), looked_up)


def test_codes_may_lie_in_a_part_of_a_buffer():
    book, words, rows, vectors = random_rows(4, 64, R=2, T=96)
    wanted = book.products(book.prepare(vectors), words)
    assert mx.array_equal(book.products(book.prepare(vectors), words[:, :, 32:64]), wanted[..., 32:64])
    assert np.array_equal(np.array(book.rows(words[:, :, 32:64], 64)), rows[:, :, 32:64])
