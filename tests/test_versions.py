"""Weights of a language model swapped while requests run: no compile, no request lost, and no answer of two makes
unless it was asked for."""

import threading

import jax
import jax.numpy as jnp
import pytest

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.errors import Closed, InvalidOption
from tests import tiny
from tests.running import all_free, blocked, eventually

pytestmark = pytest.mark.usefixtures("in_haste")

PROMPTS = ["The sky is blue because", "Once upon a time", "x", [(3 + 7 * i) % 320 for i in range(150)]]
HOW = dict(max_tokens=40, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
        lm.warmup()
        yield lm


@pytest.fixture
def weights(lm):
    """The old ones, and others that draw otherwise; the old ones are there again after the test."""
    old = lm.params
    yield old, jax.tree.map(lambda leaf: (leaf[::-1] * 1.01).astype(leaf.dtype) if leaf.ndim == 1 else leaf, old)
    lm.swap(old)
    assert eventually(lambda: all_free(lm) and len(lm._engine.weights) == 1), "something is left"


def bits(outputs):
    return [(o.tokens, o.logprobs) for o in outputs]


@pytest.fixture
def expected(lm, weights):
    """What each of them answers."""
    both = []
    for params in weights:
        lm.swap(params)
        both.append(bits(lm.generate(PROMPTS, **HOW)))
    lm.swap(weights[0])
    assert both[0] != both[1]
    return both


def test_a_swap_compiles_nothing_and_every_output_names_its_version(lm, weights, expected):
    seen = []
    with events.observe(seen.append):
        before = lm("x", **HOW).version
        assert before == lm.version and lm.swap(weights[1]) == lm.version == before + 1
        outputs = lm.generate(PROMPTS, **HOW)
    assert bits(outputs) == expected[1] and {o.version for o in outputs} == {before + 1}
    assert not [e for e in seen if isinstance(e, events.Compiling)]


def test_what_runs_finishes_on_the_old_weights_beside_the_new(lm, weights, expected):
    with blocked(lm):
        began = [lm.submit(p, **HOW) for p in PROMPTS]
    first = [next(iter(answer)) for answer in began]
    version = lm.swap(weights[1])
    late = [lm.submit(p, **HOW) for p in PROMPTS]
    assert first and bits(a.result(60) for a in began) == expected[0]
    assert bits(a.result(60) for a in late) == expected[1]
    assert {a.result().version for a in began} == {version - 1} and {a.result().version for a in late} == {version}


def test_what_waits_begins_on_the_new_weights(lm, weights, expected):
    with blocked(lm):
        waiting = [lm.submit(p, **HOW) for p in PROMPTS]
        swapper = threading.Thread(target=lm.swap, args=(weights[1],))
        swapper.start()
        assert eventually(lambda: lm._engine._inbox)
    swapper.join(30)
    outputs = [a.result(60) for a in waiting]
    assert all(b in (x, y) for b, x, y in zip(bits(outputs), *expected, strict=True)), "an answer of two makes"
    assert outputs[-1].version == lm.version


def test_what_runs_may_continue_on_the_new_weights(lm, weights, expected):
    stream = lm.stream("Once upon a time", max_tokens=200, ignore_eos=True)
    next(stream)
    version = lm.swap(weights[1], running="continue")
    output = list(stream)[-1].output
    assert output.version == version and len(output.tokens) == 200
    assert len(lm._engine.weights) == 1, "the old weights are kept for nobody"
    assert bits(lm.generate(PROMPTS, **HOW)) == expected[1], "pages of two makes were shared"


def test_no_answer_mixes_versions_under_many_swaps(lm, weights, expected):
    wrong, done, stop = [], [], threading.Event()

    def ask(i):
        while not stop.is_set():
            found = bits([lm(PROMPTS[i], **HOW)])[0]
            done.append(i)
            if found not in (expected[0][i], expected[1][i]):
                wrong.append(found)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for turn in range(12):
        lm.swap(weights[turn % 2])
        before = len(done)
        assert eventually(lambda before=before: len(done) > before)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong and set(done) == set(range(len(PROMPTS)))


def test_what_does_not_fit_is_refused(lm, weights):
    old, version = weights[0], lm.version
    with pytest.raises(InvalidOption, match="another structure"):
        lm.swap({})
    with pytest.raises(InvalidOption, match=r"do not match.* is bfloat16"):
        lm.swap(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), old))
    with pytest.raises(InvalidOption, match="running is 'stop'"):
        lm.swap(old, running="stop")
    assert lm.version == version


def test_a_language_model_is_drained(tiny_path):
    lm = ji.load(tiny_path, **tiny.ONE_BUCKET)
    answers = [lm.submit("x", max_tokens=60, ignore_eos=True) for _ in range(5)]
    drainer = threading.Thread(target=lm.drain)
    drainer.start()
    assert eventually(lambda: lm._engine.queue.closed)
    with pytest.raises(Closed):
        lm("x", max_tokens=1)
    assert [len(a.result(60).tokens) for a in answers] == [60] * 5
    drainer.join(30)
    assert lm._engine.closed


def test_language_models_live_in_a_registry(tiny_path):
    registry = ji.Registry()
    make = lambda: ji.load(tiny_path, **tiny.ONE_BUCKET)
    registry.load("tiny", make)
    registry.load("tiny", make)
    output = registry["tiny"]("x", max_tokens=3)
    assert output.version == 2 and registry.versions("tiny") == [2]
    registry.close()
