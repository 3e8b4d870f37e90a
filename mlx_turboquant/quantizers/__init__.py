"""One file per quantization method, and the registry that finds them by a scheme's method."""

import mlx.core as mx

from mlx_turboquant.quantizers.raw import RawRows
from mlx_turboquant.quantizers.turbo import TurboKeys, TurboValues
from mlx_turboquant.scheme import KVScheme

# method -> (keys, values). A side with 0 bits is RawRows whatever the method.
METHODS = {"turbo": (TurboKeys, TurboValues)}


def make_quantizers(scheme: KVScheme, key_dim: int, value_dim: int, dtype: mx.Dtype):
    """The key and value quantizers of one layer.

    Raises:
        ValueError: if the head size is odd or not a multiple of the scheme's group.
    """
    keys, values = METHODS[scheme.method]
    key_side = keys if scheme.key_bits else RawRows
    value_side = values if scheme.value_bits else RawRows
    return key_side(scheme, key_dim, dtype), value_side(scheme, value_dim, dtype)


__all__ = ["METHODS", "RawRows", "TurboKeys", "TurboValues", "make_quantizers"]
