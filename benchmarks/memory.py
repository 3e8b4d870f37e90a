"""Peak memory of reading a long prompt and decoding a few tokens: fp16, turbo4, and turbo4 with a compressed prefill.

    python benchmarks/memory.py [--tokens 32768] [--prefill-step-size 2048] [--decode 8] [--dtype float16]
                                [--schemes fp16,turbo4,turbo4:prefill=compressed] [--shape 16x32x8x128]
                                [--max-kv-size N]

The model is a Llama with random weights: layers x query heads x KV heads x head size of `--shape`, and so narrow a
hidden size and MLP that the cache outweighs the rest. Each scheme reads the same prompt through mlx-lm's generate_step.
`peak` is mx.get_peak_memory() since just before, less what was in use then (the weights): `prefill peak` until all but
the prompt's last token were read, `peak` until the end. `end` is in use afterwards, `cache` is what the cache counts.
`of rows` compares with the bytes of all tokens' keys and values in the model's dtype. A first run that is not shown
makes what is made once. Prints a card, a table and one line of JSON.
"""

import argparse
import gc
import json
import time

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

from mlx_turboquant import make_prompt_cache
from mlx_turboquant.cli.evaluate import card
from mlx_turboquant.evaluation import parse_schemes
from mlx_turboquant.ops.backend import choose_backend

HIDDEN, MLP, VOCABULARY = 256, 256, 256
MIB = 1 << 20


def random_model(layers: int, heads: int, kv_heads: int, dim: int, dtype: mx.Dtype) -> llama.Model:
    """A Llama of that shape with reproducible weights."""
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            intermediate_size=MLP,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            head_dim=dim,
        )
    )
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def measure(model: llama.Model, prompt: mx.array, scheme: str, args: argparse.Namespace) -> dict:
    """One scheme's peak and remaining bytes, and the seconds it took."""
    cache = make_prompt_cache(model, args.max_kv_size, kv_scheme=scheme)
    gc.collect()
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    read = {}

    def note(done: int, total: int) -> None:
        if done < total:  # before the first decode step, which encodes a raw prompt
            read.update(peak=mx.get_peak_memory() - before, seconds=time.perf_counter() - start)

    steps = generate_step(
        prompt,
        model,
        prompt_cache=cache,
        max_tokens=args.decode,
        prefill_step_size=args.prefill_step_size,
        prompt_progress_callback=note,
    )
    for _ in steps:
        pass
    mx.synchronize()
    mx.clear_cache()
    return {
        "scheme": scheme,
        "prefill_peak_bytes": read["peak"],
        "peak_bytes": mx.get_peak_memory() - before,
        "end_bytes": mx.get_active_memory() - before,
        "cache_bytes": sum(layer.nbytes for layer in cache),
        "prefill_s": read["seconds"],
    }


def main() -> None:
    """Measure every scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--decode", type=int, default=8, help="tokens generated after the prompt (8)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--schemes", default="fp16,turbo4,turbo4:prefill=compressed")
    parser.add_argument("--shape", default="16x32x8x128", help="layers x query heads x KV heads x head size")
    parser.add_argument("--max-kv-size", type=int, help="bound of the compressed caches")
    args = parser.parse_args()
    layers, heads, kv_heads, dim = map(int, args.shape.split("x"))
    dtype = getattr(mx, args.dtype)
    model = random_model(layers, heads, kv_heads, dim, dtype)
    prompt = mx.random.randint(0, VOCABULARY, (args.tokens,), key=mx.random.key(1))
    # The last token generated is not in the cache.
    raw = 2 * layers * kv_heads * dim * dtype.size * (args.tokens + args.decode)
    print(
        card(
            "",
            f"{args.tokens} prompt tokens in chunks of {args.prefill_step_size}, {args.decode} decoded; random Llama, "
            f"{layers} layers, {heads} query and {kv_heads} KV heads of {dim}, {args.dtype}, hidden size {HIDDEN}, "
            f"max_kv_size {args.max_kv_size}; backend {choose_backend(None)}; rows alone {raw / MIB:,.0f} MiB",
        )
    )
    print("| cache | prefill peak MiB | peak MiB | of rows | end MiB | cache MiB | of rows | prefill s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    rows = []
    # Constants that are made once (codebooks, compiled kernels) belong to no scheme.
    measure(model, prompt[: args.prefill_step_size + 256], "turbo4:prefill=compressed", args)
    for scheme in parse_schemes(args.schemes):
        row = measure(model, prompt, scheme, args)
        rows.append(row)
        peak, held = row["peak_bytes"], row["cache_bytes"]
        print(
            f"| {scheme} | {row['prefill_peak_bytes'] / MIB:,.1f} | {peak / MIB:,.1f} | {peak / raw:.0%} "
            f"| {row['end_bytes'] / MIB:,.1f} | {held / MIB:,.1f} | {held / raw:.0%} | {row['prefill_s']:.2f} |",
            flush=True,
        )
    setting = {name: value for name, value in vars(args).items() if name != "schemes"}
    print(json.dumps({"backend": choose_backend(None), "raw_bytes": raw, **setting, "results": rows}))


if __name__ == "__main__":
    main()
