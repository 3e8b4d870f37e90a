"""The cases that kernels are checked with: each is one template combination and the lengths it is run at."""

from dataclasses import dataclass, fields
from itertools import product

BITS = (2, 3, 4, 8)
DTYPES = ("float16", "bfloat16", "float32")
HEAD_SIZES = (64, 80, 96, 128, 256)
# Packed tokens that one dispatch reads, and that need two (ops/attend.py decides; a test holds the two together).
SINGLE_PASS_TOKENS, TWO_PASS_TOKENS = 192, 1088
KV_HEADS = 2
# Queries and rows that are many to ops/score.py (a test holds the two together), by tiles of 1, 2, 4 and 8 queries.
MANY_SCORES = ((1, 262183), (2, 262183), (4, 262183), (64, 32807))
SINKS, TAIL = 4, 23


@dataclass(frozen=True)
class AttendCase:
    """One call of attention over a compressed layer.

    Attributes:
        key_bits, value_bits: 0 is raw.
        D: head size.
        G: query heads per KV head.
        L: queries.
        dtype: of the model.
        passes: 1 or 2 dispatches.
        mask: "", "causal", "boolean" or "added".
        logits: whether there are attention-sink logits.
        signs: whether keys keep signs of residuals beside codes of `key_bits`, as `qjl` schemes do.
        group: elements per scale; 0 is the whole row.
        block: tokens per centre.
        center, balance: of the keys.
        batch: sequences, all of the same length, or of `ragged` lengths.
        ragged: whether sequences have different lengths, one of them without blocks, one without raw rows.
        sinks, tail: raw tokens at the front and at the end.
    """

    key_bits: int = 4
    value_bits: int = 4
    D: int = 128
    G: int = 4
    L: int = 1
    dtype: str = "float16"
    passes: int = 1
    mask: str = ""
    logits: bool = False
    group: int = 0
    block: int = 64
    center: bool = True
    balance: bool = True
    batch: int = 1
    ragged: bool = False
    sinks: int = SINKS
    tail: int = TAIL
    signs: bool = False

    operation = "attend"

    def kernels(self, backend: str) -> tuple[str, ...]:
        """The kernels that it runs (ops/attend.py chooses; a test holds the two together)."""
        if backend == "reference" or self.passes == 1:
            return () if backend == "reference" else ("attend",)
        tensor_cores = (
            backend == "cuda"
            and self.D in (64, 128, 256)
            and self.dtype != "float32"
            and self.group in (0, self.D)
            and self.block == 64
            and not self.signs
        )
        return ("attend_mma" if tensor_cores else "attend", "attend_merge")

    @property
    def packed(self) -> int:
        """Packed tokens: whole blocks."""
        tokens = SINGLE_PASS_TOKENS if self.passes == 1 else TWO_PASS_TOKENS
        return -(-tokens // self.block) * self.block

    @property
    def lengths(self) -> tuple[tuple[int, int, int], ...]:
        """For each sequence its rows of sinks, blocks and tail."""
        longest = self.sinks, self.packed, self.tail
        if not self.ragged:
            return (longest,) * self.batch
        return (longest, (self.sinks, 0, self.tail), (0, self.block, 0), (2, self.packed - self.block, 1))

    def __str__(self) -> str:
        main = f"K{self.key_bits} V{self.value_bits} D{self.D} G{self.G} L{self.L} {self.dtype}"
        shown = {"key_bits", "value_bits", "D", "G", "L", "dtype", "passes"}
        return ", ".join([main, "1 pass" if self.passes == 1 else "2 passes", *_others(self, shown)])


@dataclass(frozen=True)
class _RowCase:
    """A few blocks of rows. Attributes as in `AttendCase`."""

    bits: int = 4
    D: int = 128
    dtype: str = "float16"
    group: int = 0
    block: int = 64
    center: bool = True
    balance: bool = True

    def kernels(self, backend: str) -> tuple[str, ...]:
        """The kernels that it runs."""
        return () if backend == "reference" else (self.operation,)

    def __str__(self) -> str:
        return ", ".join([f"{self.bits} bits D{self.D} {self.dtype}", *_others(self, {"bits", "D", "dtype"})])


@dataclass(frozen=True)
class EncodeCase(_RowCase):
    """Three blocks of rows, encoded from a buffer that holds more.

    Attributes:
        bits, D, dtype, group, block, center, balance: as in `AttendCase`.
        scalings: how many are tried.
        nonfinite: whether some entries are NaN or infinite.
    """

    scalings: int = 2
    nonfinite: bool = False

    operation = "encode"


@dataclass(frozen=True)
class DequantizeCase(_RowCase):
    """Two blocks of rows, decoded from buffers that hold more. Attributes as in `EncodeCase`."""

    operation = "dequantize"


@dataclass(frozen=True)
class SurveyCase:
    """Three blocks of rows, looked at in a buffer that holds more; without `center` the last one is shorter.

    Attributes:
        D, dtype, block, center: as in `AttendCase`.
        squares: whether they are summed.
        nonfinite: whether some entries are NaN or infinite.
    """

    D: int = 128
    dtype: str = "float16"
    block: int = 64
    center: bool = True
    squares: bool = True
    nonfinite: bool = True

    operation = "survey"

    def kernels(self, backend: str) -> tuple[str, ...]:
        """The kernels that it runs."""
        return () if backend == "reference" else (self.operation,)

    def __str__(self) -> str:
        return ", ".join([f"D{self.D} {self.dtype}", *_others(self, {"D", "dtype"})])


@dataclass(frozen=True)
class ScoreCase:
    """One call of `ops.score.score` over random codes, or over the trellis codes of random rows.

    Attributes:
        bits: of a code.
        dim: elements of a row and of a query.
        m: queries.
        n: rows.
        encoded: whether the codes are made by `ops.trellis.encode` first; bits are 2.
    """

    bits: int = 4
    dim: int = 384
    m: int = 3
    n: int = 257
    encoded: bool = False

    operation = "score"

    def kernels(self, backend: str) -> tuple[str, ...]:
        """The kernels that it runs."""
        return () if backend == "reference" else ("trellis", "score") if self.encoded else ("score",)

    def __str__(self) -> str:
        return f"{self.bits} bits dim {self.dim}, {self.m} queries, {self.n} {'encoded ' * self.encoded}rows"


Case = AttendCase | EncodeCase | DequantizeCase | SurveyCase | ScoreCase


def _others(case: Case, shown: set[str]) -> list[str]:
    """What differs from the defaults, in words."""
    out = []
    for name, default in ((field.name, field.default) for field in fields(case) if field.name not in shown):
        value = getattr(case, name)
        if value != default:
            out.append((name if value else f"no {name}") if type(value) is bool else f"{name} {value}")
    return out


def quick() -> list[Case]:
    """A few cases that touch every kernel and every kind of mask: the self-test of `mlx_turboquant doctor`."""
    return [
        AttendCase(),
        AttendCase(passes=2),
        AttendCase(3, 2, D=64, G=7, L=4, dtype="bfloat16", mask="causal", ragged=True, batch=4),
        AttendCase(8, 0, D=80, G=2, L=2, dtype="float32", passes=2, mask="boolean", logits=True),
        EncodeCase(),
        EncodeCase(3, D=96, dtype="bfloat16", group=16, center=False, balance=False),
        DequantizeCase(),
        DequantizeCase(3, D=96, dtype="bfloat16", group=16, center=False, balance=False),
        SurveyCase(),
        ScoreCase(),
        ScoreCase(2, dim=100, m=1, n=300, encoded=True),
    ]


def full() -> list[Case]:
    """Every template combination that matters: each constant through its values, in both passes where it has them."""
    return list(
        dict.fromkeys(
            [*quick(), *_attend(), *_rows(EncodeCase), *_encode(), *_rows(DequantizeCase), *_surveys(), *_scores()]
        )
    )


def _attend() -> list[AttendCase]:
    both = (1, 2)
    pairs = [pair for pair in product((0, *BITS), repeat=2) if pair != (0, 0)]
    return [
        *(AttendCase(k, v, passes=p) for (k, v), p in product(pairs, both)),
        *(
            AttendCase(k, v, D=D, dtype=dtype, passes=p)
            for (k, v), D, dtype, p in product(((4, 4), (3, 2), (0, 8)), HEAD_SIZES, DTYPES, both)
        ),
        *(AttendCase(D=D, passes=p) for D, p in product((16, 32, 48, 112, 160, 192, 240), both)),
        *(AttendCase(G=G, passes=p) for G, p in product(range(1, 17), both)),
        *(AttendCase(D=D, G=G) for D, G in product((64, 256), (1, 2, 8, 16))),
        *(AttendCase(L=L, mask="causal", passes=p) for L, p in product(range(1, 9), both)),
        *(
            AttendCase(D=D, G=G, L=L, mask="causal", passes=p)
            for (D, G, L), p in product(((64, 1, 8), (128, 16, 8), (64, 7, 3), (256, 8, 5)), both)
        ),
        *(
            AttendCase(L=L, mask=mask, dtype=dtype, batch=2, passes=p)
            for L, mask, dtype, p in product((1, 3), ("boolean", "added"), ("float16", "float32"), both)
        ),
        *(AttendCase(G=G, L=L, logits=True, passes=p) for G, L, p in product((1, 4, 8), (1, 2), both)),
        *(
            AttendCase(bits, bits, group=group, passes=p)
            for bits, group, p in product(BITS, (16, 32, 64), both)
        ),
        *(AttendCase(3, 3, D=D, group=16, passes=p) for D, p in product((64, 80, 96, 256), both)),
        *(AttendCase(center=c, balance=b, passes=p) for c, b, p in product((True, False), (True, False), both)),
        *(AttendCase(block=block, passes=p) for block, p in product((16, 32, 128, 256), both)),
        *(
            AttendCase(L=L, mask=mask, ragged=True, batch=4, passes=p)
            for (L, mask), p in product(((1, ""), (3, "causal"), (2, "boolean")), both)
        ),
        *(AttendCase(sinks=s, tail=t, passes=p) for (s, t), p in product(((0, 0), (4, 0), (0, 80), (4, 71)), both)),
        *_signs(),
    ]  # fmt: skip


def _signs() -> list[AttendCase]:
    both = (1, 2)
    return [
        *(AttendCase(k, D=D, block=32, passes=p, signs=True) for k, D, p in product((2, 3), HEAD_SIZES, both)),
        *(AttendCase(3, dtype=dtype, block=32, passes=p, signs=True) for dtype, p in product(DTYPES[1:], both)),
        *(AttendCase(3, G=G, L=L, mask="causal", signs=True) for G, L in ((1, 2), (3, 3), (2, 8))),
        *(
            AttendCase(3, 2, L=2, mask=mask, logits=True, ragged=True, batch=4, center=c, balance=c, block=32, passes=p,
                       signs=True)
            for mask, c, p in product(("boolean", "causal"), (True, False), both)
        ),
    ]  # fmt: skip


def _rows(kind: type[EncodeCase] | type[DequantizeCase]) -> list[EncodeCase | DequantizeCase]:
    return [
        *(kind(bits, D=D, dtype=dtype) for bits, D, dtype in product(BITS, HEAD_SIZES, DTYPES)),
        *(kind(D=D) for D in (16, 32, 48, 112, 160, 192, 240)),
        *(kind(bits, D=D, group=16) for bits, D in product(BITS, HEAD_SIZES)),
        *(kind(bits, group=group) for bits, group in product(BITS, (32, 64))),
        *(kind(D=256, group=group) for group in (8, 128)),
        *(kind(bits, center=c, balance=b) for bits, (c, b) in product(BITS, ((False, True), (True, False)))),
        *(kind(bits, center=False, balance=False) for bits in BITS),
        *(kind(block=block) for block in (16, 32, 128, 256)),
    ]


def _encode() -> list[EncodeCase]:
    return [
        *(EncodeCase(bits, scalings=n) for bits, n in product(BITS, (1, 3))),
        *(EncodeCase(bits, dtype=dtype, nonfinite=True) for bits, dtype in product(BITS, DTYPES)),
        EncodeCase(nonfinite=True, center=False),
        EncodeCase(nonfinite=True, D=80, group=16),
    ]


def _surveys() -> list[SurveyCase]:
    yes = (True, False)
    return [
        *(SurveyCase(D, dtype, center=c) for D, dtype, c in product((*HEAD_SIZES, 8, 240), DTYPES, yes)),
        *(SurveyCase(block=block, center=c) for block, c in product((16, 32, 48, 128, 256), yes)),
        *(SurveyCase(D, squares=False, nonfinite=bad) for D, bad in product(HEAD_SIZES, yes)),
    ]


def _scores() -> list[ScoreCase]:
    """Each width with each tile of queries and several lengths of rows, then with so many that a lane takes 4 rows."""
    bits = (1, *BITS)
    return [
        *(ScoreCase(b, m=m) for b, m in product(bits, (1, 2, 4, 8, 17))),
        *(ScoreCase(b, dim=dim) for b, dim in product(bits, (8, 64, 100, 200, 768, 1536))),
        *(ScoreCase(b, m=m, n=n) for b, (m, n) in product(bits, ((1, 31), (9, 1000)))),
        *(ScoreCase(b, dim=128, m=m, n=n) for b, (m, n) in product(bits, MANY_SCORES)),
        *(ScoreCase(b, dim=72, m=m, n=n) for b, (m, n) in product(bits, MANY_SCORES[-1:])),
        *(ScoreCase(2, dim=dim, n=n, encoded=True) for dim, n in product((1, 16, 75, 384, 1536), (1, 8, 1001))),
        ScoreCase(2, dim=65536, n=9, encoded=True),
    ]
