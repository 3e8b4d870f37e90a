"""The methods a KV scheme can name: the bits each takes, the options it understands, and what they are by default."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_CACHE = ("sinks", "window", "block")
_KEYS = ("center", "balance")


@dataclass(frozen=True)
class Method:
    """One way to store keys and values.

    Attributes:
        bits: what a side may have; 0 keeps it raw.
        options: the names it understands, in the order in which they are written.
        defaults: those that differ from `KVScheme`'s own.
        by_bits: likewise, for some key bits.
        allowed: the values of an option, where it has a set of its own.
        equal: whether keys and values must have the same bits.
        names: some scheme names, for messages.
    """

    bits: tuple[float, ...]
    options: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    by_bits: Mapping[float, Mapping[str, Any]] = field(default_factory=dict)
    allowed: Mapping[str, tuple] = field(default_factory=dict)
    equal: bool = False
    names: tuple[str, ...] = ()

    def defaults_of(self, key_bits: float) -> dict[str, Any]:
        """The defaults of a scheme with so many bits per key element."""
        return {**self.defaults, **self.by_bits.get(key_bits, {})}


_PLAIN = {"center": False, "balance": False}  # as published: what this package does to keys is there to be asked for
_AFFINE_GROUPS = (32, 64, 128)

METHODS = {
    "fp16": Method((16,), names=("fp16",)),
    "mlx": Method(
        (2, 4, 8),  # 3 and 6 bits fail in mlx-lm 0.32.2 for most head sizes: affine3 and affine6 do not
        ("group",),
        {"group": 64},
        allowed={"group": _AFFINE_GROUPS},
        equal=True,
        names=("mlx4", "mlx8"),
    ),
    "turbo": Method(
        (0, 2, 2.5, 3, 3.5, 4, 8),
        (*_CACHE, "group", *_KEYS, "rotation", "seed", "prefill"),
        names=("turbo2", "turbo2.5", "turbo3", "turbo3.5", "turbo4", "turbo8", "turbo0v4", "turbo0v2", "turbo4v2"),
    ),
    "qjl": Method((0, 3, 4), (*_CACHE, *_KEYS, "seed", "prefill"), names=("qjl3", "qjl4")),
    "outlier": Method(
        (0, 3, 4), (*_CACHE, *_KEYS, "seed", "prefill"), {"sinks": 0, **_PLAIN}, names=("outlier3", "outlier4")
    ),
    "squat": Method(
        (0, 2, 3, 4),
        (*_CACHE, "group", *_KEYS, "subspace", "lambda_", "channels", "prefill"),
        {"sinks": 0, "window": 32, "group": 32, **_PLAIN},
        {2: {"subspace": 20}},
        {"group": (16, 32, 64, 128)},
        names=("squat2", "squat4"),
    ),
    "int": Method((0, 8), (*_CACHE, *_KEYS, "prefill"), _PLAIN, names=("int8",)),
    "affine": Method(
        (0, 2, 3, 4, 6, 8),
        (*_CACHE, "group", *_KEYS, "rotation", "seed", "prefill"),
        {"sinks": 0, "group": 64, "rotation": "none", **_PLAIN},
        allowed={"group": _AFFINE_GROUPS, "rotation": ("none", "hadamard", "dense")},
        names=("affine2", "affine3", "affine4", "affine6", "affine8"),
    ),
}

NAMES = tuple(name for method in METHODS.values() for name in method.names)
