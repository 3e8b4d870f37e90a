"""A short text that differs between models whose keys and values differ."""

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_turboquant.shard import shard_of


def fingerprint(model: Any) -> str:
    """Sixteen hex digits from every parameter's name, shape and dtype and the first numbers of each matrix.

    A cache is only meaningful for the weights that filled it. Shapes tell models apart, the sampled numbers tell
    fine-tunes apart, and reading eight numbers per matrix keeps it to milliseconds.

    Where several processes hold one model, each has the digits of its own part, and which part that is follows them:
    ``.tensor0of2`` for its share of every layer's heads, ``.pipeline1of2`` for its share of the layers, or both.
    """
    digest = hashlib.sha256()
    samples = []
    for name, array in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {tuple(array.shape)} {array.dtype}\n".encode())
        if array.ndim >= 2:
            samples.append(array.reshape(-1)[:8].astype(mx.float32))
    if samples:
        digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()[:16] + shard_of(model).text
