"""``python -m mlx_turboquant.generate``, as ``python -m mlx_turboquant generate``."""

from mlx_turboquant.cli.generate import main

if __name__ == "__main__":
    main()
