"""Teacher-forced quality of KV schemes against the fp16 cache, on the real cache classes.

    python benchmarks/quality.py [--model DIR] [--kv-scheme turbo4,turbo3] [--prompt-tokens 256] [--tokens 128]

Reads a prompt, then feeds the text's own next tokens one at a time and compares each step's distribution with that of
the fp16 cache: mean KLD (nats), its 99th percentile, perplexity, top-1 agreement. Without --model it takes
SmolLM2-135M. The text ships with CPython (pydoc_data.topics). Prints a card, a Markdown table and one line of JSON.
"""

import argparse
import json
import platform
import pydoc_data.topics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load

import mlx_turboquant

SCHEMES = "turbo0v0,turbo0v4,turbo8,turbo4,turbo3,turbo4v2,turbo2,affine8,affine4"


def log_probabilities(model, ids: list[int], prompt_tokens: int, cache) -> np.ndarray:
    """Log probabilities (tokens - prompt, vocabulary) float32 of the token after each teacher-forced one."""
    rows = []
    model(mx.array(ids[:prompt_tokens])[None], cache=cache)
    mx.eval([c.state for c in cache])
    for token in ids[prompt_tokens:]:
        logits = model(mx.array([[token]]), cache=cache)[0, -1].astype(mx.float32)
        rows.append(np.array(logits - mx.logsumexp(logits)))
    return np.stack(rows)


def compare(exact: np.ndarray, other: np.ndarray, targets: list[int]) -> dict[str, float]:
    """Mean and p99 KLD in nats, perplexities and top-1 agreement of two arrays of log probabilities."""
    kld = (np.exp(exact.astype(np.float64)) * (exact.astype(np.float64) - other)).sum(-1)
    index = np.arange(len(targets))
    return {
        "kld": float(kld.mean()),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "ppl": float(np.exp(-other[index, targets].mean())),
        "ppl_fp16": float(np.exp(-exact[index, targets].mean())),
        "top1": float((exact.argmax(-1) == other.argmax(-1)).mean()),
    }


def main() -> None:
    """Run the schemes one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--kv-scheme", default=SCHEMES)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--offset", type=int, default=1000, help="first token of the text to use")
    args = parser.parse_args()
    if args.model:
        model, tokenizer = load(args.model)
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
        import smollm2

        model, tokenizer = smollm2.load()
    topics = pydoc_data.topics.topics
    ids = tokenizer.encode("\n\n".join(topics[key] for key in sorted(topics)))[args.offset :]
    ids = ids[: args.prompt_tokens + args.tokens + 1]
    targets = ids[args.prompt_tokens + 1 :]
    dtype = model.model.embed_tokens.weight.dtype
    print(f"{platform.machine()} {mx.default_device()}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, "
          f"mlx_turboquant {mlx_turboquant.__version__}, {args.model or 'SmolLM2-135M'} {dtype}, "
          f"{args.prompt_tokens} prompt tokens, {args.tokens} scored, offset {args.offset}\n")  # fmt: skip
    print("| scheme | KLD | KLD p99 | PPL | PPL fp16 | top-1 | KV ratio | seconds |\n| --- | " + "--- | " * 7)
    results, exact = [], None
    for scheme in ("fp16", *args.kv_scheme.split(",")):
        start = time.perf_counter()
        cache = mlx_turboquant.make_prompt_cache(model, kv_scheme=scheme)
        # The cache is read one token further than it is scored on: the last logits have no target.
        logs = log_probabilities(model, ids[:-1], args.prompt_tokens, cache)
        exact = logs if scheme == "fp16" else exact
        row = {"scheme": scheme, **compare(exact, logs, targets), "ratio": mlx_turboquant.report(cache).ratio}
        results.append(row)
        print(f"| {scheme} | {row['kld']:.5f} | {row['kld_p99']:.4f} | {row['ppl']:.3f} | {row['ppl_fp16']:.3f} | "
              f"{row['top1']:.3f} | {row['ratio']:.2f} | {time.perf_counter() - start:.0f} |", flush=True)  # fmt: skip
    print("\n" + json.dumps({"results": results}))


if __name__ == "__main__":
    main()
