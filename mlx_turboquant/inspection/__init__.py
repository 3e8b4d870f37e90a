"""What a file of this package holds, told without a model: prompt caches, indexes, scheme files, kept logits."""

from mlx_turboquant.inspection.norms import NormHistogram
from mlx_turboquant.inspection.recognise import inspect_file

__all__ = ["NormHistogram", "inspect_file"]
