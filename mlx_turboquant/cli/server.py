"""``mlx_turboquant.server``: mlx_lm.server with --kv-scheme, --max-prompt-tokens and KV bytes in /health."""

import importlib

from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.mlx_lm_server import extend_server


def main() -> None:
    """Run mlx_lm.server with our flags."""
    module = importlib.import_module("mlx_lm.server")
    extend_server(module)
    with one_line_errors("mlx_turboquant.server"):
        module.main()


if __name__ == "__main__":
    main()
