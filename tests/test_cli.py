"""The commands, run as a user runs them, in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_turboquant.cli import hook

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, env=None, typed=None):
    """(exit code, stdout, stderr) of ``python ARGUMENTS``."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, input=typed, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def generate(model_dir, *arguments, module=("-m", "mlx_turboquant", "generate"), **kwargs):
    return run(*module, "--model", model_dir, "--max-tokens", 6, "--ignore-chat-template", *arguments, **kwargs)


def test_generate_with_a_scheme_and_a_report(model_dir, prompt):
    code, out, err = generate(model_dir, "--prompt", prompt, "--kv-scheme", "turbo4v2", "--kv-report")
    assert code == 0, err
    assert "Generation: " in out and "0-1  turbo4v2" in out and "128" in out


def test_the_report_as_json_and_the_module_spelling(model_dir, prompt):
    code, out, err = generate(
        model_dir, "--prompt", prompt, "--kv-scheme", "turbo4", "--kv-report", "json", "--verbose", "false",
        module=("-m", "mlx_turboquant.generate"),
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["layers"][0]["block_tokens"] == 128


def test_generate_without_a_scheme_is_mlx_lms(model_dir, prompt):
    arguments = ("--prompt", prompt, "--verbose", "false")
    theirs = generate(model_dir, *arguments, module=("-m", "mlx_lm", "generate"))
    assert generate(model_dir, *arguments)[:2] == theirs[:2] == (0, theirs[1])


@pytest.mark.parametrize(
    ("command", "added"), [("generate", "--kv-report"), ("chat", "--kv-report"), ("server", "--max-prompt-tokens")]
)
def test_every_flag_of_mlx_lm_is_there(command, added):
    ours, theirs = run("-m", "mlx_turboquant", command, "--help")[1], run("-m", "mlx_lm", command, "--help")[1]
    flags = {word.strip("[],") for word in theirs.split() if word.startswith(("--", "[--"))}
    assert len(flags) > 10 and all(flag in ours for flag in flags)
    assert "--kv-scheme" in ours and added in ours and "--kv-scheme" not in theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kv-scheme", "turb4"), "Did you mean 'turbo4'?"),
        (("--kv-scheme", "turbo4:windw=3"), "Unknown option 'windw'"),
        (("--kv-scheme", "turbo4", "--kv-bits", "4"), "--kv-bits 4 conflicts with --kv-scheme turbo4"),
        (("--kv-scheme", "turbo4", "--max-kv-size", "64"), "max_kv_size=64"),
        (("--kv-scheme", "turbo4", "--prompt-cache-file", "/nowhere/c.safetensors"), "/nowhere/c.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model_dir, arguments, message):
    code, _, err = generate(model_dir, "--prompt", "w5", *arguments)
    assert code == 2 and message in err and "Traceback" not in err


@pytest.fixture(scope="module")
def chat_dir(model_dir, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }} w2 {% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def test_chat_keeps_the_conversation_compressed(chat_dir, prompt):
    arguments = ("--model", chat_dir, "--max-tokens", 4)
    typed = f"{prompt}\nw5 w6\nq\n"
    code, out, err = run("-m", "mlx_turboquant", "chat", *arguments, "--kv-scheme", "turbo4", "--kv-report", "json",
                         typed=typed)  # fmt: skip
    assert code == 0, err
    layer = json.loads(out.splitlines()[-1])["layers"][0]
    # Both prompts, each with a word of the template, the first answer and at least a word of the second.
    assert layer["block_tokens"] == 128 and 151 + 4 + 3 < 128 + layer["sink_tokens"] + layer["tail_tokens"] <= 162
    code, out, err = run("-m", "mlx_turboquant.chat", *arguments, "--kv-scheme", "turb4", typed=typed)
    assert code == 2 and "Did you mean 'turbo4'?" in err


def test_chat_without_a_scheme_is_mlx_lms(chat_dir):
    arguments = ("--model", chat_dir, "--max-tokens", 4)
    ours, theirs = (run("-m", name, "chat", *arguments, typed="w5 w6\nq\n")[1] for name in ("mlx_turboquant", "mlx_lm"))
    rows = [[line for line in text.splitlines() if "w" in line and "tok" not in line] for text in (ours, theirs)]
    assert rows[0] == rows[1] and rows[0]


def test_a_draft_model_drafts_over_compressed_rows(model_dir, prompt, tmp_path):
    arguments = ("--prompt", prompt, "--kv-scheme", "turbo4", "--draft-model")
    code, out, err = generate(model_dir, *arguments, model_dir, "--num-draft-tokens", 3, "--kv-report", "json")
    assert code == 0, err
    assert [layer["block_tokens"] for layer in json.loads(out.splitlines()[-1])["layers"]] == [128] * 4
    code, _, err = generate(model_dir, *arguments, model_dir, "--num-draft-tokens", 8)
    assert code == 2 and "Draft at most 7 tokens at a time" in err and "Traceback" not in err
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"].pop("w95")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = generate(model_dir, *arguments, other)
    assert code == 2 and "Draft model tokenizer does not match" in err and "Traceback" not in err


def test_cache_prompt_then_generate(model_dir, prompt, tmp_path):
    file = tmp_path / "c.safetensors"
    arguments = ("--model", model_dir, "--prompt-cache-file", file, "--prompt", prompt, "--kv-scheme", "turbo4")
    code, _, err = run("-m", "mlx_turboquant", "cache_prompt", *arguments)
    assert code == 0, err
    assert os.listdir(tmp_path) == ["c.safetensors"]
    compressed = file.stat().st_size
    again = ("--prompt", "w5 w6 w7", "--prompt-cache-file", file)
    code, out, err = generate(model_dir, *again, "--kv-scheme", "turbo4", "--kv-report")
    assert code == 0 and "128" in out, err
    code, _, err = generate(model_dir, *again, "--kv-scheme", "turbo3")
    assert code == 2 and "'turbo4'" in err and "'turbo3'" in err

    code, _, err = run("-m", "mlx_turboquant.cache_prompt", *arguments, "--keep-raw")
    assert code == 0 and file.stat().st_size > 1.5 * compressed, err
    assert generate(model_dir, *again, "--kv-scheme", "turbo4")[0] == 0

    file.write_bytes(file.read_bytes()[:-100])
    code, _, err = generate(model_dir, *again)
    assert code == 2 and "is not a prompt cache that can be loaded" in err and "Traceback" not in err


def test_a_cache_of_another_model_is_refused(model_dir, prompt, tmp_path):
    file, other = tmp_path / "c.safetensors", tmp_path / "model"
    other.mkdir()
    for part in model_dir.iterdir():
        (other / part.name).write_bytes(part.read_bytes())
    weights = mx.load(str(other / "model.safetensors"))
    mx.save_safetensors(str(other / "model.safetensors"), {k: v + 0.01 for k, v in weights.items()}, {"format": "mlx"})
    arguments = ("--prompt-cache-file", file, "--prompt", prompt, "--kv-scheme", "turbo4")
    assert run("-m", "mlx_turboquant", "cache_prompt", "--model", model_dir, *arguments)[0] == 0
    from mlx_turboquant import load_prompt_cache, save_prompt_cache

    cache, metadata = load_prompt_cache(file, return_metadata=True)
    save_prompt_cache(file, cache, {**metadata, "model": str(other)})
    code, _, err = generate(other, "--prompt", "w5", "--prompt-cache-file", file)
    assert code == 2 and "belongs to a model with fingerprint" in err


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_command_whose_reader_is_gone_ends_quietly(buffered, tmp_path):
    """A reader that closes at once, as ``head -0`` does: output longer than any buffer, and one line of it."""
    scheme = tmp_path / "model.kv.json"
    for layers, arguments in ((500, ()), (1, ("--json",))):
        scheme.write_text(json.dumps({"format": 1, "layers": ["turbo4v3", "turbo4"] * layers}))
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "mlx_turboquant", "inspect", scheme, *arguments],
            stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_output_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "model.kv.json").write_text(json.dumps({"format": 1, "layers": ["turbo4"]}))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_turboquant", "inspect", tmp_path / "model.kv.json"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode and "inspect: error: [Errno 28]" in done.stderr and "Traceback" not in done.stderr


def test_the_command_list():
    code, out, _ = run("-m", "mlx_turboquant", "--help")
    assert code == 0 and all(name in out for name in ("generate", "cache_prompt", "hook"))
    code, _, err = run("-m", "mlx_turboquant", "generat")
    assert code == 2 and "unknown command 'generat'" in err


def test_the_hook_line_teaches_mlx_lm_its_flags_and_costs_nothing_else(tmp_path, model_dir, prompt):
    """The .pth line works from any site folder; a temporary one stands in for site-packages here."""
    folders = [tmp_path / name for name in ("lib", "lib64")]  # where a virtual environment has one folder twice
    for folder in folders:
        folder.mkdir()
        (folder / hook.NAME).write_text(hook.pth_line())
    site = f"import site, sys; [site.addsitedir(f) for f in {[str(folder) for folder in folders]!r}]; "
    program = site + "sys.argv[0] = 'mlx_lm.generate'; from mlx_lm.generate import main; main()"
    arguments = ("--prompt", prompt, "--kv-scheme", "turbo4", "--kv-report")
    code, out, err = generate(model_dir, *arguments, module=("-c", program))
    assert code == 0 and "0-1  turbo4" in out, err
    for command in ("chat", "server"):
        code, out, err = run("-c", site + f"from mlx_lm.{command} import main; main()", "--help")
        assert code == 0 and "--kv-scheme" in out, err
    code, out, _ = run("-c", site + "print([m for m in sys.modules if m.startswith(('mlx', 'numpy'))])")
    assert code == 0 and out.strip() == "[]"
    # Without the flag mlx-lm's function runs untouched; without the package the line does nothing.
    plain = ("--prompt", prompt, "--verbose", "false")
    assert generate(model_dir, *plain, module=("-c", program))[1] == generate(model_dir, *plain)[1]
    assert "os.path.exists(p) and" in hook.pth_line()


def test_the_hook_is_written_shown_and_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})

    def call(flag):
        monkeypatch.setattr(sys, "argv", ["hook", flag])
        hook.main()
        return capsys.readouterr().out

    assert call("--status").startswith("not installed")
    said = call("--install")
    assert str(tmp_path / hook.NAME) in said and hook.pth_line().strip() in said
    assert call("--status").startswith("installed")
    (tmp_path / hook.NAME).write_text("import old\n")
    assert call("--status").startswith("out of date")
    assert call("--remove").startswith("Removed") and not list(tmp_path.iterdir())
    assert call("--remove").startswith("Nothing to remove")
