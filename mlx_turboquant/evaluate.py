"""``python -m mlx_turboquant.evaluate``, as ``python -m mlx_turboquant evaluate``."""

from mlx_turboquant.cli.evaluate import main

if __name__ == "__main__":
    main()
