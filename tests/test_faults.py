"""What goes wrong around a server harms no more than it must: readers, disks, clocks, engines, the process itself."""

import json
import logging
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx2
import pytest

import jaxinfer as ji
from jaxinfer import events as told
from jaxinfer.serving import command
from jaxinfer.serving.dashboard import state
from tests.running import all_free, at_rest, blocked, eventually, free_port
from tests.serving import Command, client, events

pytestmark = pytest.mark.usefixtures("in_haste")

ASK = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
LONG = ASK | {"max_tokens": 1500, "stream": True}
YEAR = 365 * 86400.0


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, max_context=2048, max_rows=1) as lm:
        yield lm


@pytest.fixture(autouse=True)
def nothing_is_left(lm):
    yield
    assert eventually(lambda: at_rest(lm)), "something runs on"


@contextmanager
def serving(lm, **settings):
    with ji.serve({"tiny": lm}, port=0, **settings) as server, client(server) as http:
        assert eventually(lambda: lm.hearts[0].supervised)
        yield server, http


@contextmanager
def streaming(http, **more):
    """A stream that has begun: the rest of its events."""
    with http.stream("POST", "/v1/completions", json=LONG | more) as response:
        parts = events(response)
        next(parts)
        yield parts


def ending(parts) -> dict:
    """The last chunk of a stream, or the error that it ended with."""
    *_, last, done = [data for _, data in parts]
    assert done == "[DONE]"
    return json.loads(last)


# --- clients ---


def test_a_reader_that_stops_gives_its_pages_back(lm, caplog):
    with serving(lm, stall_timeout=0.3) as (server, http), caplog.at_level(logging.INFO, "jaxinfer.serving"):
        server._sockets[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)  # the kernel would, too
        server._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # that little the kernel keeps for it
        host, port = server.url.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            body = json.dumps(LONG | {"logprobs": 5}).encode()
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
            assert eventually(lambda: server.site.running)
            assert eventually(lambda: not server.site.running and all_free(lm))
        assert "the client took nothing for" in caplog.text
        assert http.post("/v1/completions", json=ASK).status_code == 200


# --- models and engines ---


def test_whatever_is_wrong_with_a_model_the_others_are_loaded(lm, monkeypatch, capfd):
    def load(source, **options):
        if source == "broken":
            raise RuntimeError("XLA fell over")
        return lm

    monkeypatch.setattr(command.Server, "load", lambda self, name, source: self.site.load(name, lambda: load(source)))
    said, ready = [], []
    with ji.serve(ji.Registry(), port=0) as server, client(server) as http:
        command._load(server, {"first": "broken", "tiny": "whole"}, {}, said.append, ready)
        assert ready == ["tiny"] and said[0] == "error: first could not be loaded: XLA fell over"
        models = http.get("/readyz").json()["models"]
        assert models["tiny"]["ready"] and "XLA fell over" in models["first"]["reason"]
        assert http.post("/v1/completions", json=ASK).status_code == 200
        assert http.post("/v1/completions", json=ASK | {"model": "first"}).status_code == 503
        server.site.loaded.clear()  # the model is the test's
    assert "RuntimeError" in capfd.readouterr().err


def test_an_engine_killed_under_load_fails_who_ran_and_serves_who_waited(lm):
    expected = lm("Hello", max_tokens=8, ignore_eos=True).text
    with serving(lm) as (_, http), ThreadPoolExecutor(8) as pool, streaming(http) as running:
        waiting = [pool.submit(http.post, "/v1/completions", json=ASK) for _ in range(8)]
        assert eventually(lambda: lm.stats.waiting == 8)
        lm._engine._post(lambda: 1 / 0)
        assert ending(running)["error"]["type"] == "server_error"
        assert [answer.result(60).json()["choices"][0]["text"] for answer in waiting] == [expected] * 8
        assert eventually(lambda: http.get("/readyz").status_code == 200)


# --- disks ---


@contextmanager
def full_disk():
    """A file that takes nothing, as one of a log on a disk that is full."""
    file = open("/dev/full", "w", buffering=1)  # noqa: SIM115  # closing it fails too
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


def test_a_full_disk_behind_the_log_fails_no_request(lm, monkeypatch):
    def observer(event):
        raise ZeroDivisionError

    def complains(piece):
        raise ZeroDivisionError

    with full_disk() as full:
        monkeypatch.setattr(sys, "stderr", full)
        with pytest.raises(OSError, match="No space left"):
            print("it is full", file=sys.stderr)
        with serving(lm, json_logs=True) as (_, http), told.observe(observer):
            for _ in range(3):
                assert http.post("/v1/completions", json=ASK).status_code == 200
            assert http.post("/v1/completions", json=ASK | {"temperature": 9}).status_code == 400
            with pytest.raises(ZeroDivisionError):
                lm.submit("ab", max_tokens=2, on_piece=complains).result(60)
            lm.submit("ab", max_tokens=1).add_done_callback(complains)
            before = lm._engine
            before._post(lambda: 1 / 0)
            assert eventually(lambda: lm._engine is not before)
            assert http.post("/v1/completions", json=ASK).status_code == 200
        monkeypatch.undo()


ENDLESS = """import time
from jaxinfer.compiler.executables import Executables
lower = Executables.lower
Executables.lower = lambda self, key: (key.kind == "logprobs" and time.sleep(1000)) or lower(self, key)"""


def test_the_command_serves_with_a_log_that_takes_nothing_and_ends_in_the_middle_of_a_compile(tiny_path):
    with full_disk() as full:
        server = Command(f"tiny={tiny_path}", "--max-context", "128", "--max-rows", "1", port=free_port(), log=full,
                         first=ENDLESS)
    with client(server.url) as http:
        assert eventually(lambda: ready(http), seconds=120)
        assert http.post("/v1/completions", json=ASK).status_code == 200
        server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0


def ready(http) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx2.ConnectError:
        return False


# --- clocks ---


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_a_clock_that_is_set_neither_ends_nor_lengthens_anything(jump, lm, monkeypatch):
    real, real_ns, jumped = time.time, time.time_ns, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + jumped)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(jumped * 1e9))
    with serving(lm, request_timeout=30, keep_alive=60) as (server, http):
        with blocked(lm):
            patient = lm.submit(ji.Request("ab", ji.Sampling(max_tokens=2), queue_timeout=30))
            begun = time.monotonic()
            hurried = lm.submit(ji.Request("ab", ji.Sampling(max_tokens=2), queue_timeout=1.0))
            jumped = jump
            with pytest.raises(ji.JaxinferError, match="queue_timeout"):
                hurried.result(20)
            assert 0.9 < time.monotonic() - begun < 10
        assert len(patient.result(20).tokens) == 2
        with streaming(http, max_tokens=300) as parts:
            jumped = -jump
            assert ending(parts)["choices"][0]["finish_reason"] == "length"
        created = http.post("/v1/completions", json=ASK).json()["created"]
        assert abs(created - time.time()) < 60, "what is shown follows the clock"
        shown = state(server.site)
        assert 0 <= shown["time"] - shown["since"] < 600
        record = server.site.record.models["tiny"]
        for name in ("queue_seconds", "request_seconds", "first_token_seconds", "inter_token_seconds"):
            assert all(0 <= seconds < 60 for seconds in record.last.get(name, ())), name
        assert http.get("/readyz").status_code == 200


# --- the process ---


def test_what_is_not_done_when_the_grace_is_over_ends_with_an_error(tiny_path):
    with (ji.serve({"tiny": tiny_path}, port=0, load=dict(max_context=2048, max_rows=1)) as server,
          client(server) as http, ThreadPoolExecutor(1) as pool, streaming(http, n=99) as parts):
        waiting = pool.submit(http.post, "/v1/completions", json=ASK)
        assert eventually(lambda: server.site.running == 2)
        server.close(0.2)
        assert ending(parts)["error"]["code"] == "model_closed"
        assert waiting.result(20).status_code == 503 and not server.site.running


def test_nothing_accepted_is_lost_when_a_server_closes_under_load(lm):
    with serving(lm) as (server, http), ThreadPoolExecutor(9) as pool, streaming(http) as parts:
        waiting = [pool.submit(http.post, "/v1/completions", json=ASK) for _ in range(8)]
        assert eventually(lambda: lm.stats.waiting == 8)
        closing = pool.submit(server.close)
        assert eventually(lambda: server.site.draining)
        assert http.post("/v1/completions", json=ASK).status_code == 503
        assert ending(parts)["choices"][0]["finish_reason"] == "length"
        assert [answer.result(60).json()["usage"]["completion_tokens"] for answer in waiting] == [8] * 8
        closing.result(30)


def test_killed_and_started_again_it_is_ready_in_seconds_on_the_same_port(tiny_path, tmp_path):
    how = f"tiny={tiny_path}", "--max-context", "64", "--max-rows", "1"
    where = {"JAXINFER_CACHE": str(tmp_path), "JAXINFER_CACHE_GB": "1"}
    server = Command(*how, **where)
    server.wait_for("tiny is ready")
    with client(server.url) as http:
        expected = http.post("/v1/completions", json=ASK).json()["choices"][0]["text"]
        assert eventually(lambda: len(list((tmp_path / "programs").iterdir())) >= 6, seconds=120)
        with pytest.raises(httpx2.HTTPError), streaming(http, max_tokens=59) as parts:
            os.kill(server.process.pid, signal.SIGKILL)
            list(parts)
            raise httpx2.ReadError("all of it was in the socket already")
    assert server.end() == -signal.SIGKILL
    again = Command(*how, port=int(server.url.rpartition(":")[2]), **where)
    seconds = float(again.wait_for(r"tiny is ready, after ([\d.]+) s")[1])
    assert again.url == server.url and seconds < 30
    assert re.findall(r"compile (forward\S+): disk", again.said), "it is traced and compiled anew"
    with client(again.url) as http:
        assert http.post("/v1/completions", json=ASK).json()["choices"][0]["text"] == expected
    again.process.send_signal(signal.SIGTERM)
    assert again.end() == 0
