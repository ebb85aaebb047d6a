"""What is done to a row's logits before it draws: as the formulas say, and to nobody else's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import InvalidRequest
from jaxinfer.kernels import (
    BIASES,
    Context,
    Edits,
    begin_history,
    check_logits_function,
    edit_logits,
    sample,
    sample_edited,
)
from jaxinfer.kernels.edits import edit
from jaxinfer.kernels.sampling import Draws
from jaxinfer.testing import SEEDS
from tests.strategies import EditRules, edit_rules

pytestmark = pytest.mark.usefixtures("strict")
R, V, S, L = 8, 97, 12, 40
W = -(-V // 32)
OFF = EditRules(1.0, 0.0, 0.0, 0, 1.0, 0, 0)
edited, sampled, sampled_edited, begun = map(jax.jit, (edit, sample, sample_edited, begin_history))
batches = st.lists(edit_rules(min(BIASES, V), L), min_size=R, max_size=R)


def mask(allowed_V: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint32[W], with junk in the bits past the vocabulary."""
    bits = rng.integers(0, 2, 32 * W)
    bits[:V] = allowed_V
    return np.array([sum(int(bit) << i for i, bit in enumerate(word)) for word in bits.reshape(W, 32)], np.uint32)


def edits(rules: list[EditRules], rng: np.random.Generator) -> Edits:
    bias_tokens, bias = rng.integers(V, 2**31, (len(rules), BIASES)), rng.normal(size=(len(rules), BIASES))
    for row, rule in zip(bias_tokens, rules, strict=True):
        row[rng.choice(BIASES, rule.biases, replace=False)] = rng.choice(V, rule.biases, replace=False)
    column = lambda name, kind: np.array([getattr(rule, name) for rule in rules], kind)
    floats = (column(name, np.float32) for name in ("repetition", "presence", "frequency"))
    masks = np.stack([mask(rng.random(V) < rule.allowed, rng) for rule in rules])
    return Edits(*floats, bias_tokens.astype(np.int32), bias.astype(np.float32), masks,
                 column("length", np.int32), column("prompt", np.int32))


def allowed(edits: Edits, r: int) -> np.ndarray:
    return np.array([edits.mask[r, t // 32] >> np.uint32(t % 32) & 1 for t in range(V)]) == 1


def formulas(row_V: np.ndarray, tokens: np.ndarray, edits: Edits, r: int) -> np.ndarray:
    """One row's edited logits, as the papers and the APIs define each edit."""
    tokens, row_V = tokens[: edits.length[r]], row_V.astype(np.float64)
    seen = np.unique(tokens)  # as transformers' RepetitionPenaltyLogitsProcessor
    score, penalty = row_V[seen], float(edits.repetition[r])
    row_V[seen] = np.where(score < 0, score * penalty, score / penalty)
    count_V = np.bincount(tokens[edits.prompt[r]:], minlength=V)  # as OpenAI's API reference
    row_V -= count_V * float(edits.frequency[r]) + (count_V > 0) * float(edits.presence[r])
    for token, bias in zip(edits.bias_tokens[r], edits.bias[r], strict=True):
        if token < V:
            row_V[token] += bias
    return np.where(allowed(edits, r), row_V, -np.inf)


class Step:
    """Random logits, slots and histories, in which a few tokens come again and again."""

    def __init__(self, seed: int, temperatures=(0.0, 0.7, 1.5)):
        self.rng = rng = np.random.default_rng(seed)
        self.logits_RV = rng.normal(size=(R, V)).astype(np.float32) * 3
        self.last_S = rng.integers(0, V, S).astype(np.int32)
        self.slot_R = rng.permutation(S)[:R].astype(np.int32)
        self.history_SL = np.where(rng.random((S, L)) < 0.5, rng.integers(0, 5, (S, L)), rng.integers(0, V, (S, L)))
        self.history_SL = self.history_SL.astype(np.int32)
        f = lambda choices: rng.choice(choices, R).astype(np.float32)
        self.draws = Draws(f(temperatures), rng.choice((0, 5, 50), R).astype(np.int32), f((1.0, 0.9)), f((0.0, 0.05)),
                           rng.integers(0, 2**32, R).astype(np.uint32), rng.integers(0, 99, R).astype(np.int32))

    def sample(self):
        return sampled(self.logits_RV, self.last_S, self.slot_R, self.draws)

    def sample_edited(self, edits: Edits):
        return sampled_edited(self.logits_RV, self.last_S, self.slot_R, self.draws, edits, self.history_SL)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint32)


@given(seed=SEEDS, rules=batches)
def test_each_row_is_edited_as_the_formulas_say(seed, rules):
    step = Step(seed)
    how = edits(rules, step.rng)
    found_RV = edited(step.logits_RV, step.slot_R, how, step.history_SL)
    for r, slot in enumerate(step.slot_R):
        expected_V = formulas(step.logits_RV[r], step.history_SL[slot], how, r)
        np.testing.assert_allclose(found_RV[r], expected_V, rtol=1e-6, atol=1e-5)


@given(seed=SEEDS, rules=batches, junk=st.sampled_from((-1, -(2**31), V, 2**31 - 1)))
def test_what_comes_after_a_history_is_never_read(seed, rules, junk):
    step = Step(seed)
    how = edits(rules, step.rng)
    junk_SL = np.full_like(step.history_SL, junk)
    for slot, length in zip(step.slot_R, how.length, strict=True):
        junk_SL[slot, :length] = step.history_SL[slot, :length]
    expected = edited(step.logits_RV, step.slot_R, how, step.history_SL)
    np.testing.assert_array_equal(bits(edited(step.logits_RV, step.slot_R, how, junk_SL)), bits(expected))


@given(seed=SEEDS, rules=batches, off=st.sets(st.integers(0, R - 1), min_size=1))
def test_a_row_with_everything_off_keeps_its_bits_and_its_draw(seed, rules, off):
    step = Step(seed)
    step.logits_RV[:, :6] = -0.0, 0.0, 1e-40, -np.inf, 3e38, -3e38
    rules = [rule if r not in off else OFF._replace(length=rule.length, prompt=rule.prompt)
             for r, rule in enumerate(rules)]
    how, off = edits(rules, step.rng), sorted(off)
    found_RV = edited(step.logits_RV, step.slot_R, how, step.history_SL)
    np.testing.assert_array_equal(bits(found_RV)[off], bits(step.logits_RV)[off])
    tokens_R, expected_R = step.sample_edited(how)[2], step.sample()[1]
    np.testing.assert_array_equal(np.asarray(tokens_R)[off], np.asarray(expected_R)[off])


@given(seed=SEEDS, rules=batches)
def test_neighbours_change_no_bit(seed, rules):
    step = Step(seed)
    how, r = edits(rules, step.rng), step.rng.integers(R)
    expected = edited(step.logits_RV, step.slot_R, how, step.history_SL)
    others = np.arange(R) != r
    step.logits_RV[others], how.bias[others], how.length[others] = np.nan, np.inf, 2**31 - 1
    step.history_SL[np.arange(S) != step.slot_R[r]] = -1
    found = edited(step.logits_RV, step.slot_R, how, step.history_SL)
    np.testing.assert_array_equal(bits(found)[r], bits(expected)[r])


@given(seed=SEEDS, rules=batches)
def test_a_token_that_the_mask_bans_is_never_drawn(seed, rules):
    step = Step(seed)
    how = edits([rule._replace(allowed=0.05) for rule in rules], step.rng)
    for _ in range(5):
        tokens_R = step.sample_edited(how)[2]
        step.draws.seed[:] += np.uint32(1)
        for r, token in enumerate(np.asarray(tokens_R)):
            assert allowed(how, r)[token] if token >= 0 else not allowed(how, r).any()


@given(seed=SEEDS, rules=batches)
def test_a_drawn_token_is_remembered_at_the_end_of_its_history_and_nowhere_else(seed, rules):
    step = Step(seed)
    how = edits([rule._replace(allowed=1.0) for rule in rules], step.rng)
    step.slot_R[:2], how.length[2] = (S, 2**31 - 1), L  # two rows of padding, and one at the end of its context
    last_S, history_SL, tokens_R = step.sample_edited(how)
    expected_S, expected_SL = step.last_S.copy(), step.history_SL.copy()
    for r in range(2, R):
        expected_S[step.slot_R[r]] = tokens_R[r]
        if how.length[r] < L:
            expected_SL[step.slot_R[r], how.length[r]] = tokens_R[r]
    np.testing.assert_array_equal(last_S, expected_S)
    np.testing.assert_array_equal(history_SL, expected_SL)


@given(seed=SEEDS, rules=batches)
def test_a_row_that_cannot_draw_says_so_and_harms_no_neighbour(seed, rules):
    step = Step(seed)
    how = edits([rule._replace(allowed=1.0) for rule in rules], step.rng)
    _, expected_SL, expected_R = map(np.array, step.sample_edited(how))
    step.logits_RV[1, 3], how.mask[4] = np.nan, 0
    _, history_SL, tokens_R = step.sample_edited(how)
    for r in (1, 4):
        expected_R[r] = -1
        if how.length[r] < L:
            expected_SL[step.slot_R[r], how.length[r]] = 0
    np.testing.assert_array_equal(tokens_R, expected_R)
    np.testing.assert_array_equal(history_SL, expected_SL)


@given(seed=SEEDS, slot=st.integers(0, S + 2))
def test_a_history_begins_in_its_slot_and_in_no_other(seed, slot):
    step = Step(seed)
    tokens_L = step.rng.integers(0, V, L).astype(np.int32)
    expected_SL = step.history_SL.copy()
    if slot < S:
        expected_SL[slot] = tokens_L
    np.testing.assert_array_equal(begun(step.history_SL, np.int32(slot), tokens_L), expected_SL)


@given(seed=SEEDS, rules=batches)
def test_a_generation_penalises_what_it_has_drawn_itself(seed, rules):
    """Greedy rows over constant logits, so that only what was drawn can change the next draw."""
    step = Step(seed, temperatures=(0.0,))
    rules = [rule._replace(allowed=1.0, length=1 + r, prompt=1 + r) for r, rule in enumerate(rules)]
    how = edits(rules, step.rng)
    texts = [step.rng.integers(0, V, rule.prompt).tolist() for rule in rules]
    for slot, text in zip(step.slot_R, texts, strict=True):
        padded_L = np.array(text + [-1] * (L - len(text)), np.int32)
        step.history_SL = begun(step.history_SL, slot, padded_L)
    for _ in range(6):
        expected_RV = np.stack([formulas(step.logits_RV[r], np.array(text), how, r) for r, text in enumerate(texts)])
        step.last_S, step.history_SL, tokens_R = step.sample_edited(how)
        for r, token in enumerate(np.asarray(tokens_R).tolist()):
            assert expected_RV[r, token] > expected_RV[r].max() - 1e-5
            texts[r].append(token)
        how = how._replace(length=how.length + np.int32(1))


# --- functions that users bring ---


def lift(logits_V, context):
    """Adds to the tokens seen, by all that a context knows."""
    real_L = jnp.arange(context.tokens.size) < context.length
    by = context.prompt + 10 * context.count + 100 * (context.seed % 7).astype(jnp.int32)
    added_L = jnp.where(real_L, by, 0).astype(jnp.float32)
    return logits_V.at[context.tokens].add(added_L, mode="drop")


def spoil(logits_V, context):
    return logits_V * jnp.nan


@functools.cache
def apply(fn):
    return jax.jit(functools.partial(edit_logits, fn))


@given(seed=SEEDS, rules=batches, chosen=st.sets(st.integers(0, R - 1)), fn=st.sampled_from((lift, spoil)))
def test_a_users_function_sees_its_row_and_leaves_the_others(seed, rules, chosen, fn):
    step = Step(seed)
    how, chosen_R = edits(rules, step.rng), np.isin(np.arange(R), list(chosen))
    step.logits_RV[~chosen_R, 0] = np.nan
    found_RV = apply(fn)(step.logits_RV, step.history_SL, step.slot_R, chosen_R, how.length, how.prompt,
                         step.draws.seed)
    np.testing.assert_array_equal(bits(found_RV)[~chosen_R], bits(step.logits_RV)[~chosen_R])
    for r in chosen:
        length, prompt = int(how.length[r]), int(how.prompt[r])
        by = prompt + 10 * (length - prompt) + 100 * int(step.draws.seed[r] % 7)
        expected_V = step.logits_RV[r] + by * np.bincount(step.history_SL[step.slot_R[r], :length], minlength=V)
        np.testing.assert_allclose(found_RV[r], expected_V if fn is lift else np.full(V, np.nan), rtol=1e-4)


def test_a_users_function_may_think_in_another_float():
    logits_RV = Step(0).logits_RV
    n_R, chosen_R = np.zeros(R, np.int32), np.arange(R) < 4
    found_RV = apply(lambda logits_V, _: logits_V.astype(jnp.bfloat16))(
        logits_RV, np.zeros((S, L), np.int32), n_R, chosen_R, n_R, n_R, n_R.astype(np.uint32))
    assert found_RV.dtype == np.float32
    np.testing.assert_array_equal(found_RV[:4], jnp.asarray(logits_RV[:4]).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(found_RV[4:], logits_RV[4:])


def reads_a_value(logits_V, context):
    return logits_V if context.length > 3 else -logits_V


def calls_back(logits_V, context):
    return jax.pure_callback(lambda x: x, logits_V, logits_V, vmap_method="sequential")


@jax.jit
def callback_free(logits_V, context):
    return logits_V * 2


WRONG = {
    "another shape": (lambda logits_V, context: logits_V[1:], f"returned float32 [{V - 1}]"),
    "no vector": (lambda logits_V, context: logits_V.max(), "returned float32 []"),
    "integers": (lambda logits_V, context: logits_V.argsort(), f"returned int32 [{V}]"),
    "a pair": (lambda logits_V, context: (logits_V, context), "returned a tuple"),
    "nothing": (lambda logits_V, context: None, "returned a NoneType"),
    "a string": (lambda logits_V, context: "logits", "raised TypeError"),
    "one argument": (lambda logits_V: logits_V, "raised TypeError"),
    "a value read in Python": (reads_a_value, "function reads_a_value raised TracerBoolConversionError"),
    "no function": (3, "logits function 3 raised TypeError"),
    "a callback": (calls_back, "function calls_back calls back to the host"),
    "a callback inside": (lambda logits_V, context: jax.jit(calls_back)(logits_V, context), "calls back to the host"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_users_function_is_refused_for(what):
    fn, message = WRONG[what]
    with pytest.raises(InvalidRequest) as caught:
        check_logits_function(fn, V, L)
    assert message in str(caught.value)
    assert f"float array [{V}]" in str(caught.value)
    assert (caught.value.__cause__ is not None) == ("raised" in message)


def test_a_good_function_passes_and_is_not_run():
    seen = []

    def good(logits_V, context):
        seen.append((logits_V.shape, logits_V.dtype, Context(*((x.shape, x.dtype) for x in context))))
        return logits_V.astype(jnp.bfloat16)

    check_logits_function(good, V, L)
    check_logits_function(lift, V, L)
    check_logits_function(lambda logits_V, context: callback_free(logits_V, context) + 1, V, L)
    int32, uint32 = jnp.dtype("int32"), jnp.dtype("uint32")
    assert seen == [((V,), jnp.dtype("float32"), Context(((L,), int32), *[((), int32)] * 3, ((), uint32)))]
