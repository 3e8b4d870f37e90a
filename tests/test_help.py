"""Each command's --help fits 80 columns and says what every option is for."""

import argparse
import contextlib
import functools
import io
import sys

import pytest
from commands import OF_MLX_LM, fresh_module, parsers_used, run_help

from mlx_turboquant.cli import COMMANDS

PAGES = [[], *([name] for name in COMMANDS), *(["index", part] for part in ("build", "search", "info"))]


@functools.cache
def of_mlx_lm(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The lines of ``mlx_lm.NAME --help`` at 80 columns, and its options without a help text."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "argv", [f"mlx_turboquant.{name}", "--help"])
        parsers = parsers_used(patch)
        with pytest.raises(SystemExit):
            fresh_module(name).main()
    bare = frozenset(action.dest for action in parsers[0]._actions if not action.help)
    return frozenset(out.getvalue().splitlines()), bare


@pytest.mark.parametrize("words", PAGES, ids=lambda words: " ".join(words) or "no command")
def test_help_fits_80_columns_and_every_option_is_explained(words, monkeypatch, capsys):
    parsers = parsers_used(monkeypatch)
    run_help(words, monkeypatch)
    used = list(parsers)
    lines = capsys.readouterr().out.splitlines()
    theirs, bare = of_mlx_lm(words[0]) if words and words[0] in OF_MLX_LM else (frozenset(), frozenset())
    assert len(lines) > 5 and [line for line in lines if len(line) > 80 and line not in theirs] == []
    assert not any("``" in line for line in lines)
    if words:
        [parser] = used
        assert parser.description or words[0] in OF_MLX_LM
        subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        explained = [pair for action in subcommands for pair in action._choices_actions]
        explained += [action for action in parser._actions if action not in subcommands]
        assert len(explained) > 1
        assert [action.dest for action in explained if not action.help and action.dest not in bare] == []
