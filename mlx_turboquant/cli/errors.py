"""How a command ends: one line instead of a traceback for what a user can mend, nothing where its reader is gone."""

import contextlib
import os
import sys
from collections.abc import Iterator

_OF_MLX_LM = ("Draft model tokenizer does not match",)
READER_GONE = 141  # 128 + SIGPIPE: what a shell reports of `yes | head`


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Print bad input as ``command: error: ...`` and exit with 2.

    Only messages written for users are shortened: those of this package and of MLX open with the place in brackets,
    and mlx-lm has a few. Where the reader of stdout has gone, as ``head`` has after its lines, exit with 141 and print
    nothing.
    """
    try:
        try:
            yield
        finally:  # left to the end of Python, a failing flush is a warning and exit code 120
            print(end="", flush=True)
    except BrokenPipeError:
        # The signal itself stays ignored, Python's default: it would end a server whenever a client hangs up. What is
        # left in the buffer goes nowhere, or Python would try to write it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(READER_GONE)
    except OSError as error:
        sys.exit(_say(command, str(error)))
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith(("[", *_OF_MLX_LM)):
            raise
        sys.exit(_say(command, str(error)))


def _say(command: str, text: str) -> int:
    print(f"{command}: error: {text}", file=sys.stderr)
    return 2
