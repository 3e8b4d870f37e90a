"""What a cache refuses at the door: rows that do not fit."""

from typing import Any

import mlx.core as mx

FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def check_rows(layer: int, held: tuple[Any, Any], keys: mx.array, values: mx.array) -> None:
    """Refuse keys and values that a layer's cache cannot take.

    Args:
        layer: for the message.
        held: the cache's key and value buffers; their arrays are None before the first rows.
        keys, values: (B, Hkv, L, D) and (B, Hkv, L, Dv).

    Raises:
        ValueError: for shapes that disagree with each other or with what is held, no tokens, or other dtypes.
    """
    where = f"[TurboQuantKVCache] layer {layer}:"
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] == 0:
        raise ValueError(
            f"{where} keys and values must be (B, Hkv, L, D) with equal B, Hkv and L > 0, "
            f"got {keys.shape} and {values.shape}."
        )
    if keys.dtype != values.dtype or keys.dtype not in FLOATS:
        raise ValueError(
            f"{where} keys and values must both be float16, bfloat16 or float32, got {keys.dtype} and {values.dtype}."
        )
    for buffer, new, name in zip(held, (keys, values), ("keys", "values"), strict=True):
        if buffer.array is not None:
            B, H, _, D = buffer.array.shape
            if (B, H, D, buffer.array.dtype) != (*new.shape[:2], new.shape[3], new.dtype):
                raise ValueError(
                    f"{where} holds {name} of batch {B}, {H} heads, head size {D}, {buffer.array.dtype}; "
                    f"got {new.shape}, {new.dtype}. Make a new cache for another batch or model."
                )
