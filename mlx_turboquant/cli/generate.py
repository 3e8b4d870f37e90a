"""``mlx_turboquant.generate``: mlx_lm.generate with --kv-scheme and --kv-report."""

import importlib

from mlx_turboquant.cli.errors import one_line_errors
from mlx_turboquant.cli.mlx_lm_commands import extend_generate


def main() -> None:
    """Run mlx_lm.generate with our flags."""
    module = importlib.import_module("mlx_lm.generate")
    extend_generate(module)
    with one_line_errors("mlx_turboquant.generate"):
        module.main()


if __name__ == "__main__":
    main()
