"""Few rows of choices in which every two choices meet: most bugs need no more than two (Cohen et al., "AETG", 1997)."""

import random
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

Row = dict[str, Any]
TRIES = 10  # at each row, of which the best is taken


def pairs(row: Row) -> set[frozenset]:
    """Every two choices that meet in a row, each a (name, value)."""
    return set(map(frozenset, combinations(row.items(), 2)))


def allowed_pairs(levels: dict[str, list], allowed: Callable[[Row], bool]) -> list[frozenset]:
    """Every two choices that may meet."""
    return [
        frozenset(((a, x), (b, y)))
        for a, b in combinations(levels, 2)
        for x in levels[a]
        for y in levels[b]
        if allowed({a: x, b: y})
    ]


def pairwise(
    levels: dict[str, list],
    allowed: Callable[[Row], bool] = lambda row: True,
    starts: Iterable[Row] = (),
    seed: int = 0,
) -> list[Row]:
    """Rows with a value for each name, so that each pair of values that may meet does.

    Args:
        levels: the values of each name.
        allowed: whether a part of a row may be; two choices that may meet must be part of some whole row.
        starts: parts of rows which shall be among them, each in a row of its own.
        seed: of the random choices; the same seed gives the same rows.
    """
    choose, rows, starts = random.Random(seed), [], list(starts)
    missing = dict.fromkeys(allowed_pairs(levels, allowed))
    while starts or missing:
        first = starts[0] if starts else dict(next(iter(missing)))
        tried = [row for _ in range(TRIES) if (row := _grown(first, levels, allowed, missing, choose))]
        if tried:
            rows.append(max(tried, key=lambda row: len(pairs(row) & missing.keys())))
            starts = starts[1:]
            for pair in pairs(rows[-1]):
                missing.pop(pair, None)
    return rows


def _grown(row: Row, levels: dict[str, list], allowed, missing: dict, choose: random.Random) -> Row | None:
    """The row with a value for every name, each one that meets most missing pairs; None at a dead end."""
    for name in choose.sample(list(levels), len(levels)):
        if name not in row:
            values = [value for value in levels[name] if allowed(row | {name: value})]
            met = [sum(frozenset(((name, value), other)) in missing for other in row.items()) for value in values]
            if not values:
                return None
            row = row | {name: choose.choice([v for v, n in zip(values, met, strict=True) if n == max(met)])}
    return {name: row[name] for name in levels}
