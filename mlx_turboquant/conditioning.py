"""Key centring and balancing: two exact changes of variables that put keys where a quantizer is good.

Keys fail from offsets, not from bits: one constant channel can be tens of times larger than the signal (Qwen2.5's key
biases), and then any quantizer spends its range on it.

*Centre.* softmax(q.(k - c)) = softmax(q.k) when every key of a head has the same c subtracted. With one c per block
of tokens, adding q.c to that block's scores is exact again, and follows the slow drift that RoPE gives the offset.

*Balance.* q.k = (q / s).(s k) for any s > 0 per channel. Quantization noise e on s k costs sum_i E q_i^2 e_i^2 / s_i^2;
after a rotation every e_i^2 is the same share of sum_j s_j^2 E k_j^2. The product of the two sums is least, by
Cauchy-Schwarz, for s_i = (E q_i^2 / E k_i^2)^(1/4). The expectations are taken over the prompt, seen once.
"""

import mlx.core as mx

# Channels that queries or keys leave (almost) unused get a share of the mean, so that no factor explodes.
BALANCE_FLOOR = 1e-3
# Larger entries are clipped before they are encoded, so that float32 holds a block's sum, a balanced row (factors stay
# below 600 up to a head size of 512) and the sums in its rotation. No float16 reaches it.
LARGEST = 1e33


def finite_or_zero(x: mx.array) -> mx.array:
    """x in float32, with 0 in place of NaN and infinities."""
    x = x.astype(mx.float32)
    return mx.where(mx.isfinite(x), x, 0.0)


def block_centers(keys: mx.array, block: int) -> mx.array:
    """The mean key of every block, over finite entries, those beyond `LARGEST` clipped.

    Args:
        keys: (B, Hkv, T, D), any float dtype, T a multiple of block.
        block: tokens per centre.

    Returns:
        (B, Hkv, T / block, D) in the dtype of keys, which is what is stored and therefore what must be subtracted.
    """
    B, H, T, D = keys.shape
    blocks = keys.reshape(B, H, T // block, block, D)
    count = mx.isfinite(blocks).sum(axis=3)
    return (_clipped(finite_or_zero(blocks)).sum(axis=3) / mx.maximum(count, 1)).astype(keys.dtype)


def subtract_centers(keys: mx.array, centers: mx.array | None) -> mx.array:
    """Keys (B, Hkv, T, D) less their block's centre, float32, at most `LARGEST` in size.

    A NaN or infinite entry becomes 0, that is its centre.
    """
    if centers is None:
        return _clipped(finite_or_zero(keys))
    B, H, T, D = keys.shape
    blocks = keys.reshape(B, H, centers.shape[2], -1, D).astype(mx.float32)
    return _clipped(finite_or_zero(blocks - centers[:, :, :, None].astype(mx.float32))).reshape(B, H, T, D)


def in_dtype(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """x float32 in a dtype, numbers beyond its largest finite one clipped: a decoded row may be larger than it was."""
    most = mx.finfo(dtype).max
    return mx.clip(x, -most, most).astype(dtype)


def balance_factors(query_squares: mx.array, key_squares: mx.array) -> mx.array:
    """The factors s that balance quantization noise between channels.

    Args:
        query_squares: (B, Hkv, D) float32, the sum of q_i^2 over all queries that read this head (any multiple of it).
        key_squares: (B, Hkv, D) float32, the sum of k_i^2 over all centred keys (any multiple of it).

    Returns:
        (B, Hkv, D) float32 with geometric mean 1 per head; all ones where a head has seen no query or no key energy.
    """
    log_s = 0.25 * (_log_floored(query_squares) - _log_floored(key_squares))
    unused = mx.minimum(query_squares.max(axis=-1, keepdims=True), key_squares.max(axis=-1, keepdims=True)) == 0
    return mx.where(unused, 1.0, mx.exp(log_s - log_s.mean(axis=-1, keepdims=True)))


def _log_floored(energy: mx.array) -> mx.array:
    energy = mx.minimum(energy, mx.finfo(mx.float32).max)  # squares of entries from 1e19 on are infinite
    energy = energy / mx.maximum(energy.max(axis=-1, keepdims=True), 1e-37)  # its scale cancels in the factors
    return mx.log(mx.maximum(energy + BALANCE_FLOOR * energy.mean(axis=-1, keepdims=True), 1e-37))


def _clipped(x: mx.array) -> mx.array:
    return mx.clip(x, -LARGEST, LARGEST)
