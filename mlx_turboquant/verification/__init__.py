"""Kernels against plain MLX: cases as data, one function that runs a case, and what was verified where."""

from mlx_turboquant.verification.cases import (
    AttendCase,
    BalanceCase,
    Case,
    DequantizeCase,
    EncodeCase,
    KeepCase,
    ScoreCase,
    SurveyCase,
)
from mlx_turboquant.verification.lists import full, quick
from mlx_turboquant.verification.record import RECORD, Verified
from mlx_turboquant.verification.runner import Result, run

__all__ = [
    "RECORD",
    "AttendCase",
    "BalanceCase",
    "Case",
    "DequantizeCase",
    "EncodeCase",
    "KeepCase",
    "Result",
    "ScoreCase",
    "SurveyCase",
    "Verified",
    "full",
    "quick",
    "run",
]
