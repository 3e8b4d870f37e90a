"""``mlx_turboquant.plan``: bits for each layer under a budget, or a refusal.

    --context 32k --memory 2GB   the least KLD within 2 GB at 32,768 tokens
    --kld 0.02                   the fewest bytes within a mean KLD of 0.02
    --memory 2GB                 the same, and what context fits into 2 GB

Writes a scheme file for ``--kv-scheme @FILE.json``. Exit code 3: the model
cannot meet the budget at the asked KLD.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_turboquant import planning
from mlx_turboquant.cache import TurboQuantKVCache
from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.evaluate import card, expand, load_model, table
from mlx_turboquant.cli.texts import load_ids
from mlx_turboquant.fingerprint import fingerprint
from mlx_turboquant.methods import NAMES
from mlx_turboquant.mlx_lm_hooks import make_prompt_cache
from mlx_turboquant.scheme import KVScheme
from mlx_turboquant.scheme_file import save
from mlx_turboquant.sizes import LayerShape, cache_nbytes, context_that_fits, layer_shapes

SHOWN = ("fp16", *(name for name in NAMES if KVScheme.parse(name).two_phase))
REFUSED = 3
VERIFIED = 96  # at least so many tokens are scored to verify a plan
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(
        prog="mlx_turboquant.plan",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--model", required=True, help="folder or Hugging Face repo of an mlx-lm model")
    out.add_argument("--memory", type=_size, help="for the KV cache, e.g. 8GB (binary units)")
    out.add_argument("--context", type=_size, help="tokens, e.g. 32k")
    out.add_argument("--kld", type=float, default=0.02, help="largest mean KLD from the fp16 cache, in nats (0.02)")
    out.add_argument("--output", metavar="FILE.json", help="scheme file to write (MODEL.kv.json)")
    out.add_argument("--text", default="pydoc", help="pydoc (offline, the default), wikitext, or a file")
    out.add_argument("--offset", type=int, default=1000, help="first token of the text to use (1000)")
    out.add_argument("--prompt-tokens", type=int, default=192, help="tokens read with a raw cache (192)")
    out.add_argument("--tokens", type=int, default=48, help="tokens scored for each measurement (48)")
    out.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="measure with the weights expanded to this"
    )
    out.add_argument("--json", action="store_true", help="end with one line of JSON")
    return out


def main() -> None:
    """Measure, choose, verify, write or refuse."""
    with one_line_errors("mlx_turboquant.plan"):
        args = parser().parse_args()
        if args.kld <= 0:
            raise ValueError(f"[--kld] must be above 0, got {args.kld}.")
        if args.prompt_tokens < 160 or args.tokens < 8:
            raise ValueError("[--prompt-tokens, --tokens] at least 160 and 8 are needed to measure anything.")
        model, tokenizer = load_model(args.model)
        shapes = layer_shapes(model)
        able = [isinstance(c, TurboQuantKVCache) for c in make_prompt_cache(model, kv_scheme="turbo4")]
        if not any(able):
            raise ValueError("[plan] No layer of this model can be compressed; the warning above says why.")
        print(card(args.model, f"planned on {args.text} from token {args.offset}"))
        print(_sizes(shapes, able, args.memory, args.context) + "\n")
        mark = fingerprint(model)  # of the model as it will be used, whatever it is measured in
        model = expand(model, args.dtype)
        _plan(args, model, mark, tokenizer, [shape if can else None for shape, can in zip(shapes, able, strict=True)])


def _plan(args: Any, model: Any, mark: str, tokenizer: Any, shapes: list[LayerShape | None]) -> None:
    span = args.prompt_tokens + args.tokens + 1
    # Verifying reads three caches where measuring reads dozens, and decides between close plans: it gets more tokens.
    ids = load_ids(tokenizer, args.text, args.offset, span + args.prompt_tokens + max(args.tokens, VERIFIED) + 1)
    first, second = ids[:span], ids[span:]
    layers = [shape is not None for shape in shapes]
    context = args.context or 32768
    budget = args.memory if args.memory and args.context else None
    smallest = planning.plan_nbytes([s and (2, 2) for s in shapes], shapes, context)
    if budget is not None and budget < smallest:  # known before anything is measured
        _refuse(f"{budget:,} bytes at {context:,} tokens: 2 bits everywhere take {smallest:,} already")
    total = args.prompt_tokens + args.tokens * (2 * sum(layers) + 2 * len(planning.WIDTHS[1:]) + 1)
    with tqdm(total=total, unit="tok", desc="measuring", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        sensitivity = planning.measure(model, first, args.prompt_tokens, layers, bar.update)

    aim = args.kld
    for _ in range(4):
        plan = planning.choose(sensitivity, shapes, context, budget, aim)
        nbytes = planning.plan_nbytes(plan, shapes, context)
        uniform = planning.best_uniform(sensitivity, shapes, context, nbytes)
        schemes = [planning.as_schemes(plan), str(planning.as_scheme(uniform))]
        chosen, same = planning.verify(model, second, schemes, args.prompt_tokens, lambda done: None)
        kld = float(chosen.kld.mean())
        if float(same.kld.mean()) < kld:  # the differences between layers were too small to measure on this text
            plan, kld = [shape and uniform for shape in shapes], float(same.kld.mean())
            nbytes = planning.plan_nbytes(plan, shapes, context)
        if kld <= args.kld or budget is not None:
            break
        aim *= min(args.kld / kld, 0.8)  # the prediction was too kind: ask it for less

    print(_layers(plan, sensitivity) + "\n\nMeasured on the text that follows the one the plan was made from:\n")
    print(table([chosen, same]) + "\n")
    if kld < float(chosen.kld.mean()):
        what = f"{same.scheme} in every layer does better than bits by layer, and is taken"
    else:
        what = f"no more KLD than {same.scheme}, the best single scheme in as few"
    print(f"{nbytes:,} bytes at {context:,} tokens; {what}.")
    if kld > args.kld:
        what = f"{budget:,} bytes at {context:,} tokens" if budget else "any plan"
        _refuse(f"{what}: the best one measured has a mean KLD of {kld:.4f}, {args.kld} was asked for")
    if args.memory and not args.context:
        fits = context_that_fits(lambda tokens: planning.plan_nbytes(plan, shapes, tokens), args.memory)
        print(f"{fits:,} tokens fit into {args.memory:,} bytes.")
    output = args.output or f"{Path(args.model).name}.kv.json"
    schemes = replace(planning.as_schemes(plan), model=mark)
    save(output, schemes, kld=kld, nbytes=nbytes, context=context, name=Path(args.model).name)
    print(f"Wrote {output}. Use it with --kv-scheme @{output}")
    if args.json:
        print(json.dumps({"plan": chosen.summary(), "uniform": same.summary(), "nbytes": nbytes, "file": output}))


def _refuse(reason: str) -> None:
    print(f"mlx_turboquant.plan: refused: {reason}.", file=sys.stderr)
    sys.exit(REFUSED)


def _sizes(shapes: list[LayerShape | None], able: list[bool], memory: int | None, context: int | None) -> str:
    """What each scheme takes at the asked context and what context it allows in the asked memory, from the shapes."""

    def nbytes(scheme: KVScheme, tokens: int) -> int:
        raw = KVScheme.parse("fp16")
        pairs = [(scheme if can else raw, shape) for shape, can in zip(shapes, able, strict=True) if shape is not None]
        return sum(cache_nbytes(each, shape, tokens) for each, shape in pairs)

    tokens = context or 32768
    rows = [f"| scheme | bytes at {tokens:,} tokens |" + (f" tokens in {memory:,} bytes |" if memory else "")]
    rows.append("| --- | --- |" + (" --- |" if memory else ""))
    for name in SHOWN:
        scheme = KVScheme.parse(name)
        try:
            row = f"| {name} | {nbytes(scheme, tokens):,} |"
        except ValueError as error:  # a group that does not divide this model's head size
            rows.append(f"| {name} | {error} |" + (" |" if memory else ""))
            continue
        if memory:
            row += f" {context_that_fits(lambda n, s=scheme: nbytes(s, n), memory):,} |"
        rows.append(row)
    others = sum(shape is None for shape in shapes)
    if others:
        rows.append(f"({others} layers with sliding windows or recurrent states come on top; they do not grow)")
    return "\n".join(rows)


def _layers(plan: list[tuple[int, int] | None], sensitivity: planning.Sensitivity) -> str:
    rows = [f"| layer | keys | values | KLD of {planning.PROBE}-bit keys | of {planning.PROBE}-bit values |"]
    rows.append("| --- " * 5 + "|")
    for layer, bits in enumerate(plan):
        if bits is None:
            rows.append(f"| {layer} | raw | raw | | |")
            continue
        words = [f"{width} bits" if width else "raw" for width in bits]
        costs = (sensitivity.keys[layer], sensitivity.values[layer])
        rows.append(f"| {layer} | {words[0]} | {words[1]} | {costs[0]:.6f} | {costs[1]:.6f} |")
    return "\n".join(rows)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"wants a number above 0 with k, M or G, such as 8GB or 32k, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


if __name__ == "__main__":
    main()
