"""Type-check Metal kernel bodies and run them on the CPU, with every memory access checked (Linux).

    from metal_emu import metal_kernel      # the same call as mx.fast.metal_kernel, mx or numpy arrays
    kernel = metal_kernel(name=..., input_names=..., output_names=..., source=..., header=...)
    call = dict(inputs=[...], template=[...], grid=..., threadgroup=..., output_shapes=..., output_dtypes=...)
    kernel(**call, check=True)              # KernelError lists races, out-of-bounds, uninitialised reads, divergence
    kernel.typecheck(**call)                # only type-checks; inputs may be (shape, dtype); CompileError or warnings
    kernel.metal_source(**call)             # the text that MLX would compile
    typecheck([(kernel, call), ...])        # many at once
    prebuild([(kernel, call), ...])         # type-checks and compiles many, two at a time, before they run
    instructions.count_loop(kernel.instance(**call), inputs)    # a loop's instructions by kind; nothing runs

The options of a call (``check``, ``strict``, ``order``, ``seed``, ...) are described at ``metal_kernel``.

How it works: ``signature`` writes the kernel as MLX does. ``typechecking`` reads it with clang's C++ for OpenCL,
against ``include/metal_stdlib``, our stand-in for Metal's library; MLX's own headers are those of the installed
wheel. ``build`` compiles the same text as C++ for the CPU. ``execute`` runs it on ``runtime``: each GPU thread is a
fiber, and barriers and simd operations are where fibers are switched, so a run is exact and repeatable.

It needs clang 17 or newer: one on PATH, or pip's ``ziglang``; ``METAL_EMU_CLANG`` forces one. Built kernels are kept
in the user's cache folder (256 MB at most). Cold, on two cores with clang 22: 32 instantiations of kernels/attend.metal
are type-checked in 3 s and built checked in 11 s. Of a small kernel's 0.06 s, half is reading the precompiled prelude;
of a large one's half second, nearly all is clang's optimizer and code generator.

What it cannot show:

- a race between an atomic and a plain access
- a race of one writer with readers of three or more simdgroups, if the two remembered readers are ordered before it
- divergence between two simd operations of bfloat, or two calls of one helper: they wait at the same place in the text
- the rounding of Metal's fast math, and of sums over lanes in another order; speed
"""

import sys

from .batch import prebuild, typecheck
from .errors import CompileError, KernelError, Report
from .kernel import MetalKernel, metal_kernel

# Why it cannot be used here, or "": for pytest.mark.skipif.
UNSUPPORTED = "" if sys.platform == "linux" else "metal_emu runs on Linux; on a Mac, kernels run on Metal itself"

__all__ = [
    "UNSUPPORTED",
    "CompileError",
    "KernelError",
    "MetalKernel",
    "Report",
    "metal_kernel",
    "prebuild",
    "typecheck",
]
