"""The array work: one file per operation, in plain MLX."""
