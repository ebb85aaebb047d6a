"""What the parts of a server share, and what each of them adds to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from jaxinfer.runtime.registry import Registry
from jaxinfer.serving.record import Record
from jaxinfer.serving.settings import Settings


@dataclass
class Loading:
    """A model that was asked for and is not there: it is being loaded since `since` (time.monotonic()), or `error` says
    why it could not be."""

    since: float
    error: BaseException | None = None


@dataclass
class Site:
    """One server: its models, its settings, what is being loaded (by name), and whether it takes no more requests."""

    registry: Registry
    settings: Settings
    loading: dict[str, Loading] = field(default_factory=dict)
    draining: bool = False
    record: Record = field(default_factory=Record)  # of what it has seen


class Part(NamedTuple):
    """What a protocol or an observer adds to a server.

    `routes` of the public port, `admin` routes of the other one, which only who has the admin token gets to. `around`
    wraps the whole public application (ASGI middleware). `living` is entered before the first request and left after
    the last one.
    """

    routes: Sequence[BaseRoute] = ()
    admin: Sequence[BaseRoute] = ()
    around: Callable[[ASGIApp], ASGIApp] | None = None
    living: Callable[[], AbstractAsyncContextManager[object]] | None = None
