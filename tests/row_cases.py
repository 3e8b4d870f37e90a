"""Rows of every kind for the kernels that encode and decode them, and where those kernels can run."""

import importlib.util
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import kernel_emulator
import metal_emu
import mlx.core as mx
import numpy as np
import pytest
from scipy.linalg import hadamard

from mlx_turboquant.ops.backend import choose_backend
from mlx_turboquant.rotation import make_rotation

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
OWN = choose_backend()  # Metal or CUDA where MLX runs on a GPU
_NO_COMPILER = "" if shutil.which("clang") or importlib.util.find_spec("ziglang") else "no clang here (pip: ziglang)"
EMULATOR = pytest.param(
    "emulator",
    marks=pytest.mark.skipif(
        bool(metal_emu.UNSUPPORTED or (OWN != "reference" and _NO_COMPILER)),
        reason=metal_emu.UNSUPPORTED or _NO_COMPILER,
    ),
)
BACKENDS = [EMULATOR] + ([] if OWN == "reference" else [OWN])
ORDERS = [dict(order="forward"), dict(order="reverse"), dict(order="random", seed=5)]


def build_kernels(run: Callable[[Any], Any], cases: Iterable[Any]) -> None:
    """Compile the kernels that `run` would run on the emulator for each case, two at a time."""
    if EMULATOR.marks[0].args[0]:
        return
    with kernel_emulator.prebuilding():
        for case in cases:
            run(case)


def put_fault(monkeypatch: Any, module: Any, name: str, right: str, wrong: str) -> None:
    """For this test, write something wrong into the text of a module's kernel, which must have what it replaces."""
    kernel = getattr(module, name)
    header, body = kernel.text
    assert right in header + body
    mark = zlib.crc32((right + wrong).encode())  # another name, since kernels are built once for each
    broken = type(kernel)(f"{kernel.name}_{mark}", kernel.inputs, kernel.outputs, kernel.headers)
    broken.__dict__["text"] = header.replace(right, wrong), body.replace(right, wrong)
    monkeypatch.setattr(module, name, broken)


@dataclass(frozen=True)
class Case:
    """One call: what decides which kernel is compiled, and which rows of the buffer are meant.

    Attributes:
        group: elements that share a scale; 0 is a whole row.
        balance: whether rows are multiplied with factors of their own for each head.
        blocks: how many are encoded.
        start: the first row of them.
    """

    D: int = 128
    bits: int = 4
    group: int = 0
    block: int = 16
    dtype: str = "float16"
    center: bool = True
    balance: bool = True
    scalings: int = 2
    B: int = 2
    heads: int = 2
    blocks: int = 2
    start: int = 5

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in vars(self).items() if v != vars(type(self)).get(k)) or "default"

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.start + self.blocks * self.block

    @property
    def rotation(self):
        """The rotation, with a seed of its own for each size."""
        return make_rotation("hadamard", self.D, self.D)

    def arguments(self) -> dict:
        """What `encode` takes beside rows, start and stop."""
        return dict(
            bits=self.bits,
            group=self.group or self.D,
            block=self.block,
            rotation=self.rotation,
            center=self.center,
            balance=self.factors() if self.balance else None,
            scalings=self.scalings,
        )

    def factors(self) -> mx.array:
        """(B, heads, D) float32, between 1/3 and 3 or so."""
        return mx.exp(0.5 * mx.random.normal((self.B, self.heads, self.D), key=mx.random.key(9)))

    def rows(self, scale: float = 1.0) -> mx.array:
        """(B, heads, stop + 11, D): Gaussian rows with an offset for each channel, large finite numbers around them."""
        key, rows = mx.random.key(self.D + self.bits), self.blocks * self.block
        x = mx.random.normal((self.B, self.heads, rows, self.D), key=key)
        x = x + 3 * mx.random.normal((self.B, self.heads, 1, self.D), key=mx.random.key(2)) * self.center
        sides = (mx.full((self.B, self.heads, n, self.D), 6e4) for n in (self.start, 11))
        before, after = (side.astype(DTYPES[self.dtype]) for side in sides)
        return mx.concatenate([before, (scale * x).astype(DTYPES[self.dtype]), after], axis=2)


def rotation_matrix(rotation) -> np.ndarray:
    """(D, D) float64: rotated = matrix @ row."""
    D = rotation.dim
    two = D & -D
    angle = 2 * np.pi * np.outer(np.arange(D // two), np.arange(D // two)) / (D // two)
    hartley = (np.cos(angle) + np.sin(angle)) / np.sqrt(D // two)
    return np.kron(hartley, hadamard(two) / np.sqrt(two)) * np.array(rotation.signs, np.float64)


# Every width with every size of head that models have, and each dtype, grouping and side with some of them.
WIDTHS_AND_SIZES = [
    Case(D=D, bits=bits, dtype=dtype, center=center, balance=center and bits != 3)
    for i, D in enumerate([64, 80, 96, 128, 256])
    for k, bits in enumerate([2, 3, 4, 8])
    for dtype, center in [(list(DTYPES)[(i + k) % 3], (i + k) % 2 == 0)]
]
OTHERS = [
    Case(center=False, balance=False, dtype="bfloat16", scalings=1),
    Case(scalings=3, bits=3, block=64, blocks=1),
    Case(scalings=1, bits=8, dtype="float32"),
    Case(D=64, block=64, blocks=3, start=1, dtype="bfloat16", bits=2, center=False),
    Case(D=256, block=256, blocks=1, start=0, bits=4, B=1),
    Case(group=16, bits=3),
    Case(group=32, bits=4, center=False, dtype="float32"),
    Case(group=64, bits=2),
    Case(group=8, bits=8, dtype="bfloat16"),
    Case(D=96, group=48, bits=3),  # neither divides 32 nor is a multiple of it: masks
    Case(D=80, group=40, bits=4, dtype="float32"),
    Case(D=80, group=16, bits=3, center=False),
    Case(D=112, group=7, bits=2, block=32, blocks=1),
    Case(D=64, group=1, bits=4, B=1, blocks=1),
    Case(D=192, group=64, bits=8),
    Case(D=16, bits=3),
    Case(D=48, bits=2, dtype="bfloat16"),
    Case(D=144, bits=4),
    Case(D=160, bits=3, dtype="bfloat16"),
    Case(D=176, bits=3),
    Case(D=208, bits=2, center=False),
    Case(D=224, bits=4),
    Case(D=240, group=120, bits=8),
]
CASES = WIDTHS_AND_SIZES + OTHERS
# A GPU compiles each kernel for seconds: it gets a third of them.
PAIRS = [pytest.param(case, *EMULATOR.values, marks=EMULATOR.marks, id=f"{case}-emulator") for case in CASES]
PAIRS += [pytest.param(case, OWN, id=f"{case}-{OWN}") for case in CASES[::3] if OWN != "reference"]
# One of each path: powers of two or not, one group or several, masks.
FEW = [
    Case(block=64),
    Case(D=80, bits=3, dtype="bfloat16"),
    Case(D=64, bits=2, group=16, center=False, balance=False),
    Case(D=96, bits=3, group=48),
]
