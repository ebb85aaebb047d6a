"""Log-probabilities, ranks and likeliest tokens: numpy's, in numpy's order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.kernels import TOP, Logprobs, logprobs, prompt_logprobs
from jaxinfer.testing import SEEDS

pytestmark = pytest.mark.usefixtures("strict")
R, T = 8, 70
found = jax.jit(logprobs)
vocabularies = st.sampled_from((7, 97, 128, 1000, 5003))  # below TOP, less than a block, one, some, more than TOP


def logits(rng: np.random.Generator, R: int, V: int, ties: bool) -> np.ndarray:
    """[R, V], some tokens impossible; with ties, of four values only, the larger ones rare."""
    x = rng.choice((-2, -1, 0, 1), (R, V), p=(0.5, 0.49, 0.006, 0.004)) if ties else rng.normal(size=(R, V)) * 4
    return np.where(rng.random((R, V)) < 0.1, -np.inf, x).astype(np.float32)


def log_softmax(row_V: np.ndarray) -> np.ndarray:
    row_V = row_V.astype(np.float64) - row_V.max()
    return row_V - np.log(np.exp(row_V).sum())


@given(seed=SEEDS, V=vocabularies, ties=st.booleans())
def test_logprobs_are_the_log_softmax_in_order(seed, V, ties):
    rng = np.random.default_rng(seed)
    logits_RV, tokens_R = logits(rng, R, V, ties), rng.integers(0, V, R).astype(np.int32)
    logits_RV[:, 0] = -1  # something is possible
    result = Logprobs(*map(np.asarray, found(logits_RV, tokens_R)))
    assert [x.dtype for x in result] == [np.float32, np.int32, np.int32, np.float32]
    n = min(TOP, V)
    for r, (row_V, token) in enumerate(zip(logits_RV, tokens_R, strict=True)):
        expected_V, order = log_softmax(row_V), np.argsort(-row_V, kind="stable")
        np.testing.assert_allclose(result.chosen[r], expected_V[token], rtol=1e-5, atol=1e-5)
        assert order[result.rank[r] - 1] == token
        np.testing.assert_array_equal(result.top_tokens[r, :n], order[:n])
        np.testing.assert_allclose(result.top[r, :n], expected_V[order[:n]], rtol=1e-5, atol=1e-5)
    assert (result.top_tokens[:, n:] >= V).all() and (result.top[:, n:] == -np.inf).all()


def test_logprobs_agree_with_jax():
    rng = np.random.default_rng(0)
    logits_RV, tokens_R = logits(rng, R, 5003, False), rng.integers(0, 5003, R).astype(np.int32)
    expected_RV = jax.nn.log_softmax(logits_RV)
    result = found(logits_RV, tokens_R)
    take = lambda tokens_RK: np.take_along_axis(np.asarray(expected_RV), np.asarray(tokens_RK), 1)
    np.testing.assert_allclose(result.chosen, take(tokens_R[:, None])[:, 0], rtol=1e-6)
    np.testing.assert_allclose(result.top, take(result.top_tokens), rtol=1e-6, atol=1e-6)


def test_a_row_of_nan_harms_no_neighbour():
    rng = np.random.default_rng(0)
    logits_RV, tokens_R = logits(rng, R, 1000, False), rng.integers(0, 1000, R).astype(np.int32)
    expected = found(logits_RV, tokens_R)
    logits_RV[3], others = np.nan, np.arange(R) != 3
    for before, after in zip(expected, found(logits_RV, tokens_R), strict=True):
        np.testing.assert_array_equal(np.asarray(after)[others], np.asarray(before)[others])


seen = set()  # how many positions the head was asked for at once


@partial(jax.jit, static_argnames="slice")
def of_prompt(table_XV, x_TD, targets_T, slice):
    """Logits read from a table, which rounds nothing."""
    def head(x_RD):
        seen.add((slice, x_RD.shape[0]))
        return table_XV[x_RD[:, 0].astype(jnp.int32)]

    return prompt_logprobs(head, x_TD, targets_T, slice)


@given(seed=SEEDS, T=st.sampled_from((1, 32, T)), slice=st.sampled_from((32, 7)))
def test_logprobs_of_a_prompt_are_those_of_its_tokens(seed, T, slice):
    rng = np.random.default_rng(seed)
    table_XV = logits(rng, 50, 333, False)
    x_TD, targets_T = rng.integers(0, 50, (T, 3)).astype(np.float32), rng.integers(0, 333, T).astype(np.int32)
    whole = of_prompt(table_XV, x_TD, targets_T, slice)
    assert {asked for most, asked in seen if most == slice} == {slice}
    for all_T, expected_T in zip(whole, found(table_XV[x_TD[:, 0].astype(int)], targets_T), strict=True):
        np.testing.assert_allclose(all_T, expected_T, rtol=1e-6, atol=1e-6)


def test_logprobs_of_a_long_prompt_hold_no_logits_of_all_of_it():
    T, D, V = 1024, 16, 4096
    step = jax.jit(lambda w_VD, x_TD, targets_T: prompt_logprobs(lambda x: x @ w_VD.T, x_TD, targets_T))
    shapes = ((V, D), np.float32), ((T, D), np.float32), ((T,), np.int32)
    compiled = step.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * V * 4 / 4
