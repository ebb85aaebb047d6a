"""A live page about the server: requests, tokens a second, latencies, pages, programs, and how it started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jaxinfer.runtime.registry import ModelVersion
from jaxinfer.serving.metrics import snapshot
from jaxinfer.serving.profiling import Stages
from jaxinfer.serving.record import SHOWN, quantile
from jaxinfer.serving.site import Part, Site
from jaxinfer.serving.threads import WATCHING

PAGE = Path(__file__).with_name("dashboard.html")


def part(site: Site) -> Part:
    """`/dashboard`, one page that needs no other and holds nothing, and `/dashboard/data`, which it asks every second,
    with an API key where the server wants one."""
    page = PAGE.read_text()

    async def show(_: Request) -> Response:
        return HTMLResponse(page)

    async def data(_: Request) -> Response:
        body = await WATCHING.run(lambda: msgspec.json.encode(state(site)))
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    return Part(routes=[Route("/dashboard", show), Route("/dashboard/data", data)])


def state(site: Site) -> dict[str, Any]:
    """All that the page shows, as plain data."""
    numbers, record = snapshot(site, site.record), site.record
    models = []
    for name in sorted(numbers):
        seen = record.models.get(name)
        last = {key: tuple(seen.last[key]) if seen else () for key in SHOWN}
        models.append({
            "name": name, "numbers": numbers[name], "reasons": dict(seen.reasons) if seen else {},
            "latencies": {key: {f"p{p}": quantile(values, p / 100) for p in (50, 90, 99)}
                          for key, values in last.items() if values}})
    versions = [_version(version) for version in site.registry.models]
    loading = {name: str(found.error) if found.error else f"for {time.monotonic() - found.since:.0f} s"
               for name, found in site.loading.items()}
    return {"time": time.monotonic(), "since": record.since, "models": models, "versions": versions, "loading": loading,
            "stages": Stages(record).numbers()}


def _version(version: ModelVersion) -> dict[str, Any]:
    """A version's programs, how many of them are there, and the phases of its start."""
    model, coming = version.model, version.model.coming
    ledger = [{"name": e.name, "origin": e.origin, "seconds": e.seconds, "hits": e.hits, "usual": e.usual,
               "waste": e.waste, "bytes": e.bytes} for e in model.ledger]
    startup = [{"name": phase.name, "began": phase.began, "ended": phase.ended, "origin": phase.origin}
               for phase in getattr(model, "startup", ())]
    there = {"ready": coming.ready, "total": coming.total} if coming and not coming.ended else None
    return {"name": version.name, "number": version.number, "ledger": ledger, "startup": startup, "coming": there}
