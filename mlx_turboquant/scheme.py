"""What to store a KV cache in: the text of a scheme, parsed, validated and written back."""

import difflib
import re
from dataclasses import dataclass, fields, replace
from typing import Any

TURBO_BITS = (0, 2, 3, 4, 8)
AFFINE_BITS = (4, 8)
ROTATIONS = ("hadamard", "dense")
PREFILLS = ("raw", "compressed")
_TURBO = re.compile(r"turbo(\d{1,3})(?:v(\d{1,3}))?")
_NAMED = ("fp16", "affine4", "affine8", "turbo2", "turbo3", "turbo4", "turbo8", "turbo0v4", "turbo0v2", "turbo4v2")


@dataclass(frozen=True)
class KVScheme:
    """How one cache stores its keys and values.

    Written as text: a name, then options after a colon, ``turbo4v2:sinks=4,window=16``. Names:

    - ``fp16``: mlx-lm's own cache, in the model's dtype.
    - ``affine4``, ``affine8``: mlx-lm's own ``QuantizedKVCache``; option ``group`` (32, 64, 128; default 64).
    - ``turbo{K}v{V}``: K bits for a key element and V for a value element, each of 0 (raw), 2, 3, 4, 8.
      ``turbo4`` is short for ``turbo4v4``.

    Options of ``turbo`` schemes, with their defaults:

    - ``sinks=4``: how many first tokens stay in the model's dtype.
    - ``window=16``: at least so many of the newest tokens stay in the model's dtype.
    - ``block=64``: tokens that are encoded together and share one key centre.
    - ``group=0``: elements that share one scale; 0 is a whole row of one head.
    - ``center=1``: subtract each block's mean key before quantizing (exact for the softmax, see `conditioning`).
    - ``balance=1``: scale key channels by what the prompt's queries weigh (exact in the product).
    - ``rotation=hadamard``: or ``dense``, a random orthogonal matrix.
    - ``seed=0``: of the rotation's random signs or matrix.
    - ``prefill=raw``: a prompt is encoded at the first decode step; or ``compressed``: each chunk of it once it was
      read. A long prompt then never lies raw in memory, its later chunks attend to compressed earlier ones, and the
      balance is fitted to the first chunk alone.

    Example:
        >>> scheme = KVScheme.parse("turbo4v2:window=32")
        >>> scheme.key_bits, scheme.value_bits, str(scheme)
        (4, 2, 'turbo4v2:window=32')
    """

    method: str
    key_bits: int = 16
    value_bits: int = 16
    sinks: int = 4
    window: int = 16
    block: int = 64
    group: int = 0
    center: bool = True
    balance: bool = True
    rotation: str = "hadamard"
    seed: int = 0
    prefill: str = "raw"

    def __post_init__(self) -> None:
        allowed = {"fp16": (16,), "affine": AFFINE_BITS, "turbo": TURBO_BITS}
        if self.method not in allowed:
            raise ValueError(f"[KVScheme] method must be one of {', '.join(allowed)}, got {self.method!r}.")
        for side, bits in (("key", self.key_bits), ("value", self.value_bits)):
            if bits not in allowed[self.method]:
                raise ValueError(
                    f"[KVScheme] {side} bits of a {self.method} scheme must be one of "
                    f"{', '.join(map(str, allowed[self.method]))}, got {bits}."
                )
        if self.method == "affine" and self.key_bits != self.value_bits:
            raise ValueError(
                f"[KVScheme] affine schemes have equal bits for keys and values, got {self.key_bits} and "
                f"{self.value_bits}."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise ValueError(f"[KVScheme] {field.name} must be {field.type.__name__}, got {value!r}.")
            if field.name in _OPTIONS and field.name not in self.option_names() and value != field.default:
                raise ValueError(f"[KVScheme] {self.method} schemes have no option {field.name}, got {value!r}.")
        groups = {"fp16": (0,), "affine": (32, 64, 128), "turbo": (0, 8, 16, 32, 64, 128, 256)}[self.method]
        _check("sinks", self.sinks, 0 <= self.sinks <= 1024, "between 0 and 1024")
        _check("window", self.window, 0 <= self.window <= 65536, "between 0 and 65536")
        _check("block", self.block, self.block in (16, 32, 64, 128, 256), "one of 16, 32, 64, 128, 256")
        _check("group", self.group, self.group in groups, f"one of {', '.join(map(str, groups))}")
        _check("rotation", self.rotation, self.rotation in ROTATIONS, f"one of {', '.join(ROTATIONS)}")
        _check("prefill", self.prefill, self.prefill in PREFILLS, f"one of {', '.join(PREFILLS)}")
        _check("seed", self.seed, 0 <= self.seed < 2**31, "between 0 and 2147483647")

    @classmethod
    def parse(cls, text: "str | KVScheme") -> "KVScheme":
        """The scheme that ``text`` names (a `KVScheme` is returned as it is).

        Raises:
            ValueError: for an unknown name (the known ones and the nearest are listed), an unknown option, an option
                that the scheme has no use for, or a value outside its set.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise ValueError(f"[KVScheme] A scheme is text such as 'turbo4', got {type(text).__name__}.")
        name, colon, options = text.strip().partition(":")
        return replace(_named(name), **_options(name, options)) if colon else _named(name)

    @property
    def name(self) -> str:
        """The scheme's name without its options: ``'turbo4v2'``."""
        if self.method == "fp16":
            return "fp16"
        same = self.key_bits == self.value_bits
        return f"{self.method}{self.key_bits}" + ("" if same else f"v{self.value_bits}")

    def __str__(self) -> str:
        """The shortest text that parses to this scheme."""
        defaults = _named(self.name)
        return self._text(f for f in self.option_names() if getattr(self, f) != getattr(defaults, f))

    def full_text(self) -> str:
        """The text with every option spelled out, as files store it: later defaults cannot change its meaning."""
        return self._text(self.option_names())

    def option_names(self) -> tuple[str, ...]:
        """The options that this scheme's method understands."""
        return {"fp16": (), "affine": ("group",), "turbo": _OPTIONS}[self.method]

    @property
    def compresses(self) -> bool:
        """Whether anything is stored in fewer bits than the model's dtype."""
        return self.method == "affine" or (self.method == "turbo" and (self.key_bits > 0 or self.value_bits > 0))

    def _text(self, names: Any) -> str:
        options = ",".join(f"{n}={_option_text(getattr(self, n))}" for n in names)
        return f"{self.name}:{options}" if options else self.name


_OPTIONS = tuple(f.name for f in fields(KVScheme) if f.name not in ("method", "key_bits", "value_bits"))


def _check(name: str, value: Any, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"[KVScheme] {name} must be {wanted}, got {value!r}.")


def _option_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _named(name: str) -> KVScheme:
    if name == "fp16":
        return KVScheme("fp16")
    if name in ("affine4", "affine8"):
        bits = int(name[-1])
        return KVScheme("affine", bits, bits, group=64)
    if match := _TURBO.fullmatch(name):
        key_bits = int(match[1])
        return KVScheme("turbo", key_bits, key_bits if match[2] is None else int(match[2]))
    near = difflib.get_close_matches(name, _NAMED, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"[KVScheme] Unknown KV scheme {name!r}. Known: fp16, affine4, affine8, turbo2, turbo3, turbo4, turbo8 and "
        f"turbo{{K}}v{{V}} with K, V in {', '.join(map(str, TURBO_BITS))}. Did you mean {near!r}?"
    )


def _options(name: str, text: str) -> dict[str, Any]:
    known = _named(name).option_names()
    types = {f.name: f.type for f in fields(KVScheme)}
    parsed: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ValueError(f"[KVScheme] Options are written name=value, got {item!r} in '{name}:{text}'.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listed = f"Known: {', '.join(known)}." if known else "It takes none."
            raise ValueError(f"[KVScheme] Unknown option {key!r} for {name}. {listed}{hint}")
        if key in parsed:
            raise ValueError(f"[KVScheme] Option {key!r} is given twice in '{name}:{text}'.")
        parsed[key] = _value(key, value, types[key])
    return parsed


def _value(key: str, value: str, kind: Any) -> Any:
    if kind is bool:
        if value not in ("0", "1"):
            raise ValueError(f"[KVScheme] {key} must be 0 or 1, got {value!r}.")
        return value == "1"
    if kind is int:
        if not re.fullmatch(r"\d{1,100}", value):
            raise ValueError(f"[KVScheme] {key} must be a whole number, got {value!r}.")
        return int(value)
    return value
