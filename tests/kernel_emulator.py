"""A backend named "emulator": the package's kernels, run on the CPU from their Metal text by `metal_emu`.

Another, "emulator-exchange", runs the text and the plans of the backend "cuda", which looks codes up by exchange.

import kernel_emulator                                 # registers them; then wrapper(..., backend="emulator")
with kernel_emulator.options(check=True, order="reverse"):    # any option of metal_emu's kernels, for these calls
with kernel_emulator.prebuilding():   # calls in here return zeros; all their kernels are compiled, two at a time
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from metal_emu import metal_kernel, prebuild

from mlx_turboquant.ops import attend_plan
from mlx_turboquant.ops.kernel import Kernel, register_builder

_options: dict[str, Any] = {}
_planned: dict | None = None
KERNELS: dict[str, Any] = {}  # by name: the emulated kernel of the last call, with `metal_source` and `counts`
CALLS: dict[str, dict[str, Any]] = {}  # by name: the arguments of the last call, as `metal_source` takes them


class _Emulated:
    """Stands where the result of mx.fast.metal_kernel would stand."""

    def __init__(self, kernel: Kernel, template: tuple, by_exchange: bool = False):
        header, source = kernel.specialised(template, by_exchange)
        self.name = kernel.name
        self.kernel = metal_kernel(
            name=kernel.specialised_name(template, by_exchange),
            input_names=list(kernel.inputs),
            output_names=list(kernel.outputs),
            header=header,
            source=source,
        )

    def __call__(self, **call: Any) -> list[mx.array]:
        KERNELS[self.name] = self.kernel
        # Shapes in place of arrays: another thread compiles, and MLX evaluates an array only in its own.
        CALLS[self.name] = call | {"inputs": [(x.shape, x.dtype) for x in call["inputs"]]}
        if _planned is not None:
            _planned.setdefault((self.kernel.name, *_key(call)), (self.kernel, CALLS[self.name]))
            pairs = zip(call["output_shapes"], call["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in pairs]
        mx.eval(call["inputs"])
        return self.kernel(**call, **_options)


def _key(call: dict[str, Any]) -> tuple:
    """What decides which text is compiled."""
    inputs = tuple((x.dtype, x.ndim, x.size < 8) for x in call["inputs"])
    return inputs, tuple(call["output_dtypes"])


@contextmanager
def options(**chosen: Any) -> Iterator[None]:
    """Run the emulated kernels inside with these options of metal_emu (check, order, seed, misalign, ftz, ...)."""
    before = dict(_options)
    _options.update(chosen)
    try:
        yield
    finally:
        _options.clear()
        _options.update(before)


@contextmanager
def noting() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Run nothing: calls inside return zeros. A list of (kernel, call) for metal_emu's typecheck, filled at the end."""
    global _planned
    _planned, calls = {}, []
    try:
        yield calls
        calls += _planned.values()
    finally:
        _planned = None


@contextmanager
def prebuilding(check: bool = True) -> Iterator[None]:
    """Note the kernels that are called inside, with outputs of zeros; compile them all at the end."""
    with noting() as calls:
        yield
    prebuild(calls, check=check)


def only_notes() -> bool:
    """Whether calls are noted and give zeros."""
    return _planned is not None


def text_of_mlx(kernel: Any, inputs: list[mx.array], arguments: dict[str, Any], capfd: Any) -> str:
    """What MLX hands to the Metal compiler for a call of mx.fast.metal_kernel's result `kernel`.

    MLX prints it while it traces, on any machine; it compiles nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(
            os.path.join(folder, "traced.mlxfn"),
            lambda *x: kernel(inputs=list(x), verbose=True, stream=mx.gpu, **arguments),
            *inputs,
        )
    sys.stdout.flush()
    return capfd.readouterr().out.split("```\n", 1)[1].rsplit("\n```", 1)[0]


register_builder("emulator", _Emulated)
register_builder("emulator-exchange", partial(_Emulated, by_exchange=True))
attend_plan.MANY_REGISTERS.add("emulator-exchange")
