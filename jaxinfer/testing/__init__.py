"""Prove a kernel of your own: hypothesis strategies for the calls of ops, and what has to be true of each.

>>> from hypothesis import find
>>> from jaxinfer.kernels import rms_norm
>>> def mine(x, weight, eps, offset):
...     return rms_norm(x, weight, 0.0, offset)
>>> case = find(norm_cases(shape=(1, 8)), lambda case: not case.args[0].any())
>>> check_op(rms_norm, case)
>>> check_op(mine, case, reference=rms_norm)  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
AssertionError: mine differs from the reference
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("jaxinfer.testing draws its cases with hypothesis: pip install 'jaxinfer[test]'") from error

from jaxinfer.testing.cases import AttendCase, attend_cases, matmul_cases, norm_cases
from jaxinfer.testing.check import Alone, Case, call, check_op
from jaxinfer.testing.runs import (
    DECODE,
    GROUP,
    MIXED,
    MIXED_SINGLES,
    PROMPT,
    SEEDS,
    Numbers,
    RaggedRun,
    RunShape,
    ragged_runs,
)

__all__ = [
    "DECODE", "GROUP", "MIXED", "MIXED_SINGLES", "PROMPT", "SEEDS", "Alone", "AttendCase", "Case", "Numbers",
    "RaggedRun", "RunShape", "attend_cases", "call", "check_op", "matmul_cases", "norm_cases", "ragged_runs",
]
