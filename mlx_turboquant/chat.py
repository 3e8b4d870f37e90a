"""``python -m mlx_turboquant.chat``, as ``python -m mlx_turboquant chat``."""

from mlx_turboquant.cli.chat import main

if __name__ == "__main__":
    main()
