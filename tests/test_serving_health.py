"""Probes say whether the server lives, has started and can serve, and why not."""

import threading
import time
from functools import partial
from types import SimpleNamespace

import jax
import pytest
from starlette.testclient import TestClient

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.errors import ModelNotFound, OutOfMemory
from jaxinfer.runtime import supervisor
from jaxinfer.serving import health
from jaxinfer.serving.app import public
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Loading
from tests import tiny
from tests.running import blocked, eventually
from tests.watching import site_of

pytestmark = pytest.mark.usefixtures("in_haste")


@pytest.fixture
def served(tiny_path):
    """A site with one model, the model, and a client of its probes."""
    lm = ji.load(tiny_path, **tiny.ALONE, max_waiting=1)
    site = site_of(tiny=lm)
    with TestClient(public(site, [health.part(site)])) as client:
        assert eventually(lambda: all(heart.supervised for heart in lm.hearts))
        yield site, lm, client
    site.registry.close()


def asked(client, path):
    reply = client.get(path)
    body = reply.json()
    assert body["ok"] == (reply.status_code == 200) and reply.status_code in (200, 503)
    return body["ok"], body


def test_readiness_is_of_each_model_with_reasons_and_progress(served):
    site, _, client = served
    assert asked(client, "/readyz") == (True, {"ok": True, "models": {"tiny": {"ready": True, "version": 1}}})
    site.asked = frozenset({"tiny", "other"})
    assert not asked(client, "/startupz")[0], "nothing has begun to load it"
    site.loading["other"] = Loading(time.monotonic() - 3)
    events.emit(events.Progress("load", "somewhere/other", 30, 100))
    ok, body = asked(client, "/readyz")
    assert not ok and body["models"]["tiny"]["ready"] and body["models"]["other"] == {
        "ready": False, "reason": "it is being loaded", "seconds": pytest.approx(3, abs=1),
        "progress": [{"what": "load", "name": "somewhere/other", "done": 30, "total": 100}]}
    assert not asked(client, "/startupz")[0] and asked(client, "/livez")[0]
    assert asked(client, "/readyz?model=tiny")[0] and not asked(client, "/readyz?model=nobody")[0]
    events.emit(events.Progress("load", "somewhere/other", 100, 100))
    assert asked(client, "/readyz")[1]["models"]["other"]["progress"] == []
    site.loading["other"].error = OutOfMemory("it needs 3 GiB")
    ok, body = asked(client, "/readyz")
    assert not ok and body["models"]["other"] == {"ready": False,
                                                 "reason": "it could not be loaded: it needs 3 GiB"}
    assert asked(client, "/startupz")[0], "nothing is coming any more"


def test_what_is_asked_for_later_leaves_the_server_ready(served):
    site, _, client = served
    with pytest.raises(ModelNotFound):
        site.load("typo", lambda: ji.load("no-such-model"))
    ok, body = asked(client, "/readyz")
    assert ok and "could not be loaded" in body["models"]["typo"]["reason"] and asked(client, "/startupz")[0]
    assert not asked(client, "/readyz?model=typo")[0]
    site.registry.load("new", lambda: ji.endpoint(lambda x: x + 1, example=0.0, max_batch=1), label="canary")
    assert asked(client, "/readyz")[0] and asked(client, "/readyz?model=new")[0], "it has no stable version"


def test_while_a_further_model_is_loaded_the_server_is_ready_and_while_the_first_is_it_has_not_started(served):
    site, _, client = served
    begun, go = threading.Event(), threading.Event()

    def make():
        begun.set()
        assert go.wait(60)
        return ji.endpoint(lambda x: x + 1, example=0.0, max_batch=1)

    loading = threading.Thread(target=site.load, args=("new", make))
    loading.start()
    assert begun.wait(30)
    assert asked(client, "/readyz")[0] and asked(client, "/startupz")[0] and not asked(client, "/readyz?model=new")[0]
    site.asked = frozenset({"tiny", "new"})
    assert not asked(client, "/readyz")[0] and not asked(client, "/startupz")[0]
    go.set()
    loading.join()
    assert asked(client, "/readyz?model=new")[0] and asked(client, "/startupz")[0]


def test_progress_of_a_load_that_failed_is_none_of_the_next(served):
    site, _, client = served
    events.emit(events.Progress("download", "half of it", 30, 100))
    site.loading["next"] = Loading(time.monotonic())
    assert asked(client, "/readyz")[1]["models"]["next"]["progress"] == []


def test_where_keys_are_needed_a_probe_tells_no_message():
    with ji.endpoint(lambda x: x + 1, example=0.0, max_batch=1) as f:
        site = site_of(Settings(api_keys=("key",)), f=f)
        f.coming = SimpleNamespace(ended=1.0, failed={"apply[B=2]": "OSError: /home/me is full"}, ready=1, total=2)
        site.loading["other"] = Loading(time.monotonic(), OutOfMemory("/home/me/model needs 3 GiB"))
        with TestClient(public(site, [health.part(site)])) as client:
            models = asked(client, "/readyz")[1]["models"]
    assert models["other"] == {"ready": False, "reason": "it could not be loaded: OutOfMemory"}
    assert models["f"]["programs"]["failed"] == {"apply[B=2]": "OSError"}


def test_a_model_is_being_loaded_until_the_last_of_its_loads_ends(served):
    site, _, _ = served
    begun, go = threading.Event(), [threading.Event(), threading.Event()]

    def make(i):
        begun.set()
        go[i].wait(60)
        return ji.endpoint(lambda x: x + 1, example=0.0, max_batch=1)

    loads = [threading.Thread(target=site.load, args=("twice", partial(make, i))) for i in range(2)]
    loads[0].start()
    assert begun.wait(30)
    first = site.loading["twice"]
    loads[1].start()
    assert eventually(lambda: site.loading["twice"] is not first)
    go[0].set()
    loads[0].join()
    assert "twice" in site.loading
    go[1].set()
    loads[1].join()
    assert "twice" not in site.loading


def test_a_model_is_ready_with_its_first_programs_and_tells_how_many_there_are(served):
    _, lm, client = served
    lm.coming = SimpleNamespace(ready=7, total=42, failed={}, ended=None)
    ok, body = asked(client, "/readyz")
    assert ok and body["models"]["tiny"] == {"ready": True, "version": 1, "programs": {"ready": 7, "total": 42}}
    lm.coming = SimpleNamespace(ready=42, total=42, failed={}, ended=1.0)
    assert "programs" not in asked(client, "/readyz")[1]["models"]["tiny"]
    lm.coming = SimpleNamespace(ready=41, total=42, failed={"forward": "too large"}, ended=1.0)
    assert asked(client, "/readyz")[1]["models"]["tiny"]["programs"]["failed"] == {"forward": "too large"}


def test_a_server_that_stops_or_has_no_model_is_not_ready_and_lives(served):
    site, _, client = served
    site.draining = True
    ok, body = asked(client, "/readyz")
    assert not ok and body["reason"] == "the server is stopping" and asked(client, "/livez")[0]
    site.draining = False
    site.registry.unload("tiny")
    assert asked(client, "/health")[1]["reason"] == "no model is loaded"


def test_a_probe_is_answered_past_a_full_queue_and_leaves_it_alone(served):
    _, lm, client = served
    with blocked(lm):
        waiting = lm.submit("ab", max_tokens=1)
        before = lm.stats
        assert before.waiting == 1
        start = time.monotonic()
        assert all(asked(client, path)[0] for path in ("/livez", "/readyz", "/startupz", "/health") * 5)
        assert lm.stats == before and time.monotonic() - start < 5
        waiting.cancel()


def test_a_dead_thread_fails_readiness_within_a_second_and_life_if_nobody_can_take_over(served, monkeypatch):
    _, lm, client = served
    monkeypatch.setattr(supervisor, "MOST", 0)
    lm._engine._post(lambda: 1 / 0)
    assert eventually(lambda: not lm._engine.alive)
    assert not asked(client, "/readyz")[0], "a probe sees it at once, before the supervisor has looked"
    assert eventually(lambda: not asked(client, "/livez")[0], seconds=5)
    assert "was not started again" in asked(client, "/livez")[1]["models"]["tiny"]["reason"]
    assert not asked(client, "/readyz")[0]


def test_a_dead_thread_is_replaced_and_the_model_is_ready_again(served):
    _, lm, client = served
    expected = lm("ab", max_tokens=3).tokens
    before = lm._engine
    lm._engine._post(lambda: 1 / 0)
    assert eventually(lambda: lm._engine is not before)
    assert eventually(lambda: asked(client, "/readyz")[0]) and lm("ab", max_tokens=3).tokens == expected


def test_an_engine_that_cannot_be_started_again_is_given_up(served, monkeypatch):
    _, lm, client = served
    def full(what): raise jax.errors.JaxRuntimeError("no memory")
    monkeypatch.setattr(lm._engine.executables, "empty", full)
    with blocked(lm):
        waiting = lm.submit("ab", max_tokens=1)
        lm._engine._post(lambda: 1 / 0)
    with pytest.raises(ji.JaxinferError, match="could not be started again: no memory"):
        waiting.result(20)
    assert eventually(lambda: not asked(client, "/livez")[0])
    with pytest.raises(ji.JaxinferError, match="closed"):
        lm("ab")
