"""What the parts of a server share, and what each of them adds to it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from jaxinfer.errors import InvalidOption
from jaxinfer.runtime.registry import Registry
from jaxinfer.serving.operations import Operation
from jaxinfer.serving.record import Record
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.trace import Tracing


@dataclass
class Loading:
    """A model that was asked for and is not there: it is being loaded since `since` (time.monotonic()), or `error` says
    why it could not be."""

    since: float
    error: BaseException | None = None


@dataclass
class Site:
    """One server: its models, its settings, what is being loaded (by name), how many requests are `running`, and
    whether it takes no more of them (`draining`). It is ready without models that nobody `asked` for at its start, as
    long as they are not there."""

    registry: Registry
    settings: Settings
    asked: frozenset[str] = frozenset()
    loading: dict[str, Loading] = field(default_factory=dict)
    ready: Callable[[str | None], bool] = lambda _: True  # whether a model, or the whole, can serve: health knows
    draining: bool = False
    running: int = 0
    over: bool = False  # whether what runs has had its grace
    grpc_port: int | None = None  # that gRPC listens on
    failure: BaseException | None = None  # why the server could not start
    loaded: set[str] = field(default_factory=set)  # names whose models are the server's own, to be closed with it
    record: Record = field(default_factory=Record)  # of what it has seen
    tracing: Tracing = field(default_factory=Tracing)

    def load(self, name: str, make: Callable[[], Any], **options: Any) -> int:
        """`Registry.load`, which `loading` tells of meanwhile, and afterwards if it failed and there is no other
        version."""
        entry = self.loading[name] = Loading(time.monotonic())
        try:
            number = self.registry.load(name, make, **options)
        except BaseException as error:
            entry.error = error
            if name in tuple(self.registry):  # the version that was there serves on
                self._come(name, entry)
            raise
        self.loaded.add(name)
        self._come(name, entry)
        return number

    def _come(self, name: str, entry: Loading) -> None:
        """There is a version now; another may still be loaded."""
        if (found := self.loading.get(name)) is entry or (found is not None and found.error is not None):
            self.loading.pop(name, None)


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises InvalidOption for names that are none of a function's keywords."""
    known = {name for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY}
    if unknown := sorted(set(options) - known):
        raise InvalidOption(f"options has {', '.join(unknown)}; known are {', '.join(sorted(known))}")


class Part(NamedTuple):
    """What a protocol or an observer adds to a server.

    `operations` and `routes` of the public port, of which the former are documented in /openapi.json; `admin` routes of
    the other port, which only who has the admin token gets to. `around` wraps the whole public application (ASGI
    middleware). `living` is entered before the first request and left after the last one.
    """

    operations: Sequence[Operation] = ()
    routes: Sequence[BaseRoute] = ()
    admin: Sequence[BaseRoute] = ()
    around: Callable[[ASGIApp], ASGIApp] | None = None
    living: Callable[[], AbstractAsyncContextManager[object]] | None = None
