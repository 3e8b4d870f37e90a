"""A limit on the KV bytes of the server: what runs is reserved before it begins, what is stored gets the rest."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_turboquant.cli.server_needs import KVNeeds, Need, used_layers
from mlx_turboquant.cli.server_parts import SchemeResponseGenerator
from mlx_turboquant.cli.server_refusal import RefusedError


class KVBudget:
    """The bytes that running requests have reserved, of a limit. Only the thread that generates uses it.

    Args:
        limit: bytes that running and stored caches may have together.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.needs: KVNeeds | None = None  # of the model being served
        self.next: Need | None = None  # of the request that is about to begin
        self._running: dict[Any, Need] = {}
        self._reading: set[Any] = set()

    def begin(self, key: Any) -> None:
        """The next request runs from now on, and its prompt is read."""
        self._running[key], self.next = self.next, None
        self._reading.add(key)

    def keep(self, running: Iterable[Any], reading: Iterable[Any]) -> None:
        """Only these still run, and of them these still read their prompt."""
        self._running = {key: self._running[key] for key in running}
        self._reading = set(reading)

    def reserved(self, *more: Need) -> int:
        """Bytes for what runs, and for more requests beside it."""
        if self.needs is None:
            return 0
        reading = [need for key, need in self._running.items() if key in self._reading]
        return self.needs.nbytes([*self._running.values(), *more], [*reading, *more])

    def left(self) -> int:
        """Bytes for what is stored."""
        return max(self.limit - self.reserved(), 0)


@dataclass(eq=False)
class _Waiting:
    """A request in the queue, until when it may stay there, and, once its model is served, its prompt as tokens."""

    asked: tuple
    until: float
    tokenized: tuple = ()


class LimitedResponseGenerator(SchemeResponseGenerator):
    """Begins a request when its bytes are free: stored conversations are forgotten for it, then it waits its turn.

    Requests begin in the order in which they came. One that waited for --kv-queue-seconds is answered 503; one that
    alone needs more than the limit is answered 413 at once. What runs is never touched.
    """

    def __init__(self, budget: KVBudget, *args: Any):
        self._budget, self._waiting, self._ready = budget, deque(), None
        self._served: tuple | None = None  # the model whose needs the budget knows
        super().__init__(*args)

    @property
    def kv_memory_limit(self) -> int | None:
        """--kv-memory-limit in bytes."""
        return self._budget.limit

    @property
    def queued(self) -> int:
        """Requests that came and have not begun."""
        return len(self._waiting) + super().queued

    def _next_request(self, timeout: float | None = None) -> tuple | None:
        asked = super()._next_request(None if self._waiting else timeout)
        while asked is not None:
            self._waiting.append(_Waiting(asked, time.monotonic() + self.cli_args.kv_queue_seconds))
            asked = super()._next_request()
        for one in [one for one in self._waiting if not one.tokenized and self._is_served(one.asked[2])]:
            self._look_at(one)
        if self._waiting and self._may_begin(self._waiting[0]):
            first = self._waiting.popleft()
            self._ready = first
            return first.asked
        now = time.monotonic()
        for late in [one for one in self._waiting if one.until <= now]:
            self._answer(late, self._busy())
        return None

    def _look_at(self, one: _Waiting) -> None:
        """Tokenize a request; answer one that is wrong or can never begin."""
        _, request, args = one.asked
        try:
            one.tokenized = super()._tokenize(self.model_provider.tokenizer, request, args)
            self._check_alone(self._need(one.tokenized, args))
        except Exception as error:  # whatever it is, mlx-lm answers it to the request
            self._answer(one, error)

    def _may_begin(self, first: _Waiting) -> bool:
        args = first.asked[2]
        if not self._is_served(args):
            return True  # mlx-lm ends what runs and loads the other model first; `_tokenize` checks it then
        return self._fits(self._need(first.tokenized, args))

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple:
        ready, self._ready = self._ready, None
        tokenized = ready.tokenized if ready is not None and ready.asked[1] is request else ()
        if not tokenized:
            tokenized = super()._tokenize(tokenizer, request, args)
        self._look_at_model(args)
        need = self._need(tokenized, args)
        self._check_alone(need)
        if not self._fits(need):
            raise self._busy()
        self._budget.next = need
        # Forget what is stored until the request has its bytes, and let it take over no entry that has more.
        self.prompt_cache.most_nbytes = self._budget.needs.nbytes([need], [])
        self.prompt_cache.trim_to(n_bytes=self._budget.limit - self._budget.reserved(need))
        return tokenized

    def _fits(self, need: Need) -> bool:
        return self._budget.reserved(need) <= self._budget.limit

    def _is_served(self, args: Any) -> bool:
        return self._served == (args.model, self.model_provider.model_key)

    def _look_at_model(self, args: Any) -> None:
        if self._is_served(args):
            return
        models = [self.model_provider.model, self.model_provider.draft_model]
        layers = [layer for one in models if one is not None for layer in used_layers(one, self.caches.make(one))]
        self._budget.needs = KVNeeds(layers, self.cli_args.prefill_step_size, self.cli_args.prompt_concurrency)
        self._served = args.model, self.model_provider.model_key

    def _need(self, tokenized: tuple, args: Any) -> Need:
        # A speculative step holds its drafts until they are refused.
        drafts = args.num_draft_tokens + 1 if self.model_provider.draft_model is not None else 0
        return Need(len(tokenized[0]), len(tokenized[0]) + args.max_tokens + drafts)

    def _check_alone(self, need: Need) -> None:
        nbytes = self._budget.needs.nbytes([need], [need])
        if nbytes > self._budget.limit:
            self.refused += 1
            raise RefusedError(
                413,
                f"[server] wanted at most {self._budget.limit:,} KV bytes (--kv-memory-limit), got a request that "
                f"needs {nbytes:,}: {need.prompt:,} tokens of prompt and up to {need.total - need.prompt:,} more. Send "
                "a shorter prompt or a smaller max_tokens.",
            )

    def _busy(self) -> RefusedError:
        self.refused += 1
        seconds = self.cli_args.kv_queue_seconds
        return RefusedError(
            503,
            f"[server] wanted KV bytes to become free within {seconds:g} seconds (--kv-queue-seconds), got none: "
            f"running requests have reserved {self._budget.reserved():,} of {self._budget.limit:,} bytes. Try again "
            "later.",
            max(math.ceil(seconds), 1),
        )

    def _answer(self, one: _Waiting, error: Exception) -> None:
        self._waiting.remove(one)
        logging.info(f"Refused a request: {error}")
        one.asked[0].put(error)
