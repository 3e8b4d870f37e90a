"""How far fused attention is from float64, in bands of context length up to 131,072 tokens.

    python benchmarks/numerics.py [--tokens 1024,2048,...,131072] [--schemes turbo8v4,turbo4,turbo3,turbo2]
                                  [--dtype bfloat16] [--heads 8x2x128] [--queries 64]

A cache reads random keys (some channels far from 0, as Qwen2.5's), values and queries, compresses them, and attends
with as many decode steps as `--queries`. The same rows, decoded, are attended to in float64 by numpy. So what is
measured is the kernel's arithmetic, not the codes' error. `p95 cosine` is what 95% of all outputs (query heads x
queries) reach or exceed, `worst` the least, `error` the largest difference as a part of the largest output. fp16 is
mlx's own attention over the raw rows. Prints a card, a table and one line of JSON; exits with 1 if a p95 is below
0.999.
"""

import argparse
import json
import sys

import mlx.core as mx
import numpy as np

from mlx_turboquant.attention import attend
from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cli.evaluate import card
from mlx_turboquant.ops.backend import choose_backend

WANTED = 0.999
PIECE = 8192  # tokens of a prompt's chunk


def random_rows(shape: tuple[int, ...], offset: np.ndarray, seed: int, dtype: mx.Dtype) -> mx.array:
    """Normal rows around an offset for each channel."""
    return (mx.random.normal(shape, key=mx.random.key(seed)) + mx.array(offset)).astype(dtype)


def exact(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Attention (H, L, D) in float64 of queries (H, L, D) over (Hkv, T, D), all queries seeing all tokens."""
    group = len(queries) // len(keys)
    out = np.empty(queries.shape)
    for h, query in enumerate(queries):
        scores = query @ keys[h // group].T * scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[h] = weights @ values[h // group] / weights.sum(axis=-1, keepdims=True)
    return out


def compare(scheme: str, tokens: int, args: argparse.Namespace) -> dict:
    """Cosines and errors of one scheme at one length."""
    H, Hkv, D = args.heads
    dtype, scale = getattr(mx, args.dtype), D**-0.5
    rng = np.random.default_rng(tokens)
    offset = np.where(rng.random((Hkv, 1, D)) < 0.05, 20.0 * rng.standard_normal((Hkv, 1, D)), 0.0).astype(np.float32)
    queries = random_rows((1, H, args.queries, D), np.zeros(1, np.float32), 1, dtype)
    if scheme == "fp16":
        keys = random_rows((1, Hkv, tokens, D), offset, 2, dtype)
        values = random_rows((1, Hkv, tokens, D), np.zeros(1, np.float32), 3, dtype)
        read = lambda q: mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale)  # noqa: E731
        dense = keys, values
    else:
        cache = TurboQuantKVCache(scheme)
        for start in range(0, tokens, PIECE):
            n = min(PIECE, tokens - start)
            cache.update_and_fetch(
                random_rows((1, Hkv, n, D), offset, 2 + start, dtype),
                random_rows((1, Hkv, n, D), np.zeros(1, np.float32), 3 + start, dtype),
            )
        cache.compress()
        stored = cache.keys_and_values()
        dense = [rows.dense() for rows in stored]
        read = lambda q: attend(q, *stored, scale)  # noqa: E731
    out = [np.array(read(queries[:, :, i : i + 1]).astype(mx.float32))[0] for i in range(args.queries)]
    fused = np.concatenate(out, axis=1).astype(np.float64)
    wide = [np.array(x.astype(mx.float32))[0].astype(np.float64) for x in (queries, *dense)]
    wanted = exact(*wide, scale)
    norms = np.linalg.norm(fused, axis=-1) * np.linalg.norm(wanted, axis=-1)
    cosines = (fused * wanted).sum(axis=-1) / np.maximum(norms, 1e-300)
    return {
        **{"scheme": scheme, "tokens": tokens, "p95_cosine": float(np.quantile(cosines, 0.05))},
        **{"worst_cosine": float(cosines.min()), "error": float(np.abs(fused - wanted).max() / np.abs(wanted).max())},
    }


def main() -> None:
    """Compare every scheme at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = ",".join(str(1 << n) for n in range(10, 18))
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=lengths)
    parser.add_argument("--schemes", default="fp16,turbo8v4,turbo4,turbo3,turbo2")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--heads", type=lambda text: [int(n) for n in text.split("x")], default="8x2x128")
    parser.add_argument("--queries", type=int, default=64)
    args = parser.parse_args()
    H, Hkv, D = args.heads
    print(card("", f"fused attention against float64, {args.dtype}, {H} query and {Hkv} KV heads of {D}"))
    print("| tokens | cache | p95 cosine | worst | error |\n| --- | --- | --- | --- | --- |", flush=True)
    rows = []
    for tokens in args.tokens:
        for scheme in args.schemes.split(","):
            rows.append(compare(scheme, tokens, args))
            row = rows[-1]
            print(
                f"| {tokens:,} | {scheme} | {row['p95_cosine']:.6f} | {row['worst_cosine']:.6f} | {row['error']:.1e} |",
                flush=True,
            )
    least = min(row["p95_cosine"] for row in rows)
    print(json.dumps({"backend": choose_backend(), "dtype": args.dtype, "least_p95_cosine": least, "results": rows}))
    if least < WANTED:
        sys.exit(1)


if __name__ == "__main__":
    main()
