"""Put our attention in front of mlx-lm's in the modules that define a model's layers, and take it out again.

mlx-lm's model files import ``scaled_dot_product_attention`` by value, so the name is replaced in the file that defines
the model's own attention. Every call that does not carry our cache goes to the original, unchanged.
"""

import functools
import sys
from types import ModuleType

import mlx.core as mx

from mlx_turboquant.attention import attend
from mlx_turboquant.tensor import CompressedRows, RaggedRows, SplitRows

ATTENTION = "scaled_dot_product_attention"


def bind(module: ModuleType) -> None:
    """Replace the attention function of a model's module; nothing happens if it is replaced already."""
    original = getattr(module, ATTENTION)
    if hasattr(original, "mlx_turboquant_original"):
        return

    @functools.wraps(original)
    def scaled_dot_product_attention(queries, keys, values, cache=None, *args, **kwargs):
        if isinstance(keys, (CompressedRows, SplitRows)):
            return attend(queries, keys, values, *args, **kwargs)
        ragged = isinstance(keys, RaggedRows)  # of which some sequences may still be reading their prompts
        if ragged:
            output = attend(queries, keys, values, *args, **kwargs)
        else:
            output = original(queries, keys, values, cache, *args, **kwargs)
        observe = getattr(cache, "observe_queries", None)
        sums = None if observe is None else observe(queries)
        # Tied to the output, so that evaluating the step evaluates the sums and no chunk of queries stays alive.
        return output if sums is None else mx.depends(output, sums)

    scaled_dot_product_attention.mlx_turboquant_original = original
    setattr(module, ATTENTION, scaled_dot_product_attention)


def unbind(module: ModuleType) -> None:
    """Put the module's own attention function back."""
    original = getattr(getattr(module, ATTENTION), "mlx_turboquant_original", None)
    if original is not None:
        setattr(module, ATTENTION, original)


def is_bound(module_name: str) -> bool:
    """Whether the module of this name is loaded and its attention is ours."""
    return hasattr(getattr(sys.modules.get(module_name), ATTENTION, None), "mlx_turboquant_original")
