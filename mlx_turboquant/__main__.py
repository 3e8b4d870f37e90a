"""``python -m mlx_turboquant COMMAND``."""

from mlx_turboquant.cli import main

if __name__ == "__main__":
    main()
