"""``mlx_turboquant.doctor``: this machine, its backend, which kernels were verified where, and a self-test of them.

It exits with 0 if all is well, with 1 if a kernel is wrong here, and says which and what to do then.
"""

import argparse
import json
import sys
import time

from mlx_turboquant.cli import hook
from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.ops.backend import BACKENDS, VARIABLE
from mlx_turboquant.verification import RECORD, Result, quick, run
from mlx_turboquant.verification.machine import card, describe

ADVICE = f"""\
Until it is mended, set {VARIABLE}=reference: plain MLX operations do the work then, correctly and slower.
Please run scripts/check_kernels in a checkout and paste the line of JSON that it ends with into an issue."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(prog="mlx_turboquant.doctor", description=__doc__.replace("``", ""))
    out.add_argument("--backend", help=f"{', '.join(BACKENDS)}; the default is {VARIABLE}, else what the device has")
    out.add_argument("--json", action="store_true", help="end with one line of JSON")
    return out


def main() -> None:
    """Print the report; exit with 1 if a kernel is wrong."""
    with one_line_errors("mlx_turboquant.doctor"):
        _doctor(parser().parse_args())


def _doctor(args: argparse.Namespace) -> None:
    machine = describe(args.backend)
    installed = hook.status()
    print(f"{card(machine)}\nmlx_lm hook: {installed}\n", flush=True)
    start = time.perf_counter()
    results = [run(case, machine["backend"]) for case in quick()]
    seconds = time.perf_counter() - start
    ok = all(result.ok for result in results)
    print(f"{table(results)}\n\n{verdict(results, machine, seconds)}")
    if args.json:
        report = {
            **machine,
            "hook": installed,
            "record": [row._asdict() for row in RECORD],
            "checks": [result.summary() for result in results],
            "seconds": round(seconds, 2),
            "ok": ok,
        }
        print(json.dumps(report))
    sys.exit(0 if ok else 1)


def table(results: list[Result]) -> str:
    """Which kernels were verified where, and here and now."""
    lines = ["| kernel | checked by the emulator | on CUDA | on a Mac | on this device now |", "| --- " * 5 + "|"]
    for row in RECORD:
        mine = [result.ok for result in results if row.kernel in result.case.kernels(result.backend)]
        here = f"{sum(mine)} of {len(mine)} right" if mine else "not run"
        lines.append(f"| {row.kernel} | {row.emulator} | {row.cuda} | {row.mac} | {here} |")
    return "\n".join(lines)


def verdict(results: list[Result], machine: dict, seconds: float) -> str:
    """What the self-test found, in words."""
    wrong = [result for result in results if not result.ok]
    count = f"{len(results) - len(wrong)} of {len(results)} checks right in {seconds:.1f} s"
    if machine["backend"] == "reference":
        count = (
            f"No kernel ran here: the backend is reference ({machine['reason']}). Its plain MLX operations were "
            f"checked against dense arithmetic in higher precision instead: {count}."
        )
    else:
        count = f"self-test on {machine['backend']}: {count}."
    return "\n".join([count, *(describe_wrong(result) for result in wrong), *([ADVICE] if wrong else [])])


def describe_wrong(result: Result) -> str:
    """One wrong result as a line."""
    what = result.failure.strip() or f"error {result.error:.2g}, allowed {result.allowed:.2g}"
    name = " and ".join(result.case.kernels(result.backend)) or result.case.operation
    return f"WRONG: {name}, {result.case}: {what}"


if __name__ == "__main__":
    main()
