"""``mlx_turboquant.evaluate``: KLD, perplexity and top-1 agreement of KV schemes against the fp16 cache."""

import argparse
import json
import platform
import re
import sys
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

import mlx_turboquant
from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.inspect_plot import check_plot
from mlx_turboquant.cli.texts import load_ids
from mlx_turboquant.evaluation import PREFILL_CHUNK, SchemeResult, evaluate, parse_schemes
from mlx_turboquant.fingerprint import fingerprint
from mlx_turboquant.scheme_file import for_model, resolve

DEFAULT_SCHEMES = "turbo0v4,turbo8,turbo4,turbo3,turbo4v2,turbo2,mlx8,mlx4"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(prog="mlx_turboquant.evaluate", description=__doc__.replace("``", ""))
    out.add_argument("--model", required=True, help="folder or Hugging Face repo of an mlx-lm model")
    out.add_argument("--kv-scheme", default=DEFAULT_SCHEMES, help=f"schemes, separated by commas ({DEFAULT_SCHEMES})")
    out.add_argument("--text", default="pydoc", help="pydoc (offline, the default), wikitext, or a file")
    out.add_argument("--prompt-tokens", type=int, default=384, help="tokens read before any is scored (384)")
    out.add_argument("--prefill-step-size", type=int, default=PREFILL_CHUNK,
                     help=f"of those, tokens per call ({PREFILL_CHUNK}); prefill=compressed depends on it")  # fmt: skip
    out.add_argument("--tokens", type=int, default=384, help="tokens scored after it (384)")
    out.add_argument("--offset", type=int, default=1000, help="first token of the text to use (1000)")
    out.add_argument("--step", type=int, default=1, help="teacher-forced tokens per call (1)")
    out.add_argument("--bands", type=int, default=0, help="also the mean KLD of so many stretches of positions")
    out.add_argument("--dtype", choices=("float16", "bfloat16", "float32"),
                     help="expand the weights to this dtype (a CPU is fastest with bfloat16)")  # fmt: skip
    out.add_argument("--no-kept-logits", action="store_true", help="neither read nor write fp16 logits on disk")
    out.add_argument("--json", action="store_true", help="end with one line of JSON")
    out.add_argument("--plot", metavar="FILE.png", help="draw KLD against bits per element, mlx4 and mlx8 too")
    return out


def main() -> None:
    """Evaluate and print."""
    with one_line_errors("mlx_turboquant.evaluate"):
        args = parser().parse_args()
        for name in ("prompt_tokens", "tokens", "step"):
            if getattr(args, name) < 1:
                raise ValueError(f"[--{name.replace('_', '-')}] must be at least 1, got {getattr(args, name)}.")
        if args.offset < 0 or args.bands < 0:
            raise ValueError("[--offset, --bands] must not be negative.")
        schemes = parse_schemes(args.kv_scheme)
        if args.plot:
            check_plot(args.plot)
            # The reference that the plot is read against.
            schemes += [name for name in ("mlx8", "mlx4") if name not in schemes]
        model, tokenizer = load_model(args.model)
        schemes = [for_model(resolve(scheme), fingerprint(model)) for scheme in schemes]
        model = expand(model, args.dtype)
        # The last token is only a target, so one more is read than is fed.
        ids = load_ids(tokenizer, args.text, args.offset, args.prompt_tokens + args.tokens + 1)
        print(card(args.model, f"{args.text} from token {args.offset}, {args.prompt_tokens} prompt tokens, "
                               f"{args.tokens} scored, {args.step} per call"))  # fmt: skip
        total = args.prompt_tokens + args.tokens * (len(schemes) + 1)
        with tqdm(total=total, unit="tok", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            results = evaluate(
                model,
                ids,
                schemes,
                args.prompt_tokens,
                args.step,
                bar.update,
                keep_logits=not args.no_kept_logits,
                prefill_chunk=args.prefill_step_size,
            )
        if not results:
            raise ValueError("[evaluate] None of the schemes runs here; the warnings above say why.")
        print(table(results, args.bands))
        if args.json:
            print(json.dumps({"results": [result.summary(args.bands) for result in results]}))
        if args.plot:
            plot(results, args.plot, args.model)


def load_model(name: str) -> tuple[Any, Any]:
    """(model, tokenizer).

    Raises:
        OSError: if it is neither a folder nor a repository that can be fetched.
    """
    import mlx_lm

    try:
        return mlx_lm.load(name)
    except Exception as error:  # a missing folder reaches the hub's client, which raises a dozen kinds
        raise OSError(f"[--model] {name} could not be loaded: {error}") from error


def expand(model: Any, dtype: str | None) -> Any:
    """The model with its weights expanded to a dtype; as it is for None."""
    if dtype is not None:
        from mlx_lm.utils import dequantize_model

        model = dequantize_model(model)
        model.set_dtype(getattr(mx, dtype))
        mx.eval(model.parameters())
    return model


def card(model: str, what: str) -> str:
    """Where and with what a figure was made."""
    return (
        f"{Path(model).name}: {what}\n{platform.system()} {platform.machine()}, {mx.default_device()}, "
        f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, mlx_turboquant {mlx_turboquant.__version__}\n"
    )


def table(results: list[SchemeResult], bands: int = 0) -> str:
    """The results as a Markdown table."""
    columns = [
        "scheme",
        "bits K",
        "bits V",
        "raw tokens",
        "KV B/token",
        "ratio",
        "PPL",
        "ΔPPL",
        "KLD",
        "KLD p99",
        "top-1",
    ]
    columns += [f"KLD band {i + 1}" for i in range(bands)]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for result in results:
        row = result.summary(bands)
        cells = [
            row["scheme"], f"{row['bits_key']:.2f}", f"{row['bits_value']:.2f}", str(row["raw_tokens"]),
            f"{row['bytes_per_token']:,.0f}", f"{row['ratio']:.2f}x", f"{row['ppl']:.3f}",
            f"{100 * row['ppl_delta']:+.2f}%", f"{row['kld']:.5f}", f"{row['kld_p99']:.4f}", f"{row['top1']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells + [f'{kld:.5f}' for kld in row.get('kld_bands', [])])} |")
    return "\n".join([*lines, f"(fp16 cache: PPL {results[0].summary()['ppl_fp16']:.3f})"])


def plot(results: list[SchemeResult], file: str, title: str) -> None:
    """Draw KLD against the mean of key and value bits per element; `check_plot` has looked whether it can."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    methods = dict.fromkeys(re.match("[^0-9]*", result.scheme)[0] for result in results)
    for method, marker in zip(methods, cycle("os^vDP*X<>"), strict=False):
        rows = [result.summary() for result in results if re.match("[^0-9]*", result.scheme)[0] == method]
        bits = [(row["bits_key"] + row["bits_value"]) / 2 for row in rows]
        axes.plot(bits, [max(row["kld"], 1e-6) for row in rows], marker, label=method)
        for x, row in zip(bits, rows, strict=True):
            axes.annotate(row["scheme"], (x, max(row["kld"], 1e-6)), xytext=(5, 4), textcoords="offset points")
    axes.set(yscale="log", xlabel="bits per element, keys and values averaged, metadata included",
             ylabel="mean KLD from the fp16 cache (nats)", title=Path(title).name)  # fmt: skip
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
