"""``python -m mlx_turboquant.plan``, as ``python -m mlx_turboquant plan``."""

from mlx_turboquant.cli.plan import main

if __name__ == "__main__":
    main()
