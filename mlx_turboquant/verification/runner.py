"""Run a case on a backend: inputs and judgement on the CPU in plain MLX and numpy, the operation on the device."""

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_turboquant.verification.attend_check import AttendCheck
from mlx_turboquant.verification.cases import Case
from mlx_turboquant.verification.keep_check import KeepCheck
from mlx_turboquant.verification.row_checks import DequantizeCheck, EncodeCheck
from mlx_turboquant.verification.score_check import ScoreCheck
from mlx_turboquant.verification.survey_check import BalanceCheck, SurveyCheck

MOST_CHARACTERS = 1000  # of a failure: a compiler may say much more, and says the first error first
_CHECKS = {
    "attend": AttendCheck,
    "encode": EncodeCheck,
    "dequantize": DequantizeCheck,
    "survey": SurveyCheck,
    "balance": BalanceCheck,
    "keep_rows": KeepCheck,
    "score": ScoreCheck,
}


@dataclass(frozen=True)
class Result:
    """How a case went.

    Attributes:
        case: what was run.
        backend: on what.
        error: of attention, decoded rows and scores the largest absolute error; of encoded rows how much worse than the
            reference's the worst row is, as a part of it (see `EncodeCheck`).
        allowed: for error.
        seconds: of the call, compiling included.
        failure: what was raised instead, or "".
    """

    case: Case
    backend: str
    error: float = float("nan")
    allowed: float = float("nan")
    seconds: float = float("nan")
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether the result is as near as it has to be; false for NaN."""
        return not self.failure and self.error <= self.allowed

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {} if self.failure else {"error": self.error, "allowed": self.allowed, "ms": 1e3 * self.seconds}
        return {
            "operation": self.case.operation,
            "kernels": list(self.case.kernels(self.backend)),
            "case": str(self.case),
            "ok": self.ok,
            **{name: float(f"{number:.3g}") if number == number else None for name, number in numbers.items()},
            **({"failure": self.failure} if self.failure else {}),
        }


def run(case: Case, backend: str) -> Result:
    """The result of one case; whatever is raised on the way is part of it."""
    try:
        with mx.stream(mx.cpu):
            check = _CHECKS[case.operation](case)
        start = time.perf_counter()
        out = check.call(backend)
        mx.eval(out)
        seconds = time.perf_counter() - start
        with mx.stream(mx.cpu):
            error, allowed = check.judge(out, backend)
    except Exception as error:  # a kernel that does not compile is a row of the table, not the end of it
        return Result(case, backend, failure=f"{type(error).__name__}: {error}"[:MOST_CHARACTERS])
    return Result(case, backend, float(error), float(allowed), seconds)
