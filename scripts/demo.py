"""Generate from one prompt under the fp16 cache and under turbo4, and show what each cost."""

import argparse
import shutil
import sys
import textwrap
import time
from itertools import zip_longest

import mlx.core as mx
import smollm2

import mlx_turboquant

PROMPT = """\
Read these notes from a lighthouse keeper's log, then answer the question below.

Monday: the wind turned north-east before dawn and the sea was rough until noon. I cleaned the great lens,
filled the oil lamps and counted eleven ships on the horizon, most of them fishing boats from the village of
Saint Maron. Tuesday: thick fog all day. I rang the bell every four minutes, as the rules demand, and slept
for only two hours. A small sailing boat came too close to the rocks, but its captain heard the bell in time
and turned away. Wednesday: the fog lifted. The captain came up the stairs to thank me and brought a basket of
oranges, a loaf of bread and a letter from my sister. Thursday: quiet. I painted the iron door green and wrote
a long answer to my sister. Friday: a supply boat brought oil, rope, flour and a new barometer, because the
old one had been broken since the winter storms.

Question: what happened on Tuesday, and how did the captain thank the keeper?"""


def run(model, tokenizer, prompt: list[int], scheme: str, max_tokens: int):
    """(text, decode tokens/s, prompt tokens/s, cache) for one scheme."""
    cache = mlx_turboquant.make_prompt_cache(model, kv_scheme=scheme)
    words, response = [], None
    for response in mlx_turboquant.stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, prompt_cache=cache, prompt_progress_callback=progress(scheme)
    ):
        words.append(response.text)
    return "".join(words).strip(), response.generation_tps, response.prompt_tps, cache


def progress(scheme: str):
    """A callback that shows how much of the prompt has been read."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{scheme}: read {done} of {total} prompt tokens ", end=end, file=sys.stderr)

    return show


def side_by_side(left: str, right: str) -> str:
    """Two texts in two columns."""
    width = min(shutil.get_terminal_size().columns, 120) // 2 - 2
    columns = [[line for part in text.splitlines() or [""] for line in textwrap.wrap(part, width) or [""]]
               for text in (left, right)]  # fmt: skip
    return "\n".join(f"{a:<{width}}  | {b}" for a, b in zip_longest(*columns, fillvalue=""))


def main() -> None:
    """Parse, generate twice, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--kv-scheme", default="turbo4", help="the scheme to compare with fp16 (default: turbo4)")
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        mlx_turboquant.KVScheme.parse(args.kv_scheme)
    except ValueError as error:
        parser.error(str(error))
    if not args.prompt.strip():
        parser.error("the prompt is empty")

    model, tokenizer = smollm2.load()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}], add_generation_prompt=True)
    cpu = mx.default_device() == mx.cpu
    where = "MLX's CPU backend, which is far slower than a Mac's or NVIDIA's GPU" if cpu else "the GPU"
    seconds = time.perf_counter() - start
    print(f"SmolLM2-135M, {len(ids)} prompt tokens, on {where}. Ready after {seconds:.1f} s.", flush=True)

    results = {scheme: run(model, tokenizer, ids, scheme, args.max_tokens) for scheme in ("fp16", args.kv_scheme)}
    (left, *_), (right, *_) = results.values()
    print("\n" + side_by_side(f"[fp16 cache]\n{left}", f"[{args.kv_scheme}]\n{right}") + "\n")
    unit = "tokens/s (CPU)" if cpu else "tokens/s"
    print(f"{'cache':<22}{'decode ' + unit:>22}{'prompt ' + unit:>22}{'KV bytes':>14}{'ratio':>8}")
    exact = mlx_turboquant.report(results[args.kv_scheme][3]).raw_nbytes
    for scheme, (_, decode, prompt, cache) in results.items():
        nbytes = mlx_turboquant.report(cache).nbytes if scheme != "fp16" else exact
        print(f"{scheme:<22}{decode:>22.2f}{prompt:>22.1f}{nbytes:>14,}{exact / nbytes:>7.2f}x")
    print("(fp16: the tokens' own bytes, without mlx-lm's spare room; the other: all that is held, spare room too)\n")
    print(mlx_turboquant.report(results[args.kv_scheme][3]))


if __name__ == "__main__":
    main()
