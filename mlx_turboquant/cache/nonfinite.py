"""What a cache reports later: encoded tokens whose keys or values were NaN or infinite."""

import threading
import warnings
from collections.abc import Iterable

import mlx.core as mx

from mlx_turboquant.ops.survey import bad_tokens


class _Glance:
    """Whether anything that several layers encoded in one step is bad: one number to wait for instead of one for each.

    Reading a number from a GPU takes 50 us or more, and the layers of a model encode in the same step.
    """

    def __init__(self) -> None:
        self._seen: list[mx.array] = []
        self._any: mx.array | None = None
        self._answer: bool | None = None
        self._members: set[int] = set()

    def takes(self, member: object) -> bool:
        """Whether a layer may join: nobody began, and this is the layer's first encoding since it was made."""
        return self._any is None and id(member) not in self._members

    def join(self, member: object, *bad: mx.array) -> None:
        """Add which of a layer's rows are bad."""
        self._members.add(id(member))
        self._seen += bad

    def begin(self) -> None:
        """Have it computed, without waiting."""
        if self._any is None:
            self._any, self._seen = mx.concatenate([bad.reshape(-1) for bad in self._seen]).any(), []
            mx.async_eval(self._any)

    def found(self) -> bool:
        """Whether any was bad; waits for it."""
        if self._answer is None:
            self.begin()
            self._answer = self._any.item()
        return self._answer


# Steps after the one that encodes: it is computed behind that step, which need not wait for it, and read a step later.
_BEGINS, _LATER = 2, 3
_current = threading.local()  # an array is evaluated only in the thread that made it


class NonfiniteReport:
    """Counts encoded tokens with NaN or Inf and warns about them, without making a decode step wait for the count."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, _Glance, mx.array, mx.array]] = []  # the first: in which step it is counted
        self._step = 0

    @property
    def is_open(self) -> bool:
        """Whether there is something that was not counted yet."""
        return bool(self._seen)

    def add(self, keys: mx.array, values: mx.array) -> None:
        """Take note of `Encoded.bad` of rows that are being encoded."""
        glance = getattr(_current, "glance", None)
        if glance is None or not glance.takes(self):
            glance = _current.glance = _Glance()
        self._seen.append((self._step + _LATER, glance, keys, values))
        glance.join(self, keys, values)

    def take_in(self, others: Iterable["NonfiniteReport"]) -> None:
        """Warn of what others have not counted yet, too: of the same layer, whose rows have joined."""
        for other in others:
            self._seen += [(self._step + _LATER, *rest) for _, *rest in other._seen]

    def step(self, layer: int) -> None:
        """Called once per update: warn if a count that is ready is not zero."""
        self._step += 1
        if not self._seen:
            return
        for at, glance, *_ in self._seen:
            if at - self._step <= _LATER - _BEGINS:
                glance.begin()
        if self._seen[0][0] > self._step:
            return
        # Each at its own time: a batch may encode something in every step.
        ready = [seen for seen in self._seen if seen[0] <= self._step]
        self._seen = self._seen[len(ready) :]
        count = sum(bad_tokens(keys, values) for _, glance, keys, values in ready if glance.found())
        if count:
            warnings.warn(
                f"[TurboQuantKVCache] layer {layer}: {count} tokens had NaN or Inf in their keys or values; those "
                "entries were stored as their block's mean (keys) or 0 (values).",
                RuntimeWarning,
                stacklevel=4,
            )
