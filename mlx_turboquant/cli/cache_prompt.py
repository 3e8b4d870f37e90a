"""``mlx_turboquant.cache_prompt``: mlx_lm.cache_prompt with --kv-scheme, writing its file whole or not at all."""

import importlib

from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.mlx_lm_commands import extend_cache_prompt


def main() -> None:
    """Run mlx_lm.cache_prompt with our flags."""
    module = importlib.import_module("mlx_lm.cache_prompt")
    extend_cache_prompt(module)
    with one_line_errors("mlx_turboquant.cache_prompt"):
        module.main()


if __name__ == "__main__":
    main()
