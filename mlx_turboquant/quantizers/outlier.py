"""The strongest channels of each head kept exactly, the others rotated and coded, as proposed for vLLM."""

from typing import Any

import mlx.core as mx

from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.lookup import Prepared
from mlx_turboquant.packing import words_per_row
from mlx_turboquant.quantizers.base import Learned
from mlx_turboquant.quantizers.channels import back_in_place, in_order, strongest_first
from mlx_turboquant.quantizers.codec import Codec
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tensor import PackedTensor

BITS = (2, 3, 4)
SHARE = 0.15


class OutlierCodec(Codec):
    """round(0.15 D) channels of each KV head in the model's dtype, the others rotated, in `bits` bits and one scale.

    The kept channels are those of the largest energy, the sum of squares over the prompt. For D = 128 a row stores 19
    exact numbers, one scale and 109 codes. Its error is that of the 109, whatever the size of the others: a row with
    the share a of its energy in the kept channels has 1 - a times the relative squared error of Lloyd-Max. For rows
    without outliers a is about 0.15, and the bits are better spent on finer codes.

    The scale is EDEN's matched norm (ICML 2022) rather than the plain norm of the proposal: decoded rows are as long as
    the originals, and several scalings are tried (see `ops.lloyd_max.quantize`), in the same two bytes.

    A x is the kept channels of x, then H x' with x' the others and H a `HadamardRotation` of D - n elements; E = D.

    Args:
        scheme: supplies the seed of the rotation.
        bits: 2, 3 or 4.
        dim: head size D.
        dtype: of the scales and the exact channels: the model's. Beyond its largest finite number they are clipped.

    Raises:
        ValueError: for other bits.

    Source: the outlier channels of vllm-project/vllm, pull request 38280; what vLLM merged, 38479, has none.
    """

    def __init__(self, scheme: Any, bits: float, dim: int, dtype: mx.Dtype):
        if bits not in BITS:
            raise ValueError(f"[OutlierCodec] bits must be one of {', '.join(map(str, BITS))}, got {bits}.")
        super().__init__(scheme, bits, dim, dtype)
        self.kept = round(SHARE * dim)
        self.coded = dim - self.kept
        self.rotation = make_rotation("hadamard", self.coded, scheme.seed)

    def fit(self, rows: mx.array, moments: mx.array | None) -> Learned:
        """Choose the channels to keep, for each sequence and head by itself.

        Returns:
            (order,): (B, Hkv, D) int32, the kept channels in ascending order and then the others in ascending order.
        """
        return (strongest_first(rows, self.kept),)

    def learned_layout(self, B: int, H: int) -> tuple[tuple[tuple[int, ...], mx.Dtype], ...]:
        """Shape and dtype of the order."""
        return (((B, H, self.dim), mx.int32),)

    def quantize(self, rows: mx.array, learned: Learned) -> PackedTensor:
        """Rows (B, Hkv, T, D) float32, packed.

        Returns:
            PackedTensor with codes (B, Hkv, T, W) uint32 of the coded channels; scales (B, Hkv, T, 1 + kept) in the
            model's dtype, the scale and then the kept channels.
        """
        kept, coded = self._split(rows, learned)
        codes, scales, _ = lloyd_max.quantize(coded, self.bits, self.coded, self.dtype)
        largest = mx.finfo(self.dtype).max
        exact = mx.clip(kept, -largest, largest).astype(self.dtype)
        return PackedTensor(codes, mx.concatenate([scales, exact], axis=-1))

    def dequantize(self, packed: PackedTensor, learned: Learned) -> mx.array:
        """The vectors (B, Hkv, T, D) float32: kept channels, then the others rotated."""
        kept, coded = self._parts(packed)
        return mx.concatenate([kept, lloyd_max.dequantize(coded, self.bits, self.coded)], axis=-1)

    def prepare(self, x: mx.array, learned: Learned) -> tuple[mx.array, Prepared]:
        """What meets the kept channels, and what meets the codes, of x (B, Hkv, R, D)."""
        return x[..., : self.kept], lloyd_max.prepare(x[..., self.kept :], self.bits)

    def products(self, prepared: tuple[mx.array, Prepared], packed: PackedTensor, learned: Learned) -> mx.array:
        """Inner products (B, Hkv, R, T) float32 with what `dequantize` gives."""
        kept, coded = self._parts(packed)
        return prepared[0] @ kept.swapaxes(-1, -2) + lloyd_max.products(prepared[1], coded, self.bits)

    def weighted_sum(self, weights: mx.array, packed: PackedTensor, learned: Learned) -> mx.array:
        """weights (B, Hkv, R, T) float32 times what `dequantize` gives."""
        kept, coded = self._parts(packed)
        return mx.concatenate([weights @ kept, lloyd_max.weighted_sum(weights, coded, self.bits, self.coded)], axis=-1)

    def transform(self, x: mx.array, learned: Learned) -> mx.array:
        """The kept channels of x (B, Hkv, R, D) float32, then the others rotated."""
        return mx.concatenate(self._split(x, learned), axis=-1)

    def transform_back(self, y: mx.array, learned: Learned) -> mx.array:
        """The inverse of `transform`."""
        gathered = mx.concatenate([y[..., : self.kept], self.rotation.invert(y[..., self.kept :])], axis=-1)
        return back_in_place(gathered, learned[0])

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """The shapes and the dtypes of `quantize`'s result."""
        shapes = PackedTensor((B, H, T, words_per_row(self.coded, self.bits)), (B, H, T, 1 + self.kept))
        return shapes, PackedTensor(mx.uint32, self.dtype)

    def _parts(self, packed: PackedTensor) -> tuple[mx.array, PackedTensor]:
        """The kept channels (B, Hkv, T, kept) float32, and what `lloyd_max.quantize` made of the others."""
        return packed.scales[..., 1:].astype(mx.float32), packed._replace(scales=packed.scales[..., :1])

    def _split(self, x: mx.array, learned: Learned) -> list[mx.array]:
        gathered = in_order(x, learned[0])
        return [gathered[..., : self.kept], self.rotation.apply(gathered[..., self.kept :])]
