"""Models of published shapes with random weights, made on the spot: times and bytes hardly depend on weights."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen2


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json gives it."""

    family: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    dim: int
    vocabulary: int
    tied: bool

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens in 16 bits."""
        return 2 * 2 * self.layers * self.kv_heads * self.dim * tokens


SHAPES = {
    "llama-3.1-8b": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "qwen2.5-1.5b": Shape("qwen2", 28, 1536, 8960, 12, 2, 128, 151936, True),
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "tiny": Shape("llama", 2, 64, 128, 4, 2, 64, 256, True),  # to try a script
}
BITS, GROUP = 4, 64


def random_model(shape: Shape, dtype: mx.Dtype = mx.float16, bits: int = BITS) -> nn.Module:
    """A model of that shape with random weights: of 4 bits (groups of 64), as mlx-community has, or 16 in `dtype`."""
    mx.random.seed(0)
    common = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocabulary,
        "rope_theta": 5e5,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 1 << 17,
    }
    if shape.family == "qwen2":
        model = qwen2.Model(qwen2.ModelArgs(model_type="qwen2", **common))
    else:
        model = llama.Model(llama.ModelArgs(model_type="llama", head_dim=shape.dim, **common))
    model.set_dtype(dtype)  # nothing is computed yet
    if bits < 16:
        nn.quantize(model, group_size=GROUP, bits=bits)
    for layer in [*model.layers, model]:  # one at a time, or the whole model would be there in 16 bits
        mx.eval(layer.parameters())
    mx.clear_cache()
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights."""
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
