"""Profiles on demand, on the admin port: what the host computes, what the device holds, what XLA does, which stages are
slow."""

from __future__ import annotations

import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxinfer.compiler.ledger import Table
from jaxinfer.errors import InvalidRequest, Rejected
from jaxinfer.serving import sampling
from jaxinfer.serving.record import Record, quantile
from jaxinfer.serving.site import Part, Site
from jaxinfer.serving.threads import OPERATING

MOST = 300.0  # seconds of one profile
BINARY = "application/octet-stream"
_busy = threading.Lock()  # one profile at a time: two would measure each other


def part(site: Site) -> Part:
    """`/debug/pprof/profile?seconds=5` and `/debug/pprof/heap` for `go tool pprof`, `/debug/flame?seconds=5` as a page,
    `/debug/xla?seconds=2` a zip whose perfetto_trace.json.gz ui.perfetto.dev opens, `/debug/stages` the slowest."""

    async def cpu(request: Request) -> Response:
        found = await _taken(partial(sampling.profile, seconds(request)))
        return _file(found.pprof(), "profile.pb.gz")

    async def flame(request: Request) -> Response:
        found = await _taken(partial(sampling.profile, seconds(request)))
        return HTMLResponse(found.flame())

    async def heap(_: Request) -> Response:
        return _file(await OPERATING.run(device_memory), "heap.pb.gz")

    async def stages(request: Request) -> Response:
        found = Stages(site.record)
        if "application/json" in request.headers.get("accept", ""):
            return Response(msgspec.json.encode(found.numbers()), media_type="application/json")
        return HTMLResponse(f"<!doctype html><title>jaxinfer: stages</title>{found._repr_html_()}")

    return Part(admin=[Route("/debug/pprof/profile", cpu), Route("/debug/pprof/heap", heap),
                       Route("/debug/xla", Traced(), methods=["GET"]), Route("/debug/flame", flame),
                       Route("/debug/stages", stages)])


def seconds(request: Request) -> float:
    """What the query asks for, 5 if nothing. Raises InvalidRequest."""
    said = request.query_params.get("seconds", "5")
    try:
        value = float(said)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST:
        raise InvalidRequest(f"seconds is {said!r}; it must be a number above 0, and {MOST:g} at most")
    return value


@contextmanager
def alone() -> Iterator[None]:
    """Raises Rejected while another profile is being taken."""
    if not _busy.acquire(blocking=False):
        raise Rejected("another profile is being taken; try again when it is done", 1, 5.0)
    try:
        yield
    finally:
        _busy.release()


async def _taken(take: Any) -> Any:
    with alone():
        return await OPERATING.run(take)


def device_memory() -> bytes:
    """What the device's memory holds, by who allocated it: pprof, gzipped."""
    return jax.profiler.device_memory_profile()


class Traced:
    """An XLA trace as an ASGI application: it may be large, and lies on the disk until it has been sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with tempfile.TemporaryDirectory(prefix="jaxinfer-trace-") as folder:
            packed = Path(folder, "xla_trace.zip")
            await _taken(partial(xla_trace, seconds(Request(scope)), packed))
            await FileResponse(packed, media_type=BINARY, filename=packed.name)(scope, receive, send)


def xla_trace(seconds: float, packed: Path) -> None:
    """Write what the host and the device do for so long, as a zip of what JAX's profiler writes."""
    with tempfile.TemporaryDirectory(prefix="jaxinfer-trace-") as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            time.sleep(seconds)
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(folder))


@dataclass(repr=False)
class Stages(Table):
    """What requests spend their time on, the stage that took the most in all first. Percentiles are of the last ones.

    >>> Stages(Record())
    stage  count  total s  share  p50 ms  p90 ms  p99 ms
    """

    columns = ("stage", "count", "total s", "share", "p50 ms", "p90 ms", "p99 ms")
    record: Record

    def numbers(self) -> list[dict[str, Any]]:
        found = self.record.slowest()
        total = sum(stage.seconds for _, stage in found) or 1.0
        return [{"stage": name, "count": stage.count, "seconds": stage.seconds, "share": stage.seconds / total,
                 **{f"p{percent}": quantile(tuple(stage.last), percent / 100) for percent in (50, 90, 99)}}
                for name, stage in found]

    def rows(self) -> list[tuple[str, ...]]:
        return [(n["stage"], str(n["count"]), f"{n['seconds']:.3f}", f"{n['share']:.0%}",
                 *(f"{n[p] * 1e3:.3f}" for p in ("p50", "p90", "p99"))) for n in self.numbers()]


def _file(body: bytes, name: str) -> Response:
    return Response(body, media_type=BINARY, headers={"content-disposition": f'attachment; filename="{name}"'})
