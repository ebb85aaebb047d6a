"""Who may wait, who goes first, and how a request that is not wanted any more ends."""

import gc
import threading
import time
from concurrent.futures import CancelledError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.errors import Closed, Expired, InvalidRequest, Rejected
from jaxinfer.runtime import language
from jaxinfer.runtime.delivery import Ticket
from tests import tiny
from tests.running import all_free, blocked, endings, eventually, held, hooked

pytestmark = pytest.mark.usefixtures("in_haste")

WAITING, TOKENS = 4, 100


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET, max_waiting=WAITING, max_waiting_tokens=TOKENS) as lm:
        lm("x", max_tokens=2)
        yield lm


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "lm" in request.fixturenames:
        lm = request.getfixturevalue("lm")
        assert eventually(lambda: all_free(lm)), "pages or places in the queue leaked"
        assert eventually(lambda: not lm._delivery._tickets), "tickets leaked"


# A bounded queue.


def test_one_request_too_many_is_rejected_at_once_with_the_queue_and_when_to_try_again(lm):
    with endings() as ended, blocked(lm):
        answers = [lm.submit("x", max_tokens=1) for _ in range(WAITING)]
        start = time.perf_counter()
        with pytest.raises(Rejected, match="4 requests of 4 tokens wait, and max_waiting=4") as caught:
            lm.submit("x", max_tokens=1)
        assert time.perf_counter() - start < 1, "a rejection waited for something"
        assert caught.value.queue_length == lm.stats.waiting == WAITING and caught.value.retry_after > 0
        assert [e.reason for e in ended] == ["rejected"] and ended[0].prompt_tokens == 1
    assert [len(answer.result(30).tokens) for answer in answers] == [1] * WAITING
    assert len(lm("x", max_tokens=1).tokens) == 1, "there is room again"


def test_that_there_is_no_room_is_told_before_a_prompt_is_read(lm):
    with endings() as ended, blocked(lm):
        answers = [lm.submit("x", max_tokens=1) for _ in range(WAITING - 1)]
        lm.check_room()
        answers.append(lm.submit("x", max_tokens=1))
        with pytest.raises(Rejected, match="4 requests of 4 tokens wait, and max_waiting=4") as caught:
            lm.check_room()
        assert caught.value.retry_after > 0 and [e.reason for e in ended] == ["rejected"]
    assert [len(answer.result(30).tokens) for answer in answers] == [1] * WAITING


def test_too_many_waiting_tokens_are_rejected_too(lm):
    with blocked(lm):
        answers = [lm.submit([7] * 60, max_tokens=1)]
        with pytest.raises(Rejected, match="max_waiting_tokens=100") as caught:
            lm.submit([7] * 41, max_tokens=1)
        assert caught.value.queue_length == 1 and caught.value.retry_after > 0 and lm.stats.waiting_tokens == 60
        answers.append(lm.submit([7] * 40, max_tokens=1))
    assert [len(answer.result(30).tokens) for answer in answers] == [1, 1]


def test_samples_take_a_place_each_and_all_of_them_or_none(lm):
    with blocked(lm):
        answer = lm.submit("x", n=3, max_tokens=1)
        with pytest.raises(Rejected):
            lm.submit("x", n=2, max_tokens=1)
        assert lm.stats.waiting == 3
        last = lm.submit("x", max_tokens=1)
    assert len(answer.result(30).samples) == 3 and last.result(30)


def test_an_empty_queue_takes_what_is_larger_than_itself(lm):
    assert len(lm([7] * (TOKENS + 50), max_tokens=1).tokens) == 1
    assert len(lm("x", n=WAITING + 2, max_tokens=1).samples) == WAITING + 2


def test_more_prompts_than_the_queue_holds_wait_for_room(lm):
    prompts = [[5 + i, 6] for i in range(5 * WAITING)]
    outputs = lm.generate(prompts, max_tokens=2)
    assert [o.prompt_tokens for o in outputs] == [tuple(p) for p in prompts]
    assert len(lm.score(prompts)) == len(prompts)


@pytest.mark.parametrize("name", ["timeout", "queue_timeout"])
def test_waiting_for_room_is_waiting(lm, name):
    with endings() as ended, blocked(lm):
        answers = [lm.submit("x", max_tokens=1) for _ in range(WAITING)]
        start = time.perf_counter()
        with pytest.raises(Expired, match="no room in the queue"):
            lm.generate("y", max_tokens=1, **{name: 0.2})
        assert 0.15 < time.perf_counter() - start < 5
        assert [e.reason for e in ended] == ["expired"]
    assert all(answer.result(30) for answer in answers)


def test_who_waits_for_room_gets_it_in_order_and_nobody_slips_past(lm):
    """Else small requests could keep a large one out for ever."""
    done = []
    ask = lambda prompt: done.append(lm.generate([prompt], max_tokens=1)[0].prompt_tokens)
    with blocked(lm):
        answers = [lm.submit([7] * 30, max_tokens=1) for _ in range(2)]
        large, small = (threading.Thread(target=ask, args=(p,)) for p in ([8] * 90, [9]))
        large.start()
        assert eventually(lambda: len(lm._engine.queue._line) == 1)
        small.start()
        assert eventually(lambda: len(lm._engine.queue._line) == 2), "the small one went past the large one"
        with pytest.raises(Rejected):
            lm.submit([9], max_tokens=1)
    for thread in (large, small):
        thread.join(60)
    assert sorted(map(len, done)) == [1, 90] and all(answer.result(30) for answer in answers)


def test_waiting_for_room_ends_when_the_model_is_closed(tiny_path):
    lm = ji.load(tiny_path, **tiny.ONE_BUCKET, max_waiting=1)
    with held(lm) as stopped:
        running = lm.submit("x", max_tokens=100)
        assert stopped.wait(60)
        waiting, told = lm.submit("y", max_tokens=1), []

        def ask():
            with pytest.raises(Closed):
                lm.generate(["z", "z"], max_tokens=1)
            told.append(True)

        asker = threading.Thread(target=ask)
        asker.start()
        closer = threading.Thread(target=lm.close)
        closer.start()
    asker.join(30)
    closer.join(30)
    assert told == [True]
    for answer, text in ((running, "x"), (waiting, "y")):
        assert isinstance(answer.exception(30), Closed)
        assert answer.exception().output.prompt_tokens == tuple(lm.tokenizer.encode(text)), "errors are not shared"


@pytest.mark.parametrize("point", ["queue.enter", "submit"])
def test_a_request_that_slips_in_while_the_model_closes_ends_as_well(tiny_path, point):
    lm = ji.load(tiny_path, **tiny.ONE_BUCKET)
    *path, name = point.split(".")
    owner = lm._engine.queue if path else lm._engine
    real = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: (real(*a, **k), lm.close()))
    with endings() as ended:
        answer = lm.submit("x", max_tokens=1)
        assert isinstance(answer.exception(30), Closed)
    assert [e.reason for e in ended] == ["failed"]


# Who goes first.


def began(lm, *asked):
    """The order in which requests that waited together began to be read."""
    engine, order = lm._engine, []
    with blocked(lm):
        answers = [lm.submit([5 + i], max_tokens=1, **how) for i, how in enumerate(asked)]
        tell = engine.tell
        engine.tell = lambda news: (order.extend(s.tokens[0] - 5 for s in news.began), tell(news))
    try:
        for answer in answers:
            answer.result(30)
    finally:
        engine.tell = tell
    return order


def test_first_come_first_served_within_a_level_and_lower_levels_first(lm):
    assert began(lm, {}, {}, {}, {}) == [0, 1, 2, 3]
    assert began(lm, {"priority": 1}, {}, {"priority": 1}, {"priority": -3}) == [3, 1, 0, 2]


def test_whoever_has_waited_long_enough_goes_before_a_better_level(lm, monkeypatch):
    monkeypatch.setattr(language, "AGEING", 0.05)
    engine, order = lm._engine, []
    with blocked(lm):
        old = lm.submit([5], max_tokens=1, priority=2)
        time.sleep(0.2)
        new = [lm.submit([6 + i], max_tokens=1, priority=i) for i in range(3)]
        tell = engine.tell
        engine.tell = lambda news: (order.extend(s.tokens[0] - 5 for s in news.began), tell(news))
    try:
        for answer in (old, *new):
            answer.result(30)
    finally:
        engine.tell = tell
    assert order == [0, 1, 2, 3]


# Deadlines.


def test_a_queue_timeout_fires_while_a_step_is_still_running(lm):
    with endings() as ended, blocked(lm):
        start = time.perf_counter()
        answer = lm.submit("xy", max_tokens=1, queue_timeout=0.05)
        with pytest.raises(Expired, match=r"queue_timeout of 0\.05 s is over: its prompt had not begun") as caught:
            answer.result(30)
        assert 0.04 < time.perf_counter() - start < 5
        output = caught.value.output
        assert (output.finish_reason, output.text, output.tokens) == ("expired", "", ()) and output.prompt_tokens
        assert [(e.reason, e.prompt_tokens, e.tokens) for e in ended] == [("expired", 2, 0)]


def test_a_queue_timeout_does_not_touch_what_runs(lm):
    slow = lambda key: time.sleep(0.02) if not isinstance(key.shape, int) else None
    with hooked(lm, slow):
        assert len(lm("x", max_tokens=10, ignore_eos=True, queue_timeout=0.1).tokens) == 10


def test_a_timeout_fires_while_a_step_is_still_running_and_brings_what_there_was(lm):
    whole = lm("Once", max_tokens=12, ignore_eos=True)
    go, steps = threading.Event(), []

    def stall(key):
        if not isinstance(key.shape, int):
            steps.append(key)
            if len(steps) == 8:
                go.wait(60)

    with endings() as ended, hooked(lm, stall):
        answer = lm.submit("Once", max_tokens=12, ignore_eos=True, timeout=1.0)
        with pytest.raises(Expired, match="timeout of 1 s is over: it was still running") as caught:
            answer.result(30)
        assert not go.is_set() and isinstance(caught.value, TimeoutError)
        go.set()
    output = caught.value.output
    assert output.finish_reason == "expired" and 0 < len(output.tokens) < 12
    assert output.tokens == whole.tokens[: len(output.tokens)] and output.text and whole.text.startswith(output.text)
    assert [(e.reason, e.tokens) for e in ended] == [("expired", len(output.tokens))]


def test_deadlines_fire_however_busy_the_delivery_is(lm):
    """Its inbox is never empty: every action puts another one in."""
    inbox, busy = lm._delivery._inbox, [True]
    again = lambda: (time.sleep(0.001), inbox.put(again) if busy else None)
    with blocked(lm):
        inbox.put(again)
        try:
            with pytest.raises(Expired):
                lm("x", max_tokens=1, timeout=0.05)
        finally:
            busy.clear()


def test_a_deadline_of_later_holds_no_answer_in_memory(lm):
    lm.generate([[5, 6]] * 20, max_tokens=2, timeout=3600, queue_timeout=3600)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Ticket and o.request.timeout == 3600]


# Cancelling.


def test_what_waits_is_cancelled_at_once_and_leaves_its_place(lm):
    with endings() as ended, blocked(lm):
        answers = [lm.submit("x", max_tokens=1) for _ in range(WAITING)]
        assert answers[1].cancel() and answers[1].cancelled()
        with pytest.raises(CancelledError):
            answers[1].result()
        assert eventually(lambda: [e.reason for e in ended] == ["cancelled"])
    assert [len(answers[i].result(30).tokens) for i in (0, 2, 3)] == [1, 1, 1]


def test_what_has_ended_cannot_be_cancelled(lm):
    answer = lm.submit("x", max_tokens=1)
    output = answer.result(30)
    assert not answer.cancel() and answer.result() is output


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(delays=st.lists(st.floats(0, 0.03), min_size=1, max_size=4), tokens=st.integers(1, 20), n=st.integers(1, 2),
       prompt=st.integers(1, 25))
def test_cancelling_from_another_thread_at_any_moment_ends_a_request_once(lm, delays, tokens, n, prompt):
    with endings() as ended:
        answers = lm_submit(lm, [([5 + i] * prompt, n, tokens) for i in range(len(delays))])
        threads = [threading.Timer(delay, answer.cancel) for delay, answer in zip(delays, answers, strict=True)]
        for thread in threads:
            thread.start()
        for answer in answers:
            try:
                samples = answer.result(30).samples or (answer.result(),)
                assert all(len(o.tokens) == tokens for o in samples)
            except CancelledError:
                pass
        for thread in threads:
            thread.join()
        assert eventually(lambda: all_free(lm) and len(ended) == len(answers))
    assert sorted(e.reason for e in ended) == sorted("cancelled" if a.cancelled() else "length" for a in answers)
    assert len({e.id for e in ended}) == len(ended)


def lm_submit(lm, asked):
    """Submit, however full the queue is."""
    answers = []
    for tokens, n, count in asked:
        assert eventually(lambda n=n: lm.stats.waiting + n <= WAITING)
        answers.append(lm.submit(tokens, n=n, max_tokens=count, ignore_eos=True))
    return answers


# At the door.


def test_what_can_never_fit_is_refused_at_the_door(lm):
    with endings() as ended, pytest.raises(InvalidRequest, match=r"at most 255 fit, with one new token"):
        lm.submit([5] * 256)
    assert not ended
    scheduler, fits = lm._engine.scheduler, lm._engine.scheduler.fits
    scheduler.fits = lambda tokens: tokens <= 128 and fits(tokens)  # as a model with less memory would say
    try:
        with pytest.raises(InvalidRequest, match="100 prompt tokens and 40 new ones need more pages than there are"):
            lm.submit([5] * 100, max_tokens=40)
        assert len(lm([5] * 100, max_tokens=1).tokens) == 1
    finally:
        del scheduler.fits


def test_a_function_that_cannot_be_traced_is_refused_at_the_door(lm):
    def broken(logits_V, context):
        raise KeyError("what was I thinking")

    with endings() as ended, pytest.raises(InvalidRequest, match="broken raised KeyError: 'what was I thinking'"):
        lm.submit("x", logits=broken)
    with pytest.raises(InvalidRequest, match="returned float32 \\[3\\]"):
        lm.submit("x", logits=lambda logits_V, context: logits_V[:3])
    assert not ended
