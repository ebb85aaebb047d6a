"""The applications of a server, put together from their parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from jaxinfer.runtime.registry import Registry
from jaxinfer.serving import admin, dashboard, health, logs, metrics, openapi, profiling, threads
from jaxinfer.serving.guard import HANDLERS, Guard
from jaxinfer.serving.inference import part as inference
from jaxinfer.serving.openai import api as openai
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Part, Site

# One line for each protocol or observer; the first one's `around` is the outermost.
PARTS: tuple[Callable[[Site], Part], ...] = (logs.part, health.part, metrics.part, openai.part, inference.part,
                                             admin.part, profiling.part, dashboard.part)


def application(registry: Registry, *, settings: Settings | None = None) -> Starlette:
    """The public application over a registry, for any ASGI server."""
    site = Site(registry, settings or Settings())
    return public(site, parts_of(site))


def parts_of(site: Site) -> list[Part]:
    return [part(site) for part in PARTS]


def public(site: Site, parts: Sequence[Part]) -> Starlette:
    """What the public port serves. Its lifespan is that of the parts."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        threads.prepare_many()
        async with AsyncExitStack() as stack:
            try:
                for part in parts:
                    if part.living is not None:
                        await stack.enter_async_context(part.living())
            except Exception as error:
                site.failure = error
                raise
            yield

    operations = [operation for part in parts for operation in part.operations]
    routes = [openapi.route(operations, version("jaxinfer")), *(operation.route() for operation in operations),
              *(route for part in parts for route in part.routes)]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=HANDLERS)  # type: ignore[arg-type]
    app.state.site = site
    app.add_middleware(Guard, site=site, keys=site.settings.api_keys)
    for part in reversed(parts):
        if part.around is not None:
            app.add_middleware(part.around)  # type: ignore[arg-type]
    if origins := site.settings.allow_origins:  # outermost: a browser asks without a key whether it may ask
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"],
                           expose_headers=["x-request-id", "retry-after"])
    return app


def private(site: Site, parts: Sequence[Part]) -> Starlette:
    """What the admin port serves, to whoever has the admin token; also while the server stops."""
    assert site.settings.admin_token is not None
    app = Starlette(routes=[route for part in parts for route in part.admin],
                    exception_handlers=HANDLERS)  # type: ignore[arg-type]
    app.state.site = site
    app.add_middleware(Guard, site=site, keys=[site.settings.admin_token], admin=True)
    return app
