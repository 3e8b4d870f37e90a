"""``python -m mlx_turboquant hook``: opt in to `mlx_lm.generate --kv-scheme ...`, through one line in a .pth file.

Python runs such a line when it starts. Ours loads `startup.py`, which waits for one of mlx-lm's commands to be imported
and only then adds the flags; nothing else is imported, so other programs start as fast as before.
"""

import argparse
import sysconfig
from pathlib import Path

from mlx_turboquant.cli.errors import one_line_errors

NAME = "mlx_turboquant_hook.pth"


def pth_path() -> Path:
    """Where the file is written: this Python's site-packages."""
    return Path(sysconfig.get_paths()["purelib"]) / NAME


def pth_line() -> str:
    """The line: nothing happens if the package has been removed meanwhile."""
    startup = str(Path(__file__).with_name("startup.py").resolve())
    return (
        f"import os; p = {startup!r}; os.path.exists(p) and "
        "exec(compile(open(p).read(), p, 'exec'), {'__name__': 'mlx_turboquant_startup'})\n"
    )


def status() -> str:
    """Whether the file is there and is what `--install` would write."""
    path = pth_path()
    current = path.exists() and path.read_text() == pth_line()
    state = "installed" if current else "out of date: install it again" if path.exists() else "not installed"
    return f"{state} ({path})"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    out = argparse.ArgumentParser(prog="mlx_turboquant hook", description=__doc__.split("\n\n")[0].replace("`", ""))
    action = out.add_mutually_exclusive_group(required=True)
    action.add_argument("--install", action="store_true", help=f"write {NAME} into site-packages")
    action.add_argument("--remove", action="store_true", help="delete it")
    action.add_argument("--status", action="store_true", help="say whether it is there")
    return out


def main() -> None:
    """Install, remove or show the hook."""
    with one_line_errors("mlx_turboquant hook"):
        args = parser().parse_args()
        path = pth_path()
        if args.install:
            path.write_text(pth_line())
            print(f"Wrote {path}:\n  {pth_line().strip()}\nmlx_lm.generate, cache_prompt, chat and server of this "
                  "Python now take --kv-scheme. Undo with: python -m mlx_turboquant hook --remove")  # fmt: skip
        elif args.remove:
            existed = path.exists()
            path.unlink(missing_ok=True)
            print(f"Removed {path}." if existed else f"Nothing to remove: there is no {path}.")
        else:
            print(status())


if __name__ == "__main__":
    main()
