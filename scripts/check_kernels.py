"""Check every kernel in every template combination on this machine, and time attention beside fp16.

    python scripts/check_kernels.py [--quick] [--only attend] [--backend cuda-metal] [--no-timing] [--emulator]

Prints a card, a Markdown table per operation (what is an error and how much is allowed: mlx_turboquant/verification),
the time of one decode step's attention, and one line of JSON to paste into an issue. A combination that raises is a
row; the rest still runs. Exits with 1 if anything is wrong, with 2 if there is no kernel to run.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
from pathlib import Path

import mlx.core as mx

from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.verification import Result, full, quick, run
from mlx_turboquant.verification.machine import card, describe

ROOT = Path(__file__).resolve().parents[1]
MOST_WRONG = 20  # in the line of JSON, which has to fit into an issue
OPERATIONS = ("attend", "encode", "dequantize", "survey", "keep_rows", "balance", "score")
HEADS, TOKENS, LAYERS, REPEATS = (32, 8, 128), (4096, 32768), 4, 15


def parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--quick", action="store_true", help="the few combinations of mlx_turboquant.doctor")
    out.add_argument("--only", choices=OPERATIONS, help="one operation")
    out.add_argument("--backend", help="metal, cuda or cuda-metal (the Metal text on CUDA); default: what there is")
    out.add_argument("--no-timing", action="store_true", help="only check")
    out.add_argument("--emulator", action="store_true", help="a few on the CPU, every memory access checked (Linux)")
    return out


def main() -> None:
    """Check, time, and end with one line of JSON."""
    args = parser().parse_args()
    with one_line_errors("check_kernels"):
        machine = describe("reference" if args.emulator else args.backend)
        if args.emulator:
            machine |= {"backend": "emulator", "reason": "the kernels' Metal text on the CPU"}
        elif machine["backend"] == "reference":
            raise ValueError(
                f"[check_kernels] There is no kernel to run: the backend is reference ({machine['reason']}). On a Mac "
                "or with an NVIDIA GPU leave out --backend; on Linux, --emulator runs a few combinations on the CPU."
            )
        cases = quick() if args.quick or args.emulator else full()
        cases = [case for case in cases if args.only in (None, case.operation)]
        print(card(machine))
        with emulated() if args.emulator else contextlib.nullcontext():
            results = check(cases, machine["backend"])
        timing = []
        if not (args.no_timing or args.emulator) and args.only in (None, "attend"):
            try:
                timing = time_attention(machine["backend"])
            except Exception as error:  # what was checked is worth more than what was not timed
                print(f"Timing failed: {type(error).__name__}: {error}")
    summaries = {name: summary([r for r in results if r.case.operation == name]) for name in OPERATIONS}
    wrong = [result for result in results if not result.ok]
    print(f"\n{len(results) - len(wrong)} of {len(results)} combinations are right. To paste into an issue:\n")
    report = {**machine, "operations": {k: v for k, v in summaries.items() if v}, "timing": timing}
    shown = [result.summary() for result in wrong[:MOST_WRONG]]
    print(json.dumps({"check_kernels": 1, "ok": not wrong, **report, "wrong": shown}))
    sys.exit(1 if wrong else 0)


@contextlib.contextmanager
def emulated():
    """Inside, there is a backend named "emulator"."""
    sys.path.insert(0, str(ROOT / "tests"))
    import kernel_emulator

    with kernel_emulator.options(check=True):
        yield


def check(cases: list, backend: str) -> list[Result]:
    """Run the cases and print a table for each operation, a row at a time: a crash of the driver shows where."""
    results = []
    for operation in OPERATIONS:
        mine = [case for case in cases if case.operation == operation]
        if mine:
            print(f"\n## {operation}: {len(mine)} combinations\n\n{HEADING}", flush=True)
        for case in mine:
            if sys.stderr.isatty():
                print(f"\r{case}\033[K\r", end="", file=sys.stderr, flush=True)
            results.append(run(case, backend))
            print(row(results[-1]), flush=True)
    return results


HEADING = "| combination | error | allowed | ok | compile + run ms |\n| --- | --- | --- | --- | --- |"


def row(result: Result) -> str:
    """One line of a table."""
    if result.failure:
        text = " ".join(result.failure.split()).replace("|", "\\|")
        return f"| {result.case} | {text[:300]} | | **no** | |"
    ok = "yes" if result.ok else "**no**"
    return f"| {result.case} | {result.error:.2g} | {result.allowed:.2g} | {ok} | {1e3 * result.seconds:.0f} |"


def summary(results: list[Result]) -> dict:
    """How the combinations of one operation went, for JSON; {} without any."""
    if not results:
        return {}
    ran = [result for result in results if not result.failure and math.isfinite(result.error)]
    worst = max(ran, key=lambda result: result.error / result.allowed, default=None)
    return {
        "combinations": len(results),
        "wrong": sum(not result.ok for result in results),
        "raised": sum(bool(result.failure) for result in results),
        "kernels": sorted({name for result in results for name in result.case.kernels(result.backend)}),
        "worst": worst and worst.summary(),
        "median_ms": round(1e3 * statistics.median(result.seconds for result in ran), 1) if ran else None,
    }


def time_attention(backend: str) -> list[dict]:
    """Print and return the time of one decode step's attention in one layer, compressed and fp16."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from decode_attention import contestants, measure

    H, Hkv, D = HEADS
    print(f"\n## time of one decode step's attention, {H} query heads, {Hkv} KV heads, head size {D}\n")
    print("| tokens | cache | us per layer | spread | of fp16 |\n| --- | --- | --- | --- | --- |", flush=True)
    out = []
    for tokens in TOKENS:
        table = contestants(["turbo4", "turbo3", "turbo2"], 1, H, Hkv, D, tokens, LAYERS, backend)
        queries = mx.random.normal((1, H, 1, D)).astype(mx.float16)
        for name, times in (measured := measure(table, queries, LAYERS, REPEATS)).items():
            low, middle, high = (1e6 * seconds for seconds in statistics.quantiles(times, n=4))
            ratio = 1e6 * statistics.median(measured["fp16"]) / middle if "fp16" in measured else math.nan
            print(f"| {tokens} | {name} | {middle:.1f} | {low:.1f}-{high:.1f} | {ratio:.2f}x |", flush=True)
            out.append({"tokens": tokens, "cache": name, "us": round(middle, 1), "of_fp16": round(ratio, 3)})
        del table
        mx.clear_cache()
    return out


if __name__ == "__main__":
    main()
