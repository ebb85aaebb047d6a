"""The engine's promises, end to end, on tiny random models (DESIGN.md, promises 1 to 4, and what a user relies on)."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.compiler import Key, buckets
from jaxinfer.compiler.executables import MOST_FUNCTIONS
from jaxinfer.errors import (
    Closed,
    InvalidOption,
    InvalidRequest,
    OutOfMemory,
    RequestFailed,
    StepFailed,
    UnsupportedModel,
)
from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Run, forward
from jaxinfer.graphs import decoder
from jaxinfer.kernels import attend, init_pages, tracing
from jaxinfer.runtime import memory as planning
from tests import tiny
from tests.running import IN_HASTE, all_free, eventually

pytestmark = pytest.mark.usefixtures("in_haste")
HOW = dict(max_context=1024, max_rows=2)  # the model of most tests here, so that all share its programs
PROMPTS = ["The sky is blue because", "Once upon a time", "x", "w1 w2 w3 w4 w5 w6 w7", "Привет, мир! 你好", "a" * 80]


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **HOW) as lm:
        yield lm


@pytest.fixture(scope="module")
def windowed(windowed_path):
    with ji.load(windowed_path, max_context=1024, max_rows=4) as lm:
        yield lm


@pytest.fixture(autouse=True)
def pages_are_conserved(request):
    """Promise 4: after every test of this file all pages of both models are free."""
    yield
    for name in {"lm", "windowed"} & set(request.fixturenames):
        model = request.getfixturevalue(name)
        assert eventually(lambda model=model: all_free(model)), "pages leaked"


def plainly(lm, prompt, count):
    """Greedy decoding as the textbook has it: the whole text is read anew for every token, by the reference ops,
    in one row with pages in order. Returns tokens and the smallest gap between the two best logits."""
    width = 144
    pages = {g.name: [init_pages(1, width, g.kv_heads, g.head_width, jnp.float32)] * g.layers for g in lm.graph.groups}
    tables = {g.name: np.zeros((1, 1), np.int32) for g in lm.graph.groups}
    tokens, gap = list(lm.tokenizer.encode(prompt)), np.inf
    start = len(tokens)

    @jax.jit
    def read(tokens_T, length):
        run = Run(tokens_T, jnp.stack([0 * length, length]), length[None], jnp.zeros(1, jnp.int32), tables, width)
        return forward(lm.graph, lm.params, pages, jnp.zeros(1, jnp.int32), run)[1][0]

    with tracing("cpu", forced={"attend": "reference", "matmul": "reference"}):
        for _ in range(count):
            assert len(tokens) <= width
            row = np.zeros(width, np.int32)
            row[: len(tokens)] = tokens
            logits_V = np.asarray(read(row, np.int32(len(tokens))))
            tokens.append(int(np.argmax(logits_V)))
            second, best = np.sort(logits_V)[-2:]
            gap = min(gap, best - second)
            if tokens[-1] == 1:
                break
    return tuple(tokens[start:]), gap


@pytest.mark.parametrize("model", ["lm", "windowed"])
def test_greedy_tokens_are_those_of_plain_decoding_alone_and_in_a_batch(model, request):
    lm = request.getfixturevalue(model)
    expected = [plainly(lm, prompt, 40) for prompt in PROMPTS]
    assert min(gap for _, gap in expected) > 1e-4, "the prompts prove nothing if the two best logits are equal"
    together = lm.generate(PROMPTS, max_tokens=40)
    assert [o.tokens for o in together] == [tokens for tokens, _ in expected]
    assert [lm(prompt, max_tokens=40).tokens for prompt in PROMPTS[:2]] == [tokens for tokens, _ in expected[:2]]


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_neighbours_and_order_of_arrival_change_no_token(windowed, data):
    cases = st.tuples(st.sampled_from(PROMPTS), st.integers(1, 24), st.sampled_from([0.0, 0.9]), st.integers(0, 9))
    asked = data.draw(st.lists(cases, min_size=1, max_size=10))
    sampling = [ji.Sampling(max_tokens=n, temperature=t, seed=s, top_p=0.95) for _, n, t, s in asked]
    outputs = windowed.generate([prompt for prompt, *_ in asked], sampling)
    for (prompt, *_), how, output in zip(asked, sampling, outputs, strict=True):
        assert windowed(prompt, how).tokens == output.tokens


def test_a_prompt_of_several_chunks_reads_as_one(windowed):
    prompt = np.random.default_rng(0).integers(4, 320, 900).tolist()
    whole = windowed(prompt, max_tokens=8).tokens
    scheduler = windowed._engine.scheduler
    try:
        scheduler.chunk = 100
        assert windowed.generate([prompt, *PROMPTS], max_tokens=8)[0].tokens == whole and len(whole) == 8
    finally:
        scheduler.chunk = 512


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 511, 512, 513])
def test_prompts_at_the_borders_of_pages_and_chunks_go_on_as_longer_ones_do(windowed, length):
    prompt = np.random.default_rng(1).integers(4, 320, 513).tolist()[:length]
    three = windowed(prompt, max_tokens=3).tokens
    assert windowed(prompt, max_tokens=1).tokens == three[:1]
    assert windowed([*prompt, three[0]], max_tokens=2).tokens == three[1:]


def test_junk_in_unwritten_memory_changes_no_bit(tiny_path, lm):
    expected = [o.tokens for o in lm.generate(PROMPTS, max_tokens=30)]
    with ji.load(tiny_path, **HOW) as poisoned:
        engine = poisoned._engine
        engine.state = jax.tree.map(lambda page: jnp.full_like(page, jnp.nan), engine.state)
        assert [o.tokens for o in poisoned.generate(PROMPTS, max_tokens=30)] == expected


def test_a_preempted_sequence_resumes_with_the_same_tokens(windowed_path):
    graph, ladder = architecture(tiny.WINDOWED).graph(), buckets.invariant_ladder(4, 256)
    need = planning.needs(graph, dtype=jnp.float32, max_context=256, max_rows=4, chunk=ladder.chunk)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[-1]]
    with ji.load(windowed_path, **tiny.ONE_BUCKET, memory=need.least + need.row // 8) as tight:
        expected = [tight(prompt, max_tokens=70, reuse=False).tokens for prompt in prompts]
        assert tight._engine.scheduler.preempted == 0, "one has room"
        assert [o.tokens for o in tight.generate(prompts * 3, max_tokens=70)] == expected * 3
        assert tight._engine.scheduler.preempted > 0, "there was memory for all: nothing was tested"
        assert all_free(tight)


def test_a_stream_says_what_the_whole_answer_says(lm):
    whole = lm("Once upon a time", max_tokens=40)
    pieces = list(lm.stream("Once upon a time", max_tokens=40))
    assert "".join(p.text for p in pieces) == whole.text == lm.tokenizer.decode(whole.tokens)
    assert sum((p.tokens for p in pieces), ()) == whole.tokens
    last = pieces[-1].output
    assert last == replace(whole, timings=last.timings, reused=last.reused)  # the second one's prompt is known
    assert [p.output is None for p in pieces] == [True] * (len(pieces) - 1) + [False]


def test_a_stop_string_ends_the_text_and_never_shows(lm):
    whole = lm("Once upon a time", max_tokens=60).text
    stop = whole[20:24]
    cut = whole[: whole.index(stop)]
    pieces = list(lm.stream("Once upon a time", max_tokens=60, stop=[stop, "never there"]))
    assert "".join(p.text for p in pieces) == cut and pieces[-1].output.text == cut
    assert pieces[-1].output.finish_reason == "stop"


def test_a_stop_token_ends_the_answer(lm):
    whole = lm("Once upon a time", max_tokens=40)
    assert whole.finish_reason == "length" and len(whole.tokens) == 40
    token = whole.tokens[10]
    stopped = lm("Once upon a time", max_tokens=40, stop_tokens=[token])
    assert stopped.finish_reason == "stop" and stopped.tokens == whole.tokens[: whole.tokens.index(token) + 1]


def test_a_seed_repeats_a_draw_and_no_seed_does_not(lm):
    ask = lambda **options: lm("Once", max_tokens=30, temperature=1.0, **options).tokens
    assert ask(seed=7) == ask(seed=7) != ask(seed=8)
    assert ask() != ask()


def test_an_answer_ends_where_the_context_does(lm):
    output = lm([5] * 1000, max_tokens=500)
    assert len(output.tokens) == 24 and output.finish_reason == "length"


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ("", {}, "prompt is empty"),
    ([], {}, "prompt is empty"),
    ([5] * 1024, {}, "prompt has 1024 tokens; at most 1023 fit"),
    (b"hello", {}, "prompt is a bytes"),
    ([[5, 6]], {}, "prompt is a list"),
    ([320], {}, "token id 320; this model's are 0 to 319"),
    (3.5, {}, "prompt is a float"),
    ("x", {"temperature": -1}, "temperature is -1"),
    ("x", {"max_tokens": 0}, "max_tokens is 0"),
    ("x", {"allowed_tokens": [320]}, "allowed_tokens has the token id 320"),
    ("x", {"logit_bias": {400: 1.0}}, "logit_bias has the token id 400"),
    ("x", {"regex": "(" }, "regex"),
    ("x", {"json_schema": {"type": "nonsense"}}, "json_schema"),
    ("x", {"choice": []}, "choice is empty"),
    ("x", {"logits": lambda logits_V, context: logits_V[:3]}, "logits"),
    ("x", {"logits": lambda logits_V, context: logits_V.nothing}, "logits"),
    ("x", {"priority": "high"}, "priority is 'high'"),
    ("x", {"timeout": 0}, "timeout is 0"),
    ("x", {"tempreature": 1}, "unknown sampling options"),
])
def test_bad_requests_are_refused_before_they_are_queued(lm, prompt, options, message):
    for ask in (lm, lm.stream, lambda *a, **k: asyncio.run(lm.agenerate(*a, **k))):
        with pytest.raises(InvalidRequest, match=message):
            ask(prompt, **options)
    with pytest.raises(InvalidRequest, match=message):
        lm.generate(["fine", prompt], **options)


def test_arrays_of_token_ids_are_prompts(lm):
    ids, ask = [5, 6, 7], dict(max_tokens=4, ignore_eos=True)
    expected = lm(ids, **ask).tokens
    assert lm(np.array(ids), **ask).tokens == expected
    for many in ([np.array(ids)] * 2, np.array([ids, ids]), (ids, ids)):
        assert [o.tokens for o in lm.generate(many, **ask)] == [expected] * 2
        assert len(lm.score(many)) == len(lm.embed(many)) == 2


@pytest.mark.parametrize("verb", ["score", "embed"])
def test_what_is_only_read_takes_no_sampling(lm, verb):
    with pytest.raises(InvalidRequest, match="sampling"):
        getattr(lm, verb)(ji.Request("x", ji.Sampling(temperature=1.0)))
    with pytest.raises(InvalidRequest, match="temperature"):
        getattr(lm, verb)("x", temperature=1.0)
    assert len(getattr(lm, verb)(ji.Request("x", priority=3))) == 1


def test_as_many_samplings_as_prompts(lm):
    with pytest.raises(InvalidRequest, match="2 samplings were given for 1 prompts"):
        lm.generate(["x"], [ji.Sampling(), ji.Sampling()])


def test_chat_follows_the_template(lm):
    rendered = lm.tokenizer.encode("<|user|>Hi</s><|assistant|>", add_special=False)
    output = lm.chat("Hi", max_tokens=5)
    assert output.prompt_tokens == tuple(rendered)
    *_, last = lm.chat([{"role": "user", "content": "Hi"}], stream=True, max_tokens=5)
    assert last.output.tokens == output.tokens


def test_closing_a_stream_cancels_it_even_before_its_first_piece(lm):
    stream = lm.stream("x", max_tokens=900)
    next(stream)
    stream.close()
    lm.stream("x", max_tokens=900)
    gc.collect()
    assert eventually(lambda: all_free(lm))


def test_ctrl_c_during_a_stream_leaks_no_page(lm):
    with pytest.raises(KeyboardInterrupt):
        for i, _ in enumerate(lm.stream("x", max_tokens=1000)):
            if i == 3:
                threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(5)
    assert eventually(lambda: all_free(lm))
    assert len(lm("x", max_tokens=5).tokens) == 5


def test_cancelling_a_task_cancels_its_request(lm):
    async def main():
        async with asyncio.TaskGroup() as group:
            slow = group.create_task(lm.agenerate("x", max_tokens=1000))
            fast = group.create_task(lm.agenerate("Once", max_tokens=10))
            await fast
            slow.cancel()
        return fast.result()

    assert asyncio.run(main()).tokens == lm("Once", max_tokens=10).tokens
    assert eventually(lambda: all_free(lm))


def test_threads_share_one_model(lm):
    expected, found = [lm(p, max_tokens=12).tokens for p in PROMPTS], {}
    ask = lambda i: found.setdefault(i, lm(PROMPTS[i % len(PROMPTS)], max_tokens=12).tokens)
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: expected[i % len(PROMPTS)] for i in range(24)}


def test_after_warmup_nothing_compiles(lm):
    lm.warmup()
    seen = []
    listen = lambda event, *_, **__: seen.append(events.Compiling(event)) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)  # XLA itself, not only what we know of
    with events.observe(seen.append):
        lm.generate(PROMPTS * 2, [ji.Sampling(temperature=i % 2 * 0.7, max_tokens=5 + i) for i in range(12)])
        lm([5] * 700, max_tokens=3)
    assert not [e for e in seen if isinstance(e, events.Compiling | events.Missed)]
    assert sum(e.name.startswith(("forward", "greedy_steps")) for e in lm.ledger) <= 16
    assert len([e for e in seen if isinstance(e, events.RequestEnded)]) == 13


def test_a_missing_bucket_borrows_a_larger_one_and_says_why(tiny_path):
    with ji.load(tiny_path, max_context=256, max_rows=4) as lm:
        executables, seen = lm._engine.executables, []
        executables.compile_all(Key("forward", buckets.prompt(32)), Key("forward", buckets.decode(4)),
                                Key("greedy", 1), Key("greedy", 4))
        compiling = threading.Event()
        slow, executables._compile = executables._compile, lambda *it: (compiling.wait(20), slow(*it))[1]
        with events.observe(seen.append):
            outputs = lm.generate(["x", "y"], max_tokens=6)
            missed = [e for e in seen if isinstance(e, events.Missed)]
            assert missed and missed[0].ran_on == "T=4,R=4" and "run.kv_lens_R [2]" in missed[0].why
            assert "ran on T=4,R=4" in executables.ledger["forward[T=2,R=2]"].missed
            compiling.set()
            assert eventually(lambda: executables.ledger["forward[T=2,R=2]"].origin != "listed", 60)
        assert [o.tokens for o in lm.generate(["x", "y"], max_tokens=6)] == [o.tokens for o in outputs]


def test_a_failed_step_is_repeated_once_with_the_same_tokens(lm):
    expected = [o.tokens for o in lm.generate(PROMPTS, max_tokens=20)]
    executables, calls = lm._engine.executables, []
    real = executables.get

    def fails_at(*counts):
        calls.clear()

        def get(key, *counted):
            found = real(key, *counted)
            if key.kind != "forward":
                return found
            calls.append(key)
            if len(calls) not in counts:
                return found

            def broken(params, state, last_S, run):
                jax.tree.map(lambda page: page.delete(), state)
                raise RuntimeError("the device is on fire")

            return broken

        executables.get = get

    try:
        fails_at(9)
        assert [o.tokens for o in lm.generate(PROMPTS, max_tokens=20)] == expected
        fails_at(3, 4)
        with pytest.raises(StepFailed, match="the device is on fire"):
            lm(PROMPTS[0], max_tokens=20)
    finally:
        executables.get = real
    assert lm(PROMPTS[0], max_tokens=20).tokens == expected[0]


def test_a_failing_detokeniser_fails_its_own_request_only(lm):
    class Broken:
        def push(self, token):
            raise UnicodeError("what is this?")

    stream, expected = lm.stream("x", max_tokens=900), lm("Once", max_tokens=10).tokens
    ((_, sample),) = lm._delivery._tickets.values()
    sample.text = Broken()
    with pytest.raises(UnicodeError, match="what is this"):
        list(stream)
    assert lm("Once", max_tokens=10).tokens == expected


def test_a_graph_of_ones_own_runs_in_the_same_engine(tiny_path, lm):
    def louder(config):
        graph = decoder.build(config)
        last = graph.blocks[-1]

        def apply(params, pages, x_TD, run):
            y_TD, pages = last.apply(params, pages, x_TD, run)
            return x_TD + 0 * y_TD, pages  # the last layer adds nothing

        return replace(graph, blocks=(*graph.blocks[:-1], replace(last, apply=apply)))

    how = tiny.ONE_BUCKET
    with ji.load(tiny_path, graph=louder, **how) as mine:
        expected, gap = plainly(mine, "Once", 12)
        assert gap > 1e-4 and mine("Once", max_tokens=12).tokens == expected
        assert mine("Once", max_tokens=12).tokens != lm("Once", max_tokens=12).tokens
    with ji.load(tiny_path, graph=decoder, **how) as same:
        assert same("Once", max_tokens=12).tokens == lm("Once", max_tokens=12).tokens


def test_kernels_are_forced_where_they_are_named_and_nowhere_else(tiny_path, lm):
    with ji.load(tiny_path, **HOW, kernels={"attend": "reference"}) as other:
        assert other("Once", max_tokens=8).tokens == lm("Once", max_tokens=8).tokens
        chosen = [entry.kernels for entry in other.ledger if "attend" in entry.kernels]
    assert chosen and all(c["attend"] == "reference" and c["matmul"] == "two_rows" for c in chosen)
    assert {entry.kernels["attend"] for entry in lm.ledger if "attend" in entry.kernels} == {"visits"}


def test_a_kernel_for_some_calls_serves_those_and_the_ledger_tells(tiny_path, lm):
    decode_only = lambda q, k, v, pages, run, **_: run.longest == 1
    attend.add("mine", ("cpu",), attend.reference, decode_only)
    try:
        with ji.load(tiny_path, **HOW, kernels={"attend": "mine"}) as other:
            other._engine.executables.compile_all(*(Key("forward", b) for b in (buckets.prompt(32), buckets.decode(1))))
            assert other("Once", max_tokens=8).tokens == lm("Once", max_tokens=8).tokens
            chosen = {e.name: e.kernels["attend"] for e in other.ledger if e.hits and "attend" in e.kernels}
        assert chosen == {"forward[T=32,R=1]": "visits", "forward[T=1,R=1]": "mine"}
    finally:
        del attend.fast["mine"]


@pytest.mark.parametrize(("kernels", "message"), [
    ({"attend": "mine"}, "'mine' of attend is for no call in the programs of this model; they take visits$"),
    ({"matmul_fp8": "in_slices"}, "'in_slices' of matmul_fp8 .*; none of them calls matmul_fp8$"),
])
def test_a_kernel_that_would_never_run_is_refused_before_anything_is_loaded(tiny_path, monkeypatch, kernels, message):
    monkeypatch.setattr("jaxinfer.runtime.load.load_params", None)
    attend.add("mine", ("cpu",), attend.reference, lambda *args, **_: False)
    try:
        with pytest.raises(InvalidOption, match=message):
            ji.load(tiny_path, max_context=64, max_rows=1, kernels=kernels)
    finally:
        del attend.fast["mine"]


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"dtype": "float8"}, InvalidOption, "dtype is 'float8'"),
    ({"max_rows": 0}, InvalidOption, "max_rows is 0"),
    ({"max_context": 1}, InvalidOption, "max_context is 1"),
    ({"max_context": 4096}, InvalidOption, "limit is 2048"),
    ({"memory": "lots"}, InvalidOption, "memory is 'lots'"),
    ({"memory": "0GiB"}, InvalidOption, "memory is '0GiB'"),
    ({"device": "abacus"}, InvalidOption, "device is 'abacus'; present here: cpu"),
    ({"graph": 3}, InvalidOption, "graph is a int"),
    ({"graph": lambda config: config}, InvalidOption, "graph made a Config"),
    ({"kernels": "by_page"}, InvalidOption, "kernels is a str"),
    ({"kernels": {"attention": "by_page"}}, InvalidOption, "no op 'attention'; there are attend, "),
    ({"kernels": {"attend": "ragged"}}, InvalidOption, "attend has no 'ragged' on cpu; it has visits, by_page, refer"),
    ({"kernels": {"attend": "visits"}, "batch_invariant": True}, InvalidOption, "batch_invariant needs attend to be"),
    ({"memory": "1MiB"}, OutOfMemory, "MiB for weights.*memory='1MiB' is 1 MiB"),
])
def test_bad_options_are_refused_before_anything_is_loaded(tiny_path, options, error, message):
    with pytest.raises(error, match=message):
        ji.load(tiny_path, **options)


def test_an_unknown_architecture_is_named(tiny_path, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba9"}')
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(tiny_path / name)
    with pytest.raises(UnsupportedModel, match="mamba9"):
        ji.load(tmp_path)


def test_closing_fails_what_runs_and_refuses_what_comes(tiny_path):
    lm = ji.load(tiny_path, **HOW)
    stream = lm.stream("x", max_tokens=1000)
    next(stream)
    lm.close()
    with pytest.raises(Closed):
        list(stream)
    for refused in (lambda: lm("x"), lm.warmup, lambda: lm.generate(["x"])):
        with pytest.raises(Closed):
            refused()
    lm.close()


def test_exit_with_requests_in_flight_does_not_hang(tiny_path):
    script = f"""
import jaxinfer as ji
lm = ji.load({str(tiny_path)!r}, **{HOW!r})
stream = lm.stream("x", max_tokens=1000)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | IN_HASTE, timeout=90, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_ten_models_loaded_and_closed_leave_nothing_behind(tiny_path):
    def once():
        with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
            lm("x", max_tokens=3)

    once()
    gc.collect()
    threads, arrays = threading.active_count(), sum(a.nbytes for a in jax.live_arrays())
    for _ in range(10):
        once()
    gc.collect()
    assert threading.active_count() <= threads
    assert sum(a.nbytes for a in jax.live_arrays()) <= arrays + 1000


@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit])
def test_an_observer_that_raises_harms_nobody(lm, capfd, kind):
    def broken(event):
        raise kind("a watcher's own fault")

    expected = lm("Once", max_tokens=5).tokens
    with events.observe(broken):
        assert lm("Once", max_tokens=5).tokens == expected
    reported = []
    assert eventually(lambda: reported.append(capfd.readouterr().err) or "a watcher's own fault" in "".join(reported))


def test_a_compile_that_failed_is_tried_again(tiny_path):
    with ji.load(tiny_path, **HOW) as lm:
        executables, real = lm._engine.executables, lm._engine.executables.lower
        bucket = executables.ladder.holding(buckets.prompt(32))[0]
        executables.warmup([bucket])
        for key in [key for key in executables._pending if key.shape == bucket]:
            del executables._pending[key], executables._ready[key]
        executables.lower = lambda key: 1 / 0
        with pytest.raises(StepFailed, match="division by zero"):
            lm("Once", max_tokens=5)
        executables.lower = real
        assert len(lm("Once", max_tokens=5).tokens) == 5


def test_a_compile_that_failed_for_a_request_is_tried_again_for_the_next(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
        executables, real = lm._engine.executables, lm._engine.executables.lower
        lm("x", max_tokens=2)
        executables.lower = lambda key: 1 / 0
        for ask in (dict(logprobs=1), dict(logit_bias={5: 1.0}), dict(prompt_logprobs=0)):
            with pytest.raises(RequestFailed, match="could not be compiled: division by zero"):
                lm("Once", max_tokens=3, **ask)
        executables.lower = real
        assert lm("Once", max_tokens=3, logprobs=1, logit_bias={5: 1.0}, prompt_logprobs=0).prompt_logprobs


def test_users_functions_that_come_at_once_leave_no_more_programs_than_are_kept(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
        answers = [lm.submit("x", max_tokens=2, logits=lambda logits_V, _, i=i: logits_V + i) for i in range(40)]
        assert {len(answer.result(60).tokens) for answer in answers} == {2}
        lm("x", max_tokens=2, logits=lambda logits_V, _: logits_V)
        assert sum(key.kind == "logits" for key in lm._engine.executables._ready) <= MOST_FUNCTIONS


def test_what_a_request_needs_is_compiled_before_it_is_admitted(tiny_path):
    """In every bucket that a step of it can run in: its neighbours never wait for it."""
    with ji.load(tiny_path, **HOW) as lm:
        lm.generate(["a", "b", "c", "d"], max_tokens=12)
        compiled = []
        hear = lambda e: compiled.append((e.name, threading.current_thread().name)) \
            if isinstance(e, events.Compiling | events.Missed) else None
        with events.observe(hear):
            lm.generate(["a", "b", "c", "d"], max_tokens=12, logprobs=1, logit_bias={5: 1.0},
                        logits=lambda logits_V, _: logits_V)
        assert {"logits", "edited", "logprobs"} <= {name.split("[")[0] for name, _ in compiled}
        assert not [c for c in compiled if c[1] == "jaxinfer-engine"]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_several_steps_in_one_call_are_seen_as_so_many_steps(lm, temperature, monkeypatch):
    monkeypatch.setattr("jaxinfer.runtime.engine.TOGETHER", 60.0)  # however slow this machine is now
    lm.warmup()
    kind = "steps" if temperature else "greedy_steps"
    how = [ji.Sampling(max_tokens=40 + i, temperature=temperature, seed=i, ignore_eos=True) for i in range(4)]
    calls = lambda: sum(e.hits for e in lm.ledger if e.name.startswith(f"{kind}["))
    together, asked = calls(), [[9 + i] * 9 for i in range(4)]
    many = lm.generate(asked, how)
    assert (together := calls() - together) >= 4, "no call drew several tokens: nothing was tested"
    monkeypatch.setattr("jaxinfer.runtime.engine.TOGETHER", 0.0)
    before = calls()
    single = lm.generate(asked, how)
    assert calls() == before
    assert [(o.tokens, o.text, o.finish_reason) for o in many] == [(o.tokens, o.text, o.finish_reason) for o in single]


def test_the_next_step_leaves_before_the_one_before_it_is_read_back(lm, monkeypatch):
    monkeypatch.setattr("jaxinfer.runtime.engine.TOGETHER", 0.0)
    lm.warmup()
    engine, log = lm._engine, []
    dispatch, commit = engine._dispatch, engine._commit
    monkeypatch.setattr(engine, "_dispatch", lambda plan: (log.append(("out", plan.number)), dispatch(plan))[1])
    monkeypatch.setattr(engine, "_commit", lambda flight: (log.append(("in", flight.plan.number)), commit(flight)))
    lm.generate(PROMPTS[:4], max_tokens=30, ignore_eos=True)
    ahead = [n for kind, n in log if kind == "in" and ("out", n + 1) in log[: log.index(("in", n))]]
    assert len(ahead) >= sum(kind == "in" for kind, _ in log) - 2, log


def watch(owner, name, monkeypatch):
    """What a method returns from now on."""
    seen, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (seen.append(method(*args)), seen[-1])[1])
    return seen


def test_a_prompt_is_read_beside_decode_rows_where_attention_can_mix(windowed_path, windowed, monkeypatch):
    """As on a GPU or a TPU, whose attention says so. Of this model's layers one sees all, and two through a window."""
    monkeypatch.setattr("jaxinfer.kernels.chunks", lambda platform: 1)
    with ji.load(windowed_path, max_context=256, max_rows=2) as mixed:
        plans = watch(mixed._engine.scheduler, "plan", monkeypatch)
        outputs = mixed.generate([PROMPTS[0], [5] * 200, *PROMPTS[1:]], max_tokens=24, logprobs=0, ignore_eos=True)
        assert any(plan and plan.singles and len(plan.ids) > plan.singles for plan in plans), "nothing was mixed"
    for output in outputs:
        alone = windowed(output.prompt_tokens, max_tokens=24, logprobs=0, ignore_eos=True)
        ours, theirs = ([t.logprob for t in o.logprobs] for o in (output, alone))
        assert output.tokens == alone.tokens
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_model_that_is_dropped_is_closed(tiny_path):
    lm = ji.load(tiny_path, **HOW)
    lm("x", max_tokens=2)
    thread = lm._engine._thread
    del lm
    gc.collect()
    assert eventually(lambda: not thread.is_alive())


def test_a_request_that_needs_the_other_sampler_borrows_it_too(tiny_path):
    with ji.load(tiny_path, max_context=256, max_rows=4) as lm:
        lm._engine.executables.warmup([buckets.prompt(32), buckets.decode(4)])
        lm.generate(["x", "y"], max_tokens=4, temperature=0.5, seed=1)
        assert lm.ledger["sample[R=4]"].hits > 0


def test_each_platform_gets_its_own_trace(tiny_path, lm):
    run = Run(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (3,), (2,), (2,))),
              {g.name: jax.ShapeDtypeStruct((2, 1), jnp.int32) for g in lm.graph.groups}, 1)
    pages = {g.name: [init_pages(2, 64, g.kv_heads, g.head_width, jnp.float32)] * g.layers for g in lm.graph.groups}
    for platform, expected in (("cpu", "two_rows"), ("tpu", "reference"), ("cpu", "two_rows")):
        with tracing(platform) as traced:
            jax.jit(lambda *a: forward(lm.graph, *a)).lower(lm.params, pages, jnp.zeros(2, jnp.int32), run)
        assert traced.chosen["matmul"] == expected and "attend" in traced.chosen
