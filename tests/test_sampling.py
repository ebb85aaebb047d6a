"""Sampling on the device: each row by its own rules, and by nobody else's."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxinfer.kernels import sample, sample_greedy
from jaxinfer.kernels.sampling import Draws, truncate
from jaxinfer.testing import SEEDS
from tests.strategies import Rules, sampling_rules

pytestmark = pytest.mark.usefixtures("strict")
R, V, S = 32, 97, 8
sampled, greedily = jax.jit(sample), jax.jit(sample_greedy)
batches = st.lists(sampling_rules(V), min_size=R // 4, max_size=R // 4).map(lambda rules: rules * 4)
NOWHERE = np.full(R, S, np.int32)


def draws(rules: list[Rules], seeds, counts) -> Draws:
    columns = (*zip(*rules, strict=True), seeds, counts)
    kinds = (np.float32, np.int32, np.float32, np.float32, np.uint32, np.int32)
    return Draws(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def logits(rng: np.random.Generator) -> np.ndarray:
    """[R, V], random, of both signs, with no two alike in a row."""
    return np.stack([rng.permutation(V) - V // 2 for _ in range(R)]).astype(np.float32) / 25


def seeds_and_counts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 2**32, R), rng.integers(0, 5000, R)


@jax.jit
@jax.vmap
def noise(seed, count):
    """What a request's seed and count alone decide."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), (V,))


def kept(scaled_V: np.ndarray, rule: Rules) -> np.ndarray:
    """The tokens that top-k, then top-p, then min-p leave, by sorting in float64."""
    order = np.argsort(-scaled_V)[: rule.top_k or V]
    probs = np.exp(scaled_V[order].astype(np.float64) - scaled_V.max())
    probs /= probs.sum()
    before, floor = np.cumsum(probs) - probs, rule.min_p * probs[0]
    if rule.top_p < 1:
        assume(np.abs(before - rule.top_p).min() > 1e-5)  # else a rounding error decides
    if 0 < rule.min_p < 1:
        assume(np.abs(probs / floor - 1).min() > 1e-5)
    return order[((before < rule.top_p) | (rule.top_p == 1)) & (probs >= floor)]


@given(seed=SEEDS, rules=batches)
def test_each_row_draws_from_exactly_what_its_rules_keep(seed, rules):
    rng = np.random.default_rng(seed)
    logits_RV, (seeds, counts) = logits(rng), seeds_and_counts(rng)
    how = draws(rules, seeds, counts)
    _, tokens_R = sampled(logits_RV, np.zeros(S, np.int32), NOWHERE, how)
    rows = zip(logits_RV, rules, np.asarray(noise(how.seed, how.count)), np.asarray(tokens_R), strict=True)
    for row_V, rule, noise_V, token in rows:
        if rule.temperature == 0:
            assert token == row_V.argmax()
        else:
            scaled_V = (row_V - row_V.max()) / np.float32(rule.temperature)
            stay = kept(scaled_V, rule)
            assert token == stay[np.argmax((scaled_V + noise_V)[stay])]


@given(seed=SEEDS, rules=batches)
def test_the_kernel_for_gpus_truncates_as_the_reference_does(seed, rules):
    """In Pallas' interpreter; ties and minus infinity among them. A NaN spoils its own row alone."""
    rules = rules[:4]
    scaled_RV = np.random.default_rng(seed).choice(np.float32([-np.inf, -3, -1.5, -1e-30, -0.0, 0]), (4, V))
    scaled_RV[:, seed % V], scaled_RV[-1, 0] = 0, np.nan
    top_k_R, top_p_R = draws(rules, *[np.zeros(4)] * 2)[1:3]
    found, expected = (truncated[how](scaled_RV, top_k_R, top_p_R) for how in ("triton", "reference"))
    np.testing.assert_array_equal(found[:-1], expected[:-1])


truncated = {how: jax.jit(partial(truncate, how=how)) for how in ("triton", "reference")}


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


@given(seed=SEEDS, rules=batches, order=st.permutations(range(R)))
def test_neighbours_and_places_change_no_draw(seed, rules, order):
    rng = np.random.default_rng(seed)
    logits_RV, (seeds, counts), order = logits(rng), seeds_and_counts(rng), list(order)
    last_S, how = np.zeros(S, np.int32), draws(rules, seeds, counts)
    _, one = sampled(logits_RV, last_S, NOWHERE, how)
    _, other = sampled(logits_RV[order], last_S, NOWHERE, Draws(*(column[order] for column in how)))
    np.testing.assert_array_equal(np.asarray(one)[order], other)
    for r in order[:3]:
        _, alone = sampled(logits_RV[[r]], last_S, NOWHERE[:1], Draws(*(column[[r]] for column in how)))
        assert alone == one[r]


@pytest.mark.parametrize("rule", [
    Rules(1.0, 1, 1.0, 0.0), Rules(1.0, 0, 0.0, 0.0), Rules(1.0, 0, 1e-30, 0.0), Rules(1.0, 0, 1.0, 1.0),
    Rules(1e-30, 0, 1.0, 0.0), Rules(2e-38, 0, 0.9, 0.1), Rules(2e-38, 0, 1.0, 0.0), Rules(1e-45, 3, 1.0, 0.0),
])
def test_the_sharpest_rules_leave_the_likeliest_token(rule):
    """Also those that float32 can hardly hold, or rounds to nothing."""
    rng = np.random.default_rng(0)
    logits_RV = 100 * logits(rng)
    _, tokens_R = sampled(logits_RV, np.zeros(S, np.int32), NOWHERE, draws([rule] * R, *seeds_and_counts(rng)))
    np.testing.assert_array_equal(tokens_R, logits_RV.argmax(1))


def test_an_impossible_token_is_never_drawn():
    """As a grammar's mask makes it: minus infinity."""
    rng = np.random.default_rng(0)
    logits_RV = logits(rng)
    logits_RV[:, 2:] = -np.inf
    for rule in (Rules(1.0, 0, 1.0, 0.0), Rules(2.0, 50, 0.99, 0.0), Rules(1.0, 0, 1.0, 0.001)):
        _, tokens_R = sampled(logits_RV, np.zeros(S, np.int32), NOWHERE, draws([rule] * R, *seeds_and_counts(rng)))
        assert set(np.asarray(tokens_R).tolist()) <= {0, 1}


@given(seed=SEEDS)
def test_a_row_whose_slot_is_past_the_end_remembers_nothing(seed):
    rng = np.random.default_rng(seed)
    logits_RV, last_S, slot_R = logits(rng), np.arange(100, 100 + S, dtype=np.int32), NOWHERE.copy()
    slot_R[:4] = 3, S, 0, 2**31 - 1
    for found, tokens in (
        greedily(logits_RV, last_S, slot_R),
        sampled(logits_RV, last_S, slot_R, draws([Rules(1.0, 0, 1.0, 0.0)] * R, *seeds_and_counts(rng))),
    ):
        expected = last_S.copy()
        expected[[3, 0]] = np.asarray(tokens)[[0, 2]]
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(greedily(logits_RV, last_S, slot_R)[1], logits_RV.argmax(1))


HOPELESS = {
    "a NaN": lambda row_V, at: np.where(np.arange(V) == at, np.float32(np.nan), row_V),
    "nothing but NaN": lambda row_V, at: np.full_like(row_V, np.nan),
    "a NaN beside the certain": lambda row_V, at: np.where(np.arange(V) == at, np.float32(np.nan), np.float32(np.inf)),
    "nothing possible": lambda row_V, at: np.full_like(row_V, -np.inf),
}


@given(seed=SEEDS, rules=batches, at=st.integers(0, V - 1), what=st.sampled_from(sorted(HOPELESS)))
def test_a_row_that_cannot_draw_says_so_and_harms_no_neighbour(seed, rules, at, what):
    rng = np.random.default_rng(seed)
    logits_RV, last_S, how = logits(rng), np.arange(S, dtype=np.int32), draws(rules, *seeds_and_counts(rng))
    poisoned_RV, hopeless = logits_RV.copy(), rng.choice(R, 3, replace=False)
    poisoned_RV[hopeless] = [HOPELESS[what](row_V, at) for row_V in logits_RV[hopeless]]
    slot_R = NOWHERE.copy()
    slot_R[hopeless[0]] = 3
    for sampler, more in ((greedily, ()), (sampled, (how,))):
        expected = np.asarray(sampler(logits_RV, last_S, NOWHERE, *more)[1]).copy()
        expected[hopeless] = -1
        remembered, found = sampler(poisoned_RV, last_S, slot_R, *more)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(remembered, [0, 1, 2, 0, 4, 5, 6, 7])  # a token that the next step can read


@given(seed=SEEDS, rules=batches)
def test_a_token_at_plus_infinity_is_certain(seed, rules):
    rng = np.random.default_rng(seed)
    logits_RV, certain_R = logits(rng), rng.integers(0, V, R)
    logits_RV[np.arange(R), certain_R] = np.inf
    how, last_S = draws(rules, *seeds_and_counts(rng)), np.zeros(S, np.int32)
    np.testing.assert_array_equal(sampled(logits_RV, last_S, NOWHERE, how)[1], certain_R)
    np.testing.assert_array_equal(greedily(logits_RV, last_S, NOWHERE)[1], certain_R)


def test_both_zeros_are_one_logit():
    """Ties stay together, whatever their sign."""
    row_V = np.full(V, -1, np.float32)
    row_V[:2] = -0.0, 0.0
    rng = np.random.default_rng(0)
    how = draws([Rules(1.0, 1, 1.0, 0.0)] * R, *seeds_and_counts(rng))
    _, tokens_R = sampled(np.tile(row_V, (R, 1)), np.zeros(S, np.int32), NOWHERE, how)
    assert set(np.asarray(tokens_R).tolist()) == {0, 1}
