"""Rows that stay raw when blocks are encoded: copied to the bit, on every backend, and nothing else is held on to."""

import kernel_emulator
import metal_emu
import mlx.core as mx
import pytest
from conftest import memory_in_use
from row_cases import BACKENDS, EMULATOR, ORDERS, build_kernels, put_fault

from mlx_turboquant.ops import keep_rows as ops
from mlx_turboquant.ops.keep_rows import keep_rows
from mlx_turboquant.verification import KeepCase, full, run

CASES = [case for case in full() if isinstance(case, KeepCase)]


@pytest.fixture(scope="module")
def built():
    build_kernels(lambda case: run(case, "emulator"), CASES)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_rows_are_copied_to_the_bit(backend, built):
    with kernel_emulator.options(check=True):
        results = [run(case, backend) for case in CASES]
    assert len(results) >= 20 and all(result.ok for result in results), results


@pytest.mark.parametrize("backend", [EMULATOR])
def test_every_kind_of_kernel_type_checks_and_runs_in_any_order(backend, built):
    with kernel_emulator.noting() as calls:
        for case in CASES:
            run(case, backend)
    kinds = {(case.D, case.Dv, case.dtype, case.first, case.room) for case in CASES}
    assert len(calls) == len(kinds) and all(found == [] for found in metal_emu.typecheck(calls))
    for order in ORDERS:
        with kernel_emulator.options(check=True, **order):
            assert run(CASES[0], backend).ok


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("count > first ? count - first : 0u", "count"),  # zeros behind the rows
        ("start + first", "start"),  # the second part's rows
        ("part == 0", "part == 1"),
        ("uint(sizes[1])", "uint(sizes[0])"),  # the values' own capacity
    ],
)
@pytest.mark.parametrize("backend", [EMULATOR])
def test_a_fault_in_the_kernel_is_noticed(backend, right, wrong, monkeypatch):
    put_fault(monkeypatch, ops, "_KEEP", right, wrong)
    with kernel_emulator.options(check=True):
        assert not all(run(KeepCase(newest=newest, room=newest + 2), backend).ok for newest in (70, 50))


@pytest.mark.parametrize(("D", "dtype"), [(72, mx.float16), (7, mx.float32)])
def test_other_head_sizes_are_copied_by_plain_mlx(D, dtype):
    rows = mx.random.normal((1, 2, 40, D)).astype(dtype)
    kept = keep_rows(rows, rows + 1, first=2, start=30, stop=40, room=12)
    assert mx.array_equal(kept.newest[0][:, :, :10], rows[:, :, 30:]) and not kept.newest[1][:, :, 10:].any()
    assert mx.array_equal(kept.first[1], rows[:, :, :2] + 1)


def test_what_was_copied_does_not_hold_on_to_the_rest():
    def made():
        rows = mx.random.normal((1, 2, 4000, 64))
        mx.eval(rows)
        return keep_rows(rows, rows, first=4, start=3900, stop=4000, room=100, backend="reference")

    before = memory_in_use()
    kept = made()
    mx.eval(kept)
    bytes_kept = sum(array.nbytes for pair in kept for array in pair)
    assert memory_in_use() - before < 1.1 * bytes_kept + 16384 and bytes_kept < 1 << 18
