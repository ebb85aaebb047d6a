"""What the public checks find: a kernel that is wrong in one way fails in that way, and a right one passes."""

import subprocess
import sys
from functools import partial

import jax.numpy as jnp
import pytest
from hypothesis import Phase, given, settings

from jaxinfer.kernels import attend, matmul_dense
from jaxinfer.testing import MIXED, Case, RunShape, attend_cases, check_op, matmul_cases

SMALL = RunShape(tokens=4, rows=4, longest=1, S=2, P=3, pages=14)


def scaled(*args, **options):
    return attend.reference(*args, **{**options, "scale": 1.01 * options["scale"]})


def looks_at_padding(q, k, v, pages, run, **options):
    out, pages = attend.reference(q, k, v, pages, run, **options)
    return jnp.where(jnp.isnan(q[-1]).any(), out * (1 + 1e-6), out), pages


def looks_at_neighbours(q, k, v, pages, run, **options):
    out, pages = attend.reference(q, k, v, pages, run, **options)
    return out * (1 + 1e-6 * (run.cu_q_lens[-1] - 1)), pages


def forgets_to_write(q, k, v, pages, run, **options):
    return attend.reference(q, k, v, pages, run, **options)[0], pages


WRONG = {
    "other numbers": (scaled, "differs from the reference"),
    "a look at padding": (looks_at_padding, "has looked where nobody may look"),
    "a look at neighbours": (looks_at_neighbours, "is not batch-invariant"),
    "no write": (forgets_to_write, "differs from the reference"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_check_finds(what):
    function, message = WRONG[what]

    @settings(derandomize=True, database=None, phases=[Phase.generate])  # to shrink what failed takes a minute
    @given(case=attend_cases(SMALL))
    def prove(case):
        check_op(function, case, reference=attend.reference, batch_invariant=True)

    with pytest.raises(AssertionError, match=message):
        prove()


@given(case=attend_cases(SMALL))
def test_the_check_lets_the_reference_pass(case):
    check_op(attend.reference, case, reference=attend.reference, batch_invariant=True)


@given(case=matmul_cases())
def test_a_check_says_what_it_cannot_check(case):
    with pytest.raises(ValueError, match="needs a reference"):
        check_op(partial(jnp.matmul), case)
    with pytest.raises(ValueError, match="matmul has no 'abacus' here for this call; it has"):
        check_op(matmul_dense, case, how="abacus")


def test_a_result_of_another_dtype_is_another_result():
    case = Case((jnp.ones(3),))
    with pytest.raises(AssertionError, match=r"float32\(3,\), not int32\(3,\)"):
        check_op(lambda x: x, case, reference=lambda x: x.astype(jnp.int32))


@given(case=attend_cases(MIXED, page_size=16, width=16, sinks=True), weights=matmul_cases(8, 128, 64, "bfloat16"))
def test_cases_can_be_drawn_for_the_kernels_of_gpus(case, weights):
    assert attend.takes("triton", *case.args, **case.arrays, **case.options)
    assert matmul_dense.takes("few", *weights.args)
    assert case.args[3].shape[2:] == (16, 16) and max(at for _, at in case.ragged.tokens) < 16 * MIXED.P


@given(case=attend_cases(MIXED, sinks=True, window=5, dtype="bfloat16"))
def test_a_case_prints_shapes_not_numbers(case):
    assert "bfloat16[40, 2, 4, 8]" in repr(case) and len(repr(case)) < 2000


def test_without_hypothesis_the_import_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; import jaxinfer.testing"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'jaxinfer[test]'" in found.stderr and found.returncode
