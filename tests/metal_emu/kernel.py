"""``metal_kernel``: MLX's call, answered by the CPU."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np

from . import arrays, signature, typechecking
from .build import shared_object
from .errors import CompileError, KernelError, Report
from .execute import Argument, Options, execute, load
from .instance import Instance, describe_input, template_arguments

MAX_THREADS = 1024


class MetalKernel:
    """A kernel body; make it with ``metal_kernel``. After a call, ``reports``, ``warnings`` and ``counts`` tell more.

    ``counts`` holds switches, collectives, barriers, accesses (of a checked run) and threadgroup_bytes.
    """

    def __init__(self, name, input_names, output_names, source, header, atomic_outputs, math_mode, options: Options):
        self.name, self.source, self.header = name, source, header
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.atomic_outputs, self.math_mode, self.options = atomic_outputs, math_mode, options
        self.reports: list[Report] = []
        self.warnings: list[str] = []
        self.counts: dict[str, int] = {}

    def instance(self, *, inputs, output_dtypes, template=None, **_) -> Instance:
        """The instantiation that a call would compile. Takes a call's arguments and ignores what it does not need.

        Each input is an array, a Python number, or a pair (shape, dtype).
        """
        self._expect("inputs", inputs, self.input_names)
        self._expect("output_dtypes", output_dtypes, self.output_names)
        return Instance(
            self.name,
            self.header,
            self.source,
            tuple(describe_input(name, value) for name, value in zip(self.input_names, inputs, strict=True)),
            tuple(self.output_names),
            tuple(arrays.dtype_name(dtype) for dtype in output_dtypes),
            template_arguments(template),
            self.atomic_outputs,
            self.math_mode,
        )

    def metal_source(self, **call) -> str:
        """The Metal source MLX would compile for this call (see ``instance``), without MLX's own prelude."""
        return signature.metal_source(self.instance(**call))

    def typecheck(self, **call) -> list[str]:
        """Type-check this call (see ``instance``) and return the warnings. Raises ``CompileError``."""
        return typechecking.check([self.instance(**call)])[0]

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
        **options,
    ):
        """Run the kernel; arguments as for MLX's, and the options of ``metal_kernel``. ``stream`` is ignored.

        Returns a list of outputs: mx arrays if any input or output dtype is MLX's, else numpy arrays.
        Raises ``CompileError``; ``KernelError`` for what a run breaks; ``ValueError`` for a call that MLX or Metal
        would refuse.
        """
        chosen = dataclasses.replace(self.options, **options)
        self._expect("output_shapes", output_shapes, self.output_names)
        instance = self.instance(inputs=inputs, output_dtypes=output_dtypes, template=template)
        grid, threadgroup = self._sizes("grid", grid), self._sizes("threadgroup", threadgroup)
        if verbose:
            print(signature.metal_source(instance))
        if np.prod(threadgroup) > MAX_THREADS:
            raise ValueError(
                f"[{self.name}] wanted at most the maximum of {MAX_THREADS} threads per threadgroup, "
                f"got {np.prod(threadgroup)}. Use a smaller threadgroup."
            )
        if chosen.typecheck:
            self.warnings = typechecking.check([instance])[0]
        kernel = load(shared_object(instance, chosen.check))
        if kernel.threadgroup_bytes > chosen.max_threadgroup_memory:
            raise ValueError(
                f"[{self.name}] threadgroup memory of {kernel.threadgroup_bytes} bytes exceeds the "
                f"{chosen.max_threadgroup_memory} there are. Use smaller threadgroup arrays."
            )
        storages = [arrays.to_storage(value) for value in inputs]
        outputs = [
            arrays.new_storage(shape, dtype, init_value)
            for shape, dtype in zip(output_shapes, instance.output_dtypes, strict=True)
        ]
        arguments = self._input_arguments(instance, storages, chosen.misalign)
        for name, storage in zip(self.output_names, outputs, strict=True):
            arguments.append(Argument(name, storage, True, init_value is not None))
        self.reports, self.counts = execute(kernel, self.name, arguments, grid, threadgroup, chosen)
        as_mx = any(isinstance(x, mx.array) for x in inputs) or any(isinstance(d, mx.Dtype) for d in output_dtypes)
        dtypes = instance.output_dtypes
        results = [arrays.from_storage(o, dtype, as_mx) for o, dtype in zip(outputs, dtypes, strict=True)]
        if self.reports and chosen.raise_errors:
            raise KernelError(self.name, self.reports, results)
        return results

    def _input_arguments(self, instance: Instance, storages: list[np.ndarray], misalign: int) -> list[Argument]:
        out = []
        for _, name, what, index in signature.parameters(instance):
            storage, offset = storages[index], 0
            if what == "data":
                # A sliced mx array starts anywhere; its elements are aligned, its vectors need not be.
                offset = misalign * storage.itemsize if storage.ndim else 0
                storage = storage if storage.size else np.zeros(1, storage.dtype)
            elif what == "shape":
                storage = np.array(storage.shape, np.int32)
            elif what == "strides":
                storage = np.array([np.prod(storage.shape[i + 1 :]) for i in range(storage.ndim)], np.int64)
            else:
                storage = np.array([storage.ndim], np.int32)
            out.append(Argument(name, storage, offset=offset))
        return out

    def _expect(self, what: str, values, names: list[str]) -> None:
        if len(values) != len(names):
            raise ValueError(f"[{self.name}] wanted {len(names)} {what} ({', '.join(names)}), got {len(values)}.")

    def _sizes(self, what: str, sizes) -> tuple[int, int, int]:
        sizes = tuple(int(size) for size in sizes)
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"[{self.name}] {what} must be three positive numbers, got {sizes}.")
        return sizes


def metal_kernel(
    name,
    input_names,
    output_names,
    source,
    header="",
    ensure_row_contiguous=True,
    atomic_outputs=False,
    compile_options=None,
    **options,
) -> MetalKernel:
    """A kernel to call as one of ``mx.fast.metal_kernel``, run on the CPU. Its inputs are always made contiguous.

    Options, here or in a call:

    - ``check`` (False): check every access, and undefined behaviour; about 10 times slower than without
    - ``strict`` (True): lanes of a simdgroup, or threads, that wait at different places are an error
    - ``order`` ("forward", "reverse", "random") and ``seed``: in which order threadgroups, simdgroups and lanes run
    - ``typecheck`` (True): type-check with Metal's address spaces first
    - ``misalign`` (0): shift the inputs by so many elements, as those of a sliced array are
    - ``ftz`` (False): flush denormals to zero
    - ``max_threadgroup_memory`` (32768): bytes
    - ``unwritten`` (True): in a checked run, an output byte that nobody writes is an error
    - ``raise_errors`` (True): raise ``KernelError``; otherwise read ``kernel.reports``

    Raises ``ValueError`` for what ``mx.fast.metal_kernel`` refuses, and for unknown options.
    """
    if not output_names:
        raise ValueError(f"[{name}] wanted at least one output, got none.")
    math_mode = (compile_options or {}).get("math_mode", "safe")
    if set(compile_options or {}) - {"math_mode"} or math_mode not in ("safe", "relaxed", "fast"):
        raise ValueError(f"[{name}] compile_options takes math_mode safe, relaxed or fast, got {compile_options}.")
    known = [field.name for field in dataclasses.fields(Options)]
    if set(options) - set(known):
        raise ValueError(f"[{name}] unknown options {sorted(set(options) - set(known))}. Known: {', '.join(known)}.")
    return MetalKernel(name, input_names, output_names, source, header, atomic_outputs, math_mode, Options(**options))


__all__ = ["CompileError", "KernelError", "MetalKernel", "metal_kernel"]
