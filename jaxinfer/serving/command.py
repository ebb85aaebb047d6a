"""`jaxinfer serve`: listen, load, wait for a signal, let what runs end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from jaxinfer import events
from jaxinfer.errors import InvalidOption, JaxinferError
from jaxinfer.runtime.registry import Registry
from jaxinfer.serving.server import Server, named_models
from jaxinfer.serving.settings import Settings

POLL = 0.05
PATIENCE = 6  # seconds for what is still sent when everybody has been answered, to clients and to a collector
FILES = 65536  # that may be open: each connection is one, and many shells start a process with 1,024


def serve(models: Sequence[str], settings: Settings, options: dict[str, Any], say: Callable[[str], None]) -> int:
    """Serve until a signal comes; returns the exit code. It listens before the models are loaded, and a model that
    cannot be loaded leaves the others alone; if that is all of them, their errors are all there is to say."""
    named = _named(models)
    allow_files()
    server = Server(Registry(), settings, named)
    others = {"gRPC": server.grpc_address, "the administration": server.admin_url}
    say(f"listening on {server.url}" + "".join(f", for {what} on {where}" for what, where in others.items() if where))
    ready, heard = list[str](), list[int]()
    loader = threading.Thread(target=_load, args=(server, named, options, say, ready), name="jaxinfer-load",
                              daemon=True)

    def hear(number: int, _: object) -> None:  # takes no lock: the main thread, which it interrupts, may hold that
        if heard:
            server.hurry()  # whoever asks twice does not want to wait
        heard.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    loader.start()
    try:
        while not heard and (loader.is_alive() or ready):
            time.sleep(POLL)
        failed = not heard
        if not failed:
            say(f"stopping: {server.site.running} requests may go on for {settings.grace:g} s")
        if not _closed(server) or loader.is_alive():
            os._exit(0)  # a compile does not end when it is told to, and everybody has been answered
        return 2 if failed else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _closed(server: Server) -> bool:
    """Close it, and wait until nobody is served any more, for no longer than the grace, and a little longer: whether
    all that it had has ended."""
    server.site.draining, end = True, time.monotonic() + server.settings.grace
    closing = threading.Thread(target=server.close, name="jaxinfer-close", daemon=True)
    closing.start()
    while closing.is_alive() and server.site.running and time.monotonic() < end:
        time.sleep(POLL)
    closing.join(PATIENCE)
    return not closing.is_alive()


def allow_files() -> None:
    """Let this process have as many open files as it may, up to `FILES`."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; a container may forbid the change
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
        if resource.RLIM_INFINITY != now < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _named(models: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for said in models:
        name, equals, source = said.partition("=")
        found = {name: source} if equals and name and source else named_models(said)
        for name, source in found.items():
            if name in named or "@" in name:
                raise InvalidOption(f"{said!r} would be called {name!r}, which is taken or has an @ in it; give it "
                                    "another name, as NAME=MODEL")
            named[name] = source
    return named


def _load(server: Server, named: dict[str, str], options: dict[str, Any], say: Callable[[str], None],
          ready: list[str]) -> None:
    """In a thread of its own: the main one waits for signals. `ready` gets the names of those that were loaded."""
    for name, source in named.items():
        start = time.monotonic()
        try:
            server.load(name, source, **options)
        except Exception as error:  # whatever is wrong with it, the others are loaded
            if not isinstance(error, JaxinferError):
                events.report()
            say(f"error: {name} could not be loaded: {error}")
        else:
            ready.append(name)
            coming = next((version.model.coming for version in server.registry.models if version.name == name), None)
            more = f"; {coming.total - coming.ready} more programs come in the background" if coming else ""
            say(f"{name} is ready, after {time.monotonic() - start:.1f} s{more}")
