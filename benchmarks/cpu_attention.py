"""One decode step's attention in plain MLX operations on the CPU: compressed caches beside raw ones, in one run.

    python benchmarks/cpu_attention.py [--tokens 1024,4096,16384] [--heads 32x8x128,9x3x64] [--repeats 15]
                                       [--schemes turbo4,turbo3,turbo2,turbo8v4,int8,affine4,qjl4]

Every contestant is one layer with a batch of 1. Raw ones are `mx.fast.scaled_dot_product_attention` on keys and values
in float16, bfloat16 and float32; compressed ones `attend` on what a `TurboQuantKVCache` holds after a float16 prompt,
with sinks, centres, balance and tail as by default. Times are in milliseconds, of one call with its evaluation: the
median and the quartiles over repeats in which all contestants take turns. `peak` is the memory that one call takes at
its highest point beyond what is held, in MiB. Prints a card, a table and one line of JSON.
"""

import argparse
import json
import statistics
import time

import mlx.core as mx

from mlx_turboquant import TurboQuantKVCache
from mlx_turboquant.attention import attend
from mlx_turboquant.cli.evaluate import card

RAW = {"fp16": mx.float16, "bf16": mx.bfloat16, "fp32": mx.float32}
WARM_UP = 2


def contestants(schemes: list[str], H: int, Hkv: int, D: int, tokens: int) -> dict:
    """name -> function without arguments that builds one layer's attention output (1, H, 1, D)."""
    rows = [mx.random.normal((1, Hkv, tokens, D), key=mx.random.key(seed)).astype(mx.float16) for seed in (0, 1)]
    queries = mx.random.normal((1, H, 1, D), key=mx.random.key(2)).astype(mx.float16)
    table = {}
    for name, dtype in RAW.items():
        arrays = [array.astype(dtype) for array in (queries, *rows)]
        mx.eval(arrays)
        table[name] = lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=D**-0.5), arrays
    for name in schemes:
        cache = TurboQuantKVCache(name)
        cache.update_and_fetch(*rows)
        cache.observe_queries(queries)
        cache.compress()
        mx.eval(cache.state)
        table[name] = (
            lambda q, k, v: attend(q, k, v, D**-0.5, backend="reference"),
            (
                queries,
                *cache.keys_and_values(),
            ),
        )
    return {name: lambda run=run, arrays=arrays: run(*arrays) for name, (run, arrays) in table.items()}


def measure(table: dict, repeats: int) -> tuple[dict, dict]:
    """For each contestant the milliseconds of every repeat, and the highest bytes of one call beyond what is held."""
    times, peaks = {name: [] for name in table}, {}
    for repeat in range(-WARM_UP, repeats):
        for name, run in table.items():
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(run())
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
            peaks[name] = mx.get_peak_memory() - held
    return times, peaks


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1024,4096,16384")
    parser.add_argument("--heads", default="32x8x128,9x3x64", help="query heads x KV heads x head size, with commas")
    parser.add_argument("--schemes", default="turbo4,turbo3,turbo2,turbo8v4,int8,affine4,qjl4")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(card("", "attention in plain MLX on the CPU"))
    print("| heads | tokens | cache | ms | quartiles | fp16 / it | bf16 / it | fp32 / it | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    results = []
    for heads in args.heads.split(","):
        H, Hkv, D = map(int, heads.split("x"))
        for tokens in map(int, args.tokens.split(",")):
            times, peaks = measure(contestants(args.schemes.split(","), H, Hkv, D, tokens), args.repeats)
            middles = {name: statistics.median(each) for name, each in times.items()}
            for name, each in times.items():
                low, middle, high = statistics.quantiles(each, n=4)
                ratios = {f"{raw}_ratio": middles[raw] / middle for raw in RAW}
                results.append(
                    {
                        **{"heads": heads, "tokens": tokens, "cache": name, "ms": middle, "low_ms": low},
                        **{"high_ms": high, **ratios, "peak_bytes": peaks[name]},
                    }
                )
                shown = " | ".join(f"{ratio:.2f}x" for ratio in ratios.values())
                print(
                    f"| {heads} | {tokens} | {name} | {middle:.2f} | {low:.2f}-{high:.2f} | {shown} "
                    f"| {peaks[name] / 2**20:.1f} |",
                    flush=True,
                )
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
