"""The machine, the versions and the backend, in words: what a report from another machine has to begin with."""

import os
import platform
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx

import mlx_turboquant
from mlx_turboquant.ops.backend import VARIABLE, choose_backend

COPIED = 1 << 27  # bytes of the array that is copied: more than any cache holds
COPIES, REPEATS = 4, 6


def describe(backend: str | None = None) -> dict[str, Any]:
    """Everything about where this runs.

    Args:
        backend: what was asked for, see `choose_backend`.

    Returns:
        device, memory_gb, system, mlx_device, backend, reason (why that backend), versions; and where MLX runs on a GPU
        memory_gb_per_s, the 10^9 bytes that a copy there reads and writes together.

    Raises:
        ValueError: for an unknown backend, or one that this machine does not have.
    """
    info = mx.device_info()
    memory = info.get("memory_size") or info.get("total_memory") or _host_memory()
    release = platform.mac_ver()[0]
    return {
        "device": str(info.get("device_name") or platform.processor() or "unknown"),
        "memory_gb": round(int(memory) / 2**30, 1),
        "system": f"{f'macOS {release}' if release else platform.system()} {platform.machine()}",
        "mlx_device": str(mx.default_device()),
        "backend": choose_backend(backend),
        "reason": _reason(backend),
        "versions": {
            "python": platform.python_version(),
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
            "mlx_turboquant": mlx_turboquant.__version__,
        },
        **({"memory_gb_per_s": round(copy_rate() / 1e9, 1)} if mx.default_device() == mx.gpu else {}),
    }


def card(machine: dict[str, Any]) -> str:
    """What `describe` gives, in a few lines."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    memory = f"{machine['memory_gb']:g} GB"
    if "memory_gb_per_s" in machine:
        memory += f" ({machine['memory_gb_per_s']:g} GB/s copying)"
    return (
        f"{machine['device']}, {memory}, {machine['system']}, MLX on {machine['mlx_device']}\n"
        f"{versions}\nbackend: {machine['backend']} ({machine['reason']})"
    )


def copy_rate() -> float:
    """Bytes per second that copies of a large array read and write together on the default device: the best of six.

    Times of attention are judged by it: what a cache's bytes take at this rate is the least that reading it can take.
    """
    x = mx.ones((COPIED // 2,), mx.float16)
    mx.eval(x)
    best = float("inf")
    for _ in range(REPEATS):  # the first ones find the clock low and memory not yet mapped
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([-x for _ in range(COPIES)])
        best = min(best, time.perf_counter() - start)
    return 2 * COPIES * COPIED / best


def _reason(asked: str | None) -> str:
    if asked not in (None, "", "auto"):
        return "asked for as an argument"
    if not asked and os.environ.get(VARIABLE, "auto") not in ("", "auto"):
        return f"asked for by the variable {VARIABLE}"
    return f"what {mx.default_device()} has"


def _host_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
