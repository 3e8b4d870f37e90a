"""scripts/mlx_lm_tests.py: it replaces mlx-lm's caches as it says, and its page lists what does not apply."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "mlx_lm_tests.md").read_text()

# What stands in a checkout here: three files as mlx-lm's are written, the last two without tests.
TESTS = """
import unittest

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
from mlx_lm.utils import load


class TestCaches(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model, cls.tokenizer = load("mlx-community/Qwen1.5-0.5B-Chat-4bit")

    def check(self, scheme):
        cache = make_prompt_cache(self.model)
        list(generate_step(mx.arange(40), self.model, prompt_cache=cache, max_tokens=3))
        self.assertTrue(all(isinstance(c, KVCache) and str(c.scheme) == scheme for c in [*cache, KVCache()]))
        self.assertEqual([c.block_tokens for c in cache], [32, 32])
        self.assertIs(type(KVCache.merge(cache[:1])), BatchKVCache)

    def test_default(self):
        self.check("turbo3:window=0,block=16")

    def test_other(self):
        self.check("turbo8:window=0,block=16")

    def test_not_ours(self):
        self.fail()

    def test_no_cache(self):
        pass
"""


@pytest.fixture
def script(monkeypatch):
    """scripts/mlx_lm_tests.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("mlx_lm_tests", ROOT / "scripts" / "mlx_lm_tests.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mlx_lm_tests", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_every_test_that_does_not_apply_and_no_failure(script):
    rows = dict(re.findall(r"^\| `(Test\w+\.test_\w+)` \| (.+) \|$", PAGE, re.M))
    others = {name: f"`{scheme}` | {why}" for name, (scheme, why) in script.OTHER_SCHEME.items()}
    assert rows == script.NOT_APPLICABLE | script.WANTS_QWEN | others
    (total,) = re.findall(r"^\| all \| (.+) \|$", PAGE, re.M)
    tests, passed, _, _, failed, skipped = map(int, total.split(" | "))
    assert failed == 0 and skipped == len(script.NOT_APPLICABLE | script.WANTS_QWEN) and passed == tests - skipped


@pytest.fixture
def run(tmp_path, model_dir):
    """A function that runs the script on a checkout with TESTS and its own tables; the finished process."""
    (tmp_path / "tests").mkdir()
    for name in ("test_prompt_cache.py", "test_generate.py", "test_server.py"):
        (tmp_path / "tests" / name).write_text(TESTS if name == "test_prompt_cache.py" else "")
    tables = (
        "import sys, mlx_lm_tests as script; script.NOT_APPLICABLE = {'TestCaches.test_not_ours': 'no reason'}; "
        "script.WANTS_QWEN = {}; script.OTHER_SCHEME = {'TestCaches.%s': ('turbo8:window=0,block=16', 'why')}; "
        "sys.exit(script.main())"
    )

    def start(*arguments: str, other: str = "test_other") -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", tables % other, str(tmp_path), "--model", str(model_dir), *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    return start


def test_each_test_runs_with_our_caches_in_its_scheme(run, tmp_path):
    done = run("--kv-scheme", "turbo3:window=0,block=16", "--markdown", "page.md")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "page.md").read_text()
    assert "| test_prompt_cache.py | 4 | 3 | 2 | 2 | 0 | 1 |" in page
    assert "| `TestCaches.test_not_ours` | no reason |" in page
    assert "| `TestCaches.test_other` | `turbo8:window=0,block=16` | why |" in page


def test_mlx_lm_s_own_caches_stay_its_own(run):
    done = run("--own-caches")
    assert done.returncode == 1 and "3 failed, 1 passed" in done.stdout, done.stdout + done.stderr


def test_what_cannot_be_run_is_said(run, tmp_path):
    done = run(other="test_gone")
    assert "The tables name tests that these files do not have: TestCaches.test_gone" in done.stdout + done.stderr
    done = run("--kv-scheme", "turbo3:window=0,block=16", "-k", "no_cache", "--markdown", "page.md")
    assert done.returncode == 1 and "page.md was not written: 1 of 4 tests have run" in done.stderr
    assert not (tmp_path / "page.md").exists()
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "_version.py").write_text("__version__ = '0.1'\n")
    done = run()
    assert done.returncode == 2 and "is mlx-lm 0.1, but" in done.stderr
