"""Encoding a prompt's keys and values, and decoding them again, against a copy of the same fp16 bytes, in one run.

    python benchmarks/encode.py [--cases 1x32768,1x4096,1x64] [--heads 8x128,8x64,4x256] [--bits 4,3,2,8]
                                [--scalings 1,2,3] [--layers 8] [--repeats 15] [--backend cuda] [--no-gpu-time]

A case is batch x tokens. One layer's keys (centred and balanced) and values are encoded, a call each, from whole
buffers with sinks before the rows and a tail behind them. Several layers with buffers of their own are evaluated
together, so that no cache memory helps from one to the next. Times are of one layer's keys and values through MLX, in
microseconds, the median and the spread (from the lower to the upper quartile) over repeats in which all contestants
take turns. GPU time is added where torch's profiler can see the kernels. `copy` reads and writes all bytes of the rows
(turning their sign: MLX leaves out a plain copy). `none` is keys and values without centre and balance. `reference` is
plain MLX. Prints a card, a table and one line of JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_turboquant.cli.evaluate import card
from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.ops.dequantize import dequantize
from mlx_turboquant.ops.encode import encode
from mlx_turboquant.rotation import make_rotation

BLOCK, SINKS, TAIL = 64, 4, 40


def contestants(args, B: int, tokens: int, H: int, D: int, backend: str) -> dict[str, Callable[[], list[mx.array]]]:
    """name -> a function that makes the arrays to evaluate, for all layers."""
    rotation, stop = make_rotation("hadamard", D), SINKS + tokens
    layers = [
        [mx.random.normal((B, H, stop + TAIL, D)).astype(mx.float16) for _ in range(2)] for _ in range(args.layers)
    ]
    exact = [[mx.random.normal((B, H, tokens, D)).astype(mx.float16) for _ in range(2)] for _ in range(args.layers)]
    balance = mx.random.uniform(0.5, 2.0, (B, H, D))
    mx.eval(layers, exact, balance)
    common = dict(group=D, block=BLOCK, rotation=rotation)

    def encoded(bits: int, scalings: int, backend: str, keys: bool = True):
        treatment = (dict(center=True, balance=balance) if keys else dict(center=False)), dict(center=False)
        return [
            encode(rows, SINKS, stop, bits=bits, scalings=scalings, backend=backend, **common, **how).packed
            for layer in layers
            for rows, how in zip(layer, treatment, strict=True)
        ]

    def encodes(*arguments):
        return lambda: [array for packed in encoded(*arguments) for array in packed if array is not None]

    table = {"copy": lambda: [-rows for layer in exact for rows in layer]}
    default = lloyd_max.SCALINGS
    for bits in args.bits:
        for scalings in args.scalings if bits == args.bits[0] else [default]:
            table[f"encode {bits} bits, {scalings} scalings"] = encodes(bits, scalings, backend)
    first = args.bits[0]
    table[f"encode {first} bits, {default} scalings, none"] = encodes(first, default, backend, False)
    for bits in args.bits:
        packed = encoded(bits, default, backend)
        mx.eval(packed)
        table[f"decode {bits} bits"] = lambda packed=packed, bits=bits: [
            dequantize(
                *(side, 0, tokens),
                **dict(bits=bits, dim=D, block=BLOCK, rotation=rotation, backend=backend),
                balance=None if side.centers is None else balance,
            )
            for side in packed
        ]
    if args.reference:
        table[f"encode {first} bits, {default} scalings, reference"] = encodes(first, default, "reference")
    return table


def measure(table, layers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per layer, for each contestant and repeat."""
    times = {name: [] for name in table}
    for repeat in range(-2, repeats):
        for name, run in table.items():
            mx.synchronize()
            start = time.perf_counter()
            outputs = run()
            mx.eval(outputs)
            mx.synchronize()
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) / layers)
            del outputs
    return times


def gpu_times(table, layers: int) -> dict[str, float]:
    """Seconds of GPU time per layer, from torch's profiler (it sees every kernel of the process); {} without it."""
    try:
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return {}
    found = {}
    for name, run in table.items():
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(3):
                mx.eval(run())
            mx.synchronize()
        total = sum(event.device_time for event in seen.events() if str(event.device_type).endswith("CUDA"))
        if total:
            found[name] = total / 1e6 / 3 / layers
    return found


def main() -> None:
    """Measure every case."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="1x32768", help="batch x tokens, several with commas")
    parser.add_argument("--heads", default="8x128", help="KV heads x head size, several with commas")
    parser.add_argument("--bits", type=numbers, default=[4, 3, 2, 8])
    parser.add_argument("--scalings", type=numbers, default=[1, 2, 3], help="for the first of the bits")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--backend")
    parser.add_argument("--reference", action="store_true", help="plain MLX too")
    parser.add_argument("--no-gpu-time", action="store_true")
    args = parser.parse_args()
    backend = choose_backend(args.backend)
    print(card("", f"encode and decode, backend {backend}"))
    print("| KV heads x size | batch x tokens | what | MLX us | spread | of a copy | GPU us | of a copy |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    rows = []
    for heads in args.heads.split(","):
        H, D = map(int, heads.split("x"))
        for case in args.cases.split(","):
            B, tokens = map(int, case.split("x"))
            table = contestants(args, B, tokens, H, D, backend)
            times = measure(table, args.layers, args.repeats)
            gpu = {} if args.no_gpu_time else gpu_times(table, args.layers)
            for name in table:
                low, middle, high = (1e6 * x for x in statistics.quantiles(times[name], n=4))
                row = {
                    **{"heads": heads, "case": case, "what": name, "mlx_us": middle, "low_us": low, "high_us": high},
                    "mlx_ratio": middle / 1e6 / statistics.median(times["copy"]),
                    "gpu_us": 1e6 * gpu[name] if name in gpu else None,
                    "gpu_ratio": gpu[name] / gpu["copy"] if name in gpu and "copy" in gpu else None,
                }
                rows.append(row)
                gpu_us, gpu_ratio = (
                    "" if row[k] is None else form.format(row[k])
                    for k, form in (("gpu_us", "{:.1f}"), ("gpu_ratio", "{:.2f}x"))
                )
                print(
                    f"| {heads} | {case} | {name} | {middle:.1f} | {low:.1f}-{high:.1f} | {row['mlx_ratio']:.2f}x "
                    f"| {gpu_us} | {gpu_ratio} |",
                    flush=True,
                )
            del table
            mx.clear_cache()
    print(json.dumps({"backend": backend, "results": rows}))


if __name__ == "__main__":
    main()
