"""From a plan to arrays, and what is done to a row's logits before it draws, through the whole engine."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.compiler.buckets import Bucket
from jaxinfer.graph import Run, hidden
from jaxinfer.kernels import init_pages, tracing
from jaxinfer.request import Sampling, Sequence
from jaxinfer.runtime.pack import Packer
from jaxinfer.scheduler import Began, Plan
from tests import tiny
from tests.running import at_rest, eventually

pytestmark = pytest.mark.usefixtures("in_haste")

VOCAB = 320


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
        yield lm


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "lm" in request.fixturenames:
        lm = request.getfixturevalue("lm")
        assert eventually(lambda: at_rest(lm)), "something runs on"


# The arrays.


@st.composite
def plans(draw):
    """A plan of some rows in some slots, and a bucket that holds it."""
    slots = draw(st.permutations(range(6)))[: draw(st.integers(1, 5))]
    singles = draw(st.integers(0, len(slots)))
    lens = [1] * singles + [draw(st.integers(1, 5)) for _ in slots[singles:]]
    starts = [draw(st.integers(0, 20)) for _ in slots]
    draws = [r < singles or draw(st.booleans()) for r in range(len(slots))]
    tokens = draw(st.lists(st.integers(-1, VOCAB - 1), min_size=sum(lens), max_size=sum(lens)))
    pages = [("all", slot, i, draw(st.integers(0, 99))) for slot in slots for i in range(3)]
    began = [Began(10 + slot, slot, (1, 2), 2, Sampling(temperature=slot / 2, top_k=slot, seed=slot)) for slot in slots]
    plan = Plan(1, singles, 1, "draw", [10 + s for s in slots], list(slots), starts, lens, tokens, draws,
                list(range(len(slots))), pages, [], began)
    padded = singles + draw(st.integers(0, 2))
    rows = padded + len(slots) - singles + draw(st.integers(0, 2))
    size = sum(lens) + padded - singles + draw(st.integers(0, 4))
    return plan, Bucket(max(lens), rows, size, padded)


@given(case=plans())
def test_every_row_finds_its_tokens_its_pages_and_its_slot(case):
    plan, bucket = case
    packer = Packer(6, {"all": 3}, VOCAB)
    run, remember_R, rows = packer.pack(plan, bucket)
    again = packer.pack(plan, bucket)
    assert all(map(np.array_equal, jax.tree.leaves((run, remember_R, rows)), jax.tree.leaves(again)))
    ends, at = np.cumsum(plan.lens), np.asarray(run.cu_q_lens)
    assert len(run.tokens_T) == bucket.tokens and len(run.kv_lens_R) == len(run.slot_R) == bucket.rows
    for r, slot in enumerate(plan.slots):
        row = rows[r]
        assert (row < bucket.singles) == (r < plan.singles), "a decode row is where decode rows are"
        assert run.kv_lens_R[row] == plan.starts[r] + plan.lens[r] and run.slot_R[row] == slot
        assert remember_R[row] == (slot if plan.draws[r] else 6)
        assert at[row + 1] - at[row] == plan.lens[r]
        assert run.tokens_T[at[row]: at[row + 1]].tolist() == plan.tokens[ends[r] - plan.lens[r]: ends[r]]
        assert run.tables["all"][row].tolist() == [page for _, s, _, page in plan.pages if s == slot]
    padding = np.setdiff1d(np.arange(bucket.rows), rows)
    assert (run.kv_lens_R[padding] == 0).all() and (remember_R[padding] == 6).all()
    draws = packer.draws(plan, rows, bucket.rows)
    assert draws.temperature[rows].tolist() == [slot / 2 for slot in plan.slots]
    assert draws.count[rows].tolist() == plan.counts
    assert draws.seed[rows].tolist() == plan.slots == draws.top_k[rows].tolist()
    assert (draws.temperature[padding] == 0).all()


@given(case=plans(), data=st.data())
def test_a_step_of_the_same_rows_is_packed_as_if_it_were_the_first(case, data):
    """One that shares its columns with the step before, whose arrays it may share, and a copy that shares nothing."""
    plan, bucket = case
    keeps, packer = Packer(6, {"all": 3}, VOCAB), Packer(6, {"all": 3}, VOCAB)
    keeps.pack(plan, bucket)
    packer.pack(plan, bucket)
    n = len(plan.ids)
    like = replace(plan, singles=n, lens=[1] * n, draws=[True] * n, tokens=[-1] * n, pages=[], began=[])
    bucket = Bucket(1, n + data.draw(st.integers(0, 2)), n + data.draw(st.integers(0, 2)) + 2, n)
    seen = []
    for number in range(data.draw(st.integers(2, 5))):
        fresh = data.draw(st.lists(st.sampled_from(plan.slots), max_size=2))
        like = replace(like, number=number, starts=[start + 1 for start in like.starts],
                       pages=[("all", slot, number % 3, 200 + number) for slot in fresh])
        seen.append((keeps.pack(like, bucket), keeps.draws(like, np.arange(n), bucket.rows)))
        apart = replace(like, slots=list(like.slots))
        expected = packer.pack(apart, bucket), packer.draws(apart, np.arange(n), bucket.rows)
        assert all(map(np.array_equal, jax.tree.leaves(seen[-1]), jax.tree.leaves(expected)))
        if number:
            assert seen[-1][0][0].slot_R is seen[0][0][0].slot_R, "nothing was shared: nothing was tested"
    starts = [run.kv_lens_R[0] for (run, *_), _ in seen]
    assert starts == list(range(starts[0], starts[0] + len(starts))), "an array was written to after its step left"


TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40, unique=True)


@given(allowed=st.none() | TOKENS, stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=3), least=st.integers(0, 2),
       count=st.integers(0, 2), bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=5))
def test_a_rows_edits_say_what_its_sampling_says_and_the_others_change_nothing(allowed, stops, least, count, bias):
    packer = Packer(4, {"all": 1}, VOCAB)
    edits, off = packer.no_edits(3), packer.no_edits(3)
    how = Sampling(allowed_tokens=allowed, min_tokens=least, logit_bias=bias, repetition_penalty=1.5,
                   presence_penalty=0.5, frequency_penalty=-0.5)
    packer.edit(edits, 1, Sequence(0, [5] * 7, 7, how, stops), count)
    for name, made in edits._asdict().items():
        assert np.array_equal(made[[0, 2]], getattr(off, name)[[0, 2]]), f"{name} of another row changed"
    bits = np.unpackbits(edits.mask[1].view(np.uint8), bitorder="little")[:VOCAB]
    free = set(range(VOCAB)) if allowed is None else set(allowed)
    longer = free - stops if count < least else free
    assert set(np.flatnonzero(bits)) == (longer or free), "what cannot go on may end"
    real = edits.bias_tokens[1] < VOCAB
    told = dict(zip(edits.bias_tokens[1][real].tolist(), edits.bias[1][real].tolist(), strict=True))
    assert told == {token: np.float32(value) for token, value in bias.items()}
    assert (edits.length[1], edits.prompt[1]) == (7 + count, 7)
    assert (edits.repetition[1], edits.presence[1], edits.frequency[1]) == (1.5, 0.5, -0.5)


# Through the engine. Edited rows always have plain neighbours, which must not change by a bit.


@pytest.fixture(scope="module")
def neighbours(lm):
    asked = [("w1 w2", ji.Sampling(max_tokens=30, ignore_eos=True, logprobs=2)),
             ("é", ji.Sampling(max_tokens=30, ignore_eos=True, temperature=1.0, seed=3, logprobs=2))]
    return asked, [lm(*one) for one in asked]


def beside(lm, neighbours, prompt, **options):
    """The answer to `prompt` beside neighbours, whose answers stay what they were."""
    asked, expected = neighbours
    own = ji.Sampling(ignore_eos=True, **options)
    outputs = lm.generate([prompt, *(p for p, _ in asked)], [own, *(s for _, s in asked)])
    for output, alone in zip(outputs[1:], expected, strict=True):
        assert (output.tokens, output.logprobs) == (alone.tokens, alone.logprobs), "a neighbour changed"
    return outputs[0]


def test_a_bias_draws_and_forbids(lm, neighbours):
    plain = beside(lm, neighbours, "Once", max_tokens=20)
    assert set(beside(lm, neighbours, "Once", max_tokens=20, logit_bias={33: 1e6}).tokens) == {33}
    forbidden = plain.tokens[0]
    without = beside(lm, neighbours, "Once", max_tokens=20, logit_bias={forbidden: -math.inf})
    assert forbidden not in without.tokens
    second = lm("Once", max_tokens=1, logprobs=2).logprobs[0].top[1][0]
    assert without.tokens[0] == second, "the likeliest of the others"


def test_only_allowed_tokens_are_drawn(lm, neighbours):
    allowed = [9, 33, 200, 319]
    drawn = beside(lm, neighbours, "Once", max_tokens=20, allowed_tokens=allowed, temperature=1.5, seed=2)
    assert set(drawn.tokens) <= set(allowed) and len(set(drawn.tokens)) > 1


def logits_of(lm, tokens):
    """The model's logits after each of `tokens`, read at once by the reference ops."""
    width = 64
    pages = {g.name: [init_pages(1, width, g.kv_heads, g.head_width, jnp.float32)] * g.layers for g in lm.graph.groups}
    tables = {g.name: np.zeros((1, 1), np.int32) for g in lm.graph.groups}
    tokens_T = np.zeros(width, np.int32)
    tokens_T[: len(tokens)] = tokens
    length = np.array([len(tokens)], np.int32)
    run = Run(tokens_T, np.array([0, len(tokens)], np.int32), length, np.zeros(1, np.int32), tables, width)
    with tracing("cpu", forced={"attend": "reference", "matmul": "reference"}):
        _, x_TD = hidden(lm.graph, lm.params, pages, np.zeros(1, np.int32), run)
        return np.asarray(lm.graph.head(lm.params, x_TD))[: len(tokens)]


@pytest.mark.parametrize("how", [{"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"presence_penalty": 1.5},
                                 {"frequency_penalty": 1.0}, {"presence_penalty": 0.5, "frequency_penalty": 0.3,
                                                              "repetition_penalty": 1.1, "logit_bias": {76: 2.0}}])
def test_edits_are_those_of_the_textbook(lm, neighbours, how):
    drawn = beside(lm, neighbours, "Once", max_tokens=16, **how)
    prompt, checked = list(drawn.prompt_tokens), 0
    logits_TV = logits_of(lm, [*prompt, *drawn.tokens]).astype(np.float64)[len(prompt) - 1:]
    for i, token in enumerate(drawn.tokens):
        scores, counts = logits_TV[i], np.bincount(drawn.tokens[:i], minlength=VOCAB)
        seen, repetition = counts + np.bincount(prompt, minlength=VOCAB) > 0, how.get("repetition_penalty", 1.0)
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / repetition, scores[seen] * repetition)
        scores -= how.get("frequency_penalty", 0) * counts + how.get("presence_penalty", 0) * (counts > 0)
        scores[76] += how.get("logit_bias", {}).get(76, 0)
        second, first = np.sort(scores)[-2:]
        if first - second > 1e-3:
            assert token == np.argmax(scores), f"token {i}"
            checked += 1
    assert checked > 12 and drawn.tokens != lm("Once", max_tokens=16, ignore_eos=True).tokens


# Users' functions.


def next_token(logits_V, context):
    """Forces the last token's successor."""
    return jnp.where(jnp.arange(VOCAB) == (context.tokens[context.length - 1] + 1) % VOCAB, 0.0, -jnp.inf)


def test_a_users_function_sees_what_was_drawn_last(lm, neighbours):
    forward = lambda: [(e.name, e.origin) for e in lm.ledger if e.name.startswith("forward")]
    lm("Once", max_tokens=1)
    before = forward()
    drawn = beside(lm, neighbours, "Once", max_tokens=40, logits=next_token)
    last = drawn.prompt_tokens[-1]
    assert drawn.tokens == tuple((last + 1 + i) % VOCAB for i in range(40))
    assert forward() == before, "the model was compiled again"


def test_a_users_function_knows_lengths_counts_and_the_seed(lm, neighbours):
    def what(logits_V, context):
        numbers = jnp.stack([context.length, context.prompt, context.count, context.seed.astype(jnp.int32)])
        number = numbers[context.count % 4] + 100 * (context.count % 4)
        return jnp.where(jnp.arange(VOCAB) == number, 0.0, -jnp.inf)

    drawn = beside(lm, neighbours, [7] * 5, max_tokens=4, logits=what, seed=9)
    assert drawn.tokens == (5, 105, 202, 309 % VOCAB)


def test_a_users_function_sees_all_tokens_after_a_hit_in_any_sample(lm, neighbours):
    def total(logits_V, context):
        real = jnp.where(jnp.arange(context.tokens.size) < context.length, context.tokens, 0)
        return jnp.where(jnp.arange(VOCAB) == real.sum() % VOCAB, 0.0, -jnp.inf)

    prompt = [(3 + 7 * i) % VOCAB for i in range(90)]
    for n in (1, 3):
        drawn = beside(lm, neighbours, prompt, max_tokens=6, logits=total, n=n)
        for sample in drawn.samples or (drawn,):
            tokens = list(prompt)
            for token in sample.tokens:
                assert token == sum(tokens) % VOCAB
                tokens.append(token)
    assert drawn.reused >= 64, "nothing was found: nothing was tested"


def test_two_functions_and_an_edit_share_a_step(lm, neighbours):
    constant = lambda logits_V, context: jnp.where(jnp.arange(VOCAB) == 50, 0.0, -jnp.inf)
    asked, expected = neighbours
    how = [ji.Sampling(max_tokens=20, ignore_eos=True, **o)
           for o in ({"logits": next_token}, {"logits": constant}, {"allowed_tokens": [60]})]
    outputs = lm.generate([[7], [8], [9], asked[0][0]], [*how, asked[0][1]])
    assert [o.tokens for o in outputs[:3]] == [tuple(range(8, 28)), (50,) * 20, (60,) * 20]
    assert (outputs[3].tokens, outputs[3].logprobs) == (expected[0].tokens, expected[0].logprobs)


def test_a_function_that_leaves_the_logits_alone_changes_nothing(lm):
    plain = [lm("Once", max_tokens=20, temperature=t, seed=1, logprobs=1) for t in (0.0, 1.0)]
    same = [lm("Once", max_tokens=20, temperature=t, seed=1, logprobs=1, logits=lambda logits_V, _: logits_V)
            for t in (0.0, 1.0)]
    assert [(o.tokens, o.logprobs) for o in plain] == [(o.tokens, o.logprobs) for o in same]
