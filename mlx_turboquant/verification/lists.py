"""The lists of cases: a quick one, and every template combination that matters."""

from dataclasses import replace
from itertools import product

from mlx_turboquant.verification.cases import (
    BITS,
    DTYPES,
    HEAD_SIZES,
    MANY_SCORES,
    AttendCase,
    BalanceCase,
    Case,
    DequantizeCase,
    EncodeCase,
    KeepCase,
    ScoreCase,
    SurveyCase,
)


def quick() -> list[Case]:
    """A few cases that touch every kernel and every kind of mask: the self-test of `mlx_turboquant doctor`."""
    return [
        AttendCase(),
        AttendCase(passes=2),
        AttendCase(3, 2, D=64, G=7, L=4, dtype="bfloat16", mask="causal", ragged=True, batch=4),
        AttendCase(8, 0, D=80, G=2, L=2, dtype="float32", passes=2, mask="boolean", logits=True),
        AttendCase(D=64, block=32, beside=2),
        EncodeCase(),
        EncodeCase(3, D=96, dtype="bfloat16", group=16, center=False, balance=False),
        DequantizeCase(),
        DequantizeCase(3, D=96, dtype="bfloat16", group=16, center=False, balance=False),
        SurveyCase(),
        KeepCase(),
        BalanceCase(),
        ScoreCase(),
        ScoreCase(2, dim=100, m=1, n=300, encoded=True),
    ]


def full() -> list[Case]:
    """Every template combination that matters: each constant through its values, in both passes where it has them."""
    rows = [*_rows(EncodeCase), *_encode(), *_rows(DequantizeCase), *_surveys(), *_kept(), *_balances()]
    return list(dict.fromkeys([*quick(), *_attend(), *rows, *_scores()]))


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
        *_beside(),
    ]  # fmt: skip


def _beside() -> list[AttendCase]:
    both = (1, 2)
    cases = [
        *(AttendCase(D=D, dtype=dtype, passes=p, beside=3) for D, dtype, p in product(HEAD_SIZES, DTYPES, both)),
        *(AttendCase(G=G, passes=p, beside=n) for (G, n), p in product(((1, 1), (7, 2), (8, 16)), both)),
        *(AttendCase(k, v, batch=2, passes=p, beside=5) for (k, v), p in product(((0, 4), (3, 2), (8, 0)), both)),
        AttendCase(3, signs=True, beside=4),
    ]
    return [replace(case, block=32) for case in cases]  # not 64: tensor cores read a tail that is written


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


def _kept() -> list[KeepCase]:
    return [
        *(KeepCase(D, D, dtype, newest=D // 4) for D, dtype in product(HEAD_SIZES, DTYPES)),
        *(KeepCase(D, Dv, first=first) for (D, Dv), first in product(((192, 128), (8, 256)), (0, 1, 80))),
        *(KeepCase(newest=newest, room=room) for newest, room in ((0, 72), (1, 1), (72, 72), (64, 200), (257, 300))),
    ]


def _balances() -> list[BalanceCase]:
    return [BalanceCase(D) for D in (*HEAD_SIZES, 8, 16, 48, 112, 240)]


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
