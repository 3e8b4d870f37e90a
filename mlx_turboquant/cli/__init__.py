"""The commands. ``python -m mlx_turboquant COMMAND`` runs any of them; ``mlx_turboquant.COMMAND`` is the same."""

import importlib
import sys

from mlx_turboquant.cli.errors import one_line_errors

COMMANDS = {
    "generate": "mlx_lm.generate with --kv-scheme and --kv-report",
    "cache_prompt": "mlx_lm.cache_prompt with --kv-scheme",
    "chat": "mlx_lm.chat with --kv-scheme and --kv-report",
    "server": "mlx_lm.server with --kv-scheme; /health tells the KV bytes",
    "evaluate": "KLD, perplexity and top-1 agreement against the fp16 cache",
    "plan": "bits for each layer under a budget of memory or quality",
    "doctor": "this machine, its backend, and a self-test of the kernels",
    "index": "an index of vectors in 1 to 8 bits a value: build, search, info",
    "inspect": "what a prompt cache, an index or a scheme file holds",
    "hook": "make the literal mlx_lm commands take --kv-scheme (opt-in)",
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        listed = "\n".join(f"  {command:14}{what}" for command, what in COMMANDS.items())
        usage = f"usage: mlx_turboquant COMMAND [arguments]\n\ncommands:\n{listed}"
        if name in ("-h", "--help"):
            with one_line_errors("mlx_turboquant"):
                print(usage)
            return
        print(usage if not name else f"{usage}\n\nerror: unknown command {name!r}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"mlx_turboquant.{name}", *sys.argv[2:]]
    importlib.import_module(f"mlx_turboquant.cli.{name}").main()
