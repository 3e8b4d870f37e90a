"""How many sequences fit into a memory, predicted and then held, and what they decode together.

    python benchmarks/capacity.py [--shape llama-3.1-8b] [--tokens 8192] [--memory 80] [--schemes fp16,turbo4]
                                  [--rounds 3] [--weights 4]

The prediction for a cache is (memory - weights) / bytes of one sequence that has decoded what is decoded here
(`mlx_turboquant.plan` prints the same bytes). It is confirmed by holding so many: caches are filled with random rows in
chunks, as a compressed prefill leaves them, then all sequences decode 64 tokens `--rounds` times. `peak` is the most
memory in use while they decode, weights included; a batch whose peak is above the memory is made smaller by what is
missing, and tried again. GB are 10^9 bytes. `--weights 16`: see generation.py. Prints a card, a table and one line of
JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import time

import mlx.core as mx
from generation import STEPS, decode
from random_models import SHAPES, random_model, weight_bytes

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.cli.evaluate import card
from mlx_turboquant.ops.backend import choose_backend

WARM = 2  # tokens decoded before anything is measured
CHUNK = 512  # tokens of all sequences that are raw at once while caches are filled
GB = 10**9


def held_caches(model, shape, scheme: str, batch: int, tokens: int) -> list:
    """Prompt caches of so many sequences of so many tokens, compressed but for their tails."""
    text = scheme if scheme == "fp16" else f"{scheme}:prefill=compressed"
    cache = make_prompt_cache(model, kv_scheme=text)
    rows = [mx.random.normal((batch, shape.kv_heads, CHUNK, shape.dim), mx.float16) for _ in range(2)]
    for layer in cache:
        for start in range(0, tokens, CHUNK):
            layer.update_and_fetch(*(-each[:, :, : tokens - start] for each in rows))
            mx.eval([rows.array for rows in layer._tail] if scheme != "fp16" else [layer.keys, layer.values])
        if scheme != "fp16":
            layer.compress()
            mx.eval([rows.array for rows in layer._tail])
        mx.clear_cache()
    return cache


def bytes_of_one(model, shape, scheme: str, tokens: int, decoded: int) -> int:
    """Bytes of one sequence's cache with its spare room after a prompt and so many more tokens, from one layer."""
    (layer,) = make_prompt_cache(model, kv_scheme=scheme)[:1]
    for n in (tokens, *[1] * decoded):
        layer.update_and_fetch(*(mx.zeros((1, shape.kv_heads, n, shape.dim), mx.float16) for _ in range(2)))
    return shape.layers * layer.nbytes


def measure(model, shape, scheme: str, args: argparse.Namespace) -> dict:
    """The largest batch that fits, its peak and its tokens per second."""
    one = bytes_of_one(model, shape, scheme, args.tokens, WARM + args.rounds * STEPS)
    memory = int(args.memory * GB)
    predicted = batch = int((memory - weight_bytes(model)) // one)
    while True:
        gc.collect()
        mx.clear_cache()
        start = time.perf_counter()
        cache = held_caches(model, shape, scheme, batch, args.tokens)
        token = mx.zeros((batch, 1), mx.int32)
        decode(model, cache, token, WARM)
        mx.synchronize()
        print(f"{scheme}: {batch} sequences after {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        mx.clear_cache()
        mx.reset_peak_memory()
        seconds = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            decode(model, cache, token, STEPS)
            seconds.append((time.perf_counter() - start) / STEPS)
            peak = mx.get_peak_memory()
            if peak > memory:
                break
        nbytes = sum(layer.nbytes for layer in cache)
        del cache
        if peak <= memory:
            break
        batch -= max(-(-(peak - memory) // one), 1)
        if batch < 1:
            raise SystemExit(
                f"[capacity] {args.memory:g} GB hold no sequence of {scheme}: {peak / GB:.2f} GB at the least."
            )
    step = statistics.median(seconds)
    return {
        **{"scheme": scheme, "bytes_of_one": one, "predicted": predicted, "batch": batch, "peak_bytes": peak},
        **{"cache_bytes": nbytes, "step_ms": 1e3 * step, "low_ms": 1e3 * min(seconds), "high_ms": 1e3 * max(seconds)},
        "tokens_per_s": batch / step,
    }


def main() -> None:
    """Measure every scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--memory", type=float, default=80, help="GB for weights and caches (80)")
    parser.add_argument("--schemes", default="fp16,turbo4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", type=int, choices=(4, 16), default=4, help="bits; see generation.py")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    model = random_model(shape, bits=args.weights)
    what = f"{args.shape}, weights of {args.weights} bits, {args.tokens:,} tokens in each sequence, {args.memory:g} GB"
    what += f", backend {choose_backend()}"
    print(card("", what))
    print("| cache | MB of one | predicted | batch | of fp16 | peak GB | ms | tokens/s | of fp16 |")
    print("| --- " * 9 + "|", flush=True)
    rows = []
    for scheme in args.schemes.split(","):
        rows.append(measure(model, shape, scheme, args))
        row, first = rows[-1], rows[0]
        print(
            f"| {scheme} | {row['bytes_of_one'] / 1e6:,.1f} | {row['predicted']} | {row['batch']} "
            f"| {row['batch'] / first['batch']:.2f}x | {row['peak_bytes'] / GB:.2f} | {row['step_ms']:.1f} "
            f"| {row['tokens_per_s']:,.0f} | {row['tokens_per_s'] / first['tokens_per_s']:.2f}x |",
            flush=True,
        )
    print(json.dumps({"backend": choose_backend(), **vars(args), "weight_bytes": weight_bytes(model), "results": rows}))


if __name__ == "__main__":
    main()
