"""JAX's own persistent cache, for programs that are not `stored`: they are traced in each process, and found by what
was traced."""

from __future__ import annotations

import hashlib
import platform
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import jax

from jaxinfer.home import cache_dir

try:
    from jax._src.config import persistent_cache_min_compile_time_secs as _least_seconds
except ImportError:  # then JAX keeps a second copy of what we store
    _least_seconds = nullcontext

_found = threading.local()


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


def unwritten(yes: bool) -> AbstractContextManager[object]:
    """What this thread compiles inside the `with` block is not put into JAX's cache."""
    return _least_seconds(float("inf")) if yes else nullcontext()


@contextmanager
def watch() -> Iterator[list[bool]]:
    """Collects one True for each program that this thread takes from the cache inside the `with` block."""
    if not hasattr(_found, "hits"):
        _found.hits = None
    before, _found.hits = _found.hits, []
    try:
        yield _found.hits
    finally:
        _found.hits = before


def _listen(event: str, **_) -> None:
    hits = getattr(_found, "hits", None)
    if event == "/jax/compilation_cache/cache_hits" and hits is not None:
        hits.append(True)


jax.monitoring.register_event_listener(_listen)
