"""A server from outside: keys, limits, TLS, what is logged, how it starts and how it stops."""

import asyncio
import json
import logging
import math
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx2
import pytest
from anyio import to_thread
from starlette.routing import Route

import jaxinfer as ji
from jaxinfer.errors import InvalidOption, ModelNotFound
from jaxinfer.serving import app
from jaxinfer.serving.openai.wire import ModelList
from jaxinfer.serving.operations import Events, Operation
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Part
from jaxinfer.serving.threads import OPERATING, WATCHING
from tests import tiny
from tests.running import eventually
from tests.serving import Command, client, events

pytestmark = pytest.mark.usefixtures("in_haste")

TINY = "--max-context", "128", "--max-rows", "1"  # tiny.ALONE


def constant():
    return ji.endpoint(lambda x: x + 1, example=0.0, max_batch=2)


@pytest.fixture
def double():
    with constant() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def http():
    with constant() as endpoint, ji.serve({"double": endpoint}, port=0) as server, client(server) as http:
        yield http


# --- who may ask, and how much ---


def test_keys_open_the_door_and_probes_need_none(double):
    with ji.serve(double, port=0, api_keys=["first", "second"]) as server:
        for key, status in ((None, 401), ("third", 401), ("firs", 401), ("first", 200), ("second", 200)):
            with client(server, key) as http:
                response = http.get("/v1/models")
                assert response.status_code == status
                assert http.get("/livez").json()["ok"]
        assert response.json()["data"]
        with client(server) as http:
            refused = http.get("/v1/models")
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
            assert http.get("/v1/models", headers={"Authorization": "Basic first"}).status_code == 401


def test_pages_of_the_origins_that_are_allowed_may_ask_from_a_browser(double):
    asks = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}
    how = {"api_keys": ("sesame",), "allow_origins": ("https://chat.example",)}
    with ji.serve({"double": double}, port=0, **how) as server, client(server, "sesame") as http:
        allowed = http.options("/v1/chat/completions", headers=asks)
        assert allowed.status_code == 200 and "authorization" in allowed.headers["access-control-allow-headers"]
        assert http.options("/v1/chat/completions", headers=asks | {"Origin": "https://other"}).status_code == 400
        told = http.get("/v1/models", headers={"Origin": "https://chat.example"})
        assert told.status_code == 200 and told.headers["access-control-allow-origin"] == "https://chat.example"
    with ji.serve({"double": double}, port=0) as server, client(server) as http:
        assert "access-control-allow-origin" not in http.get("/v1/models", headers={"Origin": "https://other"}).headers


def test_bodies_are_limited_in_bytes_and_seconds(double):
    with ji.serve(double, port=0, max_body=1000, body_timeout=0.3, max_head=4096) as server, client(server) as http:
        large = b'{"model": "' + b"x" * 1000 + b'"}'
        assert http.post("/tokenize", content=large, headers={"content-type": "application/json"}).status_code == 413
        chunked = http.post("/tokenize", content=iter([large[:600], large[600:]]),
                            headers={"content-type": "application/json"})
        assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"
        host = server.url.removeprefix("http://")
        head = f"POST /tokenize HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
        assert b" 408 " in raw(server, (head + "\r\n{").encode())
        assert b" 431 " in raw(server, head.encode() + b"X-Long: " + b"y" * 9000 + b"\r\n\r\n")
        assert b" 400 " in raw(server, head.encode() + b"X-Endless: " + b"y" * 6000)
        assert http.get("/v1/models").status_code == 200


def raw(server, sent: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


@pytest.mark.parametrize("sent", [
    b"", b"GET /v1/models HTTP/1.1\r\nX: ", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"])
def test_a_connection_without_a_request_is_closed_however_slowly_bytes_come(sent, double):
    with ji.serve(double, port=0, keep_alive=0.5, api_keys=["k"]) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=0.05) as connection, suppress(ConnectionError):
            connection.sendall(sent)
            for _ in range(200):
                with suppress(TimeoutError):
                    if not connection.recv(65536):
                        return
                connection.sendall(b"x" * bool(sent))
            pytest.fail("it was not closed")


def test_a_request_may_take_longer_than_a_connection_without_one(double):
    with ji.serve(double, port=0, keep_alive=0.1, body_timeout=0.5) as server:
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        assert b" 408 " in raw(server, head)


@pytest.mark.parametrize("body, kind, status, code", [
    (b"{", "application/json", 400, "invalid_json"), (b'{"model": 1, }', "application/json", 400, None),
    (b"\xff\xfe", "application/json", 400, "invalid_json"), (b"", "application/json", 400, "invalid_json"),
    (b"[" * 100_000, "application/json", 400, None), (b"[]", "application/json", 400, "invalid_value"),
    (b"null", "application/json; charset=utf-8", 400, "invalid_value"), (b"a=1", "text/plain", 415, None),
    (b'{"model": "\\ud800", "prompt": "x"}', "application/json", 400, None),
    (b'{"model": "m", "prompt": NaN}', "application/json", 400, "invalid_json")])
def test_malformed_bodies_are_refused(body, kind, status, code, http):
    response = http.post("/v1/completions", content=body, headers={"content-type": kind})
    assert response.status_code == status and response.json()["error"]["message"]
    assert code in (None, response.json()["error"]["code"])


def test_what_is_not_there_is_answered_in_the_same_json(http):
    assert http.get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    wrong = http.delete("/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["message"] == "Method Not Allowed"
    asked = http.post("/v1/completions", json={"model": "double", "prompt": "x"})
    assert asked.status_code == 400 and asked.json()["error"]["code"] == "wrong_model"
    assert http.post("/v1/embeddings", json={"model": "double", "input": "x"}).status_code == 400
    assert http.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert re.fullmatch("[0-9a-f]{32}", http.get("/v1/models").headers["x-request-id"])


def test_a_client_that_takes_nothing_is_cut_off(double, monkeypatch):
    ended = threading.Event()

    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        finally:
            ended.set()

    monkeypatch.setattr(app, "PARTS", (*app.PARTS, lambda _: Part(routes=[Route("/endless", type(
        "Endless", (), {"__call__": staticmethod(endless)})())])))
    with ji.serve(double, port=0, stall_timeout=0.3) as server, client(server) as http:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            assert ended.wait(20) and eventually(lambda: not server.site.running)
            assert http.get("/v1/models").status_code == 200


def test_a_stream_that_nobody_takes_ends_and_is_told_no_error_for_which_it_would_wait_again(double, monkeypatch):
    ended, failures = threading.Event(), []

    async def pieces():
        try:
            while True:
                yield bytes(65536)
        finally:
            ended.set()

    async def answer():
        return Events(pieces(), lambda error: (failures.append(error), b"")[1])

    streams = Operation("GET", "/streams", "endless", answer, gives=ModelList)
    monkeypatch.setattr(app, "PARTS", (*app.PARTS, lambda _: Part(operations=[streams])))
    with ji.serve(double, port=0, stall_timeout=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(b"GET /streams HTTP/1.1\r\nHost: x\r\n\r\n")
            assert ended.wait(20) and eventually(lambda: not server.site.running) and not failures


def test_what_is_quick_does_not_wait_for_what_is_prepared_slowly(tiny_path, monkeypatch):
    from jaxinfer.runtime.language import LanguageModel

    quick, go, slow = LanguageModel.tokens_of, threading.Event(), []

    def tokens_of(self, prompt):
        if prompt == "slow":
            slow.append(prompt)
            go.wait(60)
        return quick(self, prompt)

    monkeypatch.setattr(LanguageModel, "tokens_of", tokens_of)
    with (ji.serve({"tiny": tiny_path}, port=0, load=tiny.ONE_BUCKET) as server,
          client(server) as http, ThreadPoolExecutor(48) as asking):
        ask = {"model": "tiny", "prompt": "slow", "max_tokens": 1}
        answers = [asking.submit(http.post, "/v1/completions", json=ask) for _ in range(48)]
        try:
            assert eventually(lambda: len(slow) == 48)  # more than anyio gives
            assert http.post("/v1/completions", json=ask | {"prompt": "hi"}).status_code == 200
        finally:
            go.set()
        assert {answer.result().status_code for answer in answers} == {200}


def test_who_watches_a_server_does_not_wait_for_who_operates_it():
    async def watch():
        go = threading.Event()
        operating = [asyncio.ensure_future(OPERATING.run(go.wait, 60)) for _ in range(99)]
        try:
            async with asyncio.timeout(30):
                assert await WATCHING.run(int, "7") == await to_thread.run_sync(int, "7") == 7
        finally:
            go.set()
            await asyncio.gather(*operating)

    asyncio.run(watch())


def test_no_prompt_and_no_key_is_in_the_log(tiny_path, caplog, capfd, monkeypatch):
    from jaxinfer.serving.openai import completions

    def broken(ask, **_):
        raise RuntimeError(f"the prompt was {ask.prompt}")

    with (ji.serve({"tiny": tiny_path}, port=0, api_keys=["KEY-SECRET"], load=tiny.ONE_BUCKET)
          as server, client(server, "KEY-SECRET") as http, caplog.at_level(logging.DEBUG)):
        ask = {"model": "tiny", "prompt": "TOP-SECRET", "max_tokens": 2}
        assert http.post("/v1/completions", json=ask).status_code == 200
        assert http.post("/v1/completions", json=ask | {"temperature": "TOP-SECRET"}).status_code == 400
        monkeypatch.setattr(completions, "sampling_of", broken)
        failed = http.post("/v1/completions", json=ask)
        assert failed.status_code == 500 and "SECRET" not in failed.text
    told = caplog.text + "".join(capfd.readouterr())
    assert "SECRET" not in told and "RuntimeError" in told and "completions.py" in told


def test_a_path_makes_no_lines_of_the_log(double, monkeypatch, caplog):
    async def broken(request):
        raise RuntimeError

    monkeypatch.setattr(app, "PARTS", (*app.PARTS, lambda _: Part(routes=[Route("/broken/{path}", broken)])))
    with ji.serve(double, port=0) as server, client(server) as http:
        assert http.get("/broken/a%0AERROR all is lost").status_code == 500
    assert "GET /broken/a%0AERROR%20all%20is%20lost [" in caplog.text


# --- TLS ---


def test_tls_by_configuration(double, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=certificate)
    with ji.serve(double, port=0, certificate=certificate, private_key=key) as server:
        assert server.url.startswith("https://")
        with client(server, verify=trusted) as http:
            assert http.get("/v1/models").status_code == 200
    key.write_text("nonsense")
    with pytest.raises(InvalidOption, match="no pair for TLS"):
        ji.serve(double, port=0, certificate=certificate, private_key=key)


# --- settings ---


@pytest.mark.parametrize("wrong", [
    {"port": -1}, {"port": "80"}, {"port": None}, {"admin_port": 70000}, {"max_body": 0}, {"grace": -1},
    {"request_timeout": True}, {"api_keys": ("",)}, {"api_keys": "abc"}, {"admin_port": 0}, {"admin_token": "t"},
    {"certificate": "no.pem"}, {"certificate": "no.pem", "private_key": "no.pem"}, {"certificate": 5, "private_key": 5},
    {"host": 5}, {"admin_host": ""}, {"shared_memory": "false"}, {"json_logs": 1}, {"max_body": 1.5},
    {"max_head": True}, {"keep_alive": math.nan}, {"stall_timeout": math.inf}, {"grace": math.inf},
    {"body_timeout": "1"}, {"grpc_port": True}, {"api_keys": [5]},
    {"admin_token": 5, "admin_port": 0}, {"allow_origins": "*"}, {"allow_origins": ("chat",)}], ids=str)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InvalidOption, match=next(iter(wrong))):
        Settings(**wrong)


def test_keys_that_can_be_read_but_once_are_refused():
    with pytest.raises(InvalidOption, match="api_keys"):
        Settings(api_keys=iter(["k"]))


def test_settings_do_not_show_their_secrets():
    assert "SECRET" not in repr(Settings(api_keys=("SECRET",), admin_port=0, admin_token="SECRET"))


# --- starting and stopping ---


def test_a_server_frees_its_port_and_leaves_the_callers_models_alone(double):
    with ji.serve({"double": double}, port=0) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(InvalidOption, match="nothing can listen there"):
            ji.serve(double, port=port)
        assert "double" in repr(server)
    server.close()
    assert float(double(1.0)) == 2.0
    with ji.serve(double, port=port) as again:
        assert again.url == server.url
    assert not server._thread.is_alive() and not again._thread.is_alive()


def test_serve_takes_registries_lists_and_sources_and_closes_what_it_loaded(double, tiny_path):
    with ji.serve([double, tiny_path], port=0, load=tiny.ONE_BUCKET) as server:
        assert set(server.registry) == {double.name, tiny_path.name}
        loaded = server.registry[tiny_path.name].version.model
    with pytest.raises(ji.JaxinferError):
        loaded("x")
    registry = ji.Registry()
    registry.load("m", constant)
    with ji.serve(registry, port=0) as server:
        assert server.registry is registry
    assert float(registry["m"](1.0)) == 2.0
    registry.close()
    for wrong, error in (([], InvalidOption), ([double, double], InvalidOption), ("/no/such", ModelNotFound)):
        with pytest.raises(error):
            ji.serve(wrong, port=0)
    with pytest.raises(InvalidOption, match="colour"):
        ji.serve(double, port=0, colour="red")
    with pytest.raises(InvalidOption, match="colour"):
        ji.serve(str(tiny_path), port=0, load=dict(colour="red"))


def test_a_server_is_closed_while_a_model_of_its_is_drained(tiny_path):
    server = ji.serve({"tiny": tiny_path}, port=0, load=tiny.ALONE)
    lm = server.registry["tiny"].version.model
    answers = [lm.submit("x", max_tokens=120, ignore_eos=True) for _ in range(200)]
    drain = threading.Thread(target=server.registry.unload, args=("tiny",))
    drain.start()
    assert eventually(lambda: lm.closed)
    begun = time.monotonic()
    server.close(grace=0)
    assert time.monotonic() - begun < 10 and isinstance(answers[-1].exception(0), ji.JaxinferError)
    drain.join(10)
    assert not drain.is_alive() and not [*server.registry]


def test_sigterm_under_load_ends_what_runs_and_refuses_what_comes(tiny_path):
    command = Command(f"tiny={tiny_path}", "missing=/no/such/model", *TINY)
    command.wait_for("tiny is ready")
    command.wait_for("missing could not be loaded")
    ask = {"model": "tiny", "prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "n": 30}
    with client(command.url) as http:
        assert http.post("/v1/completions", json=ask | {"model": "missing"}).status_code == 503
        with http.stream("POST", "/v1/completions", json=ask | {"stream": True}) as response:
            parts = events(response)
            next(parts)
            command.process.send_signal(signal.SIGTERM)
            command.wait_for("stopping: 1 requests")
            refused = httpx2.post(f"{command.url}/v1/completions", json=ask)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            *chunks, done = [data for _, data in parts]
    assert done == "[DONE]"
    assert sum(json.loads(chunk)["choices"][0]["finish_reason"] == "length" for chunk in chunks) == 30
    assert command.end() == 0 and "Traceback" not in command.said


def test_if_no_model_can_be_loaded_the_command_says_so_and_ends():
    command = Command("missing=/no/such/model")
    assert command.end() == 2 and "missing could not be loaded" in command.said and "Traceback" not in command.said


def test_a_second_signal_ends_the_grace(tiny_path):
    command = Command(f"tiny={tiny_path}", *TINY, "--grace", "60", JAXINFER_API_KEYS="a b")
    command.wait_for("tiny is ready")
    with client(command.url, "b") as http:
        with http.stream("POST", "/v1/completions", json={
                "model": "tiny", "prompt": "x", "max_tokens": 120, "n": 128, "stream": True, "ignore_eos": True}
                ) as response:
            parts = events(response)
            next(parts)
            begun = time.monotonic()
            command.process.send_signal(signal.SIGINT)
            command.wait_for("stopping")
            command.process.send_signal(signal.SIGINT)
            told = [data for _, data in parts]
        assert json.loads(told[-2])["error"]["code"] == "model_closed" and told[-1] == "[DONE]"
    assert command.end() == 0 and time.monotonic() - begun < 20
