"""What the server says of itself, read by those that it is said for: a collector of OTLP, Prometheus' parsers, a log's
reader."""

import json

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.clients.conftest import KEY, NAME, QUESTION, await_that
from tests.collector import attributes, metrics, records, spans

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NEW = [{"role": "user", "content": "Which river flows through Vienna and through Budapest?"}]  # no page of it is kept


def ask(client, messages=QUESTION, **more):
    return client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=4, **more)


def test_a_collector_passes_on_the_spans_the_logs_and_the_metrics_of_a_request(client, collected, served):
    _, received = collected
    asked = ask(client, NEW, extra_headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"})
    mine = lambda: {span.name: span for span in spans(received) if span.trace_id.hex() == TRACE_ID}
    assert await_that(lambda: len(mine()) >= 6), sorted(mine())
    http, chat = mine()["POST /v1/chat/completions"], mine()[f"chat {NAME}"]
    assert http.parent_span_id.hex() == SPAN_ID and chat.parent_span_id == http.span_id
    parts = {name for name, span in mine().items() if span.parent_span_id == chat.span_id}
    assert parts == {"queue", "prefill", "decode", "detokenise"}
    told = attributes(chat)
    assert told["gen_ai.operation.name"] == "chat" and told["gen_ai.request.model"] == NAME
    assert told["gen_ai.usage.input_tokens"] == asked.usage.prompt_tokens
    assert told["gen_ai.usage.output_tokens"] == asked.usage.completion_tokens == 4

    logged = lambda: {record.body.string_value for record in records(received) if record.trace_id.hex() == TRACE_ID}
    assert await_that(lambda: len(logged()) >= 2)
    assert logged() >= {f"{NAME} ended: length", "POST /v1/chat/completions"}

    assert await_that(lambda: "gen_ai.server.time_to_first_token" in metrics(received))
    points = metrics(received)["gen_ai.server.time_to_first_token"].histogram.data_points
    assert sum(point.count for point in points if attributes(point)["gen_ai.request.model"] == NAME) >= 1
    sent = b"".join(export.SerializeToString() for exports in received.values() for export in exports)
    assert NEW[0]["content"].encode() not in sent and KEY.encode() not in sent


def test_prometheus_reads_the_metrics_in_both_of_its_formats(client, served):
    def read(parser, accept):
        answer = served.http.get("/metrics", headers={"Accept": accept})
        assert answer.headers["content-type"].startswith(accept)
        return {sample.name: sample.value for family in parser(answer.text) for sample in family.samples
                if sample.labels.get("model_name") == NAME and "le" not in sample.labels}

    before = read(parse, "text/plain")
    used = ask(client).usage
    after = read(parse, "text/plain")
    gained = lambda name: after[name] - before.get(name, 0)
    for ours in ("jaxinfer_prompt_tokens_total", "vllm:prompt_tokens_total"):
        assert gained(ours) == used.prompt_tokens
    for ours in ("jaxinfer_generated_tokens_total", "vllm:generation_tokens_total"):
        assert gained(ours) == used.completion_tokens
    for ours in ("jaxinfer_first_token_seconds_count", "vllm:time_to_first_token_seconds_count"):
        assert gained(ours) == 1
    assert {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"} <= after.keys()
    openmetrics = read(parse_openmetrics, "application/openmetrics-text")
    assert openmetrics.keys() >= after.keys()


def test_the_log_is_lines_of_json_without_prompts_answers_or_keys(client, served):
    answer = ask(client).choices[0].message.content
    ended = lambda: [line for line in served.log.read_text().splitlines() if f"{NAME} ended: length" in line]
    assert await_that(ended)
    assert {"time", "level", "logger", "trace_id", "prompt_tokens", "seconds"} <= json.loads(ended()[-1]).keys()
    said = served.log.read_text()
    assert all(secret not in said for secret in (QUESTION[0]["content"], answer, KEY))
