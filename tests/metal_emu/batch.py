"""Type-checks or builds many calls at once, with two processes, so that a test's runs find everything ready."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from . import typechecking
from .build import precompiled, run_flags, shared_object
from .kernel import MetalKernel


def _unique(calls: Iterable[tuple[MetalKernel, dict]]) -> list:
    return list(dict.fromkeys(kernel.instance(**call) for kernel, call in calls))


def typecheck(calls: Iterable[tuple[MetalKernel, dict]], jobs: int = 2) -> list[list[str]]:
    """The warnings of each (kernel, call's arguments). Raises ``CompileError`` naming all that fail."""
    return typechecking.check([kernel.instance(**call) for kernel, call in calls], jobs)


def prebuild(calls: Iterable[tuple[MetalKernel, dict]], check: bool = True, jobs: int = 2, typecheck=True) -> int:
    """Type-check and compile what the calls will need, ``jobs`` processes at a time; returns how many kernels.

    ``check`` as the calls will have it: checked and unchecked builds differ. Inputs may be (shape, dtype).
    Raises ``CompileError``.
    """
    instances = _unique(calls)
    if typecheck:
        typechecking.check(instances, jobs)
    for flags in {tuple(run_flags(instance, check)) for instance in instances}:
        precompiled(list(flags))
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(shared_object, instance, check) for instance in instances]:
            future.result()
    return len(instances)
