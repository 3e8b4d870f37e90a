"""Run by the .pth file at every start of Python: add our flags to mlx-lm's commands when, and if, they are imported."""

import sys


class _ExtendOnImport:
    """A finder that lets the usual ones find the module and runs ours after the module's own code."""

    mlx_turboquant = True
    names = {  # noqa: RUF012
        "mlx_lm.generate": ("mlx_lm_commands", "extend_generate"),
        "mlx_lm.cache_prompt": ("mlx_lm_commands", "extend_cache_prompt"),
        "mlx_lm.chat": ("mlx_lm_commands", "extend_chat"),
        "mlx_lm.server": ("mlx_lm_server", "extend_server"),
    }

    def find_spec(self, name, path=None, target=None):
        """The module's own spec, with our step behind its loader; None for every other module."""
        if name not in self.names:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = self._extended(spec.loader.exec_module, self.names[name])
                return spec
        return None

    def _extended(self, run, extension):
        def exec_module(module):
            run(module)
            import importlib

            file, function = extension
            getattr(importlib.import_module(f"mlx_turboquant.cli.{file}"), function)(module)

        return exec_module


# Python reads the .pth file once for each name of the folder it lies in, and a virtual environment on Linux has two
# (lib and lib64). Two finders would ask each other for ever.
if not any(hasattr(finder, "mlx_turboquant") for finder in sys.meta_path):
    sys.meta_path.insert(0, _ExtendOnImport())
