"""Files of an index: bit for bit what was saved, whole or not at all, mapped in bounded memory, and never trusted."""

import contextlib
import json
import os
import resource
import time
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from index_model import filled
from unit_vectors import units

from mlx_turboquant.index import TurboQuantIndex, blocks, file
from mlx_turboquant.index.settings import Settings
from mlx_turboquant.ops.score import _PIECE_ELEMENTS


def parts_of(path):
    """The parsed header and the bytes behind it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path, header, body=b"", length=None):
    """A file with this header: a dictionary or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


@pytest.fixture
def saved(tmp_path):
    """An index that was added to and removed from, and its file."""
    index = filled(units(90, 20), 2.5, "l2", seed=4, keep="int8")
    index.remove_ids([3, 4, 70])
    index.add(units(4, 20, seed=1), ids=[3, 500, 501, 502])
    index.remove_ids([502])
    path = tmp_path / "index.tqi"
    index.save(path)
    return index, path


@pytest.mark.parametrize("memory_map", [True, False])
def test_a_loaded_index_is_the_saved_one_bit_for_bit(saved, memory_map):
    index, path = saved
    again = TurboQuantIndex.load(path, memory_map=memory_map)
    assert (again.d, again.bits, again.metric, again.seed, again.keep) == (20, 2.5, "l2", 4, "int8")
    assert repr(again) == repr(index) and again.ntotal == 90
    np.testing.assert_array_equal(again.ids, index.ids)
    np.testing.assert_array_equal(again.reconstruct(index.ids), index.reconstruct(index.ids))
    q = units(7, 20, seed=9)
    for kw in ({}, {"rerank": 30}, {"filter": index.ids[::3]}, {"filter": index.ids > 40}):
        for left, right in zip(index.search(q, 95, **kw), again.search(q, 95, **kw), strict=True):
            np.testing.assert_array_equal(left, right)
    for each in (index, again):
        each.add(units(1, 20))
    assert again.ids[-1] == index.ids[-1] == 503  # 502 was removed, and its number is not given again
    again.save(path.with_name("other.tqi"))
    index.save(path)  # over the file that `again` reads, which keeps the old one
    assert path.with_name("other.tqi").read_bytes() == path.read_bytes()
    for left, right in zip(index.search(q, 95), again.search(q, 95), strict=True):
        np.testing.assert_array_equal(left, right)


def test_other_tools_can_read_the_file(saved):
    index, path = saved
    for arrays in (safetensors.numpy.load_file(path), mx.load(str(path), format="safetensors")):
        assert not {"codes_high", "codes_low", "scales", "norms", "ids", "kept", "kept_scales"} - set(arrays)
        np.testing.assert_array_equal(np.array(arrays["ids"]), index.ids)
        kept = np.array(arrays["kept"], np.float32) * np.array(arrays["kept_scales"])[:, None]
        np.testing.assert_allclose(kept[:3], units(90, 20)[:3], atol=0.004)
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {
            "format": "mlx_turboquant_index", "version": "2", "d": "20", "bits": "2.5", "metric": "l2", "seed": "4",
            "keep": "int8", "ntotal": "90", "next_id": "503",
        }  # fmt: skip


@pytest.mark.parametrize("n", [0, 1, 7, 64])
@pytest.mark.parametrize(("bits", "metric", "keep"), [(1, "ip", None), (3.5, "l2", "int8"), (3, "cosine", "float16")])
def test_every_array_starts_at_a_multiple_of_64_and_nothing_removed_is_written(n, bits, metric, keep, tmp_path):
    index = filled(units(n + 5, 9), bits, metric, keep=keep)
    index.remove_ids(np.arange(5))
    index.save(tmp_path / "index")
    header, body = parts_of(tmp_path / "index")
    start = (tmp_path / "index").stat().st_size - len(body)
    payload = 0
    for name, entry in header.items():
        if name != "__metadata__" and not name.startswith("padding"):
            assert (start + entry["data_offsets"][0]) % 64 == 0 and entry["shape"][0] == n
            payload += entry["data_offsets"][1] - entry["data_offsets"][0]
    assert payload == n * (index.code_size + index.kept_size + 8)
    assert TurboQuantIndex.load(tmp_path / "index").ids.tolist() == [*range(5, n + 5)]


def test_a_loaded_index_grows_and_shrinks_without_touching_its_file(saved):
    index, path = saved
    before = path.read_bytes()
    again = TurboQuantIndex.load(path)
    x, q = units(300, 20, seed=2), units(5, 20, seed=3)
    for each in (index, again):
        each.remove_ids(each.ids[::2])
        each.add(x)
        each.remove_ids(each.ids[100::3])
    for left, right in zip(index.search(q, 50, rerank=70), again.search(q, 50, rerank=70), strict=True):
        np.testing.assert_array_equal(left, right)
    assert path.read_bytes() == before
    again.save(path)
    assert TurboQuantIndex.load(path).ids.tolist() == index.ids.tolist()


@contextlib.contextmanager
def largest_file(size):
    """Let no file grow beyond `size` bytes: a write beyond it fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_an_interrupted_save_leaves_the_old_file_whole(saved):
    index, path = saved
    before = path.read_bytes()
    index.add(units(500, 20, seed=5))
    index.save(path.with_name("larger.tqi"))
    size = path.with_name("larger.tqi").stat().st_size
    for stop in (0, 7, 100, len(before), size // 2, size - 1):
        with largest_file(stop), pytest.raises(OSError, match="too large"):
            index.save(path)
        assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 2
    with largest_file(size):
        index.save(path)
    assert TurboQuantIndex.load(path).ntotal == 590


def test_an_error_while_rows_are_read_leaves_the_old_file_whole(saved, monkeypatch):
    index, path = saved
    before, real = path.read_bytes(), blocks.Blocks.pieces

    def pieces(self, name):
        if name == "norms":
            raise KeyboardInterrupt
        return real(self, name)

    monkeypatch.setattr(blocks.Blocks, "pieces", pieces)
    with pytest.raises(KeyboardInterrupt):
        index.save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_there_must_be_a_folder_and_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        TurboQuantIndex(8).save(tmp_path / "none" / "index")
    with pytest.raises(FileNotFoundError):
        TurboQuantIndex.load(tmp_path / "none")


# --- memory


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file of 80 blocks of 4096 vectors, 22 MB, without encoding them: any codes are somebody's."""
    monkeypatch.setattr(blocks, "BLOCK_CODES", 4096 * 64)
    settings, n = Settings(64, 8, "ip", 0, None), 80 * 4096
    rng = np.random.default_rng(0)
    columns = {
        "codes": rng.integers(0, 1 << 32, (n, 16), np.uint32),
        "scales": rng.uniform(0.1, 0.2, n).astype(np.float32),
        "ids": np.arange(n),
    }
    file.save(tmp_path / "large.tqi", settings, n, n, lambda name: iter([columns[name]]))
    return tmp_path / "large.tqi"


def test_search_and_save_of_a_mapped_index_take_the_memory_of_a_few_blocks(large):
    block_bytes = 4096 * (64 + 4)
    tracemalloc.start()
    index = TurboQuantIndex.load(large)
    assert tracemalloc.get_traced_memory()[1] < 80 * 4096 + (1 << 20)  # one byte per row says whether it lives
    q = units(4, 64)
    index.search(q, 10)
    mx.clear_cache()
    mx.reset_peak_memory()
    tracemalloc.reset_peak()
    before, numpy_before = mx.get_active_memory(), tracemalloc.get_traced_memory()[0]
    D, I = index.search(q, 10)
    # Of a block: codes twice while they are copied, unpacked as numbers and centroids; and two blocks at a time.
    assert mx.get_peak_memory() - before < 2 * (2 * block_bytes + 3 * 4 * 4096 * 64) < 80 * block_bytes / 2
    # Without a GPU numpy decodes a piece of rows: up to 16 bytes for a number while a table is read.
    assert tracemalloc.get_traced_memory()[1] - numpy_before < 2 * block_bytes + 16 * _PIECE_ELEMENTS < 20 * block_bytes
    index.remove_ids([0])
    tracemalloc.reset_peak()
    numpy_before = tracemalloc.get_traced_memory()[0]
    index.save(large.with_name("again.tqi"))
    assert tracemalloc.get_traced_memory()[1] - numpy_before < 2 * blocks._PIECE_BYTES + (1 << 20)
    tracemalloc.stop()
    whole = TurboQuantIndex.load(large, memory_map=False).search(q, 10)
    np.testing.assert_array_equal(whole[0], D)
    np.testing.assert_array_equal(whole[1], I)


# --- files that are no index


def broken(change):
    """A function that writes a file with a changed header; the bytes behind it stay."""

    def make(path):
        header, body = parts_of(path)
        write(path, change(header) or header, body)

    return make


def cut(size):
    def make(path):
        path.write_bytes(path.read_bytes()[:size])

    return make


def meta(**values):
    return broken(lambda header: header["__metadata__"].update(values))


def entry(name, **values):
    return broken(lambda header: header[name].update(values))


BROKEN = {
    "empty": (cut(0), "wanted a header"),
    "only a length": (cut(8), "wanted a header"),
    "half a header": (cut(300), "wanted a header"),
    "half the arrays": (cut(2000), r"wanted \d+ bytes, as its header says, got 2000"),
    "one byte missing": (cut(-1), "bytes, as its header says"),
    "one byte more": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, as its header says"),
    "another file": (lambda path: path.write_bytes(b"PK\3\4" + bytes(5000)), "wanted a header"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "wanted the header of an index"),
    "a huge length": (lambda path: write(path, b"{}", length=(1 << 63) + 5), "wanted a header"),
    "a length of the file": (lambda path: write(path, b"{}", bytes(9000), length=9000), "header of an index"),
    "a million entries": (
        lambda path: write(path, b'{"a":{"shape":[1]}' + b',"a":{"shape":[1]}' * 1_000_000 + b"}"),
        "header of at most 65536 bytes",
    ),
    "deep nesting": (lambda path: write(path, b"[" * 60000), "wanted the header of an index"),
    "a long number": (lambda path: write(path, b'{"__metadata__":' + b"9" * 60000 + b"}"), "wanted the header"),
    "no JSON": (lambda path: write(path, b'{"__metadata__"'), "wanted the header of an index"),
    "no text": (lambda path: write(path, b"\xff\xfe{}"), "wanted the header of an index"),
    "a list": (lambda path: write(path, [1, 2]), "wanted the header of an index"),
    "no metadata": (broken(lambda header: {"ids": header["ids"]}), "wanted the header of an index"),
    "metadata of another kind": (broken(lambda header: header.update(__metadata__=[1])), "wanted the header"),
    "another format": (meta(format="gguf"), "wanted the format 'mlx_turboquant_index', got 'gguf'"),
    "a long format": (meta(format="x" * 50000), r"got 'x+\.\.\."),
    "an earlier version": (meta(version="1"), r"wanted version 2 of the format, got '1' .* 2 bits were other codes"),
    "a later version": (meta(version="3"), r"wanted version 2 of the format, got '3' .* build the index again"),
    "no version": (broken(lambda header: header["__metadata__"].pop("version") and None), "wanted the header"),
    "another d": (meta(d="21"), "another 'codes_low' in the header|another 'codes_high'|another 'kept'"),
    "a huge d": (meta(d="65535"), "wanted the settings of an index"),
    "a d of many digits": (meta(d="9" * 5000), "wanted the settings of an index"),
    "a negative d": (meta(d="-20"), "wanted the settings of an index"),
    "other bits": (meta(bits="nan"), "wanted the settings of an index"),
    "another metric": (meta(metric=["l2"]), "wanted the settings of an index"),
    "no setting": (broken(lambda header: header["__metadata__"].pop("seed") and None), "wanted the settings"),
    "no text as a setting": (meta(d=20), "another '__metadata__'"),
    "more settings": (meta(more="1"), "another '__metadata__'"),
    "fewer vectors": (meta(ntotal="89"), "wanted the arrays of 89 vectors"),
    "many vectors": (meta(ntotal=str(1 << 40)), "wanted the settings of an index"),
    "a small next id": (meta(next_id="5"), "wanted the settings of an index"),
    "another dtype": (entry("codes_low", dtype="F32"), "another 'codes_low' in the header"),
    "a negative offset": (entry("ids", data_offsets=[-64, 656]), "another 'ids' in the header"),
    "overlapping arrays": (entry("norms", data_offsets=[0, 360]), "another 'norms' in the header"),
    "a huge offset": (entry("kept", data_offsets=[1 << 62, (1 << 62) + 1800]), "another 'kept' in the header"),
    "another shape": (entry("kept", shape=[20, 90]), "another 'kept' in the header"),
    "an entry more": (broken(lambda header: header.update(more=header["ids"])), "another 'more' in the header"),
    "an entry less": (broken(lambda header: header.pop("scales") and None), "another 'scales' in the header"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_files_are_refused_in_one_line_and_at_once(case, saved):
    _, path = saved
    make, message = BROKEN[case]
    make(path)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        TurboQuantIndex.load(path)
    text = str(error.value)
    assert text.startswith("[TurboQuantIndex.load] ") and "\n" not in text and len(text) < 500 and str(path) in text
    assert time.perf_counter() - start < 1


def test_the_same_header_in_other_words_is_taken(saved):
    index, path = saved
    header, body = parts_of(path)
    write(path, json.dumps(header, indent=1, sort_keys=True).encode(), body)
    assert TurboQuantIndex.load(path).ids.tolist() == index.ids.tolist()


def damage_ids(path, ids):
    header, body = parts_of(path)
    start, stop = header["ids"]["data_offsets"]
    write(path, header, body[:start] + np.array(ids, np.int64).tobytes() + body[stop:])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([*range(89), 0], "that are different, got one twice"),
        ([*range(89), 503], "from 0 to 502, got 0 to 503"),
        ([-1, *range(89)], "from 0 to 502, got -1 to 88"),
    ],
)
def test_damaged_ids_are_found_when_they_are_needed(ids, message, saved):
    _, path = saved
    damage_ids(path, ids)
    index = TurboQuantIndex.load(path)
    for call in (lambda: index.reconstruct([1]), lambda: index.remove_ids([1]), lambda: index.add(units(1, 20), [9])):
        with pytest.raises(ValueError, match=message + r".* the file of the index is damaged"):
            call()


def test_a_file_of_this_version_is_read_by_later_ones(tmp_path):
    """Byte for byte what version 2 was when it was made: an index of two vectors of d = 4 at 4 bits."""
    path = tmp_path / "index"
    index = filled(np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32), 4, "l2")
    index.save(path)
    header, body = parts_of(path)
    assert list(header) == [
        "__metadata__", "codes", "padding_before_scales", "scales", "padding_before_norms", "norms",
        "padding_before_ids", "ids",
    ]  # fmt: skip
    assert header["ids"] == {"dtype": "I64", "shape": [2], "data_offsets": [192, 208]} and len(body) == 208
    assert header["codes"] == {"dtype": "U32", "shape": [2, 1], "data_offsets": [0, 8]}
    np.testing.assert_allclose(np.frombuffer(body[128:136], np.float32), [30**0.5, 0], rtol=1e-6)
    assert np.frombuffer(body[192:208], np.int64).tolist() == [0, 1] and os.path.getsize(path) % 64 == 16
