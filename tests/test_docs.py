"""The README is true: its example runs, and every command, option and public function is in it."""

import os
import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
from commands import parse

import mlx_turboquant
from mlx_turboquant.cli import COMMANDS
from mlx_turboquant.evaluation import SchemeResult
from mlx_turboquant.methods import METHODS, NAMES
from mlx_turboquant.quantizers import CODECS
from mlx_turboquant.scheme_file import LayerSchemes, save

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
# Text that is indented by four spaces, outside fenced code.
SHELL = [
    line.strip() for line in re.sub(r"```.*?```", "", README, flags=re.S).splitlines() if re.match(r" {4}\S", line)
]


def test_the_first_example_runs_as_printed(model_dir, monkeypatch, capsys):
    load = mlx_lm.load
    monkeypatch.setattr(mlx_lm, "load", lambda name: load(str(model_dir)))
    examples = re.findall(r"```python\n(.*?)```", README, re.S)
    assert examples
    for example in examples:
        exec(example, {})
    out = capsys.readouterr().out
    assert "turbo4v2" in out


def test_fenced_blocks_are_python_that_runs():
    """So that a block of another kind gets a test of its own before it is added."""
    assert set(re.findall(r"^```(\w*)$", README, re.M)) == {"python", ""}
    assert README.count("```") == 2 * README.count("```python") > 0


@pytest.mark.parametrize("line", SHELL)
def test_indented_lines_are_commands_that_parse_or_what_one_prints(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("model.kv.json", LayerSchemes((mlx_turboquant.KVScheme.parse("turbo4"),)))
    words = shlex.split(line.partition(" < ")[0], comments=True)
    if words[0].startswith("mlx_turboquant."):
        assert parse([words[0].removeprefix("mlx_turboquant."), *words[1:]])
    elif words[:3] == ["python", "-m", "mlx_turboquant"]:
        assert parse(words[3:])
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert [word for word in words[2:] if word != "." and word[2:-1] not in extras] == []
    elif words[0].startswith("scripts/"):
        script = ROOT / words[0]
        assert os.access(script, os.X_OK)
        assert_options_are_in(words[1:], script, script.with_suffix(".py"))
    elif words[0] == "python":
        assert_options_are_in(words[2:], ROOT / words[1])
    else:  # what `evaluate --json` prints: its second line goes on where the first ends
        assert line[0] in '{"'
        keys = set(re.findall(r'"(\w+)"', line)) - {"results"}
        assert keys and keys <= set(printed_keys())


def printed_keys():
    one = np.zeros(1)
    return SchemeResult("turbo4", one, one, one, one, 4, 4, 0, 1.0, 1.0).summary(bands=1)


def assert_options_are_in(words, *sources):
    text = "".join(source.read_text() for source in sources if source.exists())
    assert text and all(word in text for word in words if word.startswith("--")), words


def test_the_readme_lists_all_that_evaluate_prints_as_json():
    [shown] = re.findall(r'^    \{"results": .*?\}\]\}$', README, re.S | re.M)
    assert re.findall(r'"(\w+)"', shown) == ["results", *printed_keys()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:benchmarks|docs|kernels|mlx_turboquant|scripts|tests)/[\w./-]+)`", text)
    missing = [name for name in links if not (page.parent / name).exists()]
    assert missing + [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


def test_every_command_and_option_is_listed():
    for command in COMMANDS:
        assert f"mlx_turboquant.{command}" in README or f"mlx_turboquant {command}" in README
    for field in fields(mlx_turboquant.KVScheme):
        assert f"`{field.name.rstrip('_')}`" in README or field.name in ("method", "key_bits", "value_bits")
    for scheme in (*NAMES, "turbo{K}v{V}"):
        assert f"`{scheme}`" in README, scheme


def test_defaults_in_the_readme_are_the_real_ones():
    defaults = mlx_turboquant.KVScheme.parse("turbo4")
    for name in ("sinks", "window", "block", "group", "rotation", "seed"):
        assert re.search(rf"\| `{name}` \| `?{getattr(defaults, name)}`? \|", README), name


def test_every_public_name_has_a_docstring_and_a_changelog_exists():
    for name in mlx_turboquant.__all__:
        assert getattr(mlx_turboquant, name).__doc__, name
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog.startswith("# Changelog") and "## Unreleased" in changelog


def test_the_page_of_the_api_names_every_public_name_and_no_other():
    page = (ROOT / "docs" / "api.md").read_text()
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    named = {name for name in re.findall(r"`(\w+)", rows) if not name.isupper()} - {"MLX_ENABLE_TF32"}
    assert named == set(mlx_turboquant.__all__)


def test_examples_in_the_pages_of_the_api_and_of_methods_run(model_dir, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(METHODS, "sym", None)  # what the example adds to the tables goes when the test ends
    monkeypatch.setitem(CODECS, "sym", None)
    load = mlx_lm.load
    monkeypatch.setattr(mlx_lm, "load", lambda name: load(str(model_dir)))
    for name in ("api", "adding_a_method"):
        [example] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(), re.S)
        exec(example, {})
    assert (tmp_path / "numbers.safetensors").exists()
    printed = capsys.readouterr().out
    assert printed.endswith(" 8704\n") and 0.4 < float(re.search(r"array\(([\d.]+)", printed)[1]) <= 0.5


def test_every_method_is_in_the_page_of_methods():
    page = (ROOT / "docs" / "methods.md").read_text()
    for name in NAMES:
        if not name.startswith(("fp16", "mlx", "turbo")):
            assert f"| `{name}`" in page, name
