"""Metrics as Prometheus reads them, under our own names and under vLLM's, which dashboards for it know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxinfer import events
from jaxinfer.runtime.language import Statistics
from jaxinfer.serving.record import Histogram, Record
from jaxinfer.serving.site import Part, Site
from jaxinfer.serving.threads import WATCHING

# Ours, vLLM's, and what it is.
HISTOGRAMS = (
    ("first_token_seconds", ("time_to_first_token_seconds",), "From the submission of a request to its first token"),
    ("inter_token_seconds", ("inter_token_latency_seconds", "time_per_output_token_seconds"),
     "Between two tokens of an answer"),
    ("output_token_seconds", ("request_time_per_output_token_seconds",), "Per token of an answer after its first"),
    ("request_seconds", ("e2e_request_latency_seconds",), "From the submission of a request to its end"),
    ("queue_seconds", ("request_queue_time_seconds",), "That a request waited"),
    ("prefill_seconds", ("request_prefill_time_seconds",), "From the first step for a request to its first token"),
    ("decode_seconds", ("request_decode_time_seconds",), "From the first token of an answer to its last"),
    ("inference_seconds", ("request_inference_time_seconds",), "From the first step for a request to its end"),
    ("prompt_length", ("request_prompt_tokens",), "Tokens of a prompt"),
    ("answer_length", ("request_generation_tokens",), "Tokens of an answer"),
    ("step_tokens", ("iteration_tokens_total",), "Tokens that a step of the engine carries"),
    ("copied_bytes", (), "Bytes of an endpoint's request that were copied on their way to the device"),
)
GAUGES = (
    ("requests_running", ("num_requests_running",), "Requests that the engine runs"),
    ("requests_waiting", ("num_requests_waiting",), "Requests that wait"),
    ("waiting_tokens", (), "Prompt tokens of the requests that wait"),
    ("pages", (), "KV pages"),
    ("pages_free", (), "KV pages that hold nothing"),
    ("pages_kept", (), "KV pages whose contents may be used again"),
    ("page_use_ratio", ("kv_cache_usage_perc", "gpu_cache_usage_perc"), "The share of KV pages that running requests "
     "hold"),
    ("padding_ratio", (), "The share of what was computed that was padding"),
    ("weights_version", (), "The version of the weights that new requests run on"),
    ("model_bytes", (), "Bytes of weights, pages and temporaries on each device"),
)
COUNTERS = (
    ("prompt_tokens", ("prompt_tokens",), "Prompt tokens of requests that have ended"),
    ("generated_tokens", ("generation_tokens",), "Tokens drawn for requests that have ended"),
    ("drawn_tokens", (), "Tokens drawn so far, for requests that run as well, and beyond the end of some"),
    ("prefix_queries", ("prefix_cache_queries",), "Prompt tokens that were looked for among what is computed"),
    ("prefix_hits", ("prefix_cache_hits",), "Prompt tokens that were found computed"),
    ("preemptions", ("num_preemptions",), "Requests that gave their pages back and were read again"),
    ("steps", (), "Steps of the engine, or batches of an endpoint"),
    ("swaps", (), "Changes of the weights that new requests run on"),
    ("stops_revived", (), "Threads that stopped, and in whose place others went on"),
    ("stops_lost", (), "Threads that stopped for good"),
    ("bytes_in", (), "Bytes of endpoints' requests"),
    ("bytes_copied", (), "Bytes of endpoints' requests that were copied on their way to the device"),
)
EXECUTABLES = (
    ("executable_hits", "Calls of a compiled program"),
    ("executable_tokens", "Tokens or rows that its calls carried"),
    ("executable_padding", "Tokens or rows that they were padded with"),
)
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
ENDS = {"stop": "stop", "length": "length", "cancelled": "abort", "expired": "abort", "failed": "error"}  # vLLM's names


def part(site: Site) -> Part:
    """`/metrics`, in Prometheus' text format or OpenMetrics, as is asked for."""
    registry = CollectorRegistry()
    registry.register(Metrics(site, site.record))
    ProcessCollector(registry=registry)

    async def metrics(request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        if kind.startswith("application/openmetrics-text"):  # the chosen one would turn vLLM's colons into underscores
            encode, kind = partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8), OPENMETRICS
        return Response(await WATCHING.run(encode, registry), media_type=kind)

    @asynccontextmanager
    async def living() -> AsyncIterator[None]:
        with events.observe(site.record):
            yield

    return Part(routes=[Route("/metrics", metrics)], living=living)


class Metrics(Collector):
    """Everything that is measured, at the moment it is asked for."""

    def __init__(self, site: Site, record: Record):
        self.site, self.record = site, record

    def collect(self) -> Iterator[Metric]:
        models = list(self.record.models.items())
        values = snapshot(self.site, self.record)
        for name, theirs, what in HISTOGRAMS:
            for full in _names(name, theirs):
                family = HistogramMetricFamily(full, what, labels=["model_name"])
                for model, record in models:
                    histogram = record.histograms[name]
                    if any(histogram.counts):
                        family.add_metric([model], _buckets(histogram), histogram.total)
                yield family
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, theirs, what in table:
                for full in _names(name, theirs):
                    family = kind(full, what, labels=["model_name"])
                    for model, numbers in values.items():
                        if name in numbers:
                            family.add_metric([model], numbers[name])
                    yield family
        yield from self._ends(models)
        yield from self._process()
        yield from self._executables()

    def _ends(self, models: Iterable[tuple[str, Any]]) -> Iterator[Metric]:
        ours = CounterMetricFamily("jaxinfer_requests", "Requests that have ended", labels=["model_name", "reason"])
        theirs = CounterMetricFamily("vllm:request_success", "Requests that have ended",
                                     labels=["model_name", "finished_reason"])
        for model, record in models:
            ends: dict[str, int] = defaultdict(int)
            for reason, count in tuple(record.reasons.items()):
                ours.add_metric([model, reason], count)
                if reason in ENDS:
                    ends[ENDS[reason]] += count
            for reason, count in ends.items():
                theirs.add_metric([model, reason], count)
        yield from (ours, theirs)

    def _process(self) -> Iterator[Metric]:
        count = CounterMetricFamily("jaxinfer_compiles", "Programs that were compiled, or taken from the disk",
                                    labels=["origin"])
        seconds = CounterMetricFamily("jaxinfer_compile_seconds", "Seconds that this took", labels=["origin"])
        for origin, stage in self.record.compiles.items():
            count.add_metric([origin], stage.count)
            seconds.add_metric([origin], stage.seconds)
        yield from (count, seconds)
        yield CounterMetricFamily("jaxinfer_misses", "Steps whose program was not there", self.record.totals["misses"])
        yield CounterMetricFamily("jaxinfer_retries", "Batches that failed and were tried again one by one",
                                  self.record.totals["retries"])
        times = CounterMetricFamily("jaxinfer_stage_seconds", "Seconds spent in each stage", labels=["stage"])
        calls = CounterMetricFamily("jaxinfer_stage_calls", "How often each stage was gone through", labels=["stage"])
        for name, stage in self.record.slowest():
            times.add_metric([name], stage.seconds)
            calls.add_metric([name], stage.count)
        yield from (times, calls)

    def _executables(self) -> Iterator[Metric]:
        for name, what in EXECUTABLES:
            family = CounterMetricFamily(f"jaxinfer_{name}", what, labels=["model_name", "version", "executable"])
            for version in self.site.registry.models:
                for entry in version.model.ledger:
                    if entry.hits:
                        value = getattr(entry, name.removeprefix("executable_"))
                        family.add_metric([version.name, str(version.number), entry.name], value)
            yield family


def snapshot(site: Site, record: Record) -> dict[str, dict[str, float]]:
    """Gauges and counters of each model by name; versions that are loaded side by side are summed up, and what has gone
    is counted on."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    versions = site.registry.models
    for version in versions:
        numbers, stats = found[version.name], version.model.stats
        entries = list(version.model.ledger)
        done, padding = sum(entry.tokens for entry in entries), sum(entry.padding for entry in entries)
        numbers["padding_ratio"] = padding / max(done + padding, 1)
        numbers["weights_version"] = max(numbers["weights_version"], version.model.version)
        numbers["model_bytes"] += version.model.nbytes
        numbers["requests_waiting"] += stats.waiting
        if isinstance(stats, Statistics):
            for name, value in (("requests_running", stats.running), ("waiting_tokens", stats.waiting_tokens),
                                ("pages", stats.pages), ("pages_free", stats.pages_free),
                                ("pages_kept", stats.pages_kept)):
                numbers[name] += value
            numbers["page_use_ratio"] = max(numbers["page_use_ratio"], stats.pages_used / max(stats.pages, 1))
    for name, counted in record.counted(versions).items():
        found[name].update(counted)
    for name, seen in tuple(record.models.items()):
        totals = seen.totals
        found[name].update(prompt_tokens=totals["prompt"], generated_tokens=totals["generated"],
                           drawn_tokens=totals["drawn"], prefix_queries=totals["prompt"], prefix_hits=totals["reused"],
                           swaps=totals["swaps"], stops_revived=totals["revived"], stops_lost=totals["lost"])
    return found


def _names(name: str, theirs: Iterable[str]) -> list[str]:
    return [f"jaxinfer_{name}", *(f"vllm:{other}" for other in theirs)]


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
