"""``mlx_turboquant.inspect``: what a file of this package holds, told without a model.

Takes a prompt cache, an index of vectors, a scheme file or kept fp16 logits,
and recognises which by its content. Of a prompt cache: scheme, model, tokens,
for each layer its bytes by part and their ratio to fp16, and histograms of the
norms of decoded keys and values. One layer is in memory at a time.
"""

import argparse
import json

from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.inspect_plot import check_plot, plot
from mlx_turboquant.cli.inspect_text import text
from mlx_turboquant.inspection import inspect_file


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(
        prog="mlx_turboquant.inspect",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("file", help="the file to look into")
    out.add_argument("--no-norms", action="store_true", help="read no rows: bytes and tokens only, at once")
    out.add_argument("--by-layer", action="store_true", help="histograms of each layer, not only of all together")
    out.add_argument("--json", action="store_true", help="one line of JSON instead; keys as in docs/format.md")
    out.add_argument("--plot", metavar="FILE.png", help="draw a prompt cache's bytes and norms by layer")
    return out


def main() -> None:
    """Look into the file and print."""
    with one_line_errors("mlx_turboquant.inspect"):
        args = parser().parse_args()
        if args.plot:
            check_plot(args.plot, args.no_norms)
        facts = inspect_file(args.file, norms=not args.no_norms)
        if args.plot:
            plot(facts, args.plot)
        print(json.dumps(facts) if args.json else text(facts, args.by_layer))


if __name__ == "__main__":
    main()
