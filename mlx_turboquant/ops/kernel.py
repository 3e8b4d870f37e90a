"""One kernel of kernels/: its text, its arguments, and how each backend builds and calls it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlx_turboquant.kernel_source import kernel_source
from mlx_turboquant.ops.backend import register_backend
from mlx_turboquant.ops.cuda_text import cuda_text

# Above this line a kernel file holds its contract and its functions, below it the body that mx.fast.metal_kernel wants.
BODY = "// ==== body ====\n"
# A pipeline that uses many registers may not take more threads (640 were seen on a Mac by others).
MAX_THREADS = 512


@dataclass(frozen=True)
class Kernel:
    """A kernel by the name of its file in kernels/, built once for each backend.

    Attributes:
        name: of the file, without its ending.
        inputs: names of the input arrays, in order.
        outputs: names of the output arrays, in order.
        headers: files of kernels/ whose text comes before the kernel's own functions.
        ending: "metal", or "cu" for one that only CUDA can run.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    ending: str = "metal"

    @cached_property
    def text(self) -> tuple[str, str]:
        """(functions, body) in the Metal Shading Language, or in its words for CUDA."""
        functions, body = kernel_source(f"{self.name}.{self.ending}").split(BODY)
        return "\n".join([*map(kernel_source, self.headers), functions]), body

    @cached_property
    def _built(self) -> dict[str, Callable]:
        return {}

    def __call__(
        self,
        backend: str,
        inputs: Sequence[mx.array],
        *,
        template: Sequence[tuple[str, Any]],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Run it: `groups` threadgroups of `threads` threads each.

        Inputs must be row contiguous: another layout would be copied by MLX, each time.
        """
        if threads > MAX_THREADS:
            raise ValueError(f"[{self.name}] wanted at most {MAX_THREADS} threads in a threadgroup, got {threads}.")
        if backend not in self._built:
            self._built[backend] = BUILDERS[backend](self)
        return self._built[backend](
            inputs=list(inputs),
            template=list(template),
            grid=(groups[0] * threads, groups[1], groups[2]),
            threadgroup=(threads, 1, 1),
            output_shapes=list(output_shapes),
            output_dtypes=list(output_dtypes),
        )


def _metal(kernel: Kernel) -> Callable:
    header, source = kernel.text
    return mx.fast.metal_kernel(
        name=f"mlx_turboquant_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=header,
        source=source,
    )


def _cuda(kernel: Kernel) -> Callable:
    header, source = cuda_text(*kernel.text)
    return mx.fast.cuda_kernel(
        name=f"mlx_turboquant_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=header,
        source=source,
    )


BUILDERS: dict[str, Callable[[Kernel], Callable]] = {"metal": _metal, "cuda": _cuda, "cuda-metal": _cuda}


def register_builder(name: str, build: Callable[[Kernel], Callable]) -> None:
    """Add a backend that runs the Metal text by other means, as the tests' emulator does."""
    BUILDERS[name] = build
    register_backend(name)
