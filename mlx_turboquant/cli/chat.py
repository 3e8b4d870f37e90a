"""``mlx_turboquant.chat``: mlx_lm.chat with --kv-scheme and --kv-report."""

import importlib

from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.mlx_lm_commands import extend_chat


def main() -> None:
    """Run mlx_lm.chat with our flags."""
    module = importlib.import_module("mlx_lm.chat")
    extend_chat(module)
    with one_line_errors("mlx_turboquant.chat"):
        module.main()


if __name__ == "__main__":
    main()
