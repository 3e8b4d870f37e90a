"""What a scheme may be called, and what the errors say."""

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_turboquant.scheme import PREFILLS, ROTATIONS, TURBO_BITS, KVScheme

TURBO_NAMES = [f"turbo{k}" if k == v else f"turbo{k}v{v}" for k in TURBO_BITS for v in TURBO_BITS]
OPTIONS = {
    "sinks": st.integers(0, 1024),
    "window": st.integers(0, 65536),
    "block": st.sampled_from([16, 32, 64, 128, 256]),
    "group": st.sampled_from([0, 8, 16, 32, 64, 128, 256]),
    "center": st.booleans(),
    "balance": st.booleans(),
    "rotation": st.sampled_from(ROTATIONS),
    "seed": st.integers(0, 2**31 - 1),
    "prefill": st.sampled_from(PREFILLS),
}
WITH_OPTIONS = [
    "affine4:group=32",
    "turbo4v2:window=32",
    "turbo3:sinks=0,window=0,block=16,group=8,center=0,balance=0,rotation=dense,seed=2147483647,prefill=compressed",
]


@pytest.mark.parametrize("text", ["fp16", "affine4", "affine8", *TURBO_NAMES, *WITH_OPTIONS])
def test_every_scheme_parses_and_prints_back(text):
    scheme = KVScheme.parse(text)
    assert str(scheme) == text
    assert KVScheme.parse(scheme.full_text()) == scheme
    assert scheme.name == text.partition(":")[0]


def test_a_scheme_means_what_its_text_says():
    scheme = KVScheme.parse("turbo4v2:sinks=7,center=0,rotation=dense")
    assert (scheme.method, scheme.key_bits, scheme.value_bits) == ("turbo", 4, 2)
    assert (scheme.sinks, scheme.center, scheme.rotation) == (7, False, "dense")
    assert (scheme.window, scheme.block, scheme.group, scheme.balance, scheme.seed) == (16, 64, 0, True, 0)
    assert scheme.prefill == "raw" and KVScheme.parse("turbo4:prefill=compressed").prefill == "compressed"


def test_one_width_stands_for_both_sides():
    assert KVScheme.parse("turbo4") == KVScheme.parse("turbo4v4")
    assert KVScheme.parse("turbo4") != KVScheme.parse("turbo4v2")


def test_short_text_is_canonical_and_full_text_names_every_option():
    scheme = KVScheme.parse("  turbo4v4: seed=3 , sinks=4,window=32,center=1 ")
    assert str(scheme) == "turbo4:window=32,seed=3"
    assert [item.partition("=")[0] for item in scheme.full_text().partition(":")[2].split(",")] == list(OPTIONS)
    assert KVScheme.parse("affine8").full_text() == "affine8:group=64"
    assert KVScheme.parse("fp16").full_text() == "fp16"


def test_only_a_scheme_with_fewer_bits_somewhere_compresses():
    assert not any(KVScheme.parse(text).compresses for text in ("fp16", "turbo0"))
    assert all(KVScheme.parse(text).compresses for text in ("affine4", "turbo0v2", "turbo8v0"))


def test_a_scheme_is_a_frozen_value():
    scheme = KVScheme.parse("turbo4")
    assert KVScheme.parse(scheme) is scheme
    assert len({scheme, KVScheme.parse("turbo4v4"), KVScheme.parse("turbo4:seed=1")}) == 2
    with pytest.raises(FrozenInstanceError):
        scheme.seed = 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turb4", r"Unknown KV scheme 'turb4'. Known: fp16, affine4, affine8, turbo2.* Did you mean 'turbo4'\?"),
        ("", "Unknown KV scheme ''. Known: fp16"),
        ("affine5", r"Unknown KV scheme 'affine5'.* Did you mean 'affine[48]'\?"),
        ("turbo5", "key bits of a turbo scheme must be one of 0, 2, 3, 4, 8, got 5"),
        ("turbo4v1", "value bits of a turbo scheme must be one of 0, 2, 3, 4, 8, got 1"),
        ("turbo" + "9" * 5000, r"\[KVScheme\] .* 0, 2, 3, 4, 8"),
        ("turbo4:sink=3", r"Unknown option 'sink' for turbo4. Known: sinks, window.* Did you mean 'sinks'\?"),
        ("fp16:sinks=4", "Unknown option 'sinks' for fp16. It takes none"),
        ("affine4:window=16", "Unknown option 'window' for affine4. Known: group"),
        ("turbo4:method=fp16", "Unknown option 'method' for turbo4"),
        ("turbo4:seed=1,seed=2", "'seed' is given twice"),
        ("turbo4:seed", "Options are written name=value, got 'seed'"),
        ("turbo4:seed=", "Options are written name=value, got 'seed='"),
        ("turbo4:seed=1,", "Options are written name=value, got ''"),
        ("turbo4:sinks=four", "sinks must be a whole number, got 'four'"),
        ("turbo4:sinks=-1", "sinks must be a whole number, got '-1'"),
        ("turbo4:window=1.5", "window must be a whole number, got '1.5'"),
        ("turbo4:sinks=1025", "sinks must be between 0 and 1024, got 1025"),
        ("turbo4:seed=2147483648", "seed must be between 0 and 2147483647, got 2147483648"),
        ("turbo4:sinks=99999999999", "sinks must be between 0 and 1024, got '?99999999999"),
        ("turbo4:block=48", "block must be one of 16, 32, 64, 128, 256, got 48"),
        ("turbo4:group=7", "group must be one of 0, 8, 16, 32, 64, 128, 256, got 7"),
        ("affine4:group=16", "group must be one of 32, 64, 128, got 16"),
        ("turbo4:center=2", "center must be 0 or 1, got '2'"),
        ("turbo4:rotation=givens", "rotation must be one of hadamard, dense, got 'givens'"),
        ("turbo4:prefill=lean", "prefill must be one of raw, compressed, got 'lean'"),
        ("affine4:prefill=compressed", "Unknown option 'prefill' for affine4"),
        (None, "A scheme is text such as 'turbo4', got NoneType"),
    ],
)
def test_bad_text_is_refused_with_what_was_wanted(text, message):
    with pytest.raises(ValueError, match=message):
        KVScheme.parse(text)


def test_affine_bits_that_no_text_can_name_are_refused():
    with pytest.raises(ValueError, match="affine"):
        KVScheme("affine", 4, 8, group=64)  # mlx-lm's own quantized cache has one width for both sides


@settings(deadline=None)
@given(st.sampled_from(TURBO_NAMES), st.fixed_dictionaries({}, optional=OPTIONS))
def test_any_valid_options_round_trip(name, options):
    scheme = replace(KVScheme.parse(name), **options)
    assert KVScheme.parse(str(scheme)) == scheme
    assert KVScheme.parse(scheme.full_text()) == scheme
    assert len(str(scheme)) <= len(scheme.full_text())


PIECES = [*"0248v:=,- .", "turbo", "affine", "fp16", "99999999999", "\u0664", *OPTIONS, *ROTATIONS, *PREFILLS]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_arbitrary_text_parses_to_something_printable_or_is_refused(text):
    try:
        scheme = KVScheme.parse(text)
    except ValueError as error:
        assert str(error).startswith("[KVScheme]")
    else:
        assert KVScheme.parse(str(scheme)) == scheme
