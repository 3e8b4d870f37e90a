"""Keys for inner products: Lloyd-Max codes of one bit less, and one bit per element for what they leave over.

TurboQuant's quantizer for inner products (arXiv 2504.19874, Algorithm 2). A key k is rotated, y = R k, and coded in
bits - 1 bits; y' is what the stored codes and the stored scale stand for, r = y - y' the residual. Of r its length and
the signs of S r are kept, with S a (D, D) matrix of independent N(0, 1), the same for all keys (QJL, arXiv 2406.03482):

    <q, k>  is estimated as  <R q, y'> + t <S R q, sign(S r)>,   t = sqrt(pi / 2) / D * ||r||.

For one row s of S, E[<s, x> sign(<s, r>)] = sqrt(2 / pi) <x, r> / ||r||, so the second term is <R q, r> on average over
S, whatever y' is: the estimate is unbiased, although scale and codes of y' are not. Its variance is at most
pi / (2 D) ||q||^2 ||r||^2, and at `bits` bits at most sqrt(3) pi^2 / D ||q||^2 ||k||^2 4^-bits on average (Theorem 2).
That is 0.184 and 0.0504 / D at 3 and 4 bits, where Lloyd-Max codes of as many bits, which shrink products a little,
have a squared error of 0.032 and 0.0080 / D (Gaussian rows, D = 128, 32 seeds).
"""

from functools import cache, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_turboquant.ops import lloyd_max
from mlx_turboquant.ops.lookup import Codebook, Prepared
from mlx_turboquant.packing import pack_codes, words_per_row
from mlx_turboquant.quantizers.base import Fused, Learned
from mlx_turboquant.quantizers.codec import Codec
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tensor import PackedTensor

BITS = (3, 4)
# Beside the scheme's seed: the rotation is drawn from the seed alone, and S must not depend on it.
_STREAM = 1


@cache
def _signs() -> Codebook:
    return Codebook(np.array([-1, 1]), 1)


class Projection:
    """S of one head size and seed, and S R. It never changes, so that a copy of a cache shares it.

    Attributes:
        matrix: S, (D, D) float32, entries independent N(0, 1).
        of_rows: S R, (D, D) float32: what rows and queries are multiplied with that were not rotated.
    """

    def __init__(self, kind: str, dim: int, seed: int):
        drawn = np.random.default_rng((seed, _STREAM)).standard_normal((dim, dim))
        self.matrix = mx.array(drawn.astype(np.float32))
        # R^T of each row s of S, since <R^T s, q> = <s, R q>.
        self.of_rows = make_rotation(kind, dim, seed).invert(self.matrix)
        mx.eval(self.of_rows)  # kept beyond this call, so it must not belong to a graph that is being traced

    def __deepcopy__(self, memo: dict) -> "Projection":
        return self


@lru_cache(maxsize=64)
def make_projection(kind: str, dim: int, seed: int) -> Projection:
    """The projection of one kind of rotation, size and seed, made once and shared by all layers."""
    return Projection(kind, dim, seed)


class QjlKeys(Codec):
    """Keys of one layer in `bits` bits per element, whose inner products with queries are unbiased over S.

    Stored for each row: the words of its codes, then those of its signs (bit 1: not negative), and [scale, t]. As a
    `Codec`, y is [y', t sign(S r)] of 2 D numbers, and A q is [R q, S R q].

    Args:
        scheme: supplies block, rotation and seed; group must be 0 or `dim`.
        bits: 3 or 4.
        dim: head size D.
        dtype: of scale and t: the model's.

    Attributes:
        code_bits: of a Lloyd-Max code: bits - 1.
        rotation: R.

    Raises:
        ValueError: for other bits, or another group.
    """

    def __init__(self, scheme: Any, bits: float, dim: int, dtype: mx.Dtype):
        super().__init__(scheme, bits, dim, dtype)
        if bits not in BITS:
            raise ValueError(f"[QjlKeys] wanted {' or '.join(map(str, BITS))} bits, got {bits}. Use turbo for others.")
        if scheme.group not in (0, dim):
            raise ValueError(
                f"[QjlKeys] wanted one scale per row of {dim}, got group={scheme.group}. Leave group out: the "
                "residual is one of a whole row."
            )
        self.code_bits = int(bits) - 1
        self.rotation = make_rotation(scheme.rotation, dim, scheme.seed)
        self._projection = make_projection(scheme.rotation, dim, scheme.seed)
        self.fused = Fused(self.code_bits, self.rotation, self.projection_of_rows)

    @property
    def projection(self) -> mx.array:
        """S, (D, D) float32: what rotated rows are multiplied with."""
        return self._projection.matrix

    @property
    def projection_of_rows(self) -> mx.array:
        """S R, (D, D) float32: what rows and queries are multiplied with that were not rotated."""
        return self._projection.of_rows

    def quantize(self, rows: mx.array, learned: Learned) -> PackedTensor:
        """Rows (B, Hkv, T, D) float32, finite, as words of codes and signs (B, Hkv, T, W) and [scale, t]."""
        largest = mx.maximum(mx.abs(rows).max(axis=-1, keepdims=True), 1e-37)
        most = mx.finfo(self.dtype).max
        # Sums and squares of what a float32 holds may overflow or vanish; those of what lies in [-1, 1] do not.
        unit = self.rotation.apply(rows / largest)
        coded = lloyd_max.quantize(unit, self.code_bits, self.dim, mx.float32)
        scales = mx.minimum(coded.scales * largest, most).astype(self.dtype)
        # The residual is what the stored scale leaves, rounded and bounded as it is: so the sum stays unbiased.
        stored = coded._replace(scales=scales.astype(mx.float32) / largest)
        residual = unit - lloyd_max.dequantize(stored, self.code_bits, self.dim)
        signs = residual @ self.projection.T >= 0
        length = mx.sqrt(mx.square(residual).sum(axis=-1, keepdims=True)) * (np.sqrt(np.pi / 2) / self.dim)
        t = mx.minimum(length * largest, most).astype(self.dtype)
        return PackedTensor(
            mx.concatenate([coded.codes, pack_codes(signs, 1)], axis=-1), mx.concatenate([scales, t], axis=-1)
        )

    def dequantize(self, packed: PackedTensor, learned: Learned) -> mx.array:
        """The vectors [y', t sign(S r)] (B, Hkv, T, 2 D) float32 of packed rows."""
        coded, signs, t = self._parts(packed)
        rows = lloyd_max.dequantize(coded, self.code_bits, self.dim)
        return mx.concatenate([rows, _signs().rows(signs, self.dim) * t], axis=-1)

    def prepare(self, x: mx.array, learned: Learned) -> tuple[Prepared, Prepared]:
        """Both halves of x = [R q, S R q] (B, Hkv, R, 2 D), with tables where they pay."""
        turned, projected = mx.split(x, 2, axis=-1)
        return lloyd_max.prepare(turned, self.code_bits), _signs().prepare(projected)

    def products(self, prepared: tuple[Prepared, Prepared], packed: PackedTensor, learned: Learned) -> mx.array:
        """The estimates (B, Hkv, R, T) float32."""
        coded, signs, t = self._parts(packed)
        of_signs = _signs().products(prepared[1], signs) * t.swapaxes(-1, -2)
        return lloyd_max.products(prepared[0], coded, self.code_bits) + of_signs

    def transform(self, x: mx.array, learned: Learned) -> mx.array:
        """[R x, S R x] for x (B, Hkv, R, D) float32: (B, Hkv, R, 2 D)."""
        return mx.concatenate([self.rotation.apply(x), x @ self.projection_of_rows.T], axis=-1)

    def transform_back(self, y: mx.array, learned: Learned) -> mx.array:
        """R^T y1 + (S R)^T y2 for y = [y1, y2] (B, Hkv, R, 2 D) float32: (B, Hkv, R, D)."""
        return self.rotation.invert(y[..., : self.dim]) + y[..., self.dim :] @ self.projection_of_rows

    def layout(self, B: int, H: int, T: int) -> tuple[PackedTensor, PackedTensor]:
        """The shapes and the dtypes of `quantize`'s result for T rows."""
        words = words_per_row(self.dim, self.code_bits) + words_per_row(self.dim, 1)
        return PackedTensor((B, H, T, words), (B, H, T, 2)), PackedTensor(mx.uint32, self.dtype)

    def _parts(self, packed: PackedTensor) -> tuple[PackedTensor, mx.array, mx.array]:
        """What `lloyd_max.quantize` made, the words of the signs, and t (B, Hkv, T, 1) float32."""
        words = words_per_row(self.dim, self.code_bits)
        coded = PackedTensor(packed.codes[..., :words], packed.scales[..., :1])
        return coded, packed.codes[..., words:], packed.scales[..., 1:].astype(mx.float32)
