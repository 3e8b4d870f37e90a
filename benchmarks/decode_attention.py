"""One decode step's attention over a compressed cache, against fp16 and mlx-lm's 4-bit cache, in one run.

    python benchmarks/decode_attention.py [--cases 1x4096,1x32768,1x131072,8x16384] [--heads 32x8x128,14x2x64,16x4x256]
                                          [--schemes turbo4,turbo3,turbo2,turbo8v4] [--repeats 15] [--backend cuda]

A case is batch x tokens. Everything is on: centres, balance, sinks, a raw tail, lengths per sequence. Several layers,
each with its own cache so that no cache memory helps from one to the next, run one after the other, the output of one
being the query of the next, as in a model; a step is built while the last one runs, as mlx-lm does it (async_eval).
Times are of one layer: through MLX, Python included, in microseconds, the median and the spread (from the lower to the
upper quartile) over repeats in which all contestants take turns. `bound` is the time that the bytes of the cache take
at the highest memory bandwidth that this run reaches (copying, reading, fp16 attention); GPU time is added where
torch's profiler can see the kernels. Prints a card, a table and one line of JSON.
"""

import argparse
import json
import statistics
import time

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from mlx_turboquant.cli.evaluate import card
from mlx_turboquant.ops import attend as kernel
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.packing import words_per_row
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.tensor import PackedTensor

STEPS = 16  # steps under way: the next is built while one runs, as mlx-lm's generation does it
BLOCK, SINKS, TAIL, ROOM = 64, 4, 40, 88  # of a cache with default options, and its tail's buffer


def random_side(bits: int, B: int, Hkv: int, tokens: int, D: int, centered: bool) -> kernel.StoredSide:
    """Random codes: what they stand for does not change the time."""
    raw = [mx.random.normal((B, Hkv, n, D)).astype(mx.float16) for n in (SINKS, ROOM)]
    words = words_per_row(D, bits)
    codes = mx.random.randint(-(2**31), 2**31 - 1, (B, Hkv, tokens, words), mx.int32).view(mx.uint32)
    scales = mx.random.uniform(0.5, 1.5, (B, Hkv, tokens, 1)).astype(mx.float16)
    centers = mx.random.normal((B, Hkv, tokens // BLOCK, D)).astype(mx.float16) if centered else None
    return kernel.StoredSide(bits, PackedTensor(codes, scales, centers), *raw, make_rotation("hadamard", D))


def contestants(schemes, B, H, Hkv, D, tokens, layers, backend):
    """name -> (function of the queries, bytes of one layer's cache)."""
    scale = D**-0.5
    lengths = ((SINKS, tokens, TAIL),) * B
    raw_bytes = 2 * B * Hkv * (SINKS + TAIL) * D * 2

    def chain(step, caches):
        def run(queries):
            for cache in caches:
                queries = step(queries, *cache)
            return queries

        return run

    # As mlx-lm's KVCache: a slice of a buffer of whole steps of 256 tokens, which MLX CUDA hands to cuDNN.
    total = tokens + SINKS + TAIL
    fp16 = [
        [mx.random.normal((B, Hkv, -(-total // 256) * 256, D)).astype(mx.float16) for _ in range(2)]
        for _ in range(layers)
    ]
    mx.eval(fp16)
    table = {
        "fp16": (
            chain(
                lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k[:, :, :total], v[:, :, :total], scale=scale),
                fp16,
            ),
            2 * B * Hkv * total * D * 2,
        )
    }
    if "affine4" in schemes:
        packed = [[mx.quantize(rows[:, :, :total], group_size=64, bits=4) for rows in side] for side in fp16]
        table["affine4"] = (
            chain(
                lambda q, k, v: quantized_scaled_dot_product_attention(
                    q, k, v, scale=scale, mask=None, group_size=64, bits=4
                ),
                packed,
            ),
            sum(a.nbytes for side in packed[0] for a in side),
        )
    for name in schemes:
        if name == "affine4":
            continue
        scheme = KVScheme.parse(name)
        sides = [
            (
                random_side(scheme.key_bits, B, Hkv, tokens, D, True),
                random_side(scheme.value_bits, B, Hkv, tokens, D, False),
                mx.random.uniform(0.5, 2.0, (B, Hkv, D)),
            )
            for _ in range(layers)
        ]
        step = lambda q, k, v, balance: kernel.attend(  # noqa: E731
            q, k, v, lengths, scale=scale, block=BLOCK, balance=balance, backend=backend
        )
        table[name] = (chain(step, sides), sum(side.packed.nbytes for side in sides[0][:2]) + raw_bytes)
        mx.eval(sides)
    return table


def measure(table, queries, layers, repeats):
    """Seconds per layer, for each contestant and repeat."""
    times = {name: [] for name in table}
    for repeat in range(-3, repeats):
        for name, (run, _) in list(table.items()):
            mx.synchronize()
            start = time.perf_counter()
            try:
                out = queries
                for _ in range(STEPS):
                    out = run(out)
                    mx.async_eval(out)
                mx.eval(out)
            except RuntimeError as error:
                print(f"{name} cannot run here: {str(error).splitlines()[0]}", flush=True)
                del table[name], times[name]
                continue
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) / layers / STEPS)
    return times


def gpu_times(table, queries, layers):
    """Seconds of GPU time per layer, from torch's profiler (it sees every kernel of the process); {} without it."""
    try:
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return {}
    found = {}
    for name, (run, _) in table.items():
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(3):
                mx.eval(run(queries))
            mx.synchronize()
        total = sum(event.device_time for event in seen.events() if str(event.device_type).endswith("CUDA"))
        if total:
            found[name] = total / 1e6 / 3 / layers
    return found


def bandwidth_of_this_device() -> float:
    """Bytes per second of the fastest of three: a device copy, reading for a maximum, and fp16 attention."""
    x = mx.random.normal((8, 1 << 26)).astype(mx.float16)
    cache = x.reshape(4, 1, 8, -1, 128)
    query = mx.random.normal((1, 32, 1, 128)).astype(mx.float16)
    mx.eval(x, query)
    best = 0.0
    for run, nbytes in (
        (lambda: -x, 2 * x.nbytes),
        (lambda: x.reshape(-1, 4096).max(axis=1), x.nbytes),
        (lambda: [mx.fast.scaled_dot_product_attention(query, k, k, scale=0.1) for k in cache], 2 * x.nbytes),
    ):
        for _ in range(5):
            mx.synchronize()
            start = time.perf_counter()
            mx.eval(run())
            best = max(best, nbytes / (time.perf_counter() - start))
    return best


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="1x4096,1x32768,1x131072,8x16384")
    parser.add_argument("--heads", default="32x8x128", help="query heads x KV heads x head size, several with commas")
    parser.add_argument("--schemes", default="turbo4,turbo3,turbo2,turbo8v4,affine4")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--backend")
    parser.add_argument("--no-gpu-time", action="store_true")
    args = parser.parse_args()
    backend = choose_backend(args.backend)
    bandwidth = bandwidth_of_this_device()
    print(card("", f"decode attention, backend {backend}, bandwidth {bandwidth / 1e9:.0f} GB/s"))
    print("| heads | batch x tokens | cache | MLX us | spread | of fp16 | GPU us | of fp16 | bound us |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    rows = []
    for heads in args.heads.split(","):
        H, Hkv, D = map(int, heads.split("x"))
        for case in args.cases.split(","):
            B, tokens = map(int, case.split("x"))
            layers = 16 if B * Hkv * tokens * D > 1 << 24 else 32
            queries = mx.random.normal((B, H, 1, D)).astype(mx.float16)
            table = contestants(args.schemes.split(","), B, H, Hkv, D, tokens, layers, backend)
            times = measure(table, queries, layers, args.repeats)
            gpu = {} if args.no_gpu_time else gpu_times(table, queries, layers)
            for name, (_, nbytes) in table.items():
                low, middle, high = (1e6 * x for x in statistics.quantiles(times[name], n=4))
                row = {
                    **{"heads": heads, "case": case, "scheme": name, "mlx_us": middle, "low_us": low, "high_us": high},
                    "mlx_ratio": 1e6 * statistics.median(times["fp16"]) / middle,
                    "gpu_us": 1e6 * gpu[name] if name in gpu else None,
                    "gpu_ratio": gpu["fp16"] / gpu[name] if name in gpu and "fp16" in gpu else None,
                    "bound_us": 1e6 * nbytes / bandwidth,
                }
                rows.append(row)
                shown = [f"{row[k]:.1f}" if row[k] is not None else "" for k in ("gpu_us",)]
                ratio = "" if row["gpu_ratio"] is None else f"{row['gpu_ratio']:.2f}x"
                print(
                    f"| {heads} | {case} | {name} | {middle:.1f} | {low:.1f}-{high:.1f} | {row['mlx_ratio']:.2f}x "
                    f"| {shown[0]} | {ratio} | {row['bound_us']:.1f} |",
                    flush=True,
                )
            del table
            mx.clear_cache()
    print(json.dumps({"backend": backend, "bandwidth": bandwidth, "results": rows}))


if __name__ == "__main__":
    main()
