"""The kinds of cases that kernels are checked with: each is one template combination and the lengths it is run at."""

from dataclasses import dataclass, fields
from typing import ClassVar

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
        beside: how many of the last lie beside their tail, see `tail_parts`; at most 16, and for one query.
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
    beside: int = 0

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


class _OneKernel:
    """A case of an operation that is one kernel of the same name."""

    operation: ClassVar[str]

    def kernels(self, backend: str) -> tuple[str, ...]:
        """The kernels that it runs."""
        return () if backend == "reference" else (self.operation,)


@dataclass(frozen=True)
class _RowCase(_OneKernel):
    """A few blocks of rows. Attributes as in `AttendCase`."""

    bits: int = 4
    D: int = 128
    dtype: str = "float16"
    group: int = 0
    block: int = 64
    center: bool = True
    balance: bool = True

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
class SurveyCase(_OneKernel):
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

    def __str__(self) -> str:
        return ", ".join([f"D{self.D} {self.dtype}", *_others(self, {"D", "dtype"})])


@dataclass(frozen=True)
class KeepCase(_OneKernel):
    """The rows that stay raw when blocks are encoded, of two sequences; some entries are NaN or infinite.

    Attributes:
        D, Dv: head sizes of keys and values.
        dtype: of both.
        first, newest: how many rows are copied.
        room: rows of the newest ones' new arrays.
    """

    D: int = 128
    Dv: int = 128
    dtype: str = "float16"
    first: int = 4
    newest: int = 37
    room: int = 72

    operation = "keep_rows"

    def __str__(self) -> str:
        return ", ".join([f"D{self.D}/{self.Dv} {self.dtype}", *_others(self, {"D", "Dv", "dtype"})])


@dataclass(frozen=True)
class BalanceCase(_OneKernel):
    """The balance of some heads, one of which saw no query, one with a channel far above the others."""

    D: int = 128

    operation = "balance"

    def __str__(self) -> str:
        return f"D{self.D}"


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


Case = AttendCase | EncodeCase | DequantizeCase | SurveyCase | KeepCase | BalanceCase | ScoreCase


def _others(case: Case, shown: set[str]) -> list[str]:
    """What differs from the defaults, in words."""
    out = []
    for name, default in ((field.name, field.default) for field in fields(case) if field.name not in shown):
        value = getattr(case, name)
        if value != default:
            out.append((name if value else f"no {name}") if type(value) is bool else f"{name} {value}")
    return out
