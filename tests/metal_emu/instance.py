"""One instantiation of a kernel: all that MLX's generated source depends on, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import arrays

CONSTANT_BELOW = 8  # elements: MLX puts smaller inputs into the constant address space


@dataclass(frozen=True)
class Input:
    """What the signature depends on in one input; calls that agree in it share one compiled kernel.

    ``is_scalar``: no dimensions, passed by reference. ``is_constant``: few elements, in the constant address space.
    """

    name: str
    dtype: str
    is_scalar: bool
    is_constant: bool


@dataclass(frozen=True)
class Instance:
    """A kernel with what matters of its inputs, the dtypes of its outputs, and its template arguments.

    ``template`` holds (name, value) pairs; a value is a bool, an int or a dtype name. ``math_mode`` is MLX's
    compile option: "safe", "relaxed" or "fast".
    """

    name: str
    header: str
    source: str
    inputs: tuple[Input, ...]
    output_names: tuple[str, ...]
    output_dtypes: tuple[str, ...]
    template: tuple[tuple[str, bool | int | str], ...] = ()
    atomic_outputs: bool = False
    math_mode: str = "safe"


def describe_input(name: str, value) -> Input:
    """The ``Input`` of an mx or numpy array, of a Python number, or of a pair (shape, dtype)."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], (tuple, list)):
        shape, dtype = tuple(value[0]), arrays.dtype_name(value[1])
    else:
        shape, dtype = arrays.shape_and_dtype(value)
    return Input(name, dtype, not shape, math.prod(shape) < CONSTANT_BELOW)


def template_arguments(template) -> tuple[tuple[str, bool | int | str], ...]:
    """MLX's ``template`` list with every dtype written as its name."""
    return tuple((n, v if isinstance(v, (bool, int)) else arrays.dtype_name(v)) for n, v in template or [])
