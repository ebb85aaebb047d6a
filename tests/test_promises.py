"""The promises of DESIGN.md that a whole engine keeps: sharing, invariance to the bit, failures that harm one request,
and nothing left behind. All in batch-invariant mode, where "the same" means every bit of every log-probability."""

import gc
import json
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import CancelledError
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.errors import Expired, Rejected, RequestFailed, StepFailed
from jaxinfer.frontend.text_stream import TextStream
from jaxinfer.request import Piece, Sequence
from jaxinfer.runtime.answer import Answer
from jaxinfer.runtime.delivery import Ticket
from jaxinfer.runtime.pack import Packer
from tests.running import all_free, at_rest, blocked, endings, eventually, hooked

LOAD = dict(max_context=256, max_rows=6, batch_invariant=True)
PROMPTS = ["The sky is blue because", "Once upon a time", "x", "w1 w2 w3 w4 w5 w6 w7", "Привет, мир! 你好", "a" * 80,
           [(3 + 7 * i) % 320 for i in range(150)]]


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **LOAD) as lm:
        yield lm


MODELS = {"plain-bfloat16": dict(dtype="bfloat16"), "windowed-float32": dict(dtype="float32"),
          "plain-int8": dict(dtype="bfloat16", kv_cache_dtype="int8")}


@pytest.fixture(scope="module", params=MODELS)
def any_lm(request, tiny_path, windowed_path):
    path = windowed_path if request.param.startswith("windowed") else tiny_path
    with ji.load(path, **MODELS[request.param], **LOAD) as lm:
        yield lm


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    for name in {"lm", "any_lm"} & set(request.fixturenames):
        model = request.getfixturevalue(name)
        assert eventually(lambda model=model: at_rest(model)), "something is left"


def how(i=0, count=12, **options):
    """Every other one greedy, all with log-probabilities and no early end."""
    return ji.Sampling(max_tokens=count, ignore_eos=True, temperature=i % 2 * 0.9, seed=i, logprobs=2, **options)


def bits(*outputs):
    """What must be the same: tokens, and log-probabilities as exact floats."""
    return [(o.tokens, o.logprobs) for output in outputs for o in (output.samples or (output,))]


# Sharing.


def test_samples_cost_one_prefill_and_are_what_requests_of_their_own_would_be(any_lm):
    lm, prompt = any_lm, PROMPTS[-1]
    alone = [lm(prompt, max_tokens=8, ignore_eos=True, temperature=0.9, seed=40 + i, logprobs=2, reuse=False)
             for i in range(4)]
    before = lm.stats.read
    together = lm(prompt, n=4, max_tokens=8, ignore_eos=True, temperature=0.9, seed=40, logprobs=2, reuse=False)
    assert lm.stats.read - before == len(prompt), "the prompt was read more than once"
    assert bits(together) == bits(*alone)
    assert [o.reused for o in together.samples] == [0] + [len(prompt) - 1] * 3


def test_what_is_known_is_not_read_again_unless_one_asks_for_it(lm):
    prompt = [(11 + 3 * i) % 320 for i in range(140)]
    first, before = lm(prompt, how()), lm.stats
    again = lm(prompt, how())
    assert lm.stats.read - before.read <= 1 and lm.stats.reused - before.reused == again.reused == 139
    assert first.reused == 0 and lm.stats.hit_rate > before.hit_rate
    before = lm.stats
    apart = lm(prompt, how(), reuse=False)
    assert lm.stats.read - before.read == 140 and lm.stats.reused == before.reused and apart.reused == 0
    assert bits(first) == bits(again) == bits(apart)


def test_a_second_turn_reads_only_what_is_new(lm):
    prompt = [(13 + 5 * i) % 320 for i in range(70)]
    answer = lm(prompt, max_tokens=20, ignore_eos=True)
    turn = [*prompt, *answer.tokens, 7, 8, 9]
    second = lm(turn, how())
    assert second.reused == 70 + 19, "all but the last token drawn, which was never read"
    assert bits(second) == bits(lm(turn, how(), reuse=False))


# Invariance to the bit.


@pytest.fixture(scope="module")
def alone(any_lm):
    return [any_lm(p, how(i), reuse=False) for i, p in enumerate(PROMPTS)]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bit_depends_on_company_order_hits_or_chunks(any_lm, alone, data):
    order = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=12))
    scheduler, chunk = any_lm._engine.scheduler, any_lm._engine.scheduler.chunk
    scheduler.chunk = data.draw(st.integers(1, chunk))
    try:
        outputs = any_lm.generate([PROMPTS[i] for i in order], [how(i) for i in order],
                                  reuse=data.draw(st.booleans()))
    finally:
        scheduler.chunk = chunk
    assert bits(*outputs) == bits(*(alone[i] for i in order))


def test_no_bit_depends_on_who_read_the_pages_and_why(any_lm):
    """Prompts that were scored, embedded or continued by others leave the same pages behind."""
    lm = any_lm
    for i, use in enumerate((lm.score, lm.embed, lambda p: lm(p, max_tokens=30, prompt_logprobs=0))):
        prompt = [(17 + i + 5 * j) % 320 for j in range(140)]
        use([prompt] if i < 2 else prompt)
        assert bits(lm([*prompt, 5], how(1))) == bits(lm([*prompt, 5], how(1), reuse=False))


def test_no_bit_depends_on_preemption(any_lm, alone):
    scheduler, asked = any_lm._engine.scheduler, list(range(len(PROMPTS))) * 2
    taken = {name: [scheduler.tree.take(name) for _ in range(pool.size - 5)]
             for name, pool in scheduler.tree.pools.items()}  # memory is tight: pages for one and a half
    before = any_lm.stats.preempted
    try:
        outputs = any_lm.generate([PROMPTS[i] for i in asked], [how(i, 60) for i in asked])
    finally:
        for name, pages in taken.items():
            scheduler.tree.release(name, pages)
    assert any_lm.stats.preempted > before, "there was room for all: nothing was tested"
    cut = [(o.tokens[:12], o.logprobs[:12]) for o in outputs]
    assert cut == bits(*(alone[i] for i in asked))


def test_a_grammar_is_followed_through_preemption(lm):
    """Its token may still be on the device when its pages are taken, and nobody else have a grammar."""
    tree = lm._engine.scheduler.tree
    lm("x", max_tokens=3, regex="[ab]{3}")  # compiled
    taken = {name: [tree.take(name) for _ in range(pool.size - 4)] for name, pool in tree.pools.items()}
    before = lm.stats.preempted
    try:
        old = lm.submit([(3 + 7 * i) % 320 for i in range(100)], max_tokens=150, ignore_eos=True)
        young = lm.submit([5] * 40, max_tokens=120, regex="[ab]{90}")
        text = young.result(60).text
        old.result(60)
    finally:
        for name, pages in taken.items():
            tree.release(name, pages)
    assert lm.stats.preempted > before, "there was room for both: nothing was tested"
    assert re.fullmatch("[ab]{90}", text)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_answer_to_a_schema_is_valid_beside_others(lm, data):
    jsonschema = pytest.importorskip("jsonschema")
    schema = data.draw(st.fixed_dictionaries({}, optional={
        "yes": st.just({"type": "boolean"}), "digit": st.just({"type": "integer", "minimum": 0, "maximum": 9}),
        "kind": st.lists(st.sampled_from(("a", "bc", "def")), min_size=1, unique=True).map(lambda v: {"enum": v})}))
    schema = {"type": "object", "properties": schema, "required": list(schema), "additionalProperties": False}
    how_json = ji.Sampling(max_tokens=150, json_schema=schema, temperature=0.7, seed=data.draw(st.integers(0, 99)))
    choices = tuple(data.draw(st.lists(st.sampled_from(("yes", "no", "perhaps")), min_size=1, unique=True)))
    outputs = lm.generate([[7], [8], [9]], [how_json, ji.Sampling(choice=choices), how(1, 20)])
    if outputs[0].finish_reason == "stop":
        jsonschema.validate(json.loads(outputs[0].text), schema)
    assert outputs[1].text in choices and outputs[1].finish_reason == "stop"
    assert bits(outputs[2]) == bits(lm([9], how(1, 20)))


def test_no_bit_depends_on_the_process(any_lm, alone, request, tiny_path, windowed_path):
    kind = request.node.callspec.params["any_lm"]
    path, options = windowed_path if kind.startswith("windowed") else tiny_path, MODELS[kind] | LOAD
    script = f"""
import json, sys, jax
jax.config.update("jax_compilation_cache_dir", {jax.config.jax_compilation_cache_dir!r})
import jaxinfer as ji
prompts = json.load(sys.stdin)
how = [ji.Sampling(max_tokens=12, ignore_eos=True, temperature=i % 2 * 0.9, seed=i, logprobs=2)
       for i in range(len(prompts))]
with ji.load({str(path)!r}, **{options!r}) as lm:
    outputs = lm.generate(prompts, how)
print(json.dumps([[o.tokens, [(t.token, t.logprob.hex(), t.rank) for t in o.logprobs]] for o in outputs]))
"""
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(PROMPTS), capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    ours = [[o.tokens, [(t.token, t.logprob.hex(), t.rank) for t in o.logprobs]] for o in alone]
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(json.dumps(ours))


# Chaos: one request fails, by name, and its neighbours do not change by a bit.


class Chaos(Exception):
    pass


VICTIM = "w9 w8"


@pytest.fixture(scope="module")
def undisturbed(lm):
    return [lm(p, how(i, 20), reuse=False) for i, p in enumerate(PROMPTS)]


def fails_alone(lm, undisturbed, cause, message, **options):
    """Submit the victim among the others; it alone fails, and `cause` is what did it."""
    with endings() as ended:
        answers = [lm.submit(p, how(i, 20)) for i, p in enumerate(PROMPTS)]
        callback = options.pop("on_piece", None)
        victim = lm.submit(VICTIM, on_piece=callback, **{"max_tokens": 20, "ignore_eos": True, **options})
        answers.append(lm.submit(PROMPTS[0], how(0, 20)))
        assert bits(*(a.result(60) for a in answers)) == bits(*undisturbed, undisturbed[0])
        error = victim.exception(60)
        assert message in str(error), error
        assert isinstance(error if isinstance(error, cause) else error.__cause__, cause)
        assert Counter(e.reason for e in ended) == {"failed": 1, "length": len(answers)}
    return error


def is_victim(lm, id):
    sequence = lm._engine.scheduler.sequences.get(id)
    return sequence is not None and tuple(sequence.tokens[: sequence.prompt]) == tuple(lm.tokenizer.encode(VICTIM))


@pytest.mark.parametrize("after", [0, 3])
def test_a_row_that_cannot_be_packed_fails_alone(lm, undisturbed, monkeypatch, after):
    real = Packer.pack

    def pack(self, plan, bucket):
        if any(is_victim(lm, id) and count >= after for id, count in zip(plan.ids, plan.counts, strict=True)):
            raise Chaos("no room on the desk")
        return real(self, plan, bucket)

    monkeypatch.setattr(Packer, "pack", pack)
    error = fails_alone(lm, undisturbed, Chaos, "this request could not be packed: no room on the desk")
    assert isinstance(error, RequestFailed) and len(error.output.tokens) <= after + 1
    assert error.output.finish_reason == "failed"


def test_a_row_whose_edits_cannot_be_packed_fails_alone(lm, undisturbed, monkeypatch):
    real = Packer.edit

    def edit(self, edits, row, sequence, count):
        if count == 2:
            raise Chaos("what bias?")
        real(self, edits, row, sequence, count)

    monkeypatch.setattr(Packer, "edit", edit)
    fails_alone(lm, undisturbed, Chaos, "what may be drawn next could not be said: what bias?", logit_bias={5: 1.0})


def test_a_detokeniser_that_raises_fails_its_request_alone(lm, undisturbed, monkeypatch):
    real = TextStream.push

    def push(self, token):
        if token == 271:
            raise Chaos("no such letter")
        return real(self, token)

    monkeypatch.setattr(TextStream, "push", push)
    assert not any(271 in o.tokens for o in undisturbed)
    fails_alone(lm, undisturbed, Chaos, "no such letter", logit_bias={271: 1e6})


def test_a_callback_that_raises_fails_its_request_alone(lm, undisturbed):
    def broken(piece):
        raise Chaos("not my type")

    fails_alone(lm, undisturbed, Chaos, "not my type", on_piece=broken)


def test_a_function_that_makes_nan_fails_its_request_alone(lm, undisturbed):
    poison = lambda logits_V, context: jnp.where(context.count == 2, jnp.nan, logits_V)
    error = fails_alone(lm, undisturbed, RequestFailed, "the logits are not numbers", logits=poison)
    assert len(error.output.tokens) == 2


def test_a_function_that_forbids_everything_fails_its_request_alone(lm, undisturbed):
    nothing = lambda logits_V, context: jnp.full_like(logits_V, -jnp.inf)
    fails_alone(lm, undisturbed, RequestFailed, "every token is forbidden", logits=nothing, temperature=1.0)


@pytest.mark.parametrize("verb", ["mask", "accept"])
def test_a_grammar_that_raises_fails_its_request_alone(lm, undisturbed, monkeypatch, verb):
    from jaxinfer.frontend.constraint import Matcher

    calls, real = [], getattr(Matcher, verb)

    def broken(self, *args):
        calls.append(verb)
        if len(calls) == 3:
            raise Chaos("a grammar lost its way")
        return real(self, *args)

    monkeypatch.setattr(Matcher, verb, broken)
    fails_alone(lm, undisturbed, Chaos, "a grammar lost its way", regex="[ab]{18}")


@pytest.mark.parametrize("reuse", [False, True])
def test_nan_in_ones_own_pages_reaches_nobody_else(lm, undisturbed, reuse):
    """Weights cannot make it, but a bad kernel or a flipped bit can."""
    engine, poisoned = lm._engine, []

    def poison(key):
        for sequence in engine.scheduler.running:
            if is_victim(lm, sequence.id) and len(sequence.tokens) > sequence.prompt + 2 and not poisoned:
                for name, pages in sequence.pages.items():
                    poisoned.extend(pages)
                    hit = lambda leaf, pages=pages: jnp.asarray(leaf).at[np.array(pages)].set(jnp.nan)
                    engine.state[name] = jax.tree.map(hit, engine.state[name])

    with hooked(lm, lambda key: poison(key) if key.kind == "forward" else None):
        fails_alone(lm, undisturbed, RequestFailed, "the logits are not numbers", reuse=reuse)
    assert poisoned
    assert lm(VICTIM, max_tokens=4).tokens, "who comes later finds the page with its junk"
    assert bits(lm(PROMPTS[0], how(0, 20), reuse=False)) == bits(undisturbed[0]), "a page came back with its junk"


# A failed device step.


def failing(*counts, kind="forward"):
    """The steps of these numbers lose the state that they were given."""
    calls = []

    def hook(key):
        if key.kind != kind:
            return None
        calls.append(key)
        if len(calls) not in counts:
            return None

        def broken(params, state, last_S, run):
            jax.tree.map(lambda page: page.delete(), state)
            raise RuntimeError("the device is on fire")

        return broken

    return hook


@pytest.mark.parametrize("at", [1, 9, 20, 30])
def test_after_a_failed_step_everybody_goes_on_with_the_same_bits(lm, undisturbed, at):
    extra = dict(logit_bias={5: 0.5}, regex="[ab]{12}", max_tokens=12)
    edited = lm("x", **extra)
    with endings() as ended, hooked(lm, failing(at)):
        answers = [lm.submit(p, how(i, 20)) for i, p in enumerate(PROMPTS)]
        edited_again = lm.submit("x", **extra)
        outputs = [a.result(60) for a in answers]
        assert bits(*outputs) == bits(*undisturbed) and edited_again.result(60).tokens == edited.tokens
        assert {e.reason for e in ended} <= {"length", "stop"}


def test_a_second_failure_ends_only_those_of_that_batch(lm, undisturbed):
    """Six run, and the others wait: of those the failing step may take only what it carried."""
    with endings() as ended, hooked(lm, failing(12, 13)):
        with blocked(lm):
            answers = [lm.submit(p, how(i, 20)) for i, p in enumerate(PROMPTS)] + [
                lm.submit(p, how(i, 20)) for i, p in enumerate(PROMPTS)]
        errors = [a.exception(60) for a in answers]
        lost = [i for i, e in enumerate(errors) if e is not None]
        assert lost and len(lost) <= LOAD["max_rows"] and all(isinstance(errors[i], StepFailed) for i in lost)
        assert all("the device is on fire" in str(errors[i]) and errors[i].output is not None for i in lost)
        rest = [i for i in range(len(answers)) if i not in lost]
        assert bits(*(answers[i].result() for i in rest)) == bits(*(undisturbed[i % len(PROMPTS)] for i in rest))
        assert eventually(lambda: len(ended) == len(answers) + 1)


# Nothing is left.


WAVE = 250
WAVES = 40 if settings.default.max_examples > 100 else 5  # ten thousand requests in make test-long
KINDS = (Sequence, Answer, Ticket, Piece)


def census():
    gc.collect()
    kinds = Counter(type(o) for o in gc.get_objects())
    statm = Path("/proc/self/statm")
    rss = int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0
    return {kind.__name__: kinds[kind] for kind in KINDS}, len(jax.live_arrays()), rss


def test_requests_by_the_thousand_end_once_each_and_leave_nothing(lm):
    dice = random.Random(0)
    with endings() as ended:
        reasons, counts = Counter(), []
        for _ in range(WAVES):
            answers = [lm.submit([dice.randrange(4, 320) for _ in range(dice.randint(1, 8))],
                                 max_tokens=dice.randint(1, 4), priority=dice.randint(-2, 2),
                                 timeout=dice.choice((None, None, 60.0, 0.02)), ignore_eos=True) for _ in range(WAVE)]
            doomed = dice.sample(answers, WAVE // 10)
            canceller = threading.Thread(target=lambda doomed=doomed: [answer.cancel() for answer in doomed])
            canceller.start()
            for answer in answers:
                try:
                    answer.result(60)
                    reasons["length"] += 1
                except (CancelledError, Expired, Rejected) as error:
                    reasons[{"CancelledError": "cancelled", "Expired": "expired"}[type(error).__name__]] += 1
            canceller.join()
            assert eventually(lambda: all_free(lm))
            del answers, answer, doomed, canceller
            counts.append(census())
        assert eventually(lambda: len(ended) == WAVES * WAVE)
        assert len({e.id for e in ended}) == WAVES * WAVE and Counter(e.reason for e in ended) == reasons
        assert min(reasons[reason] for reason in ("length", "cancelled", "expired")) > 0, reasons
        assert not lm._delivery._tickets
        (kinds, arrays, rss), (kinds_then, arrays_then, rss_then) = counts[2], counts[-1]
        assert all(kinds_then[k] <= kinds[k] + 4 for k in kinds), (kinds, kinds_then)
        assert arrays_then <= arrays + 4 and rss_then - rss < 1e7 + 5e5 * WAVES, (arrays, arrays_then, rss, rss_then)
