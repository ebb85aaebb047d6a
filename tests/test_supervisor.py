"""Supervision: a thread that dies or stands still is noticed, another goes on, and who only waited is served."""

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.errors import StepFailed
from jaxinfer.runtime import supervisor
from jaxinfer.runtime.supervisor import DEAD, MOST, Supervisor
from tests import tiny
from tests.running import all_free, blocked, eventually, hooked, seen_events

pytestmark = pytest.mark.usefixtures("in_haste")


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **tiny.ALONE) as lm:
        yield lm


@contextmanager
def supervised(model):
    """The model is looked after."""
    watching = Supervisor(lambda: [("tiny", model)])
    watching.start()
    try:
        assert eventually(lambda: all(heart.supervised for heart in model.hearts))
        yield watching
    finally:
        watching.close()


@pytest.fixture
def impatient(monkeypatch):
    """What has not got on for 0.4 s stands still."""
    monkeypatch.setattr(supervisor, "LEAST", 0.4)
    monkeypatch.setattr(supervisor, "UNKNOWN", 0.4)


# What is decided, by a clock of our own.


@dataclass(eq=False)
class Thread:
    """A heart of which the test says everything."""

    pulse: object = None
    alive: bool = True
    compiling: bool = False
    takes: float | None = 0.01
    supervised: bool = False
    revived: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)

    def supervise(self, on):
        self.supervised = on

    def usual(self, pulse):
        return self.takes

    def revive(self, pulse, why):
        self.revived.append(why)
        return True

    def give_up(self, why):
        self.given_up.append(why)


@pytest.fixture
def watched(monkeypatch):
    """A thread, its model, and `look(seconds)`: its supervisor looks at it for so long, five times a second."""
    thread, clock = Thread(), SimpleNamespace(now=100.0)
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock.now))
    model = SimpleNamespace(hearts=[thread], closed=False)
    watching = Supervisor(lambda: [("model", model)])

    def look(seconds, pause=0.2):
        for _ in range(round(seconds / pause)):
            clock.now += pause
            watching.look()

    look(0.2)
    return thread, model, watching, look


def test_a_thread_stands_still_after_ten_times_what_is_usual_and_five_seconds_at_least(watched):
    thread, model, watching, look = watched
    thread.pulse = object()
    look(4.8)
    assert not thread.revived and watching.trouble(model) is None
    look(0.4)
    assert len(thread.revived) == 1 and "has not got on for 5.0 s" in thread.revived[0]
    assert watching.trouble(model) is None  # the other thread serves from here on, not from the next look
    thread.pulse, thread.takes = object(), 1.0
    look(9.6)
    assert len(thread.revived) == 1 and watching.trouble(model) is None
    look(1.0)
    assert len(thread.revived) == 2


def test_a_thread_is_supervised_until_the_last_of_its_supervisors_ends(watched):
    thread, model, watching, _ = watched
    other = Supervisor(lambda: [("model", model)])
    other.look()
    watching.close()
    assert thread.supervised
    other.close()
    assert not thread.supervised


def test_what_is_not_known_gets_a_minute(watched):
    thread, _, _, look = watched
    thread.pulse, thread.takes = object(), None
    look(59)
    assert not thread.revived
    look(2)
    assert thread.revived


def test_a_thread_that_gets_on_or_idles_or_waits_for_a_compile_does_not_stand_still(watched):
    thread, _, _, look = watched
    for _ in range(10):
        thread.pulse = object()
        look(3)
    thread.pulse = None
    look(100)
    thread.pulse, thread.compiling = object(), True
    look(100)
    thread.compiling = False
    look(4.6)
    assert not thread.revived
    look(1)
    assert thread.revived


def test_time_in_which_the_process_did_not_run_does_not_count(watched):
    thread, _, _, look = watched
    thread.pulse = object()
    look(1000, pause=100)
    assert not thread.revived


def test_a_thread_that_dies_again_and_again_is_given_up(watched):
    thread, model, watching, look = watched
    thread.alive = False
    look(0.2 * MOST)
    assert thread.revived == [DEAD] * MOST and not watching.hopeless(model) and not thread.given_up
    look(0.2)
    assert watching.hopeless(model) and len(thread.given_up) == 1 and "3 times" in watching.trouble(model)
    look(2)
    assert len(thread.given_up) == 1


def test_a_thread_that_dies_now_and_then_is_not_given_up(watched):
    thread, model, watching, look = watched
    for _ in range(3 * MOST):
        thread.alive = False
        look(0.2)
        thread.alive = True
        look(300, pause=1.0)
    assert len(thread.revived) == 3 * MOST and not watching.hopeless(model)


# The engine.


def ask(lm, text="ab"):
    return lm.submit(text, max_tokens=4, ignore_eos=True, reuse=False)


def test_an_engine_that_dies_fails_who_ran_and_serves_who_waited(lm):
    expected = ask(lm).result().tokens
    before = lm._engine
    with supervised(lm), seen_events(events.Stopped) as stops:
        with blocked(lm):
            waiting = ask(lm)
            running = next(iter(lm._engine.scheduler.sequences.values()))
            before._post(lambda: 1 / 0)
            late = ask(lm)  # behind what kills it
        assert waiting.result(60).tokens == late.result(60).tokens == expected
        assert eventually(lambda: stops)
    assert stops == [events.Stopped("tiny", DEAD, True)]
    assert running.ended is not None and lm._engine is not before and not before.alive
    assert ask(lm).result().tokens == expected and eventually(lambda: all_free(lm))


def test_the_caller_of_what_ran_in_a_dying_engine_is_told_why(lm):
    with supervised(lm), hooked(lm, dying := Once(lambda: lm._engine._post(lambda: 1 / 0))):
        with pytest.raises(StepFailed, match=f"the engine stopped while this request was in it: {DEAD}") as failed:
            lm("ab", max_tokens=100, ignore_eos=True, reuse=False)
        assert dying.done and isinstance(failed.value.__cause__, ZeroDivisionError)


class Once:
    """A hook that does something in the first step, and nothing afterwards."""

    def __init__(self, act):
        self.act, self.done = act, False

    def __call__(self, key):
        if not isinstance(key.shape, int) and not self.done:
            self.done = True
            self.act()


def test_an_engine_that_stands_still_is_replaced_and_disturbs_nobody_when_it_gets_on(lm, impatient):
    expected = ask(lm).result().tokens
    before, go = lm._engine, threading.Event()
    with supervised(lm), hooked(lm, stuck := Once(lambda: go.wait(60))):
        running = ask(lm)
        assert eventually(lambda: stuck.done)
        waiting = ask(lm)
        assert waiting.result(60).tokens == expected
        with pytest.raises(StepFailed, match="has not got on for"):
            running.result(60)
        assert lm._engine is not before and before.alive
        answers = [ask(lm) for _ in range(3)]
        go.set()
        assert eventually(lambda: not before.alive)
        assert [answer.result(60).tokens for answer in answers] == [expected] * 3
    assert eventually(lambda: all_free(lm)) and not before.died


def test_an_engine_that_stands_still_while_it_decides_takes_all_it_knew_with_it(lm, monkeypatch, impatient):
    expected, before, go = ask(lm).result().tokens, lm._engine, threading.Event()
    plan, held = before.scheduler.plan, threading.Event()

    def hang(*args):
        held.set()
        go.wait(60)
        return plan(*args)

    monkeypatch.setattr(before.scheduler, "plan", hang)
    with supervised(lm):
        lost = [ask(lm)]
        assert held.wait(60)
        late = ask(lm)  # not in the books yet
        with pytest.raises(StepFailed):
            lost[0].result(60)
        assert late.result(60).tokens == ask(lm).result(60).tokens == expected
        go.set()
        assert eventually(lambda: not before.alive)
        assert ask(lm).result(60).tokens == expected
    assert eventually(lambda: all_free(lm))


def test_books_that_killed_their_engine_are_begun_anew(lm, monkeypatch):
    expected, before = ask(lm).result().tokens, lm._engine
    with supervised(lm):
        with blocked(lm):
            waiting = ask(lm)
            monkeypatch.setattr(before.scheduler, "rewind", lambda *_: 1 / 0)
            before._post(lambda: 1 / 0)
        with pytest.raises(StepFailed):
            waiting.result(20)
        assert ask(lm).result(20).tokens == expected and lm._engine.scheduler is not before.scheduler
    assert eventually(lambda: all_free(lm))


def test_closing_while_nobody_has_taken_over_tells_who_waits(tiny_path):
    with ji.load(tiny_path, **tiny.ALONE) as lm:
        lm._engine.supervised = True  # and nobody looks
        with blocked(lm):
            waiting = ask(lm)
            lm._engine._post(lambda: 1 / 0)
        assert eventually(lambda: not lm._engine.alive)
    with pytest.raises(ji.JaxinferError, match="closed"):
        waiting.result(5)


def test_a_slow_compile_is_no_standstill(lm, impatient):
    before, real = lm._engine, lm._engine.executables.lower
    executables = lm._engine.executables

    def slow(key):
        time.sleep(1.0)
        return real(key)

    executables.lower = slow
    try:
        with supervised(lm), seen_events(events.Stopped) as stops:
            key = next(key for key in tuple(executables._pending) if key.kind == "forward")
            executables.keep_only(lambda other: other.kind != "forward")
            assert key not in executables._pending
            assert len(ask(lm).result(60).tokens) == 4
    finally:
        executables.lower = real
    assert not stops and lm._engine is before


def test_the_ledger_says_how_long_steps_take(lm):
    ask(lm).result()
    used = [entry for entry in lm.ledger if entry.hits and entry.name.startswith(("forward", "greedy_steps"))]
    assert used and all(0 < entry.usual < 60 for entry in used)


# Endpoints.


def test_an_endpoint_that_stands_still_fails_that_batch_and_serves_who_waited(impatient):
    go, calls = threading.Event(), []
    with ji.endpoint(lambda x: x + 1, example=np.float32(0), max_batch=1) as f:
        assert f(1.0) == 2.0
        collect = f._work.collect

        def hang(flight):
            calls.append(flight)
            if len(calls) == 1:
                go.wait(60)
            return collect(flight)

        f._work.collect, thread = hang, f._runner._thread
        with supervised(f):
            stuck = f.submit(1.0)
            assert eventually(lambda: calls)
            later = [f.submit(float(i)) for i in range(5)]
            with pytest.raises(StepFailed, match="has not got on for"):
                stuck.result(60)
            assert [reply.result(60) for reply in later] == [1.0, 2.0, 3.0, 4.0, 5.0]
            go.set()
            assert eventually(lambda: not thread.is_alive()) and f(7.0) == 8.0


def test_an_endpoint_whose_thread_dies_goes_on():
    with ji.endpoint(lambda x: x + 1, example=np.float32(0)) as f, supervised(f):
        assert f(1.0) == 2.0
        f._runner._post(lambda: 1 / 0)
        assert eventually(lambda: not f._runner.busy) and f(2.0) == 3.0
