"""The attention kernels where inputs are odd: nothing to see, one key, bad numbers, spare room, slices, many splits."""

from dataclasses import replace

import kernel_emulator
import mlx.core as mx
import numpy as np
import pytest
from attend_cases import ON_GPU, UNSUPPORTED, Case, assert_right, build, in_every_schedule, make, run

pytestmark = pytest.mark.skipif(bool(UNSUPPORTED), reason=UNSUPPORTED)


@pytest.fixture(scope="module", autouse=True)
def built(request):
    """The kernels of all cases, compiled."""
    build(request)


def each(*cases):
    """Parametrizes a test with these cases, in one pass and in two; where kernels are compiled for seconds, in two."""
    passes = (2,) if ON_GPU else (1, 2)
    return pytest.mark.parametrize("case", [replace(case, passes=n) for case in cases for n in passes], ids=str)


def right(case, made=None, **plan):
    """The answer, after it was found right in every schedule."""
    out = in_every_schedule(lambda: run(case, made, **plan))
    assert_right(out, case, made)
    return out


def changed(made, side, part, edit):
    """The arrays with one of them edited: `edit` changes a float32 numpy copy in place."""
    stored = getattr(made, side)
    rows = stored.packed.codes if part == "packed" else getattr(stored, part)
    new = np.array(rows.astype(mx.float32))
    edit(new)
    new = mx.array(new).astype(rows.dtype)
    stored = stored._replace(**{part: stored.packed._replace(codes=new) if part == "packed" else new})
    return replace(made, **{side: stored})


@each(Case(G=2, L=2, causal=True, lengths=((4, 3, 23), (0, 0, 0), (3, 0, 17), (0, 2, 0))))
def test_each_sequence_has_its_own_lengths_and_none_gives_zero(case):
    out = right(case)
    assert (out[1] == 0).all() and (out[0] != 0).all()


@each(Case(G=2, L=2, causal=True, lengths=((0, 0, 1), (1, 0, 0), (0, 0, 0), (4, 1, 5))))
def test_queries_older_than_the_first_token_see_nothing(case):
    out = right(case)
    assert (out[:3, :, 0] == 0).all() and (out[:2, :, 1] != 0).all()


@each(*(Case(lengths=lengths) for lengths in (((0, 0, 1),), ((1, 0, 0),))))
def test_one_key_gives_its_value(case):
    values = make(case).rows[0][1]
    assert mx.array_equal(right(case)[0].astype(mx.float32), mx.array(values, mx.float32))


@each(Case(G=2, L=2, mask="boolean"), Case(G=2, L=2, mask="additive", logits=True))
def test_rows_that_are_masked_everywhere_are_zero(case):
    made = make(case)
    nothing = np.full((1, 1, 1, 155), False if case.mask == "boolean" else -np.inf)
    nothing = mx.array(nothing).astype(made.options["mask"].dtype)
    made = replace(made, options=made.options | {"mask": nothing})
    assert (in_every_schedule(lambda: run(case, made)) == 0).all()


@each(
    *(Case(G=2, L=2, mask="boolean", mask_axes=axes, lengths=((4, 2, 23), (2, 1, 40))) for axes in ("", "B", "H", "BL"))
)
def test_masks_may_be_shared_by_sequences_heads_and_queries(case):
    right(case)


@each(Case(mask="boolean", mask_axes="", logits=True, lengths=((2, 0, 3),)))
def test_masks_and_logits_of_fewer_than_8_elements(case):
    """MLX passes such inputs in another address space."""
    right(case)


@pytest.mark.parametrize("case", [Case(G=3, kv_heads=1, passes=2, lengths=((4, 7, 50),))], ids=str)
@pytest.mark.parametrize(("splits", "raw"), [(1, 1), (3, 2), (5, 1), (7, 7), (61, 3), (510, 2)])
def test_any_number_of_splits(case, splits, raw):
    right(case, splits=splits, raw_splits=raw)


@pytest.mark.parametrize("case", [Case(G=3, kv_heads=1, lengths=((4, 7, 50),))], ids=str)
@pytest.mark.parametrize("raw", [1, 2, 3, 5, 7])
def test_any_number_of_simdgroups_may_read_raw_rows(case, raw):
    right(case, raw_splits=raw)


@each(Case(), Case(key_bits=0, value_bits=0, L=2))
def test_spare_room_changes_nothing(case):
    """All cases have large numbers there; buffers without spare room give the same bits."""
    made, ((sinks, packed, tail),) = make(case), case.token_lengths
    cut = {
        name: side._replace(
            packed=side.packed.rows(0, packed, case.block),
            sinks=side.sinks[:, :, :sinks],
            tail=side.tail[:, :, :tail],
        )
        for name, side in (("keys", made.keys), ("values", made.values))
    }
    assert mx.array_equal(run(case), run(case, replace(made, **cut)))


@each(Case(key_bits=0, value_bits=0, L=2))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_entries_of_one_token_count_as_zero(case, bad):
    for side in ("keys", "values"):
        for part, token in (("sinks", 1), ("packed", 77), ("tail", 20)):

            def put(rows, number, token=token):
                rows[0, 1, token, ::3] = number

            broken, zeros = (changed(make(case), side, part, lambda rows, n=n: put(rows, n)) for n in (bad, 0.0))
            assert mx.array_equal(run(case, broken), run(case, zeros))


@each(Case(lengths=((0, 1, 0),)))
def test_decoded_values_beyond_the_dtype_end_at_its_largest_number(case):
    made = make(case)
    scales = mx.full(made.values.packed.scales.shape, 65504.0, mx.float16)
    values = made.values._replace(packed=made.values.packed._replace(scales=scales))
    out = np.array(run(case, replace(made, queries=made.queries * 300, values=values)).astype(mx.float32))
    assert np.isfinite(out).all() and np.abs(out).max() == 65504


@each(Case(), Case(D=128, dtype="bfloat16"), Case(D=128, dtype="bfloat16", value_bits=0))
def test_scores_of_thousands_do_not_overflow(case):
    made = make(case)
    right(case, replace(made, queries=made.queries * 300))


@each(Case(D=128, dtype="bfloat16"), Case(D=128, dtype="bfloat16", value_bits=0))
@pytest.mark.parametrize("size", [2.0**-12, 2.0**12] if ON_GPU else [2.0**-20, 2.0**20])  # tensor cores: float16
def test_values_of_any_size_keep_their_precision(case, size):
    made, values = make(case), make(case).values
    packed = values.packed
    larger = {"scales": packed.scales * size} if case.value_bits else {"codes": packed.codes * size}
    values = values._replace(packed=packed._replace(**larger), sinks=values.sinks * size, tail=values.tail * size)
    right(case, replace(made, values=values, rows=[(k, v * size) for k, v in made.rows]))


@each(Case(G=2, L=2, mask="boolean"))
def test_slices_and_transposed_arrays(case):
    made = make(case)
    wide = mx.concatenate([mx.ones_like(made.keys.sinks), made.keys.sinks], axis=2)
    mask = made.options["mask"]
    sliced = replace(
        made,
        queries=mx.contiguous(made.queries.swapaxes(1, 2)).swapaxes(1, 2),
        keys=made.keys._replace(sinks=wide[:, :, made.keys.sinks.shape[2] :]),
        options=made.options | {"mask": mx.concatenate([~mask, mask], axis=-1)[..., mask.shape[-1] :]},
    )
    assert mx.array_equal(run(case), run(case, sliced))


@pytest.mark.skipif(ON_GPU, reason="options of the emulator")
@each(Case(key_bits=3, value_bits=8))
def test_rows_that_start_inside_a_buffer_and_flushed_denormals(case):
    for options in ({"misalign": 16}, {"ftz": True}):
        with kernel_emulator.options(check=True, **options):
            assert_right(run(case), case)
