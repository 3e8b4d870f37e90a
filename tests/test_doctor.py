"""The doctor and scripts/check_kernels: what they say and exit with where kernels are right, wrong or absent."""

import importlib.util
import json
import sys
from pathlib import Path

import kernel_emulator  # noqa: F401, registers "emulator"
import metal_emu
import mlx.core as mx
import pytest

from mlx_turboquant.cli import doctor
from mlx_turboquant.ops import attend_plan
from mlx_turboquant.ops.backend import VARIABLE, choose_backend
from mlx_turboquant.ops.kernel import BUILDERS, register_builder
from mlx_turboquant.verification import RECORD, AttendCase, DequantizeCase, EncodeCase, ScoreCase, full, quick, run
from mlx_turboquant.verification.cases import KV_HEADS

ROOT = Path(__file__).resolve().parents[1]
on_cpu = pytest.mark.skipif(choose_backend() != "reference", reason="a kernel runs on this machine")


def zeros(kernel, *_):
    """A builder of kernels that compile and are wrong."""

    def call(output_shapes, output_dtypes, **_):
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    return call


def wrong_merge(kernel, *rest):
    """The kernels as they are, but for the second pass of attention, which is 2% off."""
    right = BUILDERS["emulator"](kernel, *rest)
    return (lambda **call: [1.02 * x for x in right(**call)]) if kernel.name == "attend_merge" else right


def broken(kernel, *_):
    """A builder of kernels that do not compile."""
    raise RuntimeError("[metal::Device] Unable to build metal library from source\nprogram_source:1: error: no | such")


for name, build in {"zeros": zeros, "wrong_merge": wrong_merge, "broken": broken}.items():
    register_builder(name, build)


@pytest.fixture
def script():
    """scripts/check_kernels.py as a module."""
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "scripts" / "check_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(monkeypatch, capsys):
    """A function (main, arguments...) -> exit code, stdout, stderr."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def run_main(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, *capsys.readouterr()

    return run_main


@on_cpu
def test_without_a_gpu_it_checks_the_reference_and_says_that_no_kernel_ran(call):
    code, out, _ = call(doctor.main)
    assert code == 0 and "No kernel ran here" in out and "14 of 14 checks right" in out
    assert all(f"| {row.kernel} |" in out for row in RECORD) and out.count("| not run |") == len(RECORD)


@on_cpu
def test_the_json_has_the_documented_keys(call):
    code, out, _ = call(doctor.main, "--json", "--backend", "auto")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and list(report) == [
        *("device", "memory_gb", "system", "mlx_device", "backend", "reason", "versions", "hook", "record", "checks"),
        *("seconds", "ok"),
    ]
    assert report["reason"] == f"what {mx.default_device()} has" and report["memory_gb"] > 0
    assert set(report["versions"]) == {"python", "mlx", "mlx-lm", "mlx_turboquant"}
    assert set(report["checks"][0]) == {"operation", "kernels", "case", "ok", "error", "allowed", "ms"}


def test_the_variable_is_named_as_the_reason(call, monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert f"asked for by the variable {VARIABLE}" in call(doctor.main)[1]


@pytest.mark.parametrize("arguments", [("--backend", "metl"), ("--backend", "cuda-metal")])
@on_cpu
def test_a_backend_that_is_not_there_is_one_line(call, script, arguments):
    for main in (doctor.main, script.main):
        code, out, err = call(main, *arguments)
        assert code == 2 and out == "" and err.count("\n") == 1 and f"Backend '{arguments[1]}'"[8:] in err


def test_wrong_kernels_are_named_with_what_to_do(call):
    code, out, _ = call(doctor.main, "--backend", "zeros", "--json")
    report = json.loads(out.splitlines()[-1])
    assert code == 1 and not report["ok"] and [check["ok"] for check in report["checks"]] == [False] * 14
    assert "WRONG: encode, 4 bits D128 float16: error" in out and "| attend_merge | " in out and "0 of 2 right" in out
    assert f"{VARIABLE}=reference" in out and "scripts/check_kernels" in out


def test_a_kernel_that_does_not_compile_is_a_result_like_others(call, script):
    code, out, _ = call(doctor.main, "--backend", "broken")
    assert code == 1 and out.count("WRONG: ") == 14 and "Unable to build metal library" in out
    code, out, _ = call(script.main, "--backend", "broken", "--quick", "--no-timing")
    report = json.loads(out.splitlines()[-1])
    assert code == 1 and report["operations"]["attend"] == {
        **{"combinations": 5, "wrong": 5, "raised": 5, "kernels": ["attend", "attend_merge"]},
        **{"worst": None, "median_ms": None},
    }
    assert out.count("| **no** | |") == len(report["wrong"]) == 14 and "no \\| such" in out


def test_a_wrong_backend_for_these_rows_is_no_silent_fallback():
    assert "no kernel runs, because head size 24" in run(DequantizeCase(D=24), "zeros").failure
    assert "no kernel runs, because head size 24" in run(AttendCase(D=24), "zeros").failure
    assert run(AttendCase(D=24), "reference").ok


@pytest.mark.skipif(bool(metal_emu.UNSUPPORTED), reason=metal_emu.UNSUPPORTED)
def test_the_kernels_pass_their_own_self_test_and_a_small_error_does_not(call, script):
    """On the emulator, the two-pass cases again with a merge that is 2% off."""
    code, out, _ = call(script.main, "--emulator")
    report = json.loads(out.splitlines()[-1])
    assert code == 0 and report["ok"] and report["backend"] == "emulator" and "14 of 14 combinations are right" in out
    assert out.count("| yes |") == 14 and [line for line in out.splitlines() if line.startswith("## ")] == [
        *("## attend: 5 combinations", "## encode: 2 combinations", "## dequantize: 2 combinations"),
        *(
            "## survey: 1 combinations",
            "## keep_rows: 1 combinations",
            "## balance: 1 combinations",
            "## score: 2 combinations",
        ),
    ]
    found = {case.passes: run(case, "wrong_merge").ok for case in quick() if isinstance(case, AttendCase)}
    assert found == {1: True, 2: False}


def test_one_operation_can_be_chosen(call, script):
    _, out, _ = call(script.main, "--backend", "zeros", "--only", "dequantize", "--quick")
    assert "## dequantize" in out and "## attend" not in out and "## time" not in out


def test_attention_is_timed_beside_fp16(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "TOKENS", (64,))
    monkeypatch.setattr(script, "HEADS", (4, 2, 64))
    monkeypatch.setattr(script, "REPEATS", 2)
    rows = script.time_attention("zeros")
    assert [row["cache"] for row in rows] == ["fp16", "turbo4", "turbo3", "turbo2"] and rows[0]["of_fp16"] == 1
    assert capsys.readouterr().out.count("| 64 | ") == 4


def test_the_full_list_goes_through_every_choice():
    cases = full()
    assert len({(case.operation, str(case)) for case in cases}) == len(cases) > 400 and len(quick()) == 14
    attends = [case for case in cases if isinstance(case, AttendCase)]
    pairs = {(case.key_bits, case.value_bits, case.passes) for case in attends}
    assert pairs == {(k, v, p) for k in (0, 2, 3, 4, 8) for v in (0, 2, 3, 4, 8) for p in (1, 2) if k or v}
    assert {case.G for case in attends} == set(range(1, 17)) and {case.L for case in attends} == set(range(1, 9))
    for kind in (AttendCase, EncodeCase, DequantizeCase):
        mine = [case for case in cases if isinstance(case, kind)]
        assert {(case.D, case.dtype) for case in mine} >= {
            (D, dtype) for D in (64, 80, 96, 128, 256) for dtype in ("float16", "bfloat16", "float32")
        }
        assert {case.block for case in mine} == {16, 32, 64, 128, 256}
        assert {case.group for case in mine} >= {0, 16, 32, 64}
    scores = {(case.bits, case.m) for case in cases if isinstance(case, ScoreCase)}
    assert scores >= {(bits, m) for bits in (1, 2, 3, 4, 8) for m in (1, 2, 4, 8, 17, 64)}


@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_cases_run_the_passes_and_the_kernels_that_they_say(backend):
    for case in (case for case in full() if isinstance(case, AttendCase)):
        groups = [case.D // case.group if bits and case.group else 1 for bits in (case.key_bits, case.value_bits)]
        shape = attend_plan.Shape(
            *(backend, len(case.lengths), KV_HEADS * case.G, case.L, case.D, KV_HEADS, case.block),
            *(getattr(mx, case.dtype), case.key_bits, case.value_bits, *groups, case.center, case.balance),
            *(1 if case.mask == "boolean" else 2 if case.mask == "added" else 0, case.mask == "causal", case.logits),
        )
        with attend_plan.tensor_cores_for_any_length():
            plan = attend_plan.plan_of(shape, case.packed, -(-(case.sinks + case.tail) // attend_plan.TILE))
        assert case.passes == (1 if plan.single else 2), case
        assert ("attend_mma" in case.kernels(backend)) == plan.tensor_cores, case


def test_every_kernel_has_a_line_in_the_record_and_in_the_documentation():
    names = {path.stem for path in (ROOT / "kernels").iterdir() if path.suffix in (".metal", ".cu")}
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert {row.kernel for row in RECORD} == names and all(f"| `{name}` |" in text for name in names)
    assert {name for case in full() for backend in ("metal", "cuda") for name in case.kernels(backend)} == names
