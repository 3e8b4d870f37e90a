"""Run by the .pth file at every start of Python: add our flags to mlx-lm's commands when, and if, they are imported."""

import sys


class _ExtendOnImport:
    """A finder that lets the usual ones find the module and runs ours after the module's own code."""

    mlx_turboquant = True
    names = {"mlx_lm.generate": "extend_generate", "mlx_lm.cache_prompt": "extend_cache_prompt"}  # noqa: RUF012

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
            from mlx_turboquant.cli import mlx_lm_commands

            getattr(mlx_lm_commands, extension)(module)

        return exec_module


# Python reads the .pth file once for each name of the folder it lies in, and a virtual environment on Linux has two
# (lib and lib64). Two finders would ask each other for ever.
if not any(hasattr(finder, "mlx_turboquant") for finder in sys.meta_path):
    sys.meta_path.insert(0, _ExtendOnImport())
