"""The house rules: imports point one way, kernels travel, codebooks on disk are the solver's."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlx_turboquant import kernel_source

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlx_turboquant"
# Each room may import from its own row and the rows above it.
ROOMS = [
    {"files", "methods", "scheme", "scheme_file", "codebook", "rotation", "packing", "tail_parts"}
    | {"tensor", "kernel_source", "settling"},
    {"ops", "conditioning"},
    {"quantizers", "vectors", "index"},
    {"plain_attention"},
    {"attention"},
    {"binding", "shard", "fingerprint"},
    {"cache", "row_values", "row_flow", "layers"},
    {"mlx_lm_hooks", "guard"},
    {"report", "prompt_cache_file", "generation"},
    {"reference_logits", "sizes", "evaluation"},
    {"planning"},
    {"verification", "inspection"},
    {"cli", "generate", "cache_prompt", "chat", "server", "evaluate", "plan", "doctor", "inspect", "__main__"}
    | {"__init__"},
]
RANK = {name: row for row, names in enumerate(ROOMS) for name in names}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in RANK, f"{room} has no place in ROOMS"
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "mlx_turboquant":
            names = [f"mlx_turboquant.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("mlx_turboquant."):
                assert RANK[name.split(".")[1]] <= RANK[room], f"{room} imports {name}"


def test_every_module_says_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_codebook_header_is_what_the_solver_gives():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "solve_codebooks.py", "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "codebook_4[16]" in kernel_source.kernel_source("codebooks.h")


def test_unknown_kernel_sources_are_named():
    for name in ("none.metal", "../pyproject.toml"):
        with pytest.raises(FileNotFoundError, match=r"No kernel source .*Known: .*codebooks.h"):
            kernel_source.kernel_source(name)


def test_the_wheel_carries_the_kernels_and_finds_them(tmp_path):
    build = (
        "import sys; from hatchling.builders.wheel import WheelBuilder; "
        "print(*WheelBuilder('.').build(directory=sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", build, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mlx_turboquant/_metal/codebooks.h", "mlx_turboquant/cache/two_phase.py"} <= set(names)
    assert not any(name.startswith(("kernels", "tests", "scripts")) for name in names)
    # From the wheel alone: the package is taken from the archive's contents, not from this checkout.
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from mlx_turboquant import kernel_source as k; "
        "print(k.__file__); print(k.kernel_source('codebooks.h')[:3])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / "site/mlx_turboquant/kernel_source.py"), "// "], done.stderr
