"""The attention kernels against float64: on a GPU, or on a CPU from their Metal text with every access checked."""

import itertools
from collections import Counter

import pytest
from attend_cases import ON_GPU, UNSUPPORTED, Case, assert_right, build, in_every_schedule, run
from pairwise import allowed_pairs, pairs, pairwise

pytestmark = pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)

WIDTHS = [0, 2, 3, 4, 8]
LEVELS = {
    "key_bits": WIDTHS,
    "value_bits": WIDTHS,
    "D": [64, 80, 96, 128, 256],
    "dtype": ["float16", "bfloat16", "float32"],
    "rows": [1, 2, 4, 8],
    "group": [0, 8, 16, 32],
    "block": [16, 64, 256],
    "mask": ["", "boolean", "additive"],
    "causal": [False, True],
    "logits": [False, True],
    "center": [False, True],
    "balance": [False, True],
    "passes": [1, 2],
}
LENGTHS = [
    ((4, 2, 23),),
    ((0, 1, 1), (5, 3, 0)),
    ((4, 0, 40), (4, 2, 17), (0, 0, 0)),
    ((1, 3, 0),),
    ((0, 2, 0), (0, 0, 9)),
    ((17, 1, 77),),
]


def may_meet(row):
    """Whether these choices can be of one call."""
    grouped, bits = row.get("group"), {row.get("key_bits"), row.get("value_bits")}
    if grouped and (bits == {0} or row.get("D", 64) % grouped):
        return False
    if row.get("key_bits") == 0 and (row.get("center") or row.get("balance")):
        return False
    return not (row.get("causal") and row.get("rows") == 1)  # a single query sees all tokens anyway


def cases_of(table):
    """A case for each row of choices; heads, queries and lengths take turns."""
    used, lengths = Counter(), itertools.cycle(LENGTHS)
    for row in map(dict, table):
        low, high = {1: (1, 1), 2: (2, 2), 4: (3, 4), 8: (5, 48)}[row.pop("rows")]
        choices = [(G, L) for G in range(1, 17) for L in range(1, 9) if low <= G * L <= high]
        G, L = min(
            (pair for pair in choices if pair[1] > 1 or not row["causal"]),
            key=lambda pair: (used["G", pair[0]] + used["L", pair[1], row["causal"]], -pair[0]),
        )
        used.update([("G", G), ("L", L, row["causal"])])
        yield Case(**row, G=G, L=L, kv_heads=2 if G < 4 else 1, lengths=next(lengths))


# Every width of keys with every width of values in one pass and in two; every other two choices meet too.
SQUARE = [dict(key_bits=k, value_bits=v, passes=p) for k in WIDTHS for v in WIDTHS for p in (1, 2)]
TABLE = pairwise(LEVELS, may_meet, SQUARE)
COVER = list(cases_of(TABLE))
# Two passes over what CUDA has a body of its own for.
TENSOR_CORES = [
    Case(
        *bits, D=D, dtype=dtype, mask=mask, causal=causal, logits=bits[1] > 2, G=3, L=2, passes=2, lengths=((4, 3, 37),)
    )
    for bits, (D, dtype), mask, causal in zip(
        itertools.product(WIDTHS, WIDTHS),
        itertools.cycle(
            [
                (64, "float16"),
                (128, "bfloat16"),
                (256, "float16"),
                (64, "bfloat16"),
                (128, "float16"),
                (256, "bfloat16"),
            ]
        ),
        itertools.cycle(["", "boolean", "", "additive"]),
        itertools.cycle([True, False, True, True, False, False, True]),
        strict=False,
    )
]
# Every head size that is not listed above.
OTHER_SIZES = [
    Case(bits, 11 - bits if bits != 4 else 2, D=16 * n, dtype="float32", passes=n % 2 + 1)
    for n, bits in zip((1, 2, 3, 7, 9, 10, 11, 12, 13, 14, 15), itertools.cycle([8, 3, 4]), strict=False)
]
CASES = TENSOR_CORES + COVER[::8] if ON_GPU else COVER + OTHER_SIZES


@pytest.fixture(scope="module")
def built(request):
    """The kernels of all cases, compiled."""
    build(request)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_float64(case, built):
    assert_right(in_every_schedule(lambda: run(case)), case)


def test_the_cases_hold_every_two_choices():
    assert set().union(*map(pairs, TABLE)) >= set(allowed_pairs(LEVELS, may_meet))
    assert {case.G for case in COVER} == set(range(1, 17)) and {case.L for case in COVER} == set(range(1, 9))
    assert {case.L for case in COVER if case.causal} == set(range(2, 9))
    assert len(COVER) < 60
