"""Sampling on the device: each row by its own rules, and by nobody else's."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.kernels import sample, sample_greedy
from jaxinfer.kernels.sampling import Draws

pytestmark = pytest.mark.usefixtures("strict")
R, V, S = 4, 97, 8
sampled, greedily = jax.jit(sample), jax.jit(sample_greedy)
rules = st.tuples(st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, V), st.floats(2**-7, 1.0, width=32),
                  st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 2**32 - 1), st.integers(0, 1000))


def draws(rows):
    kinds = (np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32)
    return Draws(*(np.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)))


def logits(seed):
    """Random, with no two alike in a row."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(V) for _ in range(R)]).astype(np.float32) / 9


def kept(row_V, temperature, k, p, min_p):
    """What top-k, then top-p, then min-p leave, by sorting; thresholds may fall either way by a rounding error."""
    scaled = (row_V / np.float32(temperature)).astype(np.float64)
    order = np.argsort(-scaled)[: k or V]
    probs = np.exp(scaled[order] - scaled.max())
    probs /= probs.sum()
    nucleus = (np.cumsum(probs) - probs < p + 1e-6) | (p >= 1)
    return set(order[nucleus & (probs >= min_p * probs.max() * (1 - 1e-6))])


@given(seed=st.integers(0, 2**32 - 1), rows=st.lists(rules, min_size=R, max_size=R))
def test_only_tokens_that_the_rules_keep_are_drawn(seed, rows):
    logits_RV, slot_R = logits(seed), np.arange(R, dtype=np.int32)
    for count in range(4):
        _, tokens_R = sampled(logits_RV, np.zeros(S, np.int32), slot_R, draws([(*r[:5], count) for r in rows]))
        for row_V, token, (t, k, p, min_p, *_) in zip(logits_RV, np.asarray(tokens_R), rows, strict=True):
            assert token == row_V.argmax() if t == 0 else token in kept(row_V, t, k, p, min_p)


@pytest.mark.parametrize(("rule", "keeps"), [
    ((1.0, 5, 1.0, 0.0), lambda order, probs: order[:5]),
    ((1.0, 0, 0.6, 0.0), lambda order, probs: order[: int((np.cumsum(probs) < 0.6).sum()) + 1]),
    ((1.0, 0, 1.0, 0.1), lambda order, probs: order[probs >= 0.1 * probs[0]]),
])
def test_every_token_that_the_rules_keep_is_drawn_as_often_as_it_is_likely(rule, keeps):
    row_V = np.random.default_rng(1).normal(size=24).astype(np.float32) * 1.5
    n = 20_000
    batch = Draws(*(np.full(n, value, kind) for value, kind in zip(
        (*rule, 7), (np.float32, np.int32, np.float32, np.float32, np.uint32), strict=True)),
        np.arange(n, dtype=np.int32))
    _, tokens = sampled(np.tile(row_V, (n, 1)), np.zeros(1, np.int32), np.full(n, 1, np.int32), batch)
    order = np.argsort(-row_V)
    probs = np.exp(row_V[order] - row_V.max())
    keep = keeps(order, probs / probs.sum())
    expected = np.exp(row_V[keep]) / np.exp(row_V[keep]).sum()
    found = np.bincount(np.asarray(tokens), minlength=24) / n
    assert set(np.flatnonzero(found)) == set(keep.tolist())
    np.testing.assert_allclose(found[keep], expected, atol=5 * (0.25 / n) ** 0.5)


@given(seed=st.integers(0, 2**32 - 1), rows=st.lists(rules, min_size=R, max_size=R), order=st.permutations(range(R)))
def test_neighbours_and_places_change_no_draw(seed, rows, order):
    logits_RV, slot_R, order = logits(seed), np.arange(R, dtype=np.int32), list(order)
    _, one = sampled(logits_RV, np.zeros(S, np.int32), slot_R, draws(rows))
    _, other = sampled(logits_RV[order], np.zeros(S, np.int32), slot_R, draws([rows[i] for i in order]))
    np.testing.assert_array_equal(np.asarray(one)[order], other)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_row_whose_slot_is_past_the_end_remembers_nothing(seed):
    last_S, slot_R = np.arange(100, 100 + S, dtype=np.int32), np.array([3, S, 0, S], np.int32)
    for found, tokens in (
        greedily(logits(seed), last_S, slot_R),
        sampled(logits(seed), last_S, slot_R, draws([(1.0, 0, 1.0, 0.0, seed, 0)] * R)),
    ):
        expected = last_S.copy()
        expected[[3, 0]] = np.asarray(tokens)[[0, 2]]
        np.testing.assert_array_equal(found, expected)
