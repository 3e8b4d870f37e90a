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
    shapes, dtypes = (keys.shape, values.shape), (keys.dtype, values.dtype)
    if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:3] != shapes[1][:3] or shapes[0][2] == 0:
        raise ValueError(
            f"[TurboQuantKVCache] layer {layer}: keys and values must be (B, Hkv, L, D) with equal B, Hkv and L > 0, "
            f"got {keys.shape} and {values.shape}."
        )
    if dtypes[0] != dtypes[1] or dtypes[0] not in FLOATS:
        raise ValueError(
            f"[TurboQuantKVCache] layer {layer}: keys and values must both be float16, bfloat16 or float32, got "
            f"{keys.dtype} and {values.dtype}."
        )
    for buffer, shape, dtype, name in zip(held, shapes, dtypes, ("keys", "values"), strict=True):
        array = buffer.array
        if array is not None:
            B, H, _, D = array.shape
            if (shape[0], shape[1], shape[3]) != (B, H, D) or array.dtype != dtype:
                raise ValueError(
                    f"[TurboQuantKVCache] layer {layer}: holds {name} of batch {B}, {H} heads, head size {D}, "
                    f"{array.dtype}; got {shape}, {dtype}. Make a new cache for another batch or model."
                )
