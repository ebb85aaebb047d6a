"""JAX's own persistent cache, for programs that are not `stored`: they are traced in each process, and found by what
was traced."""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jax

from jaxinfer.home import cache_dir

_thread = threading.local()

try:
    from jax._src import cache_key
    from jax._src.config import persistent_cache_min_compile_time_secs as _least_seconds

    def _keyed(before: Callable[[], str] = cache_key.custom_hook) -> str:
        return before() + "apart" * getattr(_thread, "apart", False)

    cache_key.custom_hook = _keyed  # JAX hashes what it returns into its keys
except (ImportError, AttributeError):  # then JAX keeps a second copy of what we store, and what it has is not stored
    _least_seconds = nullcontext


def cpu_features() -> str:
    """A digest of this CPU's instruction sets. JAX calls every CPU "cpu"; one's code can crash another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


def enable() -> None:
    """Turn on JAX's persistent compilation cache under `cache_dir()`, unless the user chose a place."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla" / cpu_features()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextmanager
def apart() -> Iterator[None]:
    """What this thread compiles inside the `with` block is neither taken from JAX's cache nor put there: XLA for CPUs
    writes a program that it has read without the functions that it calls."""
    before, _thread.apart = getattr(_thread, "apart", False), True
    try:
        with _least_seconds(float("inf")):
            yield
    finally:
        _thread.apart = before


@contextmanager
def watch() -> Iterator[list[bool]]:
    """Collects one True for each program that this thread takes from the cache inside the `with` block."""
    before, _thread.hits = getattr(_thread, "hits", None), []
    try:
        yield _thread.hits
    finally:
        _thread.hits = before


def _listen(event: str, **_) -> None:
    hits = getattr(_thread, "hits", None)
    if event == "/jax/compilation_cache/cache_hits" and hits is not None:
        hits.append(True)


jax.monitoring.register_event_listener(_listen)
