"""``python -m mlx_turboquant.server``, as ``python -m mlx_turboquant server``."""

from mlx_turboquant.cli.server import main

if __name__ == "__main__":
    main()
