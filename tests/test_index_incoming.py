"""Vectors on their way into an index: the file by which they reach a CUDA device, and what takes that way."""

import io
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_vectors import units

from mlx_turboquant.index import incoming, upload
from mlx_turboquant.index.codec import IndexCodec
from mlx_turboquant.index.settings import Settings

UNSIGNED = {np.float16: np.uint16, np.float32: np.uint32}


def any_bits(shape, dtype, seed=0):
    """Numbers of all kinds, NaN, infinities, zeros of both signs and subnormal ones among them."""
    unsigned = UNSIGNED[dtype]
    out = np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
    special = np.array([np.nan, np.inf, -np.inf, -0.0, np.finfo(dtype).smallest_subnormal], dtype).view(unsigned)
    out.reshape(-1)[: len(special)] = special[: out.size]
    return out.view(dtype)


def same_bits(array, x):
    """Whether an array of MLX has dtype, shape and bits of x; a NaN may be any NaN."""
    got = np.array(array)
    assert got.dtype == x.dtype and got.shape == x.shape
    unsigned = UNSIGNED[x.dtype.type]
    return ((got.view(unsigned) == x.view(unsigned)) | (np.isnan(got) & np.isnan(x))).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 70), d=st.integers(1, 70), first=st.integers(0, 9), seed=st.integers(0, 99))
def test_a_file_in_memory_gives_mlx_the_very_numbers(dtype, n, d, first, seed):
    x = any_bits((first + n + 1, d), dtype, seed)[first:-1]  # rows of a larger array
    assert same_bits(upload.uploaded(x), x)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4099), (4099, 1), (7,), (3, 1, 5), (5000, 211)])
def test_one_row_one_column_and_other_shapes_are_uploaded(shape):
    x = any_bits(shape, np.float32)
    assert same_bits(upload.uploaded(x), x)


def test_every_float16_is_uploaded():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    assert same_bits(upload.uploaded(x), x)


def test_rows_of_a_mapped_file_are_uploaded(tmp_path):
    x = any_bits((50, 9), np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert same_bits(upload.uploaded(mapped[13:40]), x[13:40])


def test_what_is_uploaded_does_not_follow_its_source():
    x = np.ones((30, 7), np.float32)
    array = upload.uploaded(x)
    x[:] = 2
    assert (np.array(array) == 1).all()


def test_uploading_holds_no_copy_in_python():
    x = np.ones((1024, 1024), np.float32)
    tracemalloc.start()
    try:
        array = upload.uploaded(x)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert array.shape == x.shape and peak_bytes < x.nbytes / 16


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_reads_as_the_file_that_numpy_saves(data):
    x = any_bits((data.draw(st.integers(1, 9)), 5), np.float16)
    saved, file = io.BytesIO(), upload.NpyFile(x)
    np.save(saved, x)
    whole, place = saved.getvalue(), 0
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            place = data.draw(st.integers(0, len(whole) + 3))
            assert file.seek(place) == place
        buffer = bytearray(data.draw(st.integers(0, len(whole) + 3)))
        expected = whole[place : place + len(buffer)]
        assert file.readinto(buffer) == len(expected) and buffer[: len(expected)] == expected
        place += len(expected)
        assert file.tell() == place
    assert not file.closed


@pytest.mark.parametrize("place", [(0, io.SEEK_CUR), (0, io.SEEK_END), (-1, io.SEEK_SET)])
def test_places_that_mlx_never_asks_for_are_refused(place):
    with pytest.raises(io.UnsupportedOperation, match=rf"\[NpyFile.seek\] .* got {place[0]} and whence={place[1]}"):
        upload.NpyFile(np.ones(3, np.float32)).seek(*place)


@pytest.mark.parametrize(
    "x, got",
    [
        (np.ones((4, 3), np.float64), r"\(4, 3\) <f8"),
        (np.ones((4, 3), ">f4"), r"\(4, 3\) >f4"),
        (np.ones((4, 3), np.int32), r"\(4, 3\) <i4"),
        (np.ones((3, 4), np.float32).T, r"\(4, 3\) <f4 with strides \(4, 16\)"),
        (np.ones((4, 3), np.float32)[::-1], r"\(4, 3\) <f4 with strides \(-12, 4\)"),
        (np.ones((4, 6), np.float16)[:, ::2], r"\(4, 3\) <f2 with strides \(12, 4\)"),
        (np.ones((0, 3), np.float32), r"\(0, 3\) <f4"),
    ],
)
def test_arrays_that_are_no_file_are_refused(x, got):
    with pytest.raises(ValueError, match=rf"\[NpyFile\] wanted .*, got {got}.* Call numpy.ascontiguousarray"):
        upload.uploaded(x)


SOURCES = {
    "float32": lambda x: x,
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "big-endian": lambda x: x.astype(">f4"),
    "big-endian float16": lambda x: x.astype(">f2"),
    "Fortran": np.asfortranarray,
    "backwards": lambda x: x[::-1],
    "backwards float16": lambda x: x.astype(np.float16)[::-1],
    "every second": lambda x: np.repeat(np.repeat(x, 2, axis=1), 3, axis=0)[::3, ::2],
    "columns of more": lambda x: np.pad(x, ((0, 0), (2, 3)))[:, 2:-3],
}


@pytest.fixture
def pieces(monkeypatch):
    """A function (x, backend, bits, metric, keep) -> the encoded pieces of 30 rows, and what was uploaded for them."""

    def encoded(x, backend, bits=4, metric="ip", keep=None):
        seen = []
        monkeypatch.setattr(incoming.rows, "CHUNK_ELEMENTS", 30 * x.shape[1] // incoming._ON_DEVICE)
        monkeypatch.setattr(incoming, "choose_backend", lambda: backend)
        monkeypatch.setattr(incoming, "uploaded", lambda part: (seen.append(part), upload.uploaded(part))[1])
        codec = IndexCodec(Settings(x.shape[1], bits, metric, 0, keep))
        return list(incoming.encoded("here", codec, x)), seen

    return encoded


@pytest.mark.parametrize("backend", ["cuda", "cuda-metal"])
@pytest.mark.parametrize("source", SOURCES)
def test_rows_of_the_host_reach_a_cuda_device_as_files(pieces, source, backend):
    x = SOURCES[source](units(100, 40))
    got, uploads = pieces(x, backend, keep="int8")
    plain, none = pieces(np.ascontiguousarray(x, np.float32), "metal", keep="int8")
    assert not none
    assert [part for part, _ in got] == [slice(a, min(a + 30, 100)) for a in range(0, 100, 30)]
    for (part, arrays), (_, expected), piece in zip(got, plain, uploads, strict=True):
        assert piece.dtype == (np.float16 if source.endswith("float16") and "big" not in source else np.float32)
        np.testing.assert_array_equal(piece, x[part])
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            assert isinstance(array, np.ndarray) and array.dtype == expected[name].dtype
            np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("backend", ["metal", "reference"])
def test_without_cuda_nothing_goes_through_a_file(pieces, backend):
    for source in ("float32", "backwards float16"):
        assert pieces(SOURCES[source](units(40, 40)), backend)[1] == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_arrays_of_mlx_stay_where_they_are(pieces, dtype):
    x = mx.array(units(70, 40)).astype(dtype)
    got, uploads = pieces(x, "cuda")
    assert uploads == []
    for (_, arrays), (_, expected) in zip(got, pieces(np.array(x.astype(mx.float32)), "cuda")[0], strict=True):
        np.testing.assert_array_equal(arrays["codes"], expected["codes"])


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("backend", ["cuda", "metal"])
def test_vectors_to_keep_come_back_only_if_they_were_changed(pieces, metric, backend):
    x = 3 * units(70, 40)
    for part, arrays in pieces(x, backend, metric=metric, keep="float16")[0]:
        np.testing.assert_allclose(arrays["prepared"], x[part] / (3 if metric == "cosine" else 1), rtol=1e-6)
        assert np.shares_memory(arrays["prepared"], x) == (metric != "cosine")


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_bad_numbers_are_found_behind_an_upload(pieces, bad):
    x = units(100, 40)
    x[71, 5] = bad
    with pytest.raises(ValueError, match=r"\[here\] wanted finite .* \(71, 5\)"):
        pieces(x, "cuda")
