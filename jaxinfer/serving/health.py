"""Probes: whether the process lives, has started, and can serve, model by model. No probe enters a queue or waits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxinfer import events
from jaxinfer.errors import ModelNotFound
from jaxinfer.runtime.coming import Coming
from jaxinfer.runtime.registry import STABLE
from jaxinfer.runtime.supervisor import Supervisor
from jaxinfer.serving.site import Part, Site


def part(site: Site) -> Part:
    """`/livez`, `/startupz`, `/readyz` and `/health` (vLLM's name), with reasons as JSON; `?model=NAME` asks for one.
    While the server lives its models' threads are supervised."""
    health = Health(site)
    site.ready = lambda model: health.ready(model).ok
    routes = [Route(path, partial(_answer, probe)) for path, probe in (
        ("/livez", health.lives), ("/startupz", health.started), ("/readyz", health.ready), ("/health", health.ready))]
    return Part(routes=routes, living=health.watched)


@dataclass(frozen=True)
class State:
    """Whether the answer is yes, and of what it is made."""

    ok: bool
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    reason: str | None = None


class Health:
    """What is known of a site, from plain attributes alone: nothing here takes a lock of a model's."""

    def __init__(self, site: Site):
        self.site = site
        self.supervisor = Supervisor(lambda: [(version.name, version.model) for version in site.registry.models])
        self.progress: dict[tuple[str, str], tuple[float, events.Progress]] = {}  # when it came; of what is not done

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        with events.observe(self.observe):
            self.supervisor.start()
            try:
                yield
            finally:
                await anyio.to_thread.run_sync(self.supervisor.close)

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.Progress):
            if event.done < event.total:
                self.progress[event.what, event.name] = time.monotonic(), event
            else:
                self.progress.pop((event.what, event.name), None)

    def lives(self, _: str | None = None) -> State:
        """No while a model will not serve again, however long one waits: whoever supervises the process starts it
        anew."""
        lost = {}
        for version in self.site.registry.models:
            name, model = version.name, version.model
            labelled = version.number in self._labels(name).values()  # else it is on its way out
            if self.supervisor.hopeless(model) or (labelled and model.closed and not self.site.draining):
                lost[name] = {"ready": False, "reason": self.supervisor.trouble(model) or "it is closed"}
        return State(not lost, lost)

    def started(self, _: str | None = None) -> State:
        """Yes once every model that was asked for at the start is there, or has failed for good."""
        site = self.site
        failed = [name for name, loading in tuple(site.loading.items()) if loading.error is not None]
        coming = {name: self._loading(name) for name in sorted(site.asked.difference(site.registry, failed))}
        return State(not coming, coming)

    def ready(self, model: str | None = None) -> State:
        """Yes if `model` can serve now; None: if each one can that was asked for at the start, or is there."""
        site = self.site
        names = dict.fromkeys([*site.asked, *site.loading, *site.registry]) if model is None else [model]
        models = {name: self._model(name) for name in names}
        if self.site.draining:
            return State(False, models, "the server is stopping")
        if not models:
            return State(False, models, "no model is loaded")
        wanted = {*site.asked, *site.registry} if model is None else {model}
        return State(all(found["ready"] for name, found in models.items() if name in wanted), models)

    def _model(self, name: str) -> dict[str, Any]:
        labels = self._labels(name)
        number = labels.get(STABLE, max(labels.values(), default=None))  # without a stable one, the latest
        version = next((v for v in self.site.registry.models if v.name == name and v.number == number), None)
        if version is not None:
            model = version.model
            trouble = self.supervisor.trouble(model) or ("it is closed" if model.closed else None)
            return {"ready": trouble is None, "version": version.number, **({"reason": trouble} if trouble else {}),
                    **self._coming(model.coming)}
        return self._loading(name) if name in (*self.site.asked, *self.site.loading, *self.site.registry) else {
            "ready": False, "reason": "there is no such model"}

    def _told(self, kind: str, message: str) -> str:
        """What whoever asks may know of an error. A probe needs no key: where all else does, a message, with its paths
        and addresses, is for the log and the administration."""
        return kind if self.site.settings.api_keys else message

    def _labels(self, name: str) -> dict[str, int]:
        try:
            return self.site.registry.labels(name)
        except ModelNotFound:
            return {}

    def _loading(self, name: str) -> dict[str, Any]:
        loading = self.site.loading.get(name)
        if loading is not None and loading.error is not None:
            why = self._told(type(loading.error).__name__, str(loading.error))
            return {"ready": False, "reason": f"it could not be loaded: {why}"}
        seconds = {} if loading is None else {"seconds": round(time.monotonic() - loading.since, 1)}
        progress = [{"what": p.what, "name": p.name, "done": p.done, "total": p.total}
                    for at, p in tuple(self.progress.values())
                    if loading is None or at >= loading.since]  # else it is of one that has failed
        return {"ready": False, "reason": "it is being loaded", **seconds, "progress": progress}

    def _coming(self, coming: Coming | None) -> dict[str, Any]:
        """How far a model that serves already is with the rest of its programs, and what went wrong with them."""
        if coming is None or (coming.ended and not coming.failed):
            return {}
        failed = {name: self._told(why.partition(":")[0], why) for name, why in tuple(coming.failed.items())}
        return {"programs": {"ready": coming.ready, "total": coming.total, **({"failed": failed} if failed else {})}}


async def _answer(probe: Any, request: Request) -> Response:
    state = probe(request.query_params.get("model"))
    body = {"ok": state.ok, **({"reason": state.reason} if state.reason else {}), "models": state.models}
    return Response(msgspec.json.encode(body), 200 if state.ok else 503, media_type="application/json",
                    headers={"cache-control": "no-store"})
