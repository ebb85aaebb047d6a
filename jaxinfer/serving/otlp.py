"""OpenTelemetry over OTLP: a span for every part of a request, metrics by the conventions for generative AI, and logs
that name their trace. Needs the extra `otel`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from opentelemetry import trace as api
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, TraceState

from jaxinfer import events
from jaxinfer.serving.metrics import snapshot
from jaxinfer.serving.site import Site
from jaxinfer.serving.trace import Trace

PATIENCE = 3.0  # seconds that a batch is tried to be sent for
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/embeddings": "embeddings",
              "/v1/responses": "chat"}
SEVERITY = {logging.DEBUG: SeverityNumber.DEBUG, logging.INFO: SeverityNumber.INFO,
            logging.WARNING: SeverityNumber.WARN, logging.ERROR: SeverityNumber.ERROR,
            logging.CRITICAL: SeverityNumber.FATAL}
SECONDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
TOKENS = [4.0**n for n in range(14)]


class Exporter:
    """Sends traces, metrics and logs to the collector at `address`, in the background and in batches; one that is not
    there costs nothing but what is not seen. Intervals and sampling are OpenTelemetry's own (OTEL_BSP_SCHEDULE_DELAY,
    OTEL_METRIC_EXPORT_INTERVAL, OTEL_TRACES_SAMPLER, ...)."""

    def __init__(self, site: Site, address: str):
        address, resource = address.rstrip("/"), Resource.create({"service.name": "jaxinfer"})
        how = lambda kind: {"endpoint": f"{address}/v1/{kind}", "timeout": PATIENCE}
        self._traces = TracerProvider(resource=resource)
        self._traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(**how("traces"))))
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(**how("metrics")))
        self._metrics = MeterProvider(resource=resource, metric_readers=[reader])
        self._logs = LoggerProvider(resource=resource)
        self._logs.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter(**how("logs"))))
        self.handler = Handler(self._logs.get_logger("jaxinfer"))
        self._tracer, meter = self._traces.get_tracer("jaxinfer"), self._metrics.get_meter("jaxinfer")
        histogram = lambda name, unit, bounds: meter.create_histogram(
            f"gen_ai.{name}", unit, explicit_bucket_boundaries_advisory=bounds)
        self._duration = histogram("server.request.duration", "s", SECONDS)
        self._first = histogram("server.time_to_first_token", "s", SECONDS)
        self._each = histogram("server.time_per_output_token", "s", SECONDS)
        self._usage = histogram("client.token.usage", "{token}", TOKENS)
        for name, key in (("jaxinfer.requests.running", "requests_running"), ("jaxinfer.pages.use", "page_use_ratio"),
                          ("jaxinfer.requests.waiting", "requests_waiting")):
            meter.create_observable_gauge(name, [_observed(site, key)])

    def close(self) -> None:
        """Send what is left."""
        with ThreadPoolExecutor(3) as pool:  # each waits for a collector that is not there
            for provider in (self._traces, self._metrics, self._logs):
                pool.submit(provider.shutdown)

    # A request over HTTP.

    def begin(self, trace: Trace) -> None:
        parent = None
        if trace.parent is not None:
            state = TraceState.from_header([trace.state]) if trace.state else None
            parent = _context(trace.parent.trace_id, trace.parent.span_id, trace.parent.sampled, state, remote=True)
        trace.span = self._tracer.start_span(f"{trace.method} {trace.path}", parent, SpanKind.SERVER, {
            "http.request.method": trace.method, "url.path": trace.path}, start_time=trace.began_ns)
        found = trace.span.get_span_context()
        trace.trace_id, trace.span_id = f"{found.trace_id:032x}", f"{found.span_id:016x}"

    def end(self, trace: Trace) -> None:
        trace.span.set_attribute("http.response.status_code", trace.status)
        if trace.status >= 500:
            trace.span.set_status(StatusCode.ERROR)
        trace.span.end(trace.began_ns + int((time.perf_counter() - trace.began) * 1e9))  # the clock may have been set

    # What it asked of a model.

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RequestEnded) and event.marks is not None:
            self._spans(event, event.marks)
            self._measure(event, event.marks)

    def _spans(self, event: events.RequestEnded, marks: events.Marks) -> None:
        """The spans of one request, after the fact."""
        now, since = time.time_ns(), time.perf_counter()
        at = lambda seconds: now - int((since - seconds) * 1e9)
        parent = api.set_span_in_context(event.tag.span) if isinstance(event.tag, Trace) and event.tag.span else None
        name, attributes = self._described(event)
        whole = self._tracer.start_span(name, parent, SpanKind.INTERNAL, attributes, start_time=at(marks.submitted))
        inside = api.set_span_in_context(whole)

        def part(name: str, start: float, end: float, **attributes: Any) -> None:
            named = {f"jaxinfer.{key}": value for key, value in attributes.items()}
            self._tracer.start_span(name, inside, attributes=named, start_time=at(start)).end(at(end))

        part("queue", marks.submitted, marks.began or marks.ended)
        for start, end, tokens in marks.chunks:
            part("prefill", start, end, tokens=tokens)
        drawn = [times for times in marks.drawn if times]
        if drawn:
            last = max(times[-1] for times in drawn)
            part("decode", min(times[0] for times in drawn), last, tokens=sum(map(len, drawn)))
            part("detokenise", last, marks.ended, busy_seconds=marks.detokenised)
        elif marks.began is not None and not marks.chunks:
            part("compute", marks.began, marks.ended)
        if event.reason in ("failed", "expired", "rejected"):
            whole.set_attribute("error.type", event.reason)
            whole.set_status(StatusCode.ERROR)
        whole.end(at(marks.ended))

    def _described(self, event: events.RequestEnded) -> tuple[str, dict[str, Any]]:
        """A span's name and attributes, as the conventions for generative AI have them."""
        path = event.tag.path if isinstance(event.tag, Trace) else ""
        operation = OPERATIONS.get(path, "text_completion" if event.sampling else "infer")
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": operation, "gen_ai.provider.name": "jaxinfer", "gen_ai.request.model": event.model,
            "gen_ai.response.model": event.model, "gen_ai.usage.input_tokens": event.prompt_tokens,
            "gen_ai.usage.output_tokens": event.tokens, "gen_ai.usage.cache_read.input_tokens": event.reused,
            "gen_ai.response.finish_reasons": [event.reason]}
        if (sampling := event.sampling) is not None:
            attributes |= {f"gen_ai.request.{name}": getattr(sampling, name) for name in (
                "max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty")}
            attributes |= {"gen_ai.request.seed": sampling.seed} if sampling.seed is not None else {}
            attributes |= {"gen_ai.request.choice.count": sampling.n} if sampling.n > 1 else {}
        return f"{operation} {event.model}", attributes

    def _measure(self, event: events.RequestEnded, marks: events.Marks) -> None:
        _, described = self._described(event)
        same = {key: described[key] for key in ("gen_ai.operation.name", "gen_ai.provider.name",
                                                "gen_ai.request.model", "gen_ai.response.model")}
        failed = {"error.type": event.reason} if event.reason in ("failed", "expired", "rejected") else {}
        self._duration.record(marks.ended - marks.submitted, same | failed)
        drawn = [times for times in marks.drawn if times]
        if drawn:
            self._first.record(min(times[0] for times in drawn) - marks.submitted, same)
        for times in drawn:
            if len(times) > 1:
                self._each.record((times[-1] - times[0]) / (len(times) - 1), same)
        for kind, tokens in (("input", event.prompt_tokens), ("output", event.tokens)):
            self._usage.record(tokens, same | {"gen_ai.token.type": kind})


class Handler(logging.Handler):
    """Gives log records to OpenTelemetry, with the trace of the request that they belong to."""

    def __init__(self, logger: Any):
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            trace, context = events.tag(), None
            if isinstance(trace, Trace):
                context = api.set_span_in_context(trace.span) if trace.span else _context(trace.trace_id, trace.span_id)
            self._logger.emit(LogRecord(
                timestamp=int(record.created * 1e9), context=context, severity_text=record.levelname,
                severity_number=SEVERITY.get(record.levelno, SeverityNumber.UNSPECIFIED), body=record.getMessage(),
                attributes={"logger": record.name, **getattr(record, "fields", {})}))
        except Exception:
            self.handleError(record)


def _context(trace_id: str, span_id: str, sampled: bool = True, state: TraceState | None = None,
             remote: bool = False) -> Any:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return api.set_span_in_context(NonRecordingSpan(SpanContext(int(trace_id, 16), int(span_id, 16), remote, flags,
                                                                state)))


def _observed(site: Site, key: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(numbers[key], {"gen_ai.request.model": model})
                for model, numbers in snapshot(site, site.record).items() if key in numbers]

    return observe
