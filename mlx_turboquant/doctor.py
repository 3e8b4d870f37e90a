"""``python -m mlx_turboquant.doctor``, as ``python -m mlx_turboquant doctor``."""

from mlx_turboquant.cli.doctor import main

if __name__ == "__main__":
    main()
