"""Prompt caches on disk: bit for bit the same afterwards, whole or not there, and refused when they are not ours."""

import json
import os
import struct

import mlx.core as mx
import pytest
from conftest import decode, tiny_llama, tokens
from mlx_lm.models import cache as mlx_lm_cache
from schemes import SCHEMES

import mlx_turboquant
from mlx_turboquant import KVScheme, TurboQuantKVCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_turboquant.cache.file_states import KINDS
from mlx_turboquant.scheme_file import LayerSchemes


def prefilled(model, scheme="turbo4", phase="packed", count=150):
    cache = make_prompt_cache(model, kv_scheme=scheme)
    ids = tokens(count + 40)
    model(ids[:, :count], cache=cache)
    if phase == "packed":
        model(ids[:, count : count + 1], cache=cache)
    return cache, ids


def through_mlx_lm(path, cache):
    mlx_lm_cache.save_prompt_cache(str(path), cache)
    return mlx_lm_cache.load_prompt_cache(str(path))


def through_ours(path, cache):
    save_prompt_cache(path, cache)
    return load_prompt_cache(path)


@pytest.mark.parametrize("phase", ["raw", "packed"])
@pytest.mark.parametrize("through", [through_mlx_lm, through_ours])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_restored_cache_goes_on_bit_for_bit(model, tmp_path, scheme, phase, through):
    cache, ids = prefilled(model, scheme, phase)
    never_saved, _ = prefilled(model, scheme, phase)
    loaded = through(tmp_path / "cache.safetensors", cache)
    start = cache[0].offset
    runs = [decode(model, ids, c, start, start + 16) for c in (never_saved, cache, loaded)]
    assert cache[0].block_tokens > 0
    assert mx.array_equal(runs[0], runs[1]) and mx.array_equal(runs[0], runs[2])
    again = through(tmp_path / "again.safetensors", loaded)
    # Loading leaves out the room that decoding made.
    assert all(mine.nbytes <= theirs.nbytes for mine, theirs in zip(again, loaded, strict=True))
    third = through(tmp_path / "third.safetensors", again)
    assert [c.nbytes for c in third] == [c.nbytes for c in again]
    assert str(mlx_turboquant.report(third)).split() == str(mlx_turboquant.report(again)).split()


def test_a_new_process_needs_only_the_file(model, tmp_path):
    """A cache loaded before its model binds the model's attention when it is first used."""
    cache, ids = prefilled(model)
    save_prompt_cache(tmp_path / "c.safetensors", cache)
    mlx_turboquant.unhook(model)
    loaded = mlx_lm_cache.load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert decode(model, ids, loaded, 151, 153).shape == (1, 2, 96)


def test_an_empty_cache_is_saved_and_restored(tmp_path, model):
    cache = make_prompt_cache(model, kv_scheme="turbo4v2:window=32")
    loaded = through_ours(tmp_path / "c.safetensors", cache)
    assert [c.empty() for c in loaded] == [True, True] and loaded[0].scheme == cache[0].scheme


def test_raw_and_mlx_lms_quantized_caches_can_be_saved_too(model, tmp_path):
    ids = tokens(40)
    for scheme in ("fp16", "mlx8"):
        cache = make_prompt_cache(model, kv_scheme=scheme)
        model(ids[:, :20], cache=cache)
        save_prompt_cache(tmp_path / f"{scheme}.safetensors", cache, model=model)
        loaded = load_prompt_cache(tmp_path / f"{scheme}.safetensors", model=model, kv_scheme=scheme)
        assert mx.array_equal(decode(model, ids, cache, 20, 24), decode(model, ids, loaded, 20, 24))
        with pytest.raises(ValueError, match="belongs to a model with fingerprint"):
            load_prompt_cache(tmp_path / f"{scheme}.safetensors", model=tiny_llama(seed=5))


def test_trimmed_tokens_are_not_written(model, tmp_path):
    cache, _ = prefilled(model, phase="raw")
    for layer in cache:
        layer.trim(100)
    path = save_prompt_cache(tmp_path / "c.safetensors", cache)
    shapes = [a.shape for a in mx.load(str(path)).values() if a.ndim == 4]
    assert shapes and {shape[2] for shape in shapes} == {50}


def test_metadata_and_suffix(model, tmp_path):
    cache, _ = prefilled(model)
    path = save_prompt_cache(str(tmp_path / "notes"), cache, {"topic": "lighthouse"})
    assert path == tmp_path / "notes.safetensors"
    _, metadata = load_prompt_cache(path, return_metadata=True)
    assert metadata["topic"] == "lighthouse"
    assert metadata["mlx_turboquant_scheme"] == cache[0].scheme.full_text() and "seed=0" in cache[0].scheme.full_text()
    assert (
        metadata["mlx_turboquant_model"]
        == mlx_turboquant.fingerprint(model)
        != mlx_turboquant.fingerprint(tiny_llama(seed=5))
    )


def test_another_model_or_scheme_is_refused_with_both_values(model, tmp_path):
    cache, _ = prefilled(model)
    path = save_prompt_cache(tmp_path / "c.safetensors", cache)
    other = tiny_llama(seed=5)
    mine, theirs = mlx_turboquant.fingerprint(model), mlx_turboquant.fingerprint(other)
    with pytest.raises(ValueError, match=f"{mine}.*{theirs}"):
        load_prompt_cache(path, model=other)
    with pytest.raises(ValueError, match=r"'turbo4'.*'turbo3'"):
        load_prompt_cache(path, kv_scheme="turbo3")
    assert load_prompt_cache(path, model=model, kv_scheme="turbo4")[0].offset == 151


def test_a_failed_write_leaves_the_old_file_and_no_other(model, tmp_path, monkeypatch):
    cache, _ = prefilled(model)
    path = save_prompt_cache(tmp_path / "c.safetensors", cache)
    before = path.read_bytes()

    def broken(*args):
        with open(args[0], "wb") as file:
            file.write(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(mlx_lm_cache, "save_prompt_cache", broken)
    with pytest.raises(OSError, match="disk full"):
        save_prompt_cache(path, cache)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.safetensors"]


def test_the_file_is_flushed_before_it_takes_its_name(model, tmp_path, monkeypatch):
    cache, _ = prefilled(model)
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    save_prompt_cache(tmp_path / "c.safetensors", cache)
    assert order == ["fsync", "rename", "fsync"]
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        save_prompt_cache(tmp_path / "missing" / "c.safetensors", cache)


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def metadata_changed(data: bytes, key: str, value: str) -> bytes:
    header, body = header_of(data)
    assert key in header["__metadata__"]
    header["__metadata__"][key] = value
    return with_header(header, body)


DAMAGE = {
    "empty": lambda d: b"",
    "short": lambda d: d[:6],
    "cut in the header": lambda d: d[:100],
    "cut in the arrays": lambda d: d[:-1000],
    "longer": lambda d: d + b"more",
    "text": lambda d: b"It was a dark and stormy night." * 20,
    "huge header length": lambda d: struct.pack("<Q", 1 << 60) + d[8:],
    "no metadata": lambda d: with_header({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, b""),
    "unknown class": lambda d: metadata_changed(d, "1.0", "Popen"),
    "other version": lambda d: metadata_changed(d, "0.mlx_turboquant_format", "99"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_one_clear_error(model, tmp_path, damage):
    cache, _ = prefilled(model)
    path = save_prompt_cache(tmp_path / "c.safetensors", cache)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"\[load_prompt_cache\] .*c.safetensors is not a prompt cache"):
        load_prompt_cache(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        load_prompt_cache(tmp_path / "none.safetensors")


def test_somebody_elses_weights_are_refused(tmp_path):
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"weight": mx.ones((4, 4))}, {"format": "mlx"})
    with pytest.raises(ValueError, match="is not a prompt cache"):
        load_prompt_cache(tmp_path / "w.safetensors")


WRONG_STATES = [
    ((), "begins with its format version"),
    (lambda s: (3, *s[1:]), "format version 4 is supported, got 3"),
    (lambda s: s[:-1], "has 13 parts, got 12"),
    (lambda s: (*s[:1], "turbo5", *s[2:]), "key bits of a turbo scheme must be"),
    (lambda s: (*s[:1], "fp16", *s[2:]), "'fp16' is a cache of mlx-lm's own"),
    (lambda s: (*s[:2], "0", *s[3:]), "layer a whole number"),
    (lambda s: (*s[:5], (1, 2, -64, 64), *s[6:]), "dimensions must be 4 whole numbers above 0"),
    (lambda s: (*s[:5], (1, 3, 64, 64), *s[6:]), r"keys: sinks must be \(1, 3, tokens, 64\)"),
    (lambda s: (*s[:6], "int8", *s[7:]), "dtype must be one of"),
    (lambda s: (*s[:7], (1, 0), *s[8:]), "two booleans"),
    (lambda s: (*s[:8], s[8][:4], *s[9:]), "keys must have five parts"),
    (lambda s: (*s[:8], (s[8][0], s[8][1][:, :, :65], *s[8][2:]), *s[9:]), "whole blocks of 64 tokens, got 65"),
    (lambda s: (*s[:8], (s[8][0], s[8][1][..., :4], *s[8][2:]), *s[9:]), r"keys: codes must be \(1, 2, 128, 8\)"),
    (lambda s: (*s[:8], (*s[8][:2], None, *s[8][3:]), *s[9:]), "keys: scales missing"),
    (lambda s: (*s[:9], (*s[9][:3], s[8][3], s[9][4]), *s[10:]), "values: centers not expected"),
    (lambda s: (*s[:9], (*s[9][:4], s[9][4][:, :, :-1]), *s[10:]), "equally many tokens"),
    (lambda s: (*s[:9], (s[9][0], None, None, None, s[9][4]), *s[10:]), "equally many tokens"),
    (lambda s: (*s[:10], None, *s[11:]), "learned from the prompt must be there where blocks are encoded"),
    (lambda s: (*s[:10], s[10][0], *s[11:]), "learned must be two lists"),
    (lambda s: (*s[:10], (None, s[10][1]), *s[11:]), "keys: 1 learned arrays belong to scheme turbo4, got"),
    (lambda s: (*s[:10], (s[10][0], s[10][0]), *s[11:]), "values: 0 learned arrays belong to scheme turbo4, got"),
    (lambda s: (*s[:10], ((None,), s[10][1]), *s[11:]), "keys: a learned array is missing"),
    (lambda s: (*s[:10], ((s[10][0][0][..., :3],), None), *s[11:]), r"keys: learned array must be \(1, 2, 64\)"),
    (lambda s: (*s[:11], s[11][..., None], *s[12:]), "sums over queries must be"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_STATES)
def test_a_state_that_does_not_fit_is_refused(model, change, message):
    state = prefilled(model)[0][0].state
    with pytest.raises(ValueError, match=message):
        TurboQuantKVCache.from_state(change(state) if change else change)


def test_known_classes_exist():
    assert all(hasattr(mlx_lm_cache, name) for name in KINDS)


def test_a_share_of_a_model_gets_a_file_of_its_own(model, tmp_path):
    cache, _ = prefilled(model)
    whole = save_prompt_cache(tmp_path / "c", cache)
    mark = cache[0].fingerprint
    for rank in (0, 1):
        cache[0].fingerprint = f"{mark}.tensor{rank}of2"
        path = save_prompt_cache(whole, cache)
        assert path.name == f"c.rank{rank}of2.safetensors" == save_prompt_cache(path, cache).name
    assert sorted(os.listdir(tmp_path)) == ["c.rank0of2.safetensors", "c.rank1of2.safetensors", "c.safetensors"]
    assert load_prompt_cache(whole, model=model)[0].fingerprint == mark
    message = r"filled by the share of rank 1 of 2 \(tensor parallel\); this process holds a whole model"
    with pytest.raises(ValueError, match=message):
        load_prompt_cache(path, model=model)


def test_ranks_of_another_number_are_named_where_the_file_is_missing(model, tmp_path):
    cache, _ = prefilled(model)
    cache[0].fingerprint += ".pipeline2of3"
    save_prompt_cache(tmp_path / "c", cache)
    with pytest.raises(FileNotFoundError, match=r"no .*c.safetensors. There is c.rank2of3.safetensors, .* rank 0 of 1"):
        load_prompt_cache(tmp_path / "c.safetensors", model=model)


def test_layers_that_a_scheme_file_keeps_raw_are_saved_with_the_others(model, tmp_path):
    schemes = LayerSchemes((KVScheme.parse("turbo4"), KVScheme.parse("fp16")))
    cache, ids = prefilled(model, schemes)
    path = save_prompt_cache(tmp_path / "c", cache)
    loaded = load_prompt_cache(path, model=model, kv_scheme=schemes)
    assert [type(c) for c in loaded] == [type(c) for c in cache] and loaded[0].block_tokens == 128
    assert mx.array_equal(decode(model, ids, cache, 151, 155), decode(model, ids, loaded, 151, 155))
