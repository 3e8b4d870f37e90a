"""Files of every format: those of the current versions mean what they meant, older ones are refused by name."""

import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from format_files import EXPECTED, FOLDER, difference, expected, told
from format_reader import read_rows

from mlx_turboquant import TurboQuantIndex, load_prompt_cache, reference_logits
from mlx_turboquant.cache.saved_state import FORMAT_VERSION
from mlx_turboquant.files.safetensors import read_header
from mlx_turboquant.index.file import VERSION as INDEX_VERSION
from mlx_turboquant.methods import METHODS
from mlx_turboquant.reference_logits import ReferenceLogits
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.scheme_file import FORMAT as SCHEMES_VERSION
from mlx_turboquant.scheme_file import load as load_schemes

PAGE = (FOLDER.parents[2] / "docs" / "format.md").read_text()
LOAD = {"prompt_cache": load_prompt_cache, "index": TurboQuantIndex.load, "schemes": load_schemes}
CURRENT = {"prompt_cache": FORMAT_VERSION, "index": int(INDEX_VERSION), "schemes": SCHEMES_VERSION, "logits": 1}
FILES = sorted(path.name for path in FOLDER.iterdir() if path != EXPECTED)


def kind_and_version(name):
    kind, version = re.match(r"(\w+?)_v(\d+)[_.]", name).groups()
    return kind, int(version)


OLD = [name for name in FILES if kind_and_version(name)[1] != CURRENT[kind_and_version(name)[0]]]


@pytest.mark.parametrize("name", [name for name in FILES if name not in OLD])
def test_a_file_of_the_current_version_means_what_it_meant(name):
    assert difference(told(FOLDER / name), expected()[name]) == ""


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_an_older_version_is_refused_with_both_versions(name):
    kind, version = kind_and_version(name)
    with pytest.raises(ValueError, match=f"version {CURRENT[kind]} .*'{version}'") as error:
        LOAD[kind](FOLDER / name)
    assert name in str(error.value) and name not in expected()


def test_there_is_a_small_file_of_every_kind_method_and_older_version_that_was_kept():
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    assert max(sizes) < 30_000 and sum(sizes) < 160_000
    assert {kind_and_version(name)[0] for name in expected()} == set(CURRENT)
    assert {kind_and_version(name) for name in OLD} >= {("prompt_cache", 3), ("index", 1)}
    caches = [file for name, file in expected().items() if kind_and_version(name)[0] == "prompt_cache"]
    schemes = [layer["scheme"] for file in caches for layer in file["layers"] if "scheme" in layer]
    assert {KVScheme.parse(scheme).method for scheme in schemes} == METHODS.keys() - {"fp16", "mlx"}


@pytest.mark.parametrize("kind", CURRENT)
def test_a_changed_file_is_noticed(kind, tmp_path):
    """One bit of what a file stores, and the comparison above fails."""
    name = next(name for name in expected() if name.startswith(kind))
    data = bytearray((FOLDER / name).read_bytes())
    if kind == "schemes":
        data = data.replace(b"turbo4v3", b"turbo3v3")
    else:
        with open(FOLDER / name, "rb") as file:
            arrays = read_header(file).arrays
        array = {"prompt_cache": "0.8.1", "index": "scales", "logits": "2"}[kind]
        data[8 + int.from_bytes(data[:8], "little") + arrays[array].start] ^= 1
    (tmp_path / name).write_bytes(data)
    assert difference(told(tmp_path / name), expected()[name]) != ""


def test_kept_logits_are_used_again(tmp_path, monkeypatch, model):
    monkeypatch.setattr(reference_logits, "folder", lambda: tmp_path)
    ids = list(range(5))  # one token of prompt, two calls of two; the last token is only a target
    path = ReferenceLogits(model, ids, 0, 2)._path
    shutil.copy(FOLDER / "logits_v1.safetensors", path)
    logits = ReferenceLogits(model, ids, 0, 2)
    kept = mx.load(str(path))
    for start in (0, 2):
        assert mx.array_equal(logits.get(start, lambda: pytest.fail("computed again")), kept[str(start)])


def test_the_page_reads_a_prompt_cache_with_numpy_alone(tmp_path, monkeypatch):
    file = FOLDER / f"prompt_cache_v{FORMAT_VERSION}_turbo4.safetensors"
    shutil.copy(file, tmp_path / "notes.safetensors")
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert set(re.findall(r"^import (\w+)", block, re.M)) == {"json", "numpy"} and "from " not in block
    names = {}
    exec(block, names)
    [cache] = load_prompt_cache(file)
    keys = cache.keys_and_values()[0].dense()
    assert cache.block_tokens == 32 and names["keys"].shape == keys.shape
    assert np.abs(names["keys"] - np.array(keys)).max() < 2e-3  # half a unit in the last place of float16 at 4


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(f"prompt_cache_v{FORMAT_VERSION}")])
def test_the_page_tells_how_to_read_every_method(name):
    """`format_reader` is the page, word by word; its float64 rounds to the package's rows in the model's dtype."""
    first = load_prompt_cache(FOLDER / name)[0]
    for side, rows in enumerate(first.keys_and_values()):
        rows = rows if isinstance(rows, mx.array) else rows.dense()
        dense = np.array(rows.astype(mx.float32))
        allowed = 0.51 * mx.finfo(rows.dtype).eps * np.abs(dense) + 2e-6
        assert (np.abs(read_rows(FOLDER / name, side) - dense) <= allowed).all()


def test_the_page_has_a_row_for_every_version_and_its_json_loads(tmp_path):
    rows = re.findall(r"^\| *(prompt cache|index|scheme file|) *\| (\d+) \| .* \| (yes|no) \|$", PAGE, re.M)
    loads, kind = {}, ""
    for name, version, yes in rows:
        kind = name or kind
        loads[kind, int(version)] = yes == "yes"
    names = {"prompt cache": "prompt_cache", "index": "index", "scheme file": "schemes"}
    for name, key in names.items():
        assert [loads[name, n] for n in range(1, CURRENT[key] + 1)] == [False] * (CURRENT[key] - 1) + [True]
    assert len(loads) == sum(CURRENT[key] for key in names.values())
    [example] = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    (tmp_path / "plan.json").write_text(example)
    assert [str(scheme) for scheme in load_schemes(tmp_path / "plan.json").layers] == json.loads(example)["layers"]
