"""Decoding and time to first token of whole models, every cache beside the fp16 one, in one run.

    python benchmarks/generation.py [--shapes llama-3.1-8b,qwen2.5-1.5b,llama-3.2-1b] [--models PATH_OR_REPO,..]
                                    [--cases 1x1024,1x8192,1x32768,1x131072,8x8192,8x32768,32x8192] [--rounds 5]
                                    [--schemes turbo8v4,turbo4,turbo3,turbo4v2,mlx8,mlx4] [--first 8192]
                                    [--weights 4] [--plot FILE.png]

Shapes are published ones with random weights of 4 bits or, with `--weights 16`, of 16 (`random_models.py`): MLX's
product of 4-bit weights with several rows is slow on CUDA and hides what attention takes there. `--models` adds real
ones. A case is batch x cached tokens. For decoding, caches are filled with random keys and values, whose content does
not change the time, and all caches of a case are held at once: in each round every one of them decodes 64 tokens, one
after the other, as mlx-lm's generate_step does it (a step is built while the last one runs), so that a compressed
cache encodes one block in each round. `ms` is of one step, the median of the rounds and in brackets the spread (lower
to upper quartile); `of fp16` is the median over the rounds of fp16's time over this one's in the same round, so more
than 1x is faster.

For each `--first` length: a random prompt is read by generate_step up to its first token, caches taking turns (`first
token`); and a cache that holds a raw prompt of that length decodes one token, which compresses it, and later one more
(`first step`, `next step`, each waited for). Prints a card, tables and one line of JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from random_models import SHAPES, random_model, weight_bytes

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.cli.evaluate import card
from mlx_turboquant.ops.backend import choose_backend

STEPS = 64  # of a round: one block
WARM = 8
PIECE = 1 << 15  # tokens that caches are filled with at a time


def filled(model: Any, scheme: str, batch: int, tokens: int) -> list[Any]:
    """A prompt cache that holds so many random tokens, raw as after a prompt."""
    cache, attention = make_prompt_cache(model, kv_scheme=scheme), model.layers[0].self_attn
    heads, dim = attention.n_kv_heads, attention.k_proj.weight.shape[0] // attention.n_kv_heads
    rows = [mx.random.normal((batch, heads, min(PIECE, tokens), dim), mx.float16) for _ in range(2)]
    for one in cache:
        for start in range(0, tokens, PIECE):
            # The same random rows for all layers, but a copy of their own: making them takes longer than measuring.
            one.update_and_fetch(*(-each[:, :, : tokens - start] for each in rows))
            mx.eval(list(arrays(one)))
    return cache


def arrays(layer: Any):
    """The arrays that a layer's cache holds, without asking a compressed one for its state, which prompts do."""
    sides = (layer.keys, layer.values) if hasattr(layer, "values") else [rows.array for rows in layer._tail]
    for side in sides:
        yield from side if isinstance(side, (tuple, list)) else (side,)


def decode(model: Any, cache: list[Any], token: mx.array, steps: int) -> mx.array:
    """Decode so many tokens (B, 1) greedily, building a step while the last one runs."""
    for _ in range(steps):
        following = model(token, cache=cache)[:, -1].argmax(axis=-1, keepdims=True)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return token


def spread(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    return tuple(statistics.quantiles(times, n=4)) if len(times) > 1 else (times[0],) * 3


def decode_times(model: Any, schemes: list[str], batch: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a decode step for every cache, taking turns."""
    contestants, times, held = {}, {}, {}
    for scheme in schemes:
        try:
            cache = filled(model, scheme, batch, tokens)
            token = decode(model, cache, mx.zeros((batch, 1), mx.int32), WARM)
        except RuntimeError as error:
            print(f"{scheme} cannot run here: {str(error).splitlines()[0]}", flush=True)
            continue
        contestants[scheme], times[scheme] = (cache, token), []
        held[scheme] = sum(layer.nbytes for layer in cache)
        mx.clear_cache()
    for turn in range(-1, rounds):
        for scheme, (cache, token) in contestants.items():
            mx.synchronize()
            start = time.perf_counter()
            decode(model, cache, token, STEPS)
            if turn >= 0:
                times[scheme].append((time.perf_counter() - start) / STEPS)
    rows = []
    for scheme, seconds in times.items():
        low, middle, high = spread(seconds)
        ratio = statistics.median(a / b for a, b in zip(times["fp16"], seconds, strict=True))
        rows.append(
            {
                **{"batch": batch, "tokens": tokens, "scheme": scheme, "ms": 1e3 * middle, "low_ms": 1e3 * low},
                **{"high_ms": 1e3 * high, "tokens_per_s": batch / middle, "of_fp16": ratio, "nbytes": held[scheme]},
            }
        )
    return rows


def first_times(model: Any, schemes: list[str], tokens: int, rounds: int, vocabulary: int) -> list[dict[str, Any]]:
    """Seconds to the first token of a prompt, and of the first two decode steps after a raw prompt."""
    prompt = mx.random.randint(0, vocabulary, (tokens,))
    token = mx.zeros((1, 1), mx.int32)
    seconds = {scheme: {"first token": [], "first step": [], "next step": []} for scheme in schemes}
    for turn in range(-1, rounds):
        for scheme in list(seconds):
            try:
                taken = first_times_once(model, scheme, prompt, token)
            except RuntimeError as error:
                print(f"{scheme} cannot run here: {str(error).splitlines()[0]}", flush=True)
                del seconds[scheme]
                continue
            for name, value in taken.items():
                seconds[scheme][name] += [value] if turn >= 0 else []
    rows = []
    for scheme, each in seconds.items():
        row = {"tokens": tokens, "scheme": scheme}
        for name, values in each.items():
            low, middle, high = spread(values)
            row[name] = {"ms": 1e3 * middle, "low_ms": 1e3 * low, "high_ms": 1e3 * high}
        pairs = zip(seconds["fp16"]["first token"], each["first token"], strict=True)
        row["of_fp16"] = statistics.median(mine / theirs for theirs, mine in pairs)
        row["steps"] = statistics.median(a / b for a, b in zip(each["first step"], each["next step"], strict=True))
        rows.append(row)
    return rows


def first_times_once(model: Any, scheme: str, prompt: mx.array, token: mx.array) -> dict[str, float]:
    """The same for one cache, once."""
    taken = {}
    cache = make_prompt_cache(model, kv_scheme=scheme)
    mx.synchronize()
    start = time.perf_counter()
    next(generate_step(prompt, model, prompt_cache=cache, max_tokens=1))
    taken["first token"] = time.perf_counter() - start
    del cache
    cache = filled(model, scheme, 1, prompt.size)
    mx.synchronize()
    for name in ("first step", "second", "third", "next step"):
        start = time.perf_counter()
        mx.eval(model(token, cache=cache).argmax(axis=-1))
        taken[name] = time.perf_counter() - start
    gc.collect()
    return {name: taken[name] for name in ("first token", "first step", "next step")}


def draw(results: list[dict[str, Any]], file: str) -> None:
    """Speed relative to fp16 against the length of the context, a panel for each model and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(r["model"], batch) for r in results for batch in dict.fromkeys(row["batch"] for row in r["decode"])]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (model, batch) in zip(axes[0], panels, strict=True):
        rows = [row for r in results if r["model"] == model for row in r["decode"] if row["batch"] == batch]
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            mine = [row for row in rows if row["scheme"] == scheme]
            axis.plot([row["tokens"] for row in mine], [row["of_fp16"] for row in mine], marker="o", label=scheme)
        axis.set_xscale("log", base=2)
        axis.set(title=f"{model}, batch {batch}", xlabel="cached tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("decode speed, fp16 cache = 1")
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
    print(f"wrote {file}", file=sys.stderr)


def run(name: str, model: Any, vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """All results of one model, printed as they come."""
    schemes = ["fp16", *args.schemes]
    print(f"\n{name}: weights {weight_bytes(model) / 2**20:,.0f} MiB\n")
    rows, first = [], []
    if args.cases:
        print("| model | batch x tokens | cache | ms | spread | tokens/s | of fp16 | cache MiB |")
        print("| --- " * 8 + "|", flush=True)
    for batch, tokens in args.cases:
        for row in decode_times(model, schemes, batch, tokens, args.rounds):
            rows.append(row)
            print(
                f"| {name} | {batch} x {tokens:,} | {row['scheme']} | {row['ms']:.2f} | {row['low_ms']:.2f}-"
                f"{row['high_ms']:.2f} | {row['tokens_per_s']:,.0f} | {row['of_fp16']:.2f}x "
                f"| {row['nbytes'] / 2**20:,.0f} |",
                flush=True,
            )
        gc.collect()
        mx.clear_cache()
    if args.first:
        print("\n| model | tokens | cache | first token ms | of fp16 | first step ms | next step ms | steps |")
        print("| --- " * 8 + "|", flush=True)
    for tokens in args.first:
        for row in first_times(model, schemes, tokens, args.rounds, vocabulary):
            first.append(row)
            print(
                f"| {name} | {tokens:,} | {row['scheme']} | {row['first token']['ms']:.1f} | {row['of_fp16']:.3f}x "
                f"| {row['first step']['ms']:.2f} | {row['next step']['ms']:.2f} | {row['steps']:.2f} |",
                flush=True,
            )
        mx.clear_cache()
    return {"model": name, "weight_bytes": weight_bytes(model), "decode": rows, "first": first}


def main() -> None:
    """Measure, print and draw."""

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def cases(text: str) -> list[tuple[int, int]]:
        return [tuple(map(int, part.split("x"))) for part in names(text)]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=names, default=["llama-3.1-8b", "qwen2.5-1.5b", "llama-3.2-1b"])
    parser.add_argument("--models", type=names, default=[])
    parser.add_argument(
        "--cases", type=cases, default=cases("1x1024,1x8192,1x32768,1x131072,8x1024,8x8192,8x32768,32x1024,32x8192")
    )
    parser.add_argument("--schemes", type=names, default=["turbo8v4", "turbo4", "turbo3", "turbo4v2", "mlx8", "mlx4"])
    parser.add_argument("--first", type=lambda text: [int(n) for n in names(text)], default=[1024, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", type=int, choices=(4, 16), default=4, help="bits")
    parser.add_argument("--from-json", help="draw the last line of this file instead of measuring")
    parser.add_argument("--plot")
    args = parser.parse_args()
    if unknown := set(args.shapes) - set(SHAPES):
        parser.error(f"--shapes knows {', '.join(SHAPES)}, got {', '.join(sorted(unknown))}")
    if args.from_json:
        results = json.loads(Path(args.from_json).read_text().splitlines()[-1])["results"]
    else:
        print(card("", f"generation, backend {choose_backend(None)}, {args.rounds} rounds of {STEPS} steps"))
        results = []
        for name in args.shapes:
            model = random_model(SHAPES[name], bits=args.weights)
            results.append(run(name, model, SHAPES[name].vocabulary, args))
            del model
            gc.collect()
        for name in args.models:
            from mlx_lm import load

            model, tokenizer = load(name)
            results.append(run(Path(name).name, model, tokenizer.vocab_size, args))
            del model
        setting = {"backend": choose_backend(None), "steps": STEPS, "weights": args.weights}
        print(json.dumps({**setting, "results": results}))
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
