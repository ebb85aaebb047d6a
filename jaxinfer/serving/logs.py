"""Logs as lines of JSON, each with the trace that it belongs to. No prompt, no answer and no key is in them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import anyio

from jaxinfer import events
from jaxinfer.errors import InvalidOption
from jaxinfer.serving.site import Part, Site
from jaxinfer.serving.trace import Trace

ROOT = logging.getLogger("jaxinfer")
REQUESTS, INCIDENTS = logging.getLogger("jaxinfer.requests"), logging.getLogger("jaxinfer.incidents")


def part(site: Site) -> Part:
    """Every request belongs to a trace (W3C Trace Context); JSON lines and an OpenTelemetry collector get to know of
    them as the settings say. Raises InvalidOption where OpenTelemetry is asked for and not installed."""
    tracing, settings = site.tracing, site.settings
    exporting = _exporter() if settings.otlp else None

    @asynccontextmanager
    async def living() -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if settings.json_logs or exporting is not None:
                stack.enter_context(events.observe(tell))
            if settings.json_logs:
                lines = logging.StreamHandler()
                lines.setFormatter(Json())
                stack.enter_context(handled_by(lines))
            if exporting is not None:
                exporter = exporting(site, settings.otlp)
                stack.push_async_callback(anyio.to_thread.run_sync, exporter.close)
                tracing.begin, tracing.end = exporter.begin, exporter.end
                stack.enter_context(events.observe(exporter.observe))
                stack.enter_context(handled_by(exporter.handler))
            yield

    return Part(around=tracing.around, living=living)


def _exporter() -> Any:
    """OpenTelemetry is imported only where it is used."""
    try:
        from jaxinfer.serving.otlp import Exporter
    except ImportError as error:
        raise InvalidOption(f'otlp needs {error.name}, which is not installed: pip install "jaxinfer[otel]"') from error
    return Exporter


@contextmanager
def handled_by(handler: logging.Handler):
    """Give the package's own log records to `handler`, from INFO on."""
    before = ROOT.level
    ROOT.addHandler(handler)
    ROOT.setLevel(logging.INFO)
    try:
        yield
    finally:
        ROOT.removeHandler(handler)
        ROOT.setLevel(before)


class Json(logging.Formatter):
    """One object a line: time, level, logger, message, the trace, and what the record brings in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name,
                "message": record.getMessage()}
        if isinstance(trace := events.tag(), Trace):
            line |= {"trace_id": trace.trace_id, "span_id": trace.span_id}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def tell(event: events.Event) -> None:
    """An observer: what became of each request, and what went wrong, as log records."""
    match event:
        case events.RequestEnded():
            with events.tagged(event.tag):
                REQUESTS.info("%s ended: %s", event.model, event.reason, extra={"fields": _fields(event)})
        case events.Stopped(model, why, revived):
            INCIDENTS.error("%s stopped: %s", model, why, extra={"fields": {"model": model, "revived": revived}})
        case events.Retried(requests, error):
            INCIDENTS.warning("a batch failed and is tried again: %s", error, extra={"fields": {"requests": requests}})
        case events.Missed(name, why, ran_on):
            INCIDENTS.info("a program was missing: %s", name, extra={"fields": {"why": why, "ran_on": ran_on}})
        case events.Swapped(model, version):
            INCIDENTS.info("%s runs on version %d", model, version, extra={"fields": {"model": model,
                                                                                     "version": version}})


def _fields(event: events.RequestEnded) -> dict[str, object]:
    fields: dict[str, object] = {"model": event.model, "reason": event.reason, "prompt_tokens": event.prompt_tokens,
                                 "tokens": event.tokens, "reused": event.reused}
    if marks := event.marks:
        fields["seconds"] = round(marks.ended - marks.submitted, 6)
        if marks.began is not None:
            fields["queue_seconds"] = round(marks.began - marks.submitted, 6)
        if first := min((times[0] for times in marks.drawn if times), default=None):
            fields["first_token_seconds"] = round(first - marks.submitted, 6)
    return fields
