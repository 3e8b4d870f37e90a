"""What `inspect` says of a file: every byte, every token, norms as numpy counts them, one layer at a time."""

import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_llama, tokens
from format_files import FOLDER
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from mlx_turboquant import (
    KVScheme,
    TurboQuantIndex,
    TurboQuantKVCache,
    load_prompt_cache,
    make_prompt_cache,
    report,
    save_prompt_cache,
)
from mlx_turboquant.cli import inspect
from mlx_turboquant.inspection import NormHistogram, decoded_rows, inspect_file
from mlx_turboquant.scheme_file import LayerSchemes, save

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "format.md").read_text()
PROMPT_CACHES = sorted(path.name for path in FOLDER.glob("prompt_cache_v4*"))


def call(*arguments, monkeypatch, capsys):
    """(exit code, stdout, stderr) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["mlx_turboquant.inspect", *map(str, arguments)])
    try:
        inspect.main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", PROMPT_CACHES)
def test_bytes_and_tokens_are_those_of_the_loaded_cache(name):
    facts, cache = inspect_file(FOLDER / name), load_prompt_cache(FOLDER / name)
    assert facts["file_nbytes"] == os.path.getsize(FOLDER / name) and facts["kind"] == "prompt cache"
    arrays = mx.load(str(FOLDER / name))
    kept = sum(a.nbytes for a in arrays.values() if a.ndim > 2)
    assert sum(facts["nbytes"].values()) == kept
    for layer, held in zip(facts["layers"], cache, strict=True):
        raw = sum(2 * side.shape[0] * side.shape[1] * side.shape[2] * side.shape[3] for side in held.keys_and_values())
        assert layer["tokens"] == held.size() and layer["fp16_nbytes"] == raw
        assert layer["ratio"] == raw / sum(layer["nbytes"].values())
        if isinstance(held, TurboQuantKVCache):
            assert layer["scheme"] == str(held.scheme) and layer["dropped_tokens"] == held.offset - held.size()
            counts = held.sink_tokens, held.block_tokens, held.tail_tokens
            assert (layer["sink_tokens"], layer["block_tokens"], layer["tail_tokens"]) == counts


@pytest.mark.parametrize("name", PROMPT_CACHES)
@pytest.mark.parametrize("piece", [1, 1 << 22])
def test_norms_are_those_of_the_dense_rows(name, piece, monkeypatch):
    """Decoded in as many pieces as there are blocks, or in one."""
    monkeypatch.setattr(decoded_rows, "PIECE_NUMBERS", piece)
    facts = inspect_file(FOLDER / name)
    for layer, cache in zip(facts["layers"], load_prompt_cache(FOLDER / name), strict=True):
        for side, rows in zip(("keys", "values"), cache.keys_and_values(), strict=True):
            dense = rows if isinstance(rows, mx.array) else rows.dense()
            norms = np.linalg.norm(np.array(dense.astype(mx.float32)), axis=-1)
            told = layer["norms"][side]
            assert told["rows"] == norms.size == sum(count for _, _, count in told["bins"])
            near = [norms.min(), norms.mean(), norms.max()]
            assert [told[key] for key in ("least", "mean", "most")] == pytest.approx(near, rel=1e-5)
    assert facts["norms"]["keys"]["rows"] == sum(layer["norms"]["keys"]["rows"] for layer in facts["layers"])


def test_a_real_prompt_agrees_with_its_report(tmp_path, monkeypatch, capsys):
    model = tiny_llama(layers=3, dtype=mx.float16)
    schemes = LayerSchemes(tuple(map(KVScheme.parse, ("turbo4", "turbo4", "fp16"))))
    cache = make_prompt_cache(model, kv_scheme=schemes)
    ids = tokens(182)
    model(ids[:, :180], cache=cache)
    model(ids[:, 180:181], cache=cache)
    path = save_prompt_cache(tmp_path / "notes", cache, {"topic": "sea\x1b[2J"})
    facts = inspect_file(path)
    for layer, told in zip(facts["layers"], report(cache).layers, strict=True):
        assert layer["tokens"] == told.sink_tokens + told.block_tokens + told.tail_tokens == 181
        assert layer["fp16_nbytes"] == 181 * 2 * 2 * 64 * 2
        assert told.raw_nbytes in (layer["fp16_nbytes"], None)
    # mlx-lm writes the room of its own cache, 256 tokens, too.
    assert facts["layers"][2]["nbytes"] == {"raw": 181 * 512, "spare": (256 - 181) * 512}
    assert facts["scheme"] == cache[0].scheme.full_text() and facts["model"] == cache[0].fingerprint
    code, out, err = call(path, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err) == (0, "") and "tokens: 181" in out and re.search(r"0-1  turbo4 .* each  2\.\d\dx", out)
    assert "\\x1b" in out and "\x1b" not in out
    assert out.count("norms of decoded keys, all layers: 1,086 rows") == 1 and "layer 0" not in out
    code, out, _ = call(path, "--by-layer", monkeypatch=monkeypatch, capsys=capsys)
    assert [out.count(f"norms of decoded values, layer {n}: 362 rows") for n in range(4)] == [1, 1, 1, 0]
    code, out, _ = call(path, "--no-norms", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "norms" not in out


def test_caches_of_mlx_lm_are_told_too(tmp_path):
    rows = mx.random.normal((1, 2, 40, 64), key=mx.random.key(0)).astype(mx.float16)
    plain, rotating, states = KVCache(), RotatingKVCache(max_size=32, keep=4), ArraysCache(2)
    for cache in (plain, rotating):
        for t in range(40):
            cache.update_and_fetch(rows[:, :, t : t + 1], 2 * rows[:, :, t : t + 1])
    states[0] = states[1] = mx.zeros((1, 3, 8))
    path = save_prompt_cache(tmp_path / "c", [plain, plain.to_quantized(64, 4), rotating, states])
    facts = inspect_file(path)
    one, four, ring, other = facts["layers"]
    norms = np.linalg.norm(np.array(rows.astype(mx.float32)), axis=-1)
    assert one["norms"]["values"]["mean"] == pytest.approx(2 * norms.mean(), rel=1e-5)
    assert four["norms"]["keys"]["mean"] == pytest.approx(norms.mean(), rel=0.02) and four["scheme"] == "mlx4:group=64"
    assert four["nbytes"] == {"codes": 40 * 128, "scales": 40 * 16, "spare": (256 - 40) * 144}
    assert (ring["tokens"], ring["dropped_tokens"], ring["norms"]["keys"]["rows"]) == (32, 8, 64)
    assert other["nbytes"] == {"other": 192} and other["norms"] is other["ratio"] is None
    assert facts["scheme"] == "mlx4:group=64" and facts["model"] is None and facts["tokens"] == 40


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_rows, "PIECE_NUMBERS", 1 << 14)
    rows = mx.random.normal((1, 2, 1024, 64), key=mx.random.key(0))
    path = save_prompt_cache(tmp_path / "c", [KVCache.from_state((rows + i, rows - i, 1024)) for i in range(12)])
    layer = 2 * rows.nbytes
    del rows
    for norms, most in ((True, 2.5 * layer), (False, 0.2 * layer)):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        facts = inspect_file(path, norms=norms)
        assert sum(facts["nbytes"].values()) == 12 * layer
        assert mx.get_peak_memory() - before < most
        assert (facts["norms"] is None) != norms


def keys_of(facts):
    for key, value in facts.items():
        yield key
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict) and key not in ("metadata", "notes"):
                yield from keys_of(inner)


@pytest.mark.parametrize("name", [*PROMPT_CACHES, "index_v2_2.5_ip.tqi", "schemes_v1.json", "logits_v1.safetensors"])
def test_json_is_one_line_of_documented_keys(name, monkeypatch, capsys):
    code, out, err = call(FOLDER / name, "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err, out.count("\n")) == (0, "", 1)
    documented = set(re.findall(r"`(\w+)`", DOCS)) | {"codes_high", "codes_low"}
    facts = json.loads(out)
    assert facts == inspect_file(FOLDER / name)
    assert {"kind", "file", "file_nbytes"} <= set(keys_of(facts)) <= documented


def test_index_scheme_file_and_logits(tmp_path, monkeypatch, capsys):
    index = TurboQuantIndex(64, bits=4, keep="int8")
    index.add(np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32))
    index.save(tmp_path / "named.safetensors")  # what it is is told by what is in it
    facts = inspect_file(tmp_path / "named.safetensors")
    wanted = {"codes": 50 * 32, "scales": 200, "ids": 400, "kept": 3200, "kept_scales": 200}
    assert facts["nbytes"] == wanted and facts["code_size"] == index.code_size == 36
    assert facts["ratio"] == 50 * 128 / sum(wanted.values())
    code, out, _ = call(tmp_path / "named.safetensors", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and "50 vectors of 64 values in 4 bits, 36 bytes a vector, kept as int8" in out
    TurboQuantIndex(8).save(tmp_path / "empty.tqi")
    assert inspect_file(tmp_path / "empty.tqi")["ratio"] is None
    assert "0 vectors of 8" in call(tmp_path / "empty.tqi", monkeypatch=monkeypatch, capsys=capsys)[1]

    save(tmp_path / "plan", LayerSchemes(tuple(map(KVScheme.parse, ["turbo4"] * 3 + ["fp16"])), "abc"), kld=0.5)
    facts = inspect_file(tmp_path / "plan")
    assert facts["layers"] == ["turbo4"] * 3 + ["fp16"] and facts["notes"] == {"kld": 0.5} and facts["model"] == "abc"
    code, out, _ = call(tmp_path / "plan", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and re.search(r"0-2  turbo4\n +3  fp16", out) and "kld: 0.5" in out

    facts = inspect_file(FOLDER / "logits_v1.safetensors")
    assert (facts["calls"], facts["tokens"], facts["vocabulary"], facts["nbytes"]) == (2, 4, 40, 640)


def header_only(path, text):
    path.write_bytes(len(text).to_bytes(8, "little") + text)


BAD = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "got a folder"),
    "pipe": (os.mkfifo, "got a pipe"),
    "empty": (lambda path: path.write_bytes(b""), "got none"),
    "text": (lambda path: path.write_text("It was a dark and stormy night."), "begins with 'It was a '"),
    "json": (lambda path: path.write_text('{"a": 1}'), "wanted JSON with 'format' and 'layers'"),
    "broken json": (lambda path: path.write_text('{"format": 1, "layers'), "wanted JSON, got other"),
    "NaN": (lambda path: path.write_text('{"format": 1, "layers": ["turbo4"], "kld": NaN}'), "NaN is no number"),
    "scheme": (lambda path: path.write_text('{"format": 1, "layers": ["turb4"]}'), "Did you mean 'turbo4'"),
    "weights": (lambda path: mx.save_safetensors(str(path), {"weight": mx.ones(4)}), "names and metadata of none"),
    "cut": (lambda path: path.write_bytes((FOLDER / PROMPT_CACHES[0]).read_bytes()[:-7]), "bytes of arrays"),
    "cut index": (lambda path: path.write_bytes((FOLDER / "index_v2_2_l2.tqi").read_bytes()[:-7]), "bytes of arrays"),
    "no layers": (lambda path: header_only(path, b'{"__metadata__":{"1.0":"KVCache"}}'), "is not a prompt cache"),
    "old cache": (
        lambda path: path.write_bytes((FOLDER / "prompt_cache_v3_turbo4.safetensors").read_bytes()),
        "wanted format version 4, got '3'",
    ),
    "old index": (lambda path: path.write_bytes((FOLDER / "index_v1_4_ip.tqi").read_bytes()), "wanted version 2"),
}


@pytest.mark.parametrize("what", BAD)
def test_another_file_is_one_clear_line_and_exit_code_2(what, tmp_path, monkeypatch, capsys):
    path = tmp_path / "file.safetensors"
    make, message = BAD[what]
    make(path)
    code, out, err = call(path, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err and str(path) in err and err.startswith("mlx_turboquant.inspect: error: ")


def test_a_plot_is_drawn_or_refused_before_the_file_is_read(tmp_path, monkeypatch, capsys):
    picture, file = tmp_path / "p.png", FOLDER / "prompt_cache_v4_raw.safetensors"
    code, out, err = call(file, "--plot", picture, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0 and picture.read_bytes()[:4] == b"\x89PNG" and "tokens: 40" in out, err
    for arguments, message in (
        ((file, "--plot", tmp_path / "p.txt"), "wanted a .png"),
        ((file, "--plot", tmp_path / "none" / "p.png"), "folder that exists"),
        ((file, "--plot", picture, "--no-norms"), "--no-norms"),
        ((FOLDER / "schemes_v1.json", "--plot", picture), "wanted a prompt cache to draw"),
    ):
        code, out, err = call(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(tmp_path / "missing", "--plot", picture, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "pip install matplotlib" in err


NORMS = st.lists(st.floats(0, width=32, allow_infinity=False) | st.just(float("nan")), max_size=30)


@given(NORMS, NORMS)
def test_histograms_add_up_and_survive_json(first, second):
    both, one, two = NormHistogram(), NormHistogram(), NormHistogram()
    both.add_norms(np.array(first + second))
    one.add_norms(np.array(first))
    two.add_norms(np.array(second))
    one.add(two)
    told = both.summary()
    assert one.bins == both.bins and (one.least, one.most, one.rows) == (both.least, both.most, len(first + second))
    again = NormHistogram.from_summary(json.loads(json.dumps(told)))
    assert again.bins == both.bins and again.text() == both.text()
    positive = [x for x in first + second if x > 0]
    assert [(n, both.bins[n]) for n in sorted(both.bins)] == sorted(
        (n, sum(2 ** (n / 4) <= x < 2 ** ((n + 1) / 4) for x in positive)) for n in both.bins
    )
    assert told["zeros"] == sum(x == 0 for x in first + second) and told["nonfinite"] == sum(np.isnan(first + second))
    merged = both.merged(5)
    assert len(merged) <= 5 and sum(count for _, _, count in merged) == len(positive)
    assert all(a[1] == b[0] for a, b in pairwise(merged))


def test_norms_neither_overflow_nor_vanish():
    rows = mx.array([[3e38, 0, 0, 0], [1e-30, 1e-30, 1e-30, 1e-30], [0, 0, 0, 0], [1, float("inf"), 0, 0]])
    told = NormHistogram()
    told.add_rows(rows)
    assert (told.zeros, told.nonfinite, told.rows) == (1, 1, 4)
    assert (told.least, told.most) == pytest.approx((2e-30, 3e38), rel=1e-6)
    assert told.text().splitlines()[-2:] == [f"{'zero':>21} {1:>11}", f"{'NaN or infinite':>21} {1:>11}"]


def test_a_text_histogram_has_bars_in_proportion():
    told = NormHistogram()
    told.add_norms(np.array([1.0] * 40 + [2.0] * 10 + [4.0]))
    bars = [line.count("#") for line in told.text(width=40).splitlines()]
    assert bars == [40, 0, 0, 0, 10, 0, 0, 0, 1]
