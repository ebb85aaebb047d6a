"""Promises 2, 3, 4 and 6 of DESIGN.md on the real model, in batch-invariant mode: company, failures and compiles change
no bit of anybody's log-probabilities, and every page comes back."""

import jax
import jax.numpy as jnp
import pytest

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.errors import RequestFailed
from tests.running import all_free, eventually, hooked

pytestmark = [pytest.mark.parity, pytest.mark.smollm2]
PROMPTS = ["The sky is blue because", "Once upon a time there was a", "def fibonacci(n):\n", "Привет! Как", "Once upon"]


def how(i):
    return ji.Sampling(max_tokens=10, ignore_eos=True, temperature=i % 2 * 0.8, seed=i, logprobs=3)


def bits(outputs):
    return [(o.tokens, o.logprobs) for o in outputs]


@pytest.fixture(scope="module")
def lm(smollm2_path):
    with ji.load(smollm2_path, dtype="float32", max_context=128, max_rows=4, batch_invariant=True) as lm:
        yield lm


@pytest.fixture(scope="module")
def alone(lm):
    return bits([lm(prompt, how(i), reuse=False) for i, prompt in enumerate(PROMPTS)])


@pytest.fixture(autouse=True)
def pages_are_conserved(lm):
    yield
    assert eventually(lambda: all_free(lm)), "pages leaked"


def test_batching_is_invisible_and_after_warmup_nothing_compiles(lm, alone):
    lm.warmup()
    seen = []
    with events.observe(seen.append):
        together = lm.generate(PROMPTS, [how(i) for i in range(len(PROMPTS))])
        backwards = lm.generate(PROMPTS[::-1], [how(i) for i in reversed(range(len(PROMPTS)))])
        samples = lm(PROMPTS[1], how(1), n=3).samples
    assert bits(together) == bits(backwards[::-1]) == alone
    assert bits(samples[:1]) == alone[1:2] and len({o.tokens for o in samples}) == 3
    assert not [e for e in seen if isinstance(e, events.Compiling | events.Missed)]


def test_a_request_that_fails_or_leaves_changes_nobody_elses_bits(lm, alone):
    poison = lambda logits_V, context: jnp.where(context.count == 3, jnp.nan, logits_V)
    answers = [lm.submit(prompt, how(i)) for i, prompt in enumerate(PROMPTS)]
    victim, leaver = lm.submit("x y z", max_tokens=50, logits=poison), lm.submit("w", max_tokens=50)
    leaver.cancel()
    assert bits([answer.result(120) for answer in answers]) == alone
    assert isinstance(victim.exception(120), RequestFailed) and len(victim.exception().output.tokens) == 3


def test_after_a_failed_step_everybody_goes_on_with_the_same_bits(lm, alone):
    steps = []

    def broken(params, state, last_S, run):
        jax.tree.map(lambda page: page.delete(), state)
        raise RuntimeError("the device is on fire")

    def hook(key):
        steps.append(key.kind == "forward")
        return broken if sum(steps) == 7 and steps[-1] else None

    with hooked(lm, hook):
        assert bits(lm.generate(PROMPTS, [how(i) for i in range(len(PROMPTS))])) == alone
    assert sum(steps) > 7
