"""What Prometheus reads is what happened."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse
from starlette.testclient import TestClient

import jaxinfer as ji
from jaxinfer.errors import Rejected
from jaxinfer.serving import metrics
from jaxinfer.serving.app import public
from jaxinfer.serving.record import Histogram, quantile
from tests import tiny
from tests.running import blocked, eventually
from tests.watching import site_of

pytestmark = pytest.mark.usefixtures("in_haste")

PROMPTS = [[7, *range(100, 100 + n)] for n in (3, 90, 90)]


@pytest.fixture(scope="module")
def served(tiny_path):
    lm = ji.load(tiny_path, **tiny.ONE_BUCKET, max_waiting=1)
    f = ji.endpoint(lambda x: x * 2, example=np.zeros(3, np.float32), max_batch=4)
    site = site_of(tiny=lm, double=f)
    with TestClient(public(site, [metrics.part(site)])) as client:
        yield site, lm, f, client
    site.registry.close()


def read(client) -> dict[str, dict[tuple, float]]:
    """Every sample, by its name and its labels."""
    reply = client.get("/metrics")
    found: dict[str, dict[tuple, float]] = {}
    for family in parse(reply.text):
        for sample in family.samples:
            before = found.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in before, f"{sample.name} {labels} is told twice"
            before[labels] = sample.value
    return found


def of(found, name, model="tiny", **labels):
    return found.get(name, {}).get(tuple(sorted({"model_name": model, **labels}.items())), 0.0)


def test_requests_are_counted_and_timed_under_our_names_and_vllms(served):
    _, lm, _, client = served
    before = read(client)
    outputs = [lm(prompt, max_tokens=5, ignore_eos=True) for prompt in PROMPTS]
    assert outputs[2].reused > 0
    with blocked(lm):
        waiting = lm.submit("ab", max_tokens=1)
        with pytest.raises(Rejected):
            lm("ab")
        during = read(client)
        waiting.cancel()
    assert eventually(lambda: not lm.stats.running)
    after = read(client)
    grown = lambda name, **labels: of(after, name, **labels) - of(before, name, **labels)
    drawn = sum(len(output.tokens) for output in outputs)
    for names in (("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prefix_cache_hits_total"),
                  ("jaxinfer_prompt_tokens_total", "jaxinfer_generated_tokens_total", "jaxinfer_prefix_hits_total")):
        told = [grown(name) for name in names]
        extra = told[0] - sum(map(len, PROMPTS))  # of the request that held the engine, and ended with so many tokens
        assert extra == 2 and drawn <= told[1] <= drawn + 200 and told[2] == sum(o.reused for o in outputs)
    assert grown("vllm:request_success_total", finished_reason="length") == 3
    assert grown("jaxinfer_requests_total", reason="length") == 3
    assert grown("jaxinfer_requests_total", reason="rejected") == 1
    assert grown("vllm:request_success_total", finished_reason="abort") == 2
    assert of(during, "vllm:num_requests_waiting") == 1 and of(during, "vllm:num_requests_running") == 1
    assert 0 < of(during, "vllm:kv_cache_usage_perc") <= 1 and of(after, "vllm:gpu_cache_usage_perc") == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                 "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"):
        assert grown(f"vllm:{name}_count") >= 3 and grown(f"vllm:{name}_sum") > 0, name
    assert grown("jaxinfer_inter_token_seconds_count") >= drawn - 3
    assert grown("vllm:inter_token_latency_seconds_count") == grown("jaxinfer_inter_token_seconds_count")


def test_times_add_up(served):
    _, lm, _, client = served
    before = read(client)
    outputs = [lm("w1 w2 w3", max_tokens=9, ignore_eos=True, reuse=False) for _ in range(4)]
    after = read(client)
    grown = lambda name: of(after, f"jaxinfer_{name}") - of(before, f"jaxinfer_{name}")
    total, parts = grown("request_seconds_sum"), ("queue_seconds_sum", "prefill_seconds_sum", "decode_seconds_sum")
    assert sum(map(grown, parts)) <= total <= sum(o.timings.total for o in outputs) + 0.1
    assert grown("first_token_seconds_sum") == pytest.approx(sum(o.timings.first_token for o in outputs), abs=1e-3)
    assert grown("queue_seconds_sum") + grown("prefill_seconds_sum") == pytest.approx(grown("first_token_seconds_sum"))
    assert grown("inter_token_seconds_sum") == pytest.approx(grown("decode_seconds_sum"))
    assert grown("drawn_tokens_total") >= 36 and grown("steps_total") > 0


def test_programs_padding_swaps_and_copies_are_told(served):
    _, lm, f, client = served
    before = read(client)
    lm("ab", max_tokens=2)
    lm.swap(lm.params)
    x = np.arange(3, dtype=np.float32)
    f.submit(x).result()
    [reply.result() for reply in [f.submit(x) for _ in range(8)]]
    assert eventually(lambda: of(read(client), "jaxinfer_copied_bytes_count", "double") == 9)
    after = read(client)
    assert of(after, "jaxinfer_swaps_total") - of(before, "jaxinfer_swaps_total") == 1
    assert of(after, "jaxinfer_weights_version") == lm.version
    assert of(after, "jaxinfer_bytes_in_total", "double") == f.stats.bytes_in == 9 * 12
    assert of(after, "jaxinfer_bytes_copied_total", "double") == f.stats.bytes_copied
    assert of(after, "jaxinfer_copied_bytes_sum", "double") == f.stats.bytes_copied
    entry = max(lm.ledger, key=lambda entry: entry.hits)
    named = {"version": "1", "executable": entry.name}
    assert of(after, "jaxinfer_executable_hits_total", **named) == entry.hits
    assert of(after, "jaxinfer_executable_padding_total", **named) == entry.padding
    assert 0 < of(after, "jaxinfer_padding_ratio") < 1
    assert sum(after["jaxinfer_compiles_total"].values()) >= 1
    stages = {dict(labels)["stage"] for labels in after["jaxinfer_stage_calls_total"]}
    assert {"queue", "tokenise", "plan", "pack", "dispatch", "execute", "read back", "commit", "detokenise"} <= stages


def test_what_a_version_has_counted_stays_when_it_goes():
    site, steps = site_of(), 0
    with TestClient(public(site, [metrics.part(site)])) as client:
        for more in (3, 2, 4):
            site.registry.load("f", lambda: ji.endpoint(lambda x: x * 2, example=np.zeros(3, np.float32), max_batch=1))
            for _ in range(more):
                site.registry["f"](np.ones(3, np.float32))
            steps += more
            assert of(read(client), "jaxinfer_steps_total", "f") == steps
        site.registry.unload("f")
        assert of(read(client), "jaxinfer_steps_total", "f") == steps
        assert of(read(client), "jaxinfer_bytes_in_total", "f") == 12 * steps


def test_openmetrics_is_given_to_who_asks_for_it(served):
    _, lm, _, client = served
    lm("ab", max_tokens=2)
    reply = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_open(reply.text)}
    assert {"jaxinfer_requests", "vllm:time_to_first_token_seconds", "process_resident_memory_bytes"} <= names


@given(values=st.lists(st.floats(0, 400)), bounds=st.lists(st.floats(0, 300), min_size=1, unique=True).map(sorted))
def test_a_histogram_counts_what_is_at_most_each_bound(values, bounds):
    histogram = Histogram(tuple(bounds))
    histogram.add(*values)
    for i, bound in enumerate(bounds):
        assert sum(histogram.counts[: i + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values) and histogram.total == pytest.approx(sum(values))


@given(values=st.lists(st.integers(0, 50), min_size=1), share=st.floats(0.01, 1))
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(values, share):
    found = quantile(values, share)
    enough = lambda value: sum(v <= value for v in values) >= share * len(values) - 1e-9
    assert found in values and enough(found) and not any(enough(v) for v in values if v < found)
