"""What comes out of OTLP: a receiver over HTTP, which decodes with OpenTelemetry's own messages, and short ways to what
is in them."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

KINDS = {"/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest,
         "/v1/logs": ExportLogsServiceRequest}
Received = dict[str, list]


@contextmanager
def collector() -> Iterator[tuple[str, Received]]:
    """A receiver of OTLP over HTTP: its address, and what has come by path."""
    received: Received = {path: [] for path in KINDS}

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            received[self.path].append(KINDS[self.path].FromString(body))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        server.server_close()


def spans(received: Received) -> list:
    return [span for export in received["/v1/traces"] for resource in export.resource_spans
            for scope in resource.scope_spans for span in scope.spans]


def metrics(received: Received) -> dict:
    """The last of each name."""
    return {metric.name: metric for export in received["/v1/metrics"] for resource in export.resource_metrics
            for scope in resource.scope_metrics for metric in scope.metrics}


def records(received: Received) -> list:
    return [record for export in received["/v1/logs"] for resource in export.resource_logs
            for scope in resource.scope_logs for record in scope.log_records]


def attributes(item) -> dict:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in item.attributes}
