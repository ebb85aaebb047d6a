"""The applications of a server, put together from their parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from starlette.applications import Starlette

from jaxinfer.runtime.registry import Registry
from jaxinfer.serving import dashboard, health, logs, metrics, profiling
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Part, Site

# One line for each protocol or observer; the first one's `around` is the outermost.
PARTS: tuple[Callable[[Site], Part], ...] = (logs.part, health.part, metrics.part, profiling.part, dashboard.part)


def application(registry: Registry, *, settings: Settings | None = None) -> Starlette:
    """The public application over a registry, for any ASGI server."""
    site = Site(registry, settings or Settings())
    return public(site, [part(site) for part in PARTS])


def public(site: Site, parts: Sequence[Part]) -> Starlette:
    """What the public port serves. Its lifespan is that of the parts."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for part in parts:
                if part.living is not None:
                    await stack.enter_async_context(part.living())
            yield

    app = Starlette(routes=[route for part in parts for route in part.routes], lifespan=lifespan)
    app.state.site = site
    for part in reversed(parts):
        if part.around is not None:
            app.add_middleware(part.around)  # type: ignore[arg-type]
    return app
