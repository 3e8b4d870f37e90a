"""Teach ``mlx_lm.server`` the flags --kv-scheme, --max-prompt-tokens, --kv-memory-limit and --kv-queue-seconds.

Its ``main`` builds the parser itself and looks every class up in its own module, so the module gets an argparse whose
parser has our flags too, and, when one of them is used, the classes of `server_parts` in place of its own. Like
`mlx_lm_commands`, this is loaded by the start-up hook: it imports the rest of the package only when a flag is used.
"""

import argparse
from types import ModuleType
from typing import Any

from mlx_turboquant.cli.mlx_lm_commands import SCHEME_HELP, keep_parsed

_FLAGS = ("kv_scheme", "max_prompt_tokens", "kv_memory_limit")  # without any of them mlx-lm runs untouched
QUEUE_SECONDS = 60
_PARTS = (
    "make_prompt_cache", "stream_generate", "BatchGenerator", "LRUPromptCache", "ModelProvider", "ResponseGenerator",
    "_run_http_server",
)  # fmt: skip


def extend_server(module: ModuleType) -> None:
    """Give ``mlx_lm.server`` our flags."""
    if hasattr(module, "_turboquant_args"):
        return
    module._turboquant_args = None
    module.argparse = _Argparse(module, {name: getattr(module, name) for name in _PARTS})


class _Argparse:
    """The argparse module, but for a parser that has our flags too."""

    def __init__(self, module: ModuleType, plain: dict[str, Any]):
        self._module, self._plain = module, plain

    def __getattr__(self, name: str) -> Any:
        return getattr(argparse, name)

    def ArgumentParser(self, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:  # noqa: N802, the name it stands for
        parser = argparse.ArgumentParser(*args, **kwargs)
        parser.add_argument("--kv-scheme", default=None, help=SCHEME_HELP)
        parser.add_argument("--max-prompt-tokens", type=int, default=None,
                            help="Refuse longer prompts (default: with --kv-scheme, as many as the model's config says "
                            "that it has positions for).")  # fmt: skip
        parser.add_argument("--kv-memory-limit", type=_bytes, default=None, metavar="BYTES",
                            help="Most bytes of all KV caches, running and stored, e.g. 4GB (binary units). For a "
                            "request that does not fit, stored conversations go first, then it waits.")  # fmt: skip
        parser.add_argument("--kv-queue-seconds", type=float, default=None, metavar="SECONDS",
                            help="How long a request may wait for --kv-memory-limit before it is answered 503 "
                            f"(default: {QUEUE_SECONDS}).")  # fmt: skip
        keep_parsed(self._module, parser, _FLAGS)
        parse = parser.parse_args

        def parse_args(*args: Any, **kwargs: Any) -> argparse.Namespace:
            parsed = parse(*args, **kwargs)
            if parsed.max_prompt_tokens is not None and parsed.max_prompt_tokens < 1:
                parser.error(f"--max-prompt-tokens must be at least 1, got {parsed.max_prompt_tokens}")
            _check_queue(parser, parsed)
            self._put_in_place(parser, parsed)
            return parsed

        parser.parse_args = parse_args
        return parser

    def _put_in_place(self, parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
        """Our classes if one of our flags was used, mlx-lm's own if not."""
        vars(self._module).update(self._plain)
        if self._module._turboquant_args is None:
            return
        from mlx_turboquant.cli.server_parts import parts

        try:
            replaced = parts(parsed)
        except ValueError as error:
            parser.error(str(error))
        vars(self._module).update(replaced)


def _bytes(text: str) -> int:
    from mlx_turboquant.cli.plan import _size

    return _size(text)


def _check_queue(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    seconds = parsed.kv_queue_seconds
    if seconds is None:
        parsed.kv_queue_seconds = QUEUE_SECONDS
    elif parsed.kv_memory_limit is None:
        parser.error("--kv-queue-seconds wants --kv-memory-limit beside it")
    elif not 0 <= seconds < float("inf"):
        parser.error(f"--kv-queue-seconds must be a number of at least 0, got {seconds}")
