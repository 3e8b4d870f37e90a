"""Files that somebody spoiled: each ends in one clear line at once, none in a crash, a hang, or a wrong cache.

`hostile` has the files and says what reading one must end in, `fuzz_files` makes more, `kill_saves` kills saves.
"""

import json
import os
import struct

import hostile
import mlx.core as mx
import pytest
from conftest import tokens
from hostile import READERS, read, refused, run_script
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import BatchRotatingKVCache, KVCache
from spoiling import arrays_of, number, parts_of, text, with_arrays, with_header, zeros

import mlx_turboquant
from mlx_turboquant import load_prompt_cache, save_prompt_cache
from mlx_turboquant.files.safetensors import MAX_HEADER_BYTES

SAFETENSORS = [name for name, reader in READERS.items() if reader.suffix in (".safetensors", ".tqi")]


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", READERS)
def test_a_whole_file_is_read(name, tmp_path):
    read(name, tmp_path, READERS[name].whole())
    path = tmp_path / f"whole{READERS[name].suffix}"
    path.write_bytes(READERS[name].whole())
    READERS[name].read(path)


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_cut_anywhere_is_refused(name, tmp_path):
    whole = READERS[name].whole()
    head = 8 + int.from_bytes(whole[:8], "little") if name in SAFETENSORS else 128
    for size in {*range(0, len(whole), 4096), *range(9), head // 2, head - 1, head, head + 1, len(whole) - 1}:
        rows = READERS[name].suffix in (".fvecs", ".ivecs") and size % 16 == 0 < size  # fewer rows, and whole
        if size < len(whole) and not rows:
            refused(name, tmp_path, whole[:size], r"^\[")


@pytest.mark.parametrize("name", SAFETENSORS)
def test_flips_in_the_header_end_in_one_line_or_another_whole_cache(name, tmp_path):
    whole = READERS[name].whole()
    head = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *range(8, head, max(1, head // 150))]
    for i, place in enumerate(places):
        flipped = bytearray(whole)
        flipped[place] ^= (0x01, 0x80, 0x10)[i % 3]
        read(name, tmp_path, bytes(flipped))
        if place < 8:
            refused(name, tmp_path, bytes(flipped), "header")


def changed(change):
    """A file whose header went through `change`; the bytes behind it stay."""

    def make(whole):
        header, body = parts_of(whole)
        return with_header(change(header) or header, body)

    return make


def first(header: dict) -> dict:
    """The entry of the first array that has bytes."""
    entries = (entry for name, entry in header.items() if name != "__metadata__")
    return next(entry for entry in entries if entry["data_offsets"] == [0, entry["data_offsets"][1]] != [0, 0])


def moved(by: int):
    return changed(lambda h: first(h).update(data_offsets=[n + by for n in first(h)["data_offsets"]]))


def on_each_other(whole):
    """The last array lies on the end of those before it, so that there is no hole and the file ends where it should."""
    header, body = parts_of(whole)
    last = max((header[name] for name in header if name != "__metadata__"), key=lambda entry: entry["data_offsets"])
    start, stop = last["data_offsets"]
    last["data_offsets"] = [2 * start - stop, start]
    return with_header(header, body[:start])


def entry(**values):
    return changed(lambda header: first(header).update(values))


HEADERS = {
    "a negative offset": moved(-8),
    "an offset beyond the file": moved(1 << 40),
    "an offset beyond 64 bits": moved(1 << 70),
    "overlapping arrays": moved(8),
    "arrays on each other": on_each_other,
    "offsets the wrong way round": changed(lambda h: first(h)["data_offsets"].reverse()),
    "three offsets": changed(lambda h: first(h)["data_offsets"].append(0)),
    "an offset that is no whole number": entry(data_offsets=[0.0, 4.0]),
    "an offset that is true": entry(data_offsets=[False, True]),
    "no offsets": changed(lambda h: first(h).pop("data_offsets") and None),
    "a negative shape": entry(shape=[-4, -1]),
    "a huge shape": entry(shape=[1 << 31, 1 << 31, 1 << 31]),
    "a huge empty shape": entry(shape=[0, (1 << 31) - 1, (1 << 31) - 1], data_offsets=[0, 0]),
    "a shape of a hundred axes": entry(shape=[1] * 100),
    "a shape of text": entry(shape="44"),
    "a dtype that is none": entry(dtype="F31"),
    "a dtype of another size": entry(dtype="F64"),
    "a dtype that is a list": entry(dtype=["F32"]),
    "an entry that is a list": changed(lambda h: h.update({list(h)[1]: [1, 2]})),
    "metadata that is a list": changed(lambda h: h.update(__metadata__=[["1.0", "KVCache"]])),
    "metadata that is no text": changed(lambda h: h.update(__metadata__={"1.0": 4})),
    "deep nesting": lambda w: with_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "deeply nested metadata": lambda w: with_header(b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a list": lambda w: with_header([1, 2]),
    "NaN": lambda w: with_header(b'{"__metadata__": NaN}'),
    "no UTF-8": lambda w: with_header(b'{"\xff\xfe": 1}'),
    "UTF-16": lambda w: with_header('{"__metadata__": {}}'.encode("utf-16")),
    "half of a surrogate": changed(lambda h: h.update({"\ud800": h.pop(list(h)[1])})),
    "NUL bytes": lambda w: with_header(bytes(500)),
    "a NUL in a name": changed(lambda h: h.update({"0\0": h.pop(list(h)[1])})),
    "a name twice": lambda w: with_header(b'{"a": {}, "\\u0061": {}}'),
    "a number of many digits": lambda w: with_header(b'{"a": ' + b"9" * 100_000 + b"}"),
    "a length of all ones": lambda w: b"\xff" * 8 + w[8:],
    "a length of the file": lambda w: struct.pack("<Q", len(w) - 8) + w[8:],
    "a length without a sign": lambda w: struct.pack("<q", -1) + w[8:],
    "a million entries": lambda w: with_header(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)) + b"}"
    ),
    "as many lists as a header holds": lambda w: with_header(
        b'{"a":[' + b"[]," * ((MAX_HEADER_BYTES - 20) // 3) + b"0]}"
    ),
    "as many objects as are read": lambda w: with_header(b'{"a":[' + b'{"":0},' * 130_000 + b"0]}"),
    "long text in wide letters": lambda w: with_header(
        json.dumps({"__metadata__": {"a": "\U0001f600" * (MAX_HEADER_BYTES // 4 - 100)}}, ensure_ascii=False)
    ),
    "a hole in the arrays": lambda w: w + bytes(8),
}


@pytest.mark.parametrize("name", SAFETENSORS)
@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(name, case, tmp_path):
    refused(name, tmp_path, HEADERS[case](READERS[name].whole()), r"^\[.*(wanted|unknown)")


# --- states behind a header that is in order


def stored(name: str, make) -> bytes:
    """The file of this reader, its metadata and arrays changed by `make` and laid out anew."""
    metadata, arrays = arrays_of(READERS[name].whole())
    make(metadata, arrays)
    return with_arrays(metadata, arrays)


# Of the file of ours: layer 0 is turbo4, layer 1 raw, layer 2 qjl4. The numbers are parts of `saved_state`.
OURS = {
    "a class that is none": (lambda t, a: t.update({"1.1": "PromptTrie"}), "unknown kinds of cache: ..PromptTrie"),
    "a module's name as a class": (lambda t, a: t.update({"1.1": "mx"}), "unknown kinds of cache"),
    "a class with other parts": (lambda t, a: t.update({"1.1": "RotatingKVCache"}), "a state of 6 parts"),
    "a class that looks at text": (lambda t, a: t.update({"1.0": "KVCache"}), "a state of 3 parts"),
    "ours where a raw cache was": (lambda t, a: t.update({"1.1": "TurboQuantKVCache"}), "begins with its format"),
    "no class": (lambda t, a: t.pop("1.2"), "arrays of 2 layers"),
    "a class too many": (lambda t, a: t.update({"1.3": "KVCache"}), "got none of layer 3"),
    "a layer less": (lambda t, a: [a.pop(n) for n in list(a) if n.startswith("1.")], "got not both|none of layer 1"),
    "a part less": (lambda t, a: a.pop("0.11"), "without part 11"),
    "a part far away": (lambda t, a: a.update({"0.9999": a.pop("0.11")}), "without part 11"),
    "a place of many digits": (lambda t, a: a.update({"0.99999": a.pop("0.11")}), "got one named '0.99999'"),
    "a place of many lists": (lambda t, a: a.update({"0." * 5000 + "0": a.pop("0.11")}), "got one named '0.0"),
    "a place that is both": (lambda t, a: a.update({"0.11.0": zeros(1)}), "a place that is both"),
    "a negative place": (lambda t, a: a.update({"0.-1": a.pop("0.11")}), "got one named '0.-1'"),
    "a place in other digits": (lambda t, a: a.update({"0.\u0661\u0661": a.pop("0.11")}), r"got one named '0.\\u0661"),
    "a stand-in that is not there": (lambda t, a: t.update({"2.1.0": "9.9"}), "got not both"),
    "a stand-in of no kind": (lambda t, a: t.update({"2.1.1": "pickle"}), "stands for one of scalar, string, none"),
    "a number that is an array": (lambda t, a: a.update({"0.0": zeros(4096, dtype="I32")}), "for 'scalar'"),
    "text of a million letters": (lambda t, a: a.update({"0.1": zeros(1 << 20, dtype="I32")}), "for 'string'"),
    "text of impossible letters": (lambda t, a: a.update({"0.1": ("I32", [1], b"\xff" * 4)}), "numbers of letters in"),
    "a scheme of NULs": (lambda t, a: a.update({"0.1": zeros(4096, dtype="I32")}), "printable text"),
    "a scheme that is none": (lambda t, a: a.update({"0.1": text("turbo5")}), "bits of a turbo scheme"),
    "another scheme's arrays": (lambda t, a: a.update({"0.1": text("turbo2")}), "keys: codes must be"),
    "another scheme's layer": (lambda t, a: a.update({"0.1": a["2.1"], "2.1": a["0.1"]}), "must|belong"),
    "an mlx scheme": (lambda t, a: a.update({"0.1": text("mlx4")}), "is a cache of mlx-lm's own"),
    "the format's number as a fraction": (lambda t, a: a.update({"0.0": ("F32", [], bytes(4))}), "format version"),
    "a layer below 0": (lambda t, a: a.update({"0.2": number(-1)}), "layer must be at least 0, got -1"),
    "MLX's own attention": (lambda t, a: a.update({"0.3": text("mlx.core.fast")}), "name of a model's module"),
    "a fingerprint with a bell": (lambda t, a: a.update({"0.4": text("\a")}), "printable text"),
    "a huge head": (lambda t, a: a.update({"0.5.2": number(1 << 20)}), "head sizes up to 1024"),
    "another head": (lambda t, a: a.update({"0.5.2": number(128)}), "keys: sinks must be"),
    "no head": (lambda t, a: a.update({"0.5.2": number(0)}), "4 whole numbers above 0"),
    "another batch": (lambda t, a: a.update({"0.5.0": number(2)}), "keys: sinks must be"),
    "codes in another dtype": (lambda t, a: a.update({"0.8.1": ("I32", *a["0.8.1"][1:])}), "got .* mlx.core.int32"),
    "codes of another length": (lambda t, a: a.update({"0.8.1": zeros(1, 2, 128, 8, dtype="U32")}), "scales must be"),
    "no codes": (lambda t, a: a.update({"0.8.1": zeros(1, 2, 0, 8, dtype="U32")}), "whole blocks of 64 tokens, got 0"),
    "a longer tail of keys": (lambda t, a: a.update({"0.8.4": zeros(1, 2, 40, 64)}), "equally many tokens"),
    "more sinks": (
        lambda t, a: a.update({"0.8.0": zeros(1, 2, 99, 64), "0.9.0": zeros(1, 2, 99, 64)}), "at most 4 sinks belong"
    ),
    "text for an array": (lambda t, a: a.update({"0.11": zeros(1, 2, 64, dtype="I32")}), "sums over queries must be"),
    "a bound without an end": (lambda t, a: a.update({"0.12.1": number(1 << 40)}), "the bound must be"),
    "an offset beyond the rows": (lambda t, a: a.update({"1.2": number(257)}), "from 0 to 256"),
    "an offset below 0": (lambda t, a: a.update({"1.2": number(-1)}), "from 0 to 256"),
    "keys of another length": (lambda t, a: a.update({"1.0": zeros(1, 2, 255, 64)}), "equally many keys and values"),
    "keys of other heads": (lambda t, a: a.update({"1.0": zeros(1, 1, 256, 64)}), "equally many keys and values"),
    "keys of three axes": (lambda t, a: a.update({"1.0": zeros(2, 256, 64)}), r"an array \(any, any, any, any\)"),
    "keys in whole numbers": (lambda t, a: a.update({"1.0": zeros(1, 2, 256, 64, dtype="I32")}), "of float16 or"),
    "a version of text": (lambda t, a: t.update({"0.mlx_turboquant_format": "x" * 10_000}), "format version 4 is"),
    "more metadata": (lambda t, a: t.update({"3.0": "x"}), "got '3.0' in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_states_that_are_no_cache_are_refused(case, tmp_path):
    make, message = OURS[case]
    refused("prompt cache", tmp_path, stored("prompt cache", make), message)


# Of the file of mlx-lm's caches, in the order of `hostile.mlx_lms_caches`.
OTHERS = {
    "3 bits in codes of 4": (lambda t, a: a.update({"1.4": number(3)}), "codes of 3 bits"),
    "a group of 0": (lambda t, a: a.update({"1.3": number(0)}), "a group of 32, 64 or 128 in a Quan"),
    "scales of another length": (lambda t, a: a.update({"1.0.1": zeros(1, 2, 4, 1)}), "codes of 4 bits"),
    "an offset beyond the codes": (lambda t, a: a.update({"1.2": number(257)}), "from 0 to 256 in a Quan"),
    "a ring of no size": (lambda t, a: a.update({"2.4": number(0)}), "largest size as a whole number from 1"),
    "a ring that keeps more": (lambda t, a: a.update({"2.3": number(5)}), "tokens to keep .* from 0 to 4"),
    "a ring beyond its rows": (lambda t, a: a.update({"2.5": number(99)}), "next row as a whole number from 0 to 5"),
    "a ring that misses rows": (lambda t, a: a.update({"2.4": number(9), "2.2": number(9)}), "rows of 9 tokens"),
    "a chunk behind its end": (lambda t, a: a.update({"3.4": number(6)}), "offset as a whole number from 6"),
    "no keys": (lambda t, a: (a.update({"4.0": zeros(0), "4.1": zeros(0)}),
                              t.update({"2.99.0": "4.0", "2.99.1": "none"})), "wanted"),
    "a batch of other offsets": (lambda t, a: a.update({"5.2": zeros(3, dtype="I32")}), r"an array \(1\) of int32"),
    "a batch of other padding": (lambda t, a: a.update({"5.3": zeros(2, dtype="I32")}), r"an array \(1\) of int32"),
    "a class inside that is none": (lambda t, a: a.update({"7.0.1": text("Popen")}), "unknown kind of cache 'Popen'"),
    "a class inside that is a number": (lambda t, a: a.update({"7.0.1": zeros(1)}), "for 'string'"),
    "arrays of other batches": (lambda t, a: a.update({"9.0.1": zeros(2, 3)}), "wanted|got not both"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_states_that_are_none_of_mlx_lms_caches_are_refused(case, tmp_path):
    make, message = OTHERS[case]
    refused("prompt cache of mlx-lm", tmp_path, stored("prompt cache of mlx-lm", make), message)


def test_lists_of_caches_do_not_nest_without_end(tmp_path):
    cache = KVCache()
    for _ in range(6):
        cache = mlx_lm_cache.CacheList(cache)
    path = save_prompt_cache(tmp_path / "deep", [cache])
    with pytest.raises(ValueError, match="got one named"):
        load_prompt_cache(path)


def test_a_window_reserves_no_memory_for_a_file_of_one_row(tmp_path):
    """65,536 tokens of 1 MiB each, for a file of 2 MiB."""
    cache = mlx_turboquant.TurboQuantKVCache("turbo4:window=65536")
    rows = mx.zeros((1, 1024, 1, 512), mx.float16)
    cache.update_and_fetch(rows, rows)
    path = save_prompt_cache(tmp_path / "wide", [cache])
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    load_prompt_cache(path)
    assert mx.get_peak_memory() - before < path.stat().st_size + hostile.BYTES


def test_a_matrix_for_each_layer_is_refused_and_one_for_all_is_not(tmp_path):
    def layers(*seeds):
        caches = [mlx_turboquant.TurboQuantKVCache(f"turbo4:seed={seed}") for seed in seeds]
        for cache in caches:
            cache.update_and_fetch(*[mx.zeros((1, 1, 1, 1000), mx.float16)] * 2)
        return save_prompt_cache(tmp_path / "c", caches)

    assert len(load_prompt_cache(layers(*[3] * 20))) == 20
    with pytest.raises(ValueError, match=r"layer 1: wanted at most 1,048,576 numbers in matrices .* got 2000000"):
        load_prompt_cache(layers(3, 4))


def test_a_layer_less_than_the_model_has_is_refused(model, tmp_path):
    """mlx-lm's models pair layers and caches, and would leave the last layer out."""
    cache = mlx_turboquant.make_prompt_cache(model)
    model(tokens(9), cache=cache)
    path = save_prompt_cache(tmp_path / "c", cache[:-1])
    assert len(load_prompt_cache(path)) == 1
    with pytest.raises(ValueError, match=r"c.safetensors holds 1 layers, this model has 2. Save the prompt again"):
        load_prompt_cache(path, model=model)


def test_numbers_in_arrays_are_data_and_load(tmp_path):
    """NaN, infinity and any codes: the file cannot be told from one that a model filled."""
    metadata, arrays = arrays_of(READERS["prompt cache"].whole())
    for name, (dtype, shape, data) in arrays.items():
        if len(shape) > 1:
            arrays[name] = dtype, shape, b"\xff" * len(data)
    path = tmp_path / "nan.safetensors"
    path.write_bytes(with_arrays(metadata, arrays))
    loaded = load_prompt_cache(path)
    assert loaded[0].offset == 101 and mx.isnan(loaded[1].keys).all().item()


def test_every_kind_of_cache_that_is_read_can_be_used_after_it(tmp_path):
    """mlx-lm's `BatchRotatingKVCache.from_state` leaves out what its first call looks at."""
    cache = BatchRotatingKVCache(4, [0])
    rows = mx.ones((1, 2, 1, 32))
    cache.update_and_fetch(rows, rows)
    path = save_prompt_cache(tmp_path / "batch", [cache])
    (loaded,) = load_prompt_cache(path)
    assert mx.array_equal(loaded.update_and_fetch(rows, rows)[0], cache.update_and_fetch(rows, rows)[0])


def test_values_of_no_width_are_saved_and_loaded(tmp_path):
    """As mlx-lm's models with an indexer keep them."""
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 1, 3, 32)), mx.zeros((1, 1, 3, 0)))
    (loaded,) = load_prompt_cache(save_prompt_cache(tmp_path / "c", [cache]))
    assert loaded.values.shape == (1, 1, 256, 0) and loaded.offset == 3


def test_metadata_comes_back_as_it_was_given(tmp_path):
    given = {"a.b": "dots", "5": "a number", "0.0.0.0": "", "": "no name", "\u00fc\n": "\U0001f600\0"}
    path = save_prompt_cache(tmp_path / "c", [KVCache()], given)
    _, found = load_prompt_cache(path, return_metadata=True)
    assert {key: text for key, text in found.items() if not key.startswith("mlx_turboquant")} == given


def test_metadata_that_could_not_be_read_again_is_not_written(tmp_path):
    path = save_prompt_cache(tmp_path / "c", [KVCache()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"\[save_prompt_cache\] wanted metadata that fits .* Store less text"):
        save_prompt_cache(path, [KVCache()], {"text": "x" * MAX_HEADER_BYTES})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]
    save_prompt_cache(path, [KVCache()], {"text": ""})
    spare = MAX_HEADER_BYTES - int.from_bytes(path.read_bytes()[:8], "little")
    save_prompt_cache(path, [KVCache()], {"text": "x" * spare})  # the longest that is read
    assert int.from_bytes(path.read_bytes()[:8], "little") == MAX_HEADER_BYTES
    assert load_prompt_cache(path, return_metadata=True)[1]["text"] == "x" * spare
    with pytest.raises(ValueError, match="Store less text"):
        save_prompt_cache(path, [KVCache()], {"text": "x" * (spare + 1)})


def test_a_few_seconds_of_spoiled_files_end_as_they_should():
    told = run_script("fuzz_files.py", "--seconds", "6", "--seed", "7")
    assert told["wrong"] == 0 and told["in_all"] > 50
