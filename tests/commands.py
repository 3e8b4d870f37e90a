"""The commands of the package run inside the test process, on copies of mlx-lm's modules that no other test sees."""

import argparse
import importlib
import importlib.util
import sys

import pytest

from mlx_turboquant import cli

OF_MLX_LM = ("generate", "cache_prompt", "chat", "server")


class _ParsedError(Exception):
    """Ends a command once its arguments were parsed."""


def fresh_module(name: str):
    """A copy of ``mlx_lm.name``, for a command to extend."""
    importlib.import_module(f"mlx_lm.{name}")  # its classes look their module up by name
    spec = importlib.util.find_spec(f"mlx_lm.{name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsers_used(monkeypatch: pytest.MonkeyPatch) -> list[argparse.ArgumentParser]:
    """A list that takes each parser that prints its help from now on."""
    used: list[argparse.ArgumentParser] = []
    printed = argparse.ArgumentParser.print_help
    monkeypatch.setattr(
        argparse.ArgumentParser, "print_help", lambda self, file=None: (used.append(self), printed(self, file))
    )
    return used


def run_help(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``mlx_turboquant WORDS --help`` at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with monkeypatch.context() as patch:
        _in_argv([*words, "--help"], patch)
        try:
            cli.main()
        except SystemExit as end:  # argparse's, with 0; the list of commands returns
            assert not end.code, end.code


def parse(words: list[str]) -> argparse.Namespace:
    """What ``mlx_turboquant WORDS`` parses its arguments to, checked as the command checks them; nothing else runs.

    Raises:
        SystemExit: if the command refuses them.
    """
    name, *arguments = words
    assert name in cli.COMMANDS, name
    module = importlib.import_module(f"mlx_turboquant.cli.{name}")
    if name not in OF_MLX_LM:
        return module.parser().parse_args(arguments)
    copy = fresh_module(name)
    getattr(module, f"extend_{name}")(copy)
    if name != "server":
        return copy.setup_arg_parser().parse_args(arguments)
    made = copy.argparse.ArgumentParser  # its main makes the parser itself

    def stopping(*args, **kwargs):
        parser = made(*args, **kwargs)
        parse_args = parser.parse_args

        def parse_and_stop():
            raise _ParsedError(parse_args(arguments))

        parser.parse_args = parse_and_stop
        return parser

    copy.argparse.ArgumentParser = stopping
    with pytest.raises(_ParsedError) as parsed:
        copy.main()
    return parsed.value.args[0]


def _in_argv(words: list[str], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "argv", ["mlx_turboquant", *words])
    if words and words[0] in OF_MLX_LM:
        patch.setitem(sys.modules, f"mlx_lm.{words[0]}", fresh_module(words[0]))
