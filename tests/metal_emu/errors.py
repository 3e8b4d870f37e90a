"""The two errors of a kernel: it does not compile, or its run broke a rule."""

from __future__ import annotations

from dataclasses import dataclass


class CompileError(RuntimeError):
    """The kernel is not valid Metal; the message lists every error with the line of the body or header."""


@dataclass(frozen=True)
class Report:
    """One finding of a checked run.

    ``kind`` is "out-of-bounds", "race", "uninitialised", "simd-divergence", "misaligned", "write-to-input",
    "simd-shuffle", "barrier", "undefined-behaviour" or "unwritten-output".
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.text}"


class KernelError(RuntimeError):
    """A run broke a rule: ``reports`` says which, ``outputs`` is what it computed up to there."""

    def __init__(self, name: str, reports: list[Report], outputs: list):
        self.reports, self.outputs = reports, outputs
        super().__init__(f"[{name}] {len(reports)} finding(s):\n" + "\n".join(f"  {report}" for report in reports))
