"""A server that runs: `jaxinfer.serve`, and what `jaxinfer serve` waits for."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from jaxinfer.errors import InvalidOption, ModelNotFound
from jaxinfer.runtime import load as loading
from jaxinfer.runtime.living import Living
from jaxinfer.runtime.registry import Registry
from jaxinfer.serving.app import parts_of, private, public
from jaxinfer.serving.settings import Settings
from jaxinfer.serving.site import Site, check_options
from jaxinfer.serving.transport import Protocol

LAST = 2  # seconds for what is still being sent when everything has ended
POLL = 0.01


class Server:
    """An application that listens, in a thread of its own. Leaving the `with` block closes it.

    `url` is where OpenAI's clients find it (their `base_url` is `url + "/v1"`), `admin_url` where the administration
    is, `grpc_address` where gRPC is (None where there is none). Its `registry` may be changed at any time.
    """

    def __init__(self, registry: Registry, settings: Settings, asked: Iterable[str] = ()):
        self.registry, self.settings = registry, settings
        self.site = Site(registry, settings, frozenset(asked))
        self._closing, self._hurried = threading.Lock(), False
        parts, self._failure = parts_of(self.site), list[BaseException]()
        self._sockets, self._servers = list[socket.socket](), list[uvicorn.Server]()
        try:
            self._listen(public(self.site, parts), settings.host, settings.port, "on")
            if settings.admin_port is not None:
                self._listen(private(self.site, parts), settings.admin_host, settings.admin_port, "off")
        except BaseException:
            self._close_sockets()
            raise
        self.url, self.admin_url, *_ = [*map(self._url, self._sockets), None]
        self._thread = threading.Thread(target=self._run, name="jaxinfer-server", daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not all(server.started for server in self._servers):
            time.sleep(POLL)
        if failure := self.site.failure or next(iter(self._failure), None):
            self._thread.join()
            raise failure

    @property
    def grpc_address(self) -> str | None:
        return None if self.site.grpc_port is None else f"{_reachable(self.settings.host)}:{self.site.grpc_port}"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<jaxinfer server at {self.url}: {', '.join(self.registry) or 'no model yet'}>"

    def load(self, name: str, source: str | Path, **options: Any) -> int:
        """Load a model while the server runs; it is ready when this returns. `options` are `jaxinfer.load`'s."""
        check_options(loading.load, options)
        return self.site.load(name, partial(loading.load, source, **options))

    def close(self, grace: float | None = None) -> None:
        """Stop: what comes from now on is answered with 503, and what runs may go on for `grace` seconds (by default
        those of the settings). What has not ended then fails. Models that the server has loaded are closed."""
        with self._closing:
            self.site.draining = True
            end = time.monotonic() + (self.settings.grace if grace is None else grace)
            while self.site.running and time.monotonic() < end and not self._hurried:
                time.sleep(POLL)
            self.site.over, mine = True, set(self.site.loaded)
            those = [version.model for version in self.registry.models if version.name in mine]
            with ThreadPoolExecutor(len(those) or 1) as pool:  # one that waits for its compiles holds no other up
                list(pool.map(lambda model: model.close(), those))
            forgetting = threading.Thread(target=self._forget, args=(mine,), name="jaxinfer-forget", daemon=True)
            forgetting.start()
            forgetting.join(LAST)  # whoever loads another version holds its name, and cannot be stopped
            self.site.loaded.clear()
            for server in self._servers:
                server.should_exit = True
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _forget(self, names: set[str]) -> None:
        for name in names:
            with suppress(ModelNotFound):
                self.registry.unload(name, drain=0)

    def hurry(self) -> None:
        """End the grace that `close` gives, from another thread or a signal's handler."""
        self._hurried = True

    def _listen(self, app: ASGIApp, host: str, port: int, lifespan: Any) -> None:
        settings = self.settings
        config = uvicorn.Config(
            app, lifespan=lifespan, log_config=None, access_log=False, server_header=False, ws="none", http=Protocol,
            timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # a fraction does as well
            timeout_graceful_shutdown=LAST, h11_max_incomplete_event_size=settings.max_head,
            ssl_certfile=settings.certificate, ssl_keyfile=settings.private_key)
        try:
            config.load()
        except (ssl.SSLError, OSError) as error:
            raise InvalidOption(f"certificate and private_key are no pair for TLS: {error}") from error
        self._sockets.append(_bound(host, port, settings.stall_timeout))
        self._servers.append(uvicorn.Server(config))

    def _url(self, listening: socket.socket) -> str:
        host, port, *_ = listening.getsockname()
        return f"{'https' if self.settings.certificate else 'http'}://{_reachable(host)}:{port}"

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # uvicorn exits the process where it cannot begin
            self._failure.append(RuntimeError("the server could not start; its log says why") if isinstance(
                error, SystemExit) else error)
        finally:
            self._close_sockets()

    async def _serve(self) -> None:
        await asyncio.gather(*(server.serve([at]) for server, at in zip(self._servers, self._sockets, strict=True)))

    def _close_sockets(self) -> None:
        for one in self._sockets:
            one.close()


def _reachable(host: str) -> str:
    """A host that listens, as a client of this machine writes it in an address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _bound(host: str, port: int, stall_timeout: float) -> socket.socket:
    """A socket that listens. The kernel drops connections whose other end takes nothing for so long."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * stall_timeout))
            bound.bind(address)
            bound.listen(2048)
            bound.setblocking(False)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise InvalidOption(f"host {host!r} and port {port}: nothing can listen there: {error.strerror}") from error
    return bound


def serve(models: Any, *, load: Mapping[str, Any] | None = None, **settings: Any) -> Server:
    """Serve models over HTTP, to OpenAI's clients and others, from a thread: in a script, a notebook or a test.

    `models`: what `jaxinfer.load` takes or returns (an Endpoint too), a list of these, a dict from names to these, or a
    Registry, which may be changed meanwhile. What is given as a source is loaded with the options `load`, and closed
    with the server; models and registries stay the caller's. `settings` are those of
    `jaxinfer.serving.settings.Settings`: `port=0` takes a free port, `api_keys=["..."]` asks for one of these.

    Returns a `Server` whose models are ready. Raises InvalidOption, or what `load` raises.

    >>> import jaxinfer as ji
    >>> with ji.endpoint(lambda x: 2 * x, example=0.0, max_batch=2) as double, ji.serve(double, port=0) as server:
    ...     server.url.startswith("http://127.0.0.1:")
    True
    """
    found = Settings(**_known(settings))
    if isinstance(models, Registry):
        if load is not None:
            raise InvalidOption("load is for sources; a registry's models are loaded already")
        return Server(models, found)
    named = named_models(models)
    server = Server(Registry(), found, named)
    try:
        for name, model in named.items():
            if isinstance(model, Living):
                server.registry.load(name, partial(_itself, model))
            else:
                server.load(name, model, **(load or {}))
    except BaseException:
        server.close(grace=0)
        raise
    return server


def _itself(model: Any) -> Any:
    return model


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(settings) - set(Settings.__dataclass_fields__))
    if unknown:
        raise InvalidOption(f"unknown settings {unknown}; known are {sorted(Settings.__dataclass_fields__)}")
    if "api_keys" in settings and isinstance(settings["api_keys"], list):
        settings["api_keys"] = tuple(settings["api_keys"])
    return settings


def named_models(models: Any) -> dict[str, Any]:
    """Names and what they stand for: a source by its own, such as "org/name", and a path by the last part of it."""
    if isinstance(models, Mapping):
        return dict(models)
    many = [models] if isinstance(models, str | Path | Living) else list(models) if isinstance(models, Iterable) else []
    named: dict[str, Any] = {}
    for model in many:
        name = _name(model)
        if name in named:
            raise InvalidOption(f"models has two of the name {name!r}; give a dict from names to models")
        named[name] = model
    if not named:
        raise InvalidOption("models is empty; it must be a source, a model, several of them, or a Registry")
    return named


def _name(model: Any) -> str:
    if isinstance(model, Living):
        return getattr(model, "name", None) or "model"
    path = Path(model)
    return path.name.removesuffix(".gguf").removesuffix(".onnx") if path.exists() else str(model)
