"""``python -m mlx_turboquant.cache_prompt``, as ``python -m mlx_turboquant cache_prompt``."""

from mlx_turboquant.cli.cache_prompt import main

if __name__ == "__main__":
    main()
