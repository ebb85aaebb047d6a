"""What tests do to a model that runs: wait for it, hold its engine still, make a step slow, look into its pages."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from jaxinfer import events
from jaxinfer.compiler import Key

IN_HASTE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # for another process: what the fixture `in_haste` is for this one


def eventually(condition: Callable[[], object], seconds: float = 60) -> object:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def all_free(lm) -> bool:
    """Whether nothing runs or waits, and every page could be had (promise 4)."""
    engine, scheduler = lm._engine, lm._engine.scheduler
    pools = scheduler.tree.pools.items()
    return (not scheduler.sequences and not engine.queue.waiting and not engine.queue.waiting_tokens
            and all(scheduler.tree.obtainable(name) == pool.size for name, pool in pools))


def at_rest(lm) -> bool:
    """Whether all is free, and nobody waits for anything."""
    return all_free(lm) and not lm._delivery._tickets


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextmanager
def hooked(lm, hook: Callable[[Key], Callable | None]) -> Iterator[None]:
    """In the engine's thread, before a step finds one of its programs: call `hook` with its key. What `hook` returns
    takes the program's place."""
    executables, before = lm._engine.executables, lm._engine.executables.get
    executables.get = lambda key, *counts: hook(key) or before(key, *counts)
    try:
        yield
    finally:
        executables.get = before


@contextmanager
def held(lm) -> Iterator[threading.Event]:
    """The engine stops before its next step until the block ends; what it yields says that it has."""
    stopped, go = threading.Event(), threading.Event()

    def hold(key):
        if not isinstance(key.shape, int):
            stopped.set()
            go.wait(60)

    with hooked(lm, hold):
        try:
            yield stopped
        finally:
            go.set()


@contextmanager
def blocked(lm, **options) -> Iterator[None]:
    """A request is in the engine's hands, and the engine stands still before its step: what comes now waits."""
    with held(lm) as stopped:
        answer = lm.submit([9, 9], max_tokens=200, ignore_eos=True, reuse=False, **options)
        assert stopped.wait(60), "the engine did not come to its next step"
        try:
            yield
        finally:
            answer.cancel()


def endings() -> AbstractContextManager[list[events.RequestEnded]]:
    """Every RequestEnded of the block."""
    return seen_events(events.RequestEnded)


def retries() -> AbstractContextManager[list[events.Retried]]:
    """Every Retried of the block."""
    return seen_events(events.Retried)


@contextmanager
def seen_events(kind: type) -> Iterator[list]:
    seen: list = []
    with events.observe(lambda event: seen.append(event) if isinstance(event, kind) else None):
        yield seen
