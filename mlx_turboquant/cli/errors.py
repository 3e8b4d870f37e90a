"""One line instead of a traceback for what a user can mend."""

import contextlib
import sys
from collections.abc import Iterator

_OF_MLX_LM = ("Draft model tokenizer does not match",)


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Print bad input as ``command: error: ...`` and exit with 2.

    Only messages written for users are shortened: those of this package and of MLX open with the place in brackets,
    and mlx-lm has a few.
    """
    try:
        yield
    except OSError as error:
        sys.exit(_say(command, str(error)))
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith(("[", *_OF_MLX_LM)):
            raise
        sys.exit(_say(command, str(error)))


def _say(command: str, text: str) -> int:
    print(f"{command}: error: {text}", file=sys.stderr)
    return 2
