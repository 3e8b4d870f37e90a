"""Which kernel was verified where, by which means, and when: the one place where this is written down.

`mlx_turboquant.doctor` prints it; docs/kernels.md explains it, with what was left out. Whoever runs a kernel on another
machine writes that here.
"""

from typing import NamedTuple


class Verified(NamedTuple):
    """One kernel.

    Attributes:
        kernel: the name of its file in kernels/.
        emulator: on a CPU, from its Metal text: types and address spaces, races, bounds, uninitialised memory, results.
        cuda: on an NVIDIA GPU.
        mac: on Metal.
    """

    kernel: str
    emulator: str
    cuda: str
    mac: str


_TESTS = "in the tests"
_NO_MAC = "no Mac has run it yet"
_BOTH = "with lookups by exchange and with those of Macs"

RECORD = (
    Verified("attend", _TESTS, f"H200, 2026-11-23, {_BOTH}", _NO_MAC),
    Verified("attend_merge", _TESTS, "H200, 2026-11-23", _NO_MAC),
    Verified("attend_mma", "cannot: CUDA only", "H200, 2026-11-23", "cannot: CUDA only"),
    Verified("encode", _TESTS, f"H200, 2026-11-22, {_BOTH}", _NO_MAC),
    Verified("dequantize", _TESTS, "H200, 2026-11-22", _NO_MAC),
    Verified("survey", _TESTS, "H200, 2026-11-22", _NO_MAC),
    Verified("keep_rows", _TESTS, "H200, 2026-11-22", _NO_MAC),
    Verified("balance", _TESTS, "H200, 2026-11-22", _NO_MAC),
    Verified("score", _TESTS, "H200, 2026-11-22, with lookups by exchange", _NO_MAC),
    Verified("trellis", _TESTS, "H200, 2026-11-22", _NO_MAC),
)
