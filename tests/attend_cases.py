"""Random stored keys and values of every kind for the attention kernels, and attention over them in float64 numpy.

Room beyond the valid rows is filled with large finite numbers, so that a stray read is loud.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from unittest import mock

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
from scipy.linalg import hadamard

from mlx_turboquant.codebook import gaussian
from mlx_turboquant.ops import attend as ops
from mlx_turboquant.ops import attend_plan
from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.packing import pack_codes
from mlx_turboquant.rotation import make_rotation
from mlx_turboquant.tail_parts import FEW, TailParts
from mlx_turboquant.tensor import PackedTensor

# Metal or CUDA where MLX runs on a GPU, else the emulator. A GPU compiles each kernel for seconds: it gets fewer cases.
BACKEND = "emulator" if choose_backend() == "reference" else choose_backend()
ON_GPU = BACKEND != "emulator"
UNSUPPORTED = metal_emu.UNSUPPORTED if BACKEND == "emulator" else ""
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class Case:
    """One call: what decides which kernel is compiled, and the lengths.

    Attributes:
        G, L: query heads per KV head, queries.
        signs: whether keys have signs of residuals beside codes of `key_bits`.
        group: elements that share a scale; 0 is a whole row.
        mask: "", "boolean" or "additive".
        mask_axes: which of B, H, L the mask has in full.
        passes: 1 or 2.
        lengths: of each sequence: sinks, blocks (not tokens), tail.
        beside: how many rows of the tail lie beside its array; the newest of them is new.
    """

    key_bits: int = 4
    value_bits: int = 4
    D: int = 64
    dtype: str = "float16"
    kv_heads: int = 2
    G: int = 1
    L: int = 1
    block: int = 64
    signs: bool = False
    group: int = 0
    center: bool = True
    balance: bool = True
    mask: str = ""
    mask_axes: str = "BHL"
    causal: bool = False
    logits: bool = False
    passes: int = 1
    lengths: tuple[tuple[int, int, int], ...] = ((4, 2, 23),)
    beside: int = 0

    def __str__(self) -> str:
        new = (f"{k}={v}" for k, v in vars(self).items() if v != vars(type(self)).get(k))
        return ",".join(new).replace(" ", "") or "default"

    @property
    def token_lengths(self) -> tuple[tuple[int, int, int], ...]:
        """Sinks, packed tokens and tail of each sequence."""
        return tuple((sinks, blocks * self.block, tail) for sinks, blocks, tail in self.lengths)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.D**-0.5


@dataclass(frozen=True)
class Made:
    """The arrays of a case.

    Attributes:
        queries, keys, values: as `ops.attend` takes them.
        options: its keyword arguments but the backend.
        rows: for each sequence its keys and its values (Hkv, T, D), float64, as the stored rows stand for them.
    """

    queries: mx.array
    keys: ops.StoredSide
    values: ops.StoredSide
    options: dict
    rows: list[tuple[np.ndarray, np.ndarray]]


def rotation_matrix(D: int) -> np.ndarray:
    """The rotation's matrix in float64, from its definition."""
    two = D & -D
    angle = 2 * np.pi * np.outer(np.arange(D // two), np.arange(D // two)) * two / D
    hartley = (np.cos(angle) + np.sin(angle)) / np.sqrt(D // two)
    signs = np.array(make_rotation("hadamard", D).signs, np.float64)
    return np.kron(hartley, hadamard(two) / np.sqrt(two)) * signs


@lru_cache(maxsize=8)
def make(case: Case, seed: int = 0) -> Made:
    """Random arrays for a case."""
    random, dtype, lengths = np.random.default_rng(seed), DTYPES[case.dtype], case.token_lengths
    B, H, longest = len(lengths), case.kv_heads * case.G, max(sum(n) for n in lengths)
    queries = _rounded(2 * random.standard_normal((B, H, case.L, case.D)), dtype)
    balance = mx.array(random.uniform(0.5, 2.0, (B, case.kv_heads, case.D)).astype(np.float32))
    balance = balance if case.balance and case.key_bits else None
    projection = random.standard_normal((case.D, case.D)) if case.signs else None
    keys, key_rows = _side(case, case.key_bits, random, case.center, balance, projection)
    values, value_rows = _side(case, case.value_bits, random, False, None)
    mask, logits = None, _rounded(random.uniform(-2, 6, H), dtype) if case.logits else None
    if case.mask:
        axes = (
            B if "B" in case.mask_axes else 1,
            H if "H" in case.mask_axes else 1,
            case.L if "L" in case.mask_axes else 1,
        )
        keep = random.random((*axes, longest)) < 0.7
        keep[:, -1:, -1:] &= axes[1] * axes[2] == 1  # of several rows the last one sees nothing
        mask = mx.array(keep)
        if case.mask == "additive":
            added = np.where(keep, random.standard_normal(keep.shape), -np.inf)
            added[..., ::7][added[..., ::7] == -np.inf] = -3e4  # masks unless all of them are
            added[:, -1:, -1:][~keep[:, -1:, -1:]] = -np.inf
            mask = _rounded(added, dtype)
    options = dict(scale=case.scale, block=case.block, balance=balance, mask=mask, causal=case.causal, logits=logits)
    return Made(queries, keys, values, options | {"lengths": lengths}, list(zip(key_rows, value_rows, strict=True)))


def _side(case: Case, bits: int, random, center: bool, balance, projection=None) -> tuple[ops.StoredSide, list]:
    lengths, dtype, heads, D = case.token_lengths, DTYPES[case.dtype], case.kv_heads, case.D
    B, garbage = len(lengths), 6e4 if case.dtype == "float16" else 1e30
    most = [max(n[i] for n in lengths) for i in range(3)]

    def rows(width: int, part: int, spare: int, draw, step: int = 1, fill=garbage) -> np.ndarray:
        """(B, heads, rows, width): valid rows drawn, the others garbage; a row for each `step` tokens."""
        out = np.full((B, heads, (most[part] + spare) // step, width), fill, np.float64)
        for b, n in enumerate(lengths):
            out[b, :, : n[part] // step] = draw((heads, n[part] // step, width))
        return out

    def normal(shape):
        return 0.5 + random.standard_normal(shape)

    sinks = _rounded(rows(D, 0, 2, normal), dtype) if most[0] else None
    tail = _rounded(rows(D, 2, 9, normal), dtype) if most[2] else None
    centers = None
    if bits == 0:
        packed = PackedTensor(_rounded(rows(D, 1, case.block, normal), dtype))
        exact = _exact(packed.codes)
    else:
        groups = D // case.group if case.group else 1
        codes = rows(D, 1, case.block, lambda shape: random.integers(0, 2**bits, shape), fill=2**bits - 1)
        scales = _rounded(rows(groups, 1, case.block, lambda shape: random.uniform(0.2, 1.5, shape)), dtype)
        exact = gaussian(bits).astype(np.float64)[codes.astype(int)] * np.repeat(_exact(scales), D // groups, -1)
        exact = exact @ rotation_matrix(D)
        words = pack_codes(mx.array(codes.astype(np.uint32)), bits)
        if projection is not None:
            # Residuals about a third as long as the rows, see quantizers/qjl.py; signs of spare room are 1.
            bit = rows(D, 1, case.block, lambda shape: random.integers(0, 2, shape), fill=1)
            t = _rounded(rows(1, 1, case.block, lambda shape: random.uniform(0.2, 0.6, shape) / D**0.5), dtype)
            exact = exact + (2 * bit - 1) * _exact(t) @ _exact(projection := mx.array(projection.astype(np.float32)))
            words = mx.concatenate([words, pack_codes(mx.array(bit.astype(np.uint32)), 1)], axis=-1)
            scales = mx.concatenate([scales, t], axis=-1)
        if balance is not None:
            exact = exact / _exact(balance)[:, :, None]
        if center and bits:
            centers = _rounded(rows(D, 1, case.block, normal, case.block), dtype)
            exact = exact + np.repeat(_exact(centers), case.block, axis=2)
        packed = PackedTensor(words, scales, centers)
    parts = [np.zeros((B, heads, 0, D)) if part is None else _exact(part) for part in (sinks, tail)]
    valid = [
        np.concatenate([parts[0][b, :, : n[0]], exact[b, :, : n[1]], parts[1][b, :, : n[2]]], axis=1)
        for b, n in enumerate(lengths)
    ]
    rotation = make_rotation("hadamard", D) if bits else None
    return ops.StoredSide(bits, packed, sinks, tail, rotation, projection), valid


def _rounded(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(dtype)


def _exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


@contextmanager
def forced(passes: int, **plan):
    """Inside, attention takes so many passes, and fields of its plan (splits, raw_splits) are these.

    CUDA uses tensor cores wherever it can.
    """
    _forget()
    choose = attend_plan.plan_of
    with (
        mock.patch.object(attend_plan, "_SINGLE_PASS_TILES", -1 if passes == 2 else 1 << 30),
        mock.patch.object(attend_plan, "_TENSOR_CORE_TOKENS", 0),
        mock.patch.object(ops, "plan_of", (lambda *shape: choose(*shape)._replace(**plan)) if plan else choose),
    ):
        yield
    _forget()


def _forget() -> None:
    attend_plan.plan_of.cache_clear()
    ops._prepare.cache_clear()


def run(case: Case, made: Made | None = None, backend: str = BACKEND, **plan) -> mx.array:
    """The kernels' answer, for the case's own arrays or for others."""
    made = made or make(case)
    if case.beside:
        sides = [side._replace(tail=in_parts(case, side.tail)) for side in (made.keys, made.values)]
        made = replace(made, keys=sides[0], values=sides[1])
    with forced(case.passes, **plan):
        out = ops.attend(made.queries, made.keys, made.values, **made.options, backend=backend)
    if case.beside and not kernel_emulator.only_notes():
        assert_joined(made.keys.tail)
        assert_joined(made.values.tail)
    return out


def in_parts(case: Case, tail: mx.array) -> TailParts:
    """The tail with some of its rows beside it, and garbage in their places."""
    held = case.token_lengths[0][2] - case.beside
    garbage = mx.full((*tail.shape[:2], FEW, case.D), 6e4).astype(tail.dtype)
    few, new = tail[:, :, held : held + case.beside - 1], tail[:, :, held + case.beside - 1 : held + case.beside]
    rest = mx.broadcast_to(garbage[:, :, :1], tail.shape)
    rows = mx.where(mx.arange(tail.shape[2])[:, None] < held, tail, rest)
    few = mx.concatenate([few, garbage[:, :, case.beside - 1 :]], axis=2) if case.beside > 1 else None
    mx.eval(rows, few, new)
    return TailParts(rows, held, few, case.beside - 1, mx.contiguous(new))


def assert_joined(parts: TailParts) -> None:
    """A kernel has put the new row behind the few, bit for bit."""
    rows = [parts.new] if parts.few is None else [parts.few[:, :, : parts.count], parts.new]
    wanted = mx.concatenate(rows, axis=2)
    assert parts.next.shape[2] == FEW and mx.array_equal(parts.next[:, :, : parts.count + 1], wanted)
    assert mx.array_equal(parts.loose(), wanted) and (parts.next[:, :, parts.count + 1 :] == 0).all()


def build(request) -> None:
    """Compile what the tests of the requesting module need for their parameters named `case`, two at a time."""
    if not ON_GPU:
        params = (getattr(item, "callspec", None) for item in request.session.items if item.fspath == request.fspath)
        with kernel_emulator.prebuilding():
            for case in dict.fromkeys(p.params["case"] for p in params if p and "case" in p.params):
                run(case)


def in_every_schedule(call: Callable[[], mx.array]) -> mx.array:
    """What `call` gives in three schedules, every access checked; one result, since all are the same to the bit.

    Types were checked when the kernel was built.
    """
    results = []
    for order in ("forward",) if ON_GPU else ("forward", "reverse", "random"):
        with kernel_emulator.options(check=True, order=order, typecheck=False):
            results.append(call())
    assert all(mx.array_equal(result, results[0]) for result in results)
    return results[0]


def assert_right(out: mx.array, case: Case, made: Made | None = None) -> None:
    """Rows that see nothing are 0, and others at most twice as wrong as plain MLX in the same dtype."""
    made = made or make(case)
    assert out.dtype == made.queries.dtype
    out = _exact(out)
    assert np.isfinite(out).all()
    for b in range(len(out)):
        assert (out[b][~np.isfinite(visible(case, made, b)).any(axis=-1)] == 0).all()
    largest = max(np.abs(values).max(initial=0) for _, values in made.rows)
    assert np.abs(out - exact(case, made)).max() <= 2 * plain_error(case, made) + 1e-6 * largest


def visible(case: Case, made: Made, b: int) -> np.ndarray:
    """What is added to the scores (H, L, T) of sequence b; -inf hides a token."""
    H, T = case.kv_heads * case.G, made.rows[b][0].shape[1]
    added = np.zeros((H, case.L, T))
    if (mask := made.options["mask"]) is not None:
        mask = mask[min(b, mask.shape[0] - 1), :, :, :T]
        added = added + (np.where(np.array(mask), 0, -np.inf) if mask.dtype == mx.bool_ else _exact(mask))
    if case.causal:
        added = np.where(np.arange(T - case.L, T)[:, None] >= np.arange(T), added, -np.inf)
    return added


def exact(case: Case, made: Made) -> np.ndarray:
    """(B, H, L, D) in float64; what sees nothing is 0."""
    out, logits = [], made.options["logits"]
    for b, (keys, values) in enumerate(made.rows):
        keys, values = (np.repeat(side, case.G, axis=0) for side in (keys, values))
        scores = _exact(made.queries)[b] * case.scale @ keys.swapaxes(-1, -2) + visible(case, made, b)
        extra = np.full((len(scores), 1, 1), -np.inf) if logits is None else _exact(logits)[:, None, None]
        top = np.maximum(scores.max(axis=-1, keepdims=True, initial=-1e300), extra)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True) + np.exp(extra - top)
        out.append(weights @ values / np.where(total > 0, total, 1))
    return np.stack(out)


def plain_error(case: Case, made: Made) -> float:
    """The largest error of plain MLX operations in the case's dtype, over the rows decoded to it."""
    dtype, worst, target = DTYPES[case.dtype], 0.0, exact(case, made)
    for b, rows in enumerate(made.rows):
        keys, values = (mx.repeat(_rounded(side, dtype), case.G, axis=0) for side in rows)
        added = visible(case, made, b)
        scores = (made.queries[b] * case.scale) @ keys.swapaxes(-1, -2) + _rounded(added, dtype)
        if (logits := made.options["logits"]) is not None:
            column = mx.broadcast_to(logits[:, None, None], (*scores.shape[:2], 1))
            scores = mx.concatenate([scores, column], axis=-1)
        seen = np.isfinite(added).any(axis=-1)
        if seen.any():
            weights = mx.softmax(scores, axis=-1, precise=True)[..., : keys.shape[1]]
            worst = max(worst, np.abs(_exact(weights @ values) - target[b])[seen].max())
    return worst
