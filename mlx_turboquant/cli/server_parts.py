"""What mlx_lm.server runs with when a scheme is asked for: its own classes, each with the one step that we add."""

import argparse
import functools
import json
import logging
import sys
from http.server import ThreadingHTTPServer
from typing import Any

import mlx.core as mx
from mlx_lm import server

from mlx_turboquant.cli import server_metrics
from mlx_turboquant.cli.server_caches import Active, PromptCaches, SchemeBatchGenerator, stream_generate
from mlx_turboquant.cli.server_models import SchemeModelProvider, positions
from mlx_turboquant.cli.server_refusal import RefusedError
from mlx_turboquant.cli.server_store import CompressedPromptStore
from mlx_turboquant.generation import check_draft_tokens

_run_http_server = server._run_http_server  # kept here, since `parts` puts ours under this name


def parts(args: argparse.Namespace) -> dict[str, Any]:
    """The names of mlx_lm.server to replace, for these command line arguments.

    Raises:
        ValueError: for more draft tokens than compressed rows can be read for at once.
        OSError: if the scheme's file cannot be read.
    """
    caches = PromptCaches(args.kv_scheme or "fp16", args.kv_bits)
    if args.draft_model is not None:
        check_draft_tokens(caches.scheme, args.num_draft_tokens)
    active, budget = Active(), None
    generator = functools.partial(SchemeResponseGenerator, caches, active)
    if args.kv_memory_limit is not None:
        from mlx_turboquant.cli.server_limit import KVBudget, LimitedResponseGenerator

        if mx.distributed.init().size() > 1:
            raise ValueError(
                "[server] --kv-memory-limit wanted one process, got a model shared by several, whose ranks would each "
                "decide for themselves what fits. Leave it out, or serve the model from one process."
            )
        budget = KVBudget(args.kv_memory_limit)
        generator = functools.partial(LimitedResponseGenerator, budget, caches, active)
    return {
        "make_prompt_cache": caches.make,
        "stream_generate": functools.partial(stream_generate, active, budget),
        "BatchGenerator": functools.partial(SchemeBatchGenerator, caches, active, budget),
        "LRUPromptCache": functools.partial(
            CompressedPromptStore, max_bytes=args.prompt_cache_bytes, left=None if budget is None else budget.left
        ),
        "ModelProvider": SchemeModelProvider,
        "ResponseGenerator": generator,
        "_run_http_server": run_http_server,
    }


class SchemeResponseGenerator(server.ResponseGenerator):
    """Refuses a request that could not be served before it can harm others, and tells the KV bytes."""

    def __init__(self, caches: PromptCaches, active: Active, *args: Any):
        self.caches, self.active = caches, active
        self.refused = 0  # requests, for their KV bytes
        super().__init__(*args)  # which starts the thread

    @property
    def kv_memory_limit(self) -> int | None:
        """The bytes that all KV caches may have together; None for no limit."""
        return None

    @property
    def queued(self) -> int:
        """Requests that came and have not begun."""
        return self.requests.qsize()

    def kv_cache(self) -> dict[str, dict[str, int]]:
        """Sequences, bytes and the bytes they would have raw: of what is stored, and of what is being served."""
        return {"stored": self.prompt_cache.held, "active": self.active.now}

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple:
        # What raises here is answered to its request; raised later, it would end the thread and all other requests.
        if not all(isinstance(word, str) and word for word in args.stop_words):
            raise ValueError(f"[server] stop must be a text or a list of texts, none empty; got {args.stop_words!r}.")
        if self.model_provider.draft_model is not None:
            check_draft_tokens(self.caches.scheme, args.num_draft_tokens)
        tokenized = super()._tokenize(tokenizer, request, args)
        self._check_prompt(len(tokenized[0]))
        return tokenized

    def _check_prompt(self, tokens: int) -> None:
        if tokens == 0:
            raise ValueError("[server] The prompt is empty; give at least one token.")
        limit, whose = self.cli_args.max_prompt_tokens, "--max-prompt-tokens"
        if limit is None:
            limit, whose = positions(self.model_provider.model), "the model's positions"
        if limit is not None and tokens > limit:
            raise ValueError(
                f"[server] The prompt has {tokens:,} tokens, at most {limit:,} are taken ({whose}). Send a shorter "
                "one, or start the server with a larger --max-prompt-tokens."
            )

    def _log_cache_stats(self) -> None:
        super()._log_cache_stats()
        for what, held in self.kv_cache().items():
            logging.info(
                f"KV cache ({self.caches.scheme}), {what}: {held['sequences']} sequences, {held['nbytes']:,} bytes, "
                f"raw {held['raw_nbytes']:,}"
            )


class SchemeHandler(server.APIHandler):
    """mlx-lm's HTTP handler, whose /health tells more, with /metrics, and with statuses of their own for refusals."""

    def do_GET(self) -> None:  # noqa: N802, the name that http.server calls
        """Answer a GET request."""
        if self.path != "/metrics":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-type", "text/plain; version=0.0.4; charset=utf-8")
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(server_metrics.metrics(self.response_generator).encode())

    def handle_health_check(self) -> None:
        """Answer what `server_metrics.health` tells."""
        answer = server_metrics.health(self.response_generator)
        self._set_completion_headers(200 if answer["status"] == "ok" else 503)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())
        self.wfile.flush()

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # mlx-lm answers 404 to whatever was raised for a request, from within its `except`.
        error = sys.exception()
        if not isinstance(error, RefusedError):
            super()._set_completion_headers(status_code)
            return
        super()._set_completion_headers(error.status)
        if error.retry_after is not None:
            self.send_header("Retry-After", str(error.retry_after))


def run_http_server(host: str, port: int, response_generator: SchemeResponseGenerator) -> None:
    """mlx-lm's HTTP server with our handler, which ends with the reason if the default model cannot be loaded."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # with socketserver's 5, of 32 clients at once a few were reset before they were heard

        def service_actions(self) -> None:
            """Called twice a second."""
            super().service_actions()
            if response_generator.model_provider.load_error is not None:
                raise response_generator.model_provider.load_error

    _run_http_server(host, port, response_generator, Server, SchemeHandler)
