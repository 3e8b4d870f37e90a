"""``python -m mlx_turboquant.inspect``, as ``python -m mlx_turboquant inspect``."""

from mlx_turboquant.cli.inspect import main

if __name__ == "__main__":
    main()
