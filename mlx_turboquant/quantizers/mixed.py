"""Mixed: half of the channels, those with the most energy, get one bit more than the other half: 2.5 or 3.5 bits."""

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


class MixedCodec(Codec):
    """Two Lloyd-Max quantizers side by side, each with its own rotation, matched-norm scales and half of the channels.

    The outlier channels of a head, the D / 2 with the largest sum of squares over the prompt, are stored in
    bits + 1/2 bits per element, the others in bits - 1/2.

    Energy is the right criterion where all channels of the error count alike, as those of values do: b bits leave a
    share d(b) of a half's energy as its squared error, d(b) falls with b, so the larger energy belongs with the more
    bits. An error of keys counts by the energy of the queries in its channel. Balanced keys have the same energy there
    (`conditioning`: s_i = (E q_i^2 / E k_i^2)^(1/4) makes E (s_i k_i)^2 = E (q_i / s_i)^2), so the order is the same.
    A rotation spreads a half's error evenly over it. So with a share x of both energies in the outlier half, the
    squared error of scores is in proportion to d(bits + 1/2) x^2 + d(bits - 1/2) (1 - x)^2: for no x from 1/2 to 1 more
    than if the bits were dealt out regardless of energy (x = 1/2), and least at x = 0.77 to 0.78.

    Args:
        scheme: supplies group (elements per scale within a half; 0: one scale per half), rotation and seed.
        bits: 2.5 or 3.5.
        dim: head size D, even.
        dtype: of the stored scales.

    Raises:
        ValueError: for other bits, an odd head size, or a group that does not divide half the head size.

    Source: TurboQuant (arXiv 2504.19874), section 4.3: outlier channels in one bit more, two independent quantizers.
    """

    def __init__(self, scheme: Any, bits: float, dim: int, dtype: mx.Dtype):
        super().__init__(scheme, bits, dim, dtype)
        if bits not in (2.5, 3.5):
            raise ValueError(f"[MixedCodec] bits must be 2.5 or 3.5, got {bits}.")
        if dim % 2:
            raise ValueError(
                f"[MixedCodec] wanted an even head size, to halve it, got {dim}. Choose whole bits, {bits - 0.5:g} or "
                f"{bits + 0.5:g}."
            )
        self.half = dim // 2
        self.group = scheme.group or self.half
        if self.half % self.group:
            raise ValueError(
                f"[MixedCodec] group={self.group} does not divide {self.half}, half the head size. Leave group out "
                "for one scale per half."
            )
        self.widths = (int(bits + 0.5), int(bits - 0.5))
        self.rotations = tuple(make_rotation(scheme.rotation, self.half, 2 * scheme.seed + i) for i in (0, 1))

    def fit(self, rows: mx.array, moments: mx.array | None) -> Learned:
        """The order of the channels, outliers first and each half ascending: one array (B, Hkv, D) int32.

        Args:
            rows: (B, Hkv, T, D) float32.
            moments: ignored.
        """
        return (strongest_first(rows, self.half),)

    def learned_layout(self, B: int, H: int) -> tuple[tuple[tuple[int, ...], mx.Dtype], ...]:
        """Of the order."""
        return (((B, H, self.dim), mx.int32),)

    def quantize(self, rows: mx.array, learned: Learned) -> PackedTensor:
        """Rows (B, Hkv, T, D) float32 packed.

        Returns:
            PackedTensor with codes (B, Hkv, T, W) uint32, the words of the outlier half and then of the other, and
            scales (B, Hkv, T, D / group) likewise.
        """
        halves = mx.split(self.transform(rows, learned), 2, axis=-1)
        parts = [
            lloyd_max.quantize(half, width, self.group, self.dtype)
            for half, width in zip(halves, self.widths, strict=True)
        ]
        return PackedTensor(*(mx.concatenate(field, axis=-1) for field in zip(*(p[:2] for p in parts), strict=True)))

    def dequantize(self, packed: PackedTensor, learned: Learned) -> mx.array:
        """The rows (B, Hkv, T, D) float32, still in the order and rotated as `transform` makes them."""
        halves = [lloyd_max.dequantize(half, width, self.half) for half, width in self._halves(packed)]
        return mx.concatenate(halves, axis=-1)

    def prepare(self, x: mx.array, learned: Learned) -> tuple[Prepared, ...]:
        """Both halves of x (B, Hkv, R, D), with tables where they pay."""
        halves = zip(mx.split(x, 2, axis=-1), self.widths, strict=True)
        return tuple(lloyd_max.prepare(half, width) for half, width in halves)

    def products(self, prepared: tuple[Prepared, ...], packed: PackedTensor, learned: Learned) -> mx.array:
        """Inner products (B, Hkv, R, T) float32 with what `dequantize` gives."""
        halves = zip(prepared, self._halves(packed), strict=True)
        first, second = (lloyd_max.products(x, half, width) for x, (half, width) in halves)
        return first + second

    def weighted_sum(self, weights: mx.array, packed: PackedTensor, learned: Learned) -> mx.array:
        """weights (B, Hkv, R, T) float32 times what `dequantize` gives."""
        halves = [lloyd_max.weighted_sum(weights, half, width, self.half) for half, width in self._halves(packed)]
        return mx.concatenate(halves, axis=-1)

    def transform(self, x: mx.array, learned: Learned) -> mx.array:
        """x (B, Hkv, R, D) float32 with its channels in the learned order, each half rotated."""
        halves = zip(self.rotations, mx.split(in_order(x, learned[0]), 2, axis=-1), strict=True)
        return mx.concatenate([rotation.apply(half) for rotation, half in halves], axis=-1)

    def transform_back(self, y: mx.array, learned: Learned) -> mx.array:
        """Undo `transform`, which is orthogonal."""
        halves = zip(self.rotations, mx.split(y, 2, axis=-1), strict=True)
        ordered = mx.concatenate([rotation.invert(half) for rotation, half in halves], axis=-1)
        return back_in_place(ordered, learned[0])

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """Shapes and dtypes of `quantize`'s result."""
        words = sum(words_per_row(self.half, width) for width in self.widths)
        shapes = PackedTensor((B, H, T, words), (B, H, T, self.dim // self.group))
        return shapes, PackedTensor(mx.uint32, self.dtype)

    def _halves(self, packed: PackedTensor) -> list[tuple[PackedTensor, int]]:
        """Each half as `lloyd_max.quantize` made it, and the bits of its codes."""
        codes = mx.split(packed.codes, [words_per_row(self.half, self.widths[0])], axis=-1)
        scales = mx.split(packed.scales, 2, axis=-1)
        return [(PackedTensor(*part), width) for *part, width in zip(codes, scales, self.widths, strict=True)]
