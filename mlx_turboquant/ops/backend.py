"""Which execution of the array work is used: Metal kernels, kernels on CUDA, or plain MLX operations.

"cuda" takes a kernel written for CUDA where there is one and the text of the Metal kernels otherwise; "cuda-metal"
takes that text always, to check and to measure on an NVIDIA GPU what Macs run.
"""

import os
from functools import cache

import mlx.core as mx

VARIABLE = "MLX_TURBOQUANT_BACKEND"
# The names anybody may ask for. The tests add a runner of their own, which executes the Metal text on a CPU.
BACKENDS = ("auto", "metal", "cuda", "cuda-metal", "reference")


def choose_backend(asked: str | None = None) -> str:
    """One of BACKENDS but 'auto': what is asked for here, or in MLX_TURBOQUANT_BACKEND, or what the device has.

    Raises:
        ValueError: for an unknown name, or a backend that this machine or its default device does not have.
    """
    name = asked or os.environ.get(VARIABLE) or "auto"
    if name == "auto":
        return _available()
    if name in ("metal", "cuda", "cuda-metal") and name.split("-")[0] != _available():
        raise ValueError(
            f"[choose_backend] Backend {name!r} was asked for ({_origin(asked)}), but MLX runs on "
            f"{mx.default_device()} here, which has {_available()!r}. Ask for 'auto'."
        )
    if name not in BACKENDS and name not in _EXTRA:
        raise ValueError(f"[choose_backend] Unknown backend {name!r} ({_origin(asked)}). Known: {', '.join(BACKENDS)}.")
    return name


_EXTRA: set[str] = set()


def register_backend(name: str) -> None:
    """Let `choose_backend` give this name back; for tools that run the kernels by other means."""
    _EXTRA.add(name)


def _origin(asked: str | None) -> str:
    return "as an argument" if asked else f"by the variable {VARIABLE}"


def _available() -> str:
    if mx.default_device().type != mx.DeviceType.gpu:
        return "reference"
    return _gpu_backend()


@cache
def _gpu_backend() -> str:
    if mx.metal.is_available():
        return "metal"
    return "cuda" if hasattr(mx, "cuda") and mx.cuda.is_available() else "reference"
