"""One kernel of kernels/: its text, its arguments, and how each backend builds and calls it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import mlx.core as mx

from mlx_turboquant.kernel_source import kernel_source
from mlx_turboquant.ops.backend import register_backend
from mlx_turboquant.ops.cuda_text import cuda_text, in_a_file, launch_bounds

# Above this line a kernel file holds its contract and its functions, below it the body that mx.fast.metal_kernel wants.
BODY = "// ==== body ====\n"
# A pipeline that uses many registers may not take more threads (640 were seen on a Mac by others).
MAX_THREADS = 512
# Before a text, this makes lanes look codes up by exchange (kernels/codes.h), which is faster on NVIDIA's GPUs.
_EXCHANGE = "#define TURBOQUANT_LOOKUP_BY_EXCHANGE 1\n"


@dataclass(frozen=True, eq=False)  # one by one: what is kept for a kernel is found by it, often
class Kernel:
    """A kernel by the name of its file in kernels/, built once for each backend.

    Attributes:
        name: of the file, without its ending.
        inputs: names of the input arrays, in order.
        outputs: names of the output arrays, in order.
        headers: files of kernels/ whose text comes before the kernel's own functions.
        ending: "metal", or "cu" for one that only CUDA can run.
        defines: names that the text asks for with #ifdef, where some inputs and outputs are there or not.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    ending: str = "metal"
    defines: tuple[str, ...] = ()

    @cached_property
    def text(self) -> tuple[str, str]:
        """(functions, body) in the Metal Shading Language, or in its words for CUDA."""
        functions, body = kernel_source(f"{self.name}.{self.ending}").split(BODY)
        return _bare("\n".join([*map(kernel_source, self.headers), functions])), _bare(body)

    def specialised(self, template: Sequence[tuple[str, Any]], by_exchange: bool = False) -> tuple[str, str]:
        """(functions, body) with the template constants written into the body.

        MLX could be given a template, but would then spell its arguments out at every call: 5 us of Python time for 20.

        Args:
            template: names and values, in order.
            by_exchange: whether lanes look codes up by exchanging centroids; if not, the text is what Macs run.
        """
        functions, body = self.text
        lines = [
            f"  typedef {_TYPES[value]} {name};"
            if isinstance(value, mx.Dtype)
            else f"  constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {int(value)};"
            for name, value in template
        ]
        defines = "".join(f"#define {name} 1\n" for name in self.defines)
        return _EXCHANGE * by_exchange + defines + _compact(functions), _compact("\n".join([*lines, body]))

    def specialised_name(self, template: Sequence[tuple[str, Any]], by_exchange: bool = False) -> str:
        """A name of its own for each specialised text: MLX keeps compiled kernels by name."""
        values = (str(int(v)) if not isinstance(v, mx.Dtype) else _TYPES[v] for _, v in template)
        name = "_".join(["mlx_turboquant", self.name, *values]).replace("-", "m")
        return "_".join([name, *(define.lower() for define in self.defines)]) + "_exchange" * by_exchange

    def prepare(
        self,
        backend: str,
        *,
        template: Sequence[tuple[str, Any]],
        groups: tuple[int, int, int],
        threads: int,
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> Callable[[Sequence[mx.array]], list[mx.array]]:
        """A function of the input arrays that runs `groups` threadgroups of `threads` threads each.

        Inputs must be row contiguous: another layout would be copied by MLX, each time.

        Raises:
            ValueError: for more threads in a threadgroup than every device takes.
        """
        if threads > MAX_THREADS:
            raise ValueError(f"[{self.name}] wanted at most {MAX_THREADS} threads in a threadgroup, got {threads}.")
        call = _build(self, backend, tuple(template))
        grid = (groups[0] * threads, groups[1], groups[2])
        fixed = {
            "grid": grid,
            "threadgroup": (threads, 1, 1),
            "output_shapes": list(output_shapes),
            "output_dtypes": list(output_dtypes),
        }
        return lambda inputs: call(inputs=inputs, **fixed)

    def __call__(self, backend: str, inputs: Sequence[mx.array], **how: Any) -> list[mx.array]:
        """Run it once; `how` as for `prepare`."""
        return self.prepare(backend, **how)(list(inputs))


def _bare(text: str) -> str:
    """The text without comments and indentation."""
    lines = (line.split("//")[0].strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _compact(text: str) -> str:
    """The text without spaces beside signs, unless one would run into the next: MLX hashes it at every evaluation."""
    lines = text.splitlines()
    return "\n".join(line if set(line) & set('#"') else _NEEDLESS.sub("", line) for line in lines) + "\n"


_NEEDLESS = re.compile(r"(?<=[^\w\s])[ \t]+(?=\w)|(?<=\w)[ \t]+(?=[^\w\s])|(?<=[(){};,])[ \t]+|[ \t]+(?=[(){};,])")

_TYPES = {
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.uint32: "uint",
    mx.int32: "int",
}


@lru_cache(maxsize=1024)
def _build(kernel: Kernel, backend: str, template: tuple[tuple[str, Any], ...]) -> Callable:
    return BUILDERS[backend](kernel, template)


def _metal(kernel: Kernel, template: tuple[tuple[str, Any], ...]) -> Callable:
    header, source = kernel.specialised(template)
    return mx.fast.metal_kernel(
        name=kernel.specialised_name(template),
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=header,
        source=source,
    )


def _cuda(kernel: Kernel, template: tuple[tuple[str, Any], ...], by_exchange: bool = True) -> Callable:
    header, source = cuda_text(*kernel.specialised(template, by_exchange))
    # Two template constants speak to CUDA: how many threadgroups must fit on a multiprocessor, and dynamic memory.
    constants = dict(template)
    if "RESIDENT" in constants:
        header += launch_bounds(32 * constants["NSG"], constants["RESIDENT"])
    return mx.fast.cuda_kernel(
        name=kernel.specialised_name(template, by_exchange),
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        # MLX hashes the whole text at every evaluation: 10 us for 28 KB, as long as all else of a short cache's step.
        header=in_a_file(header),
        source=in_a_file(source),
        shared_memory=constants.get("SHARED_BYTES", 0),
    )


BUILDERS: dict[str, Callable[[Kernel, tuple[tuple[str, Any], ...]], Callable]] = {
    "metal": _metal,
    "cuda": _cuda,
    "cuda-metal": partial(_cuda, by_exchange=False),
}


def register_builder(name: str, build: Callable[[Kernel, tuple[tuple[str, Any], ...]], Callable]) -> None:
    """Add a backend that runs the Metal text by other means, as the tests' emulator does.

    Args:
        name: of the backend.
        build: (kernel, template) -> a function of the keywords inputs, grid, threadgroup, output_shapes, output_dtypes.
    """
    BUILDERS[name] = build
    _build.cache_clear()
    register_backend(name)
