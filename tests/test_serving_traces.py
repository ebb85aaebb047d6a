"""Traces, metrics and logs, as a collector of OpenTelemetry's receives them over OTLP; and logs as lines of JSON."""

import json
import logging
import subprocess
import sys
import time

import opentelemetry.sdk.trace
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.serving import logs, otlp
from jaxinfer.serving.app import public
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Part
from jaxinfer.serving.trace import Trace, parse
from tests import tiny
from tests.collector import attributes, collector, metrics, records, spans
from tests.watching import site_of

pytestmark = pytest.mark.usefixtures("in_haste")

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OURS = ("jaxinfer.requests", "jaxinfer.access", "jaxinfer.incidents")  # other loggers have a say too
PROMPT = [7, *range(100, 180)]
PARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "tracestate": "vendor=1"}


def asking(lm) -> Part:
    """A protocol of one route: it asks the model what the query says."""

    async def ask(request: Request) -> JSONResponse:
        output = await lm.agenerate(PROMPT, max_tokens=int(request.query_params["n"]), ignore_eos=True,
                                    temperature=0.5, reuse=False)
        return JSONResponse({"tokens": len(output.tokens)})

    async def fail(_: Request) -> JSONResponse:
        raise RuntimeError("on purpose")

    return Part(routes=[Route("/v1/completions", ask), Route("/fail", fail)])


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
        lm._engine.scheduler.chunk = 32  # a prompt of 81 tokens comes in three
        lm(PROMPT, max_tokens=6, ignore_eos=True, temperature=0.5, reuse=False)
        yield lm


@pytest.fixture(scope="module")
def seen(lm):
    """All that the collector received of a few requests."""
    with collector() as (address, received):
        site = site_of(Settings(otlp=address), tiny=lm)
        app = public(site, [logs.part(site), asking(lm)])
        with TestClient(app, raise_server_exceptions=False) as client:
            assert client.get("/v1/completions?n=6", headers=PARENT).json() == {"tokens": 6}
            assert client.get("/v1/completions?n=3").json() == {"tokens": 3}
            assert client.get("/fail").status_code == 500
            assert client.get("/livez").status_code == 404  # of which nobody hears
        yield received
        assert not events.observed(), "an observer is left"


@pytest.mark.parametrize("jump", [86400, -86400])
def test_a_span_is_as_long_as_it_took_though_the_clock_is_set(jump, monkeypatch):
    real = time.time_ns

    async def set_the_clock(_: Request) -> JSONResponse:
        for where in (time, opentelemetry.sdk.trace):
            monkeypatch.setattr(where, "time_ns", lambda: real() + jump * 10**9)
        return JSONResponse({})

    with collector() as (address, received):
        site = site_of(Settings(otlp=address))
        app = public(site, [logs.part(site), Part(routes=[Route("/jump", set_the_clock)])])
        with TestClient(app) as client:
            assert client.get("/jump").status_code == 200
    (span,) = spans(received)
    assert 0 <= span.end_time_unix_nano - span.start_time_unix_nano < 60e9


def test_a_request_is_one_tree_of_spans_under_the_callers(seen):
    mine = {s.name: s for s in spans(seen) if s.trace_id.hex() == TRACE_ID}
    http, whole = mine["GET /v1/completions"], mine["text_completion tiny"]
    assert http.parent_span_id.hex() == SPAN_ID and whole.parent_span_id == http.span_id
    assert http.trace_state == "vendor=1" and http.kind == http.SPAN_KIND_SERVER
    parts = [s for s in spans(seen) if s.parent_span_id == whole.span_id]
    parts.sort(key=lambda s: s.start_time_unix_nano)
    assert [s.name for s in parts] == ["queue", "prefill", "prefill", "prefill", "decode", "detokenise"]
    assert [attributes(s)["jaxinfer.tokens"] for s in parts if s.name == "prefill"] == [32, 32, 17]
    assert all(http.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano
               <= http.end_time_unix_nano for s in parts)
    queue, *chunks, decode, text = parts
    assert queue.end_time_unix_nano <= chunks[0].start_time_unix_nano
    assert chunks[-1].end_time_unix_nano == pytest.approx(decode.start_time_unix_nano, abs=1e6)
    assert decode.end_time_unix_nano == pytest.approx(text.start_time_unix_nano, abs=1e6)


def test_spans_are_described_by_the_conventions_for_generative_ai(seen):
    (whole,) = (s for s in spans(seen) if s.trace_id.hex() == TRACE_ID and s.name == "text_completion tiny")
    told = attributes(whole)
    assert {key: told[key] for key in told if key != "gen_ai.response.finish_reasons"} == {
        "gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "jaxinfer", "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny", "gen_ai.usage.input_tokens": 81, "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 0, "gen_ai.request.max_tokens": 6, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0, "gen_ai.request.top_k": 0, "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0, "gen_ai.request.seed": told["gen_ai.request.seed"]}
    assert [v.string_value for v in told["gen_ai.response.finish_reasons"].values] == ["length"]


def test_who_comes_without_a_trace_begins_one_and_a_failure_is_marked(seen):
    found = [s for s in spans(seen) if s.trace_id.hex() != TRACE_ID]
    roots = {s.name: s for s in found if not s.parent_span_id}
    assert set(roots) == {"GET /v1/completions", "GET /fail"}
    assert roots["GET /fail"].status.code == Status.STATUS_CODE_ERROR
    assert attributes(roots["GET /v1/completions"])["http.response.status_code"] == 200
    assert len({s.trace_id for s in found}) == 2


def test_logs_name_their_trace_and_no_prompt(seen):
    told = [r for r in records(seen) if attributes(r)["logger"] in OURS]
    mine = {r.body.string_value: attributes(r) for r in told if r.trace_id.hex() == TRACE_ID}
    assert set(mine) == {"tiny ended: length", "GET /v1/completions"}
    assert mine["tiny ended: length"]["tokens"] == 6 and mine["GET /v1/completions"]["status"] == 200
    assert {r.span_id for r in told if r.trace_id.hex() == TRACE_ID} == {
        s.span_id for s in spans(seen) if s.trace_id.hex() == TRACE_ID and s.name == "GET /v1/completions"}
    assert all(len(r.trace_id) == 16 for r in told) and len(told) == 5


def test_metrics_are_those_of_the_conventions(seen):
    found = metrics(seen)
    counts = {name: sum(p.count for p in m.histogram.data_points) for name, m in found.items()
              if m.HasField("histogram")}
    assert counts == {"gen_ai.server.request.duration": 2, "gen_ai.server.time_to_first_token": 2,
                      "gen_ai.server.time_per_output_token": 2, "gen_ai.client.token.usage": 4}
    (running,) = found["jaxinfer.requests.running"].gauge.data_points
    assert attributes(running) == {"gen_ai.request.model": "tiny"} and running.as_double == 0
    usage = found["gen_ai.client.token.usage"].histogram.data_points
    by_kind = {attributes(point)["gen_ai.token.type"]: point.sum for point in usage}
    assert by_kind == {"input": 162, "output": 9}


def test_a_collector_that_is_not_there_harms_nobody(lm, monkeypatch):
    monkeypatch.setattr(otlp, "PATIENCE", 0.5)
    site = site_of(Settings(otlp="http://127.0.0.1:9"), tiny=lm)
    with TestClient(public(site, [logs.part(site), asking(lm)])) as client:
        assert client.get("/v1/completions?n=2").json() == {"tokens": 2}


def test_without_a_collector_opentelemetry_is_not_imported():
    code = "import sys, jaxinfer.serving.app; print(any(n.split('.')[0] == 'opentelemetry' for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_collector_without_opentelemetry_is_refused_before_anybody_is_served(monkeypatch):
    monkeypatch.delitem(sys.modules, "jaxinfer.serving.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ji.errors.InvalidOption, match=r"otlp needs opentelemetry.*jaxinfer\[otel\]"):
        logs.part(site_of(Settings(otlp="http://127.0.0.1:9")))


def test_logs_are_lines_of_json_with_the_callers_trace(lm, capsys):
    site = site_of(Settings(json_logs=True), tiny=lm)
    with TestClient(public(site, [logs.part(site), asking(lm)]), raise_server_exceptions=False) as client:
        client.get("/v1/completions?n=2", headers=PARENT)
        events.emit(events.Stopped("tiny", "it was tired", True))
        client.get("/fail")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    ended, access, stopped, failed = (line for line in lines if line["logger"] in OURS)
    assert (ended["message"], ended["tokens"], ended["prompt_tokens"]) == ("tiny ended: length", 2, 81)
    assert access["status"] == 200 and access["seconds"] >= ended["seconds"] >= ended["first_token_seconds"] > 0
    assert ended["trace_id"] == access["trace_id"] == TRACE_ID and ended["span_id"] == access["span_id"]
    assert stopped["level"] == "error" and "trace_id" not in stopped and failed["status"] == 500
    assert not logging.getLogger("jaxinfer").handlers


def test_a_tag_follows_a_request_into_its_event(lm):
    ended = []
    with events.observe(lambda e: ended.append(e) if isinstance(e, events.RequestEnded) else None):
        with events.tagged("mine"):
            answer = lm.submit("ab", max_tokens=1)
        lm("ab", max_tokens=1)
        answer.result()
    assert sorted(str(event.tag) for event in ended) == ["None", "mine"]


ALIKE = st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@given(st.one_of(st.text(), ALIKE))
def test_a_header_that_is_not_understood_is_no_trace(header):
    found = parse(header)
    if found is not None:
        assert header.strip()[3:35] == found.trace_id and int(found.trace_id, 16) and int(found.span_id, 16)
        assert not header.startswith("ff")


@pytest.mark.parametrize("header, right", [
    (f"00-{TRACE_ID}-{SPAN_ID}-01", True), (f"00-{TRACE_ID}-{SPAN_ID}-00", True),
    (f"cc-{TRACE_ID}-{SPAN_ID}-01-x", True),
    (f"00-{TRACE_ID}-{SPAN_ID}-01-x", False), (f"ff-{TRACE_ID}-{SPAN_ID}-01", False),
    (f"00-{'0' * 32}-{SPAN_ID}-01", False), (f"00-{TRACE_ID}-{'0' * 16}-01", False),
    (f"00-{TRACE_ID.upper()}-{SPAN_ID}-01", False), (None, False)])
def test_traceparent_is_read_as_the_standard_says(header, right):
    assert (parse(header) is not None) == right
    assert right is False or parse(header).sampled == (header[53:55] == "01")


def test_a_trace_without_an_exporter_has_ids_of_its_own():
    assert Trace("GET", "/", "a" * 32, "b" * 16).span is None
