"""A needle in a haystack: does a compressed context still hold one sentence, at any depth and length?

    python benchmarks/needle.py --model DIR [--kv-scheme fp16,turbo4] [--lengths 512,1024] [--depths 0,0.5,1]
                                [--repeats 3] [--plot FILE.png]
    python benchmarks/needle.py --from-json FILE --plot FILE.png     draws what an earlier run printed

The haystack, Python's own help text with one sentence about a magic number in it, is read and then compressed; the
question follows as a second turn, so that both question and answer read the compressed form. A cell is the share of
repeats, each with another city and number, whose answer holds the number. Prints a table per scheme, then one line of
JSON.
"""

import argparse
import json
import pydoc_data.topics
import random
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step

import mlx_turboquant
from mlx_turboquant.cli.evaluate import card, expand, load_model
from mlx_turboquant.evaluation import convert, parse_schemes

CITIES = ("Lisbon", "Oslo", "Quito", "Cairo", "Hanoi", "Lima", "Perth", "Dakar")


def ask(model, tokenizer, words: list[int], schemes: list[str], length: int, depth: float, seed: int) -> list[bool]:
    """Whether the model finds the number, for each scheme; the haystack is read once for all of them."""
    rng = random.Random(f"{length} {depth} {seed}")
    city, number = rng.choice(CITIES), str(rng.randrange(10000, 100000))
    needle = tokenizer.encode(f"\nThe magic number of {city} is {number}.\n")
    start = rng.randrange(len(words) - length)
    hay = words[start : start + length - len(needle)]
    at = round(depth * len(hay))
    hay = hay[:at] + needle + hay[at:]
    prefilled = mlx_turboquant.make_prompt_cache(model, kv_scheme="turbo4")
    model(mx.array(hay)[None], cache=prefilled)
    mx.eval([c.state for c in prefilled])
    question = mx.array(tokenizer.encode(f"\n\nRemember: the magic number of {city} is"))
    found = []
    for scheme in schemes:
        cache = convert(prefilled, mlx_turboquant.make_prompt_cache(model, kv_scheme=scheme))
        for layer in cache:
            if hasattr(layer, "compress"):
                layer.compress()
        answer = [token for token, _ in generate_step(question, model, prompt_cache=cache, max_tokens=8)]
        found.append(number in tokenizer.decode(answer).replace(" ", ""))
    return found


def plot(results: dict, file: str) -> None:
    """A heat map per scheme: length across, depth down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    schemes = list(results["found"])
    figure, axes = pyplot.subplots(1, len(schemes), figsize=(3.2 * len(schemes) + 1, 3.6), layout="constrained")
    for axis, scheme in zip([axes] if len(schemes) == 1 else axes, schemes, strict=True):
        image = axis.imshow(results["found"][scheme], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(results["lengths"])), results["lengths"])
        axis.set_yticks(range(len(results["depths"])), results["depths"])
        axis.set(title=scheme, xlabel="tokens", ylabel="depth")
        for y, row in enumerate(results["found"][scheme]):
            for x, share in enumerate(row):
                axis.text(x, y, f"{share:.2f}", ha="center", va="center")
    figure.colorbar(image, ax=axes, label=f"found, of {results['repeats']}")
    figure.suptitle(results["model"])
    figure.savefig(file, dpi=130)
    print(f"wrote {file}")


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--from-json")
    parser.add_argument("--kv-scheme", default="fp16,turbo4,turbo3,turbo2")
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="expand the weights to this dtype")
    parser.add_argument("--plot")
    args = parser.parse_args()
    if args.from_json:
        results = json.loads(Path(args.from_json).read_text().splitlines()[-1])
    else:
        if not args.model:
            parser.error("--model or --from-json is needed")
        model, tokenizer = load_model(args.model)
        model = expand(model, args.dtype)
        topics = pydoc_data.topics.topics
        words = list(tokenizer.encode("\n\n".join(topics[key] for key in sorted(topics))))
        lengths = [int(n) for n in args.lengths.split(",")]
        depths = [float(d) for d in args.depths.split(",")]
        print(card(args.model, f"needle, {args.repeats} repeats"))
        results = {"model": Path(args.model).name, "lengths": lengths, "depths": depths, "repeats": args.repeats}
        schemes = parse_schemes(args.kv_scheme)
        grids = {scheme: [[0.0] * len(lengths) for _ in depths] for scheme in schemes}
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                for seed in range(args.repeats):
                    for scheme, hit in zip(
                        schemes, ask(model, tokenizer, words, schemes, length, depth, seed), strict=True
                    ):
                        grids[scheme][y][x] += hit / args.repeats
        results["found"] = grids
        for scheme, grid in grids.items():
            print(f"| {scheme} | {' | '.join(f'{n:,} tokens' for n in lengths)} |")
            print("| --- " * (len(lengths) + 1) + "|")
            for depth, row in zip(depths, grid, strict=True):
                print(f"| depth {depth} | " + " | ".join(f"{share:.2f}" for share in row) + " |")
            print(flush=True)
        print(json.dumps(results))
    if args.plot:
        plot(results, args.plot)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
