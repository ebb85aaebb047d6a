"""Compiled programs by key: compiled once in the background, found without a lock, listed in a ledger."""

from __future__ import annotations

import os
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import events, kernels
from jaxinfer.compiler import cache, stored
from jaxinfer.compiler.fingerprint import Unknown
from jaxinfer.compiler.ledger import Entry, Ledger
from jaxinfer.compiler.placement import Placement
from jaxinfer.errors import Closed, CorruptFile, UntrustedCache
from jaxinfer.kernels.op import Tracing

THREADS = "jaxinfer-compile"  # those that compile, store, or have something compiled


class Programs:
    """The compiled programs of one model on one device, or as it is placed on several. `lower(key)` says what a key's
    program is; `str(key)` is its name. `forced` names implementations that ops take wherever they can. Two are compiled
    at a time; one where there are two cores, whose second one XLA uses itself. What is waited for is the next, then
    what was asked for first.

    A program that was compiled once, here or in another process, is taken from the disk instead (`stored`): nothing is
    traced for it.
    """

    params: Any  # the weights' shapes and dtypes
    machine: tuple[Any, ...] | None = None  # that `stored.machine_of` told of, if it is another one

    def __init__(self, device: jax.Device | Placement, *, name: str, platform: str | None = None,
                 forced: Mapping[str, str] | None = None):
        self.name = name
        self.place = device if isinstance(device, Placement) else Placement(device)
        self.platform, self.forced = platform or self.place.device.platform, forced or {}
        self.ledger = Ledger()
        self.usual: dict[Any, float] = {}  # seconds that what runs a key takes
        self.awaited: Any = None  # the key that `get` waits for,
        self.waited = 0.0  # and the seconds that it has waited
        self._ready: dict[Any, Callable] = {}
        self._pending: dict[Any, Future] = {}
        self._turns: dict[Any, Future] = {}  # what of it no thread has begun
        self._lock = threading.RLock()
        threads = min(2, max(1, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=THREADS)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=THREADS)

    @abstractmethod
    def lower(self, key: Any) -> jax.stages.Lowered:
        """The program of `key` for abstract arguments."""

    @abstractmethod
    def traced(self, key: Any) -> Any:
        """All that `lower(key)` reads and that another model's would not. Raises Unknown where it cannot be told."""

    def _like(self, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.place.whole)

    def _array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.place.whole)

    def _tracing(self) -> AbstractContextManager[Tracing]:
        where = self.place.mesh, self.place.axes, self.place.device.device_kind
        return kernels.tracing(self.platform, self.forced, *where)

    def chosen(self, key: Any) -> Mapping[str, str]:
        """The implementations that a program takes, by op: once it is compiled if that has been started, else it is
        only traced."""
        if pending := self._pending.get(key):
            pending.result()
            return self.ledger[str(key)].kernels
        with self._tracing() as trace:
            self.lower(key)
        return trace.chosen

    def _make(self, key: Any) -> Callable:
        """Take the program of `key` from the disk, or compile it and put it there."""
        name = str(key)
        events.emit(events.Compiling(name))
        entry = self.ledger[name]
        entry.began = time.perf_counter()
        stored_as = self._stored_as(key)
        compiled = self._load(stored_as, entry) or self._compile(key, stored_as, entry)
        entry.seconds = time.perf_counter() - entry.began
        with self._lock:
            if key in self._pending:  # else it was forgotten meanwhile
                self._ready[key] = self.place.ordered(compiled)
        events.emit(events.Compiling(name, entry.seconds, entry.origin))
        return compiled

    def _stored_as(self, key: Any) -> str | None:
        """The name of a program on the disk, None if it is not to be there."""
        if stored.store() is None or not self.place.is_local:
            return None
        try:
            return stored.key((type(self).traced, key, self.traced(key)), self.platform, self.place, self.forced,
                              self.machine)
        except Unknown as why:
            events.emit(events.NotStored(str(key), f"it is made of {why}"))
            return None

    def _load(self, stored_as: str | None, entry: Entry) -> jax.stages.Compiled | None:
        where = stored.store()
        if stored_as is None or where is None:
            return None
        try:
            found = where.get(stored_as)
            if found is None:
                return None
            note, payload = found
            chosen, temporaries = note["kernels"], note["bytes"]
            compiled = stored.unpack(payload, self.place, stored_as)
        except (CorruptFile, UntrustedCache, OSError, KeyError) as why:
            events.emit(events.NotStored(entry.name, str(why)))
            return None
        entry.origin, entry.kernels, entry.bytes, entry.read = "disk", chosen, temporaries, len(payload)
        return compiled

    def _compile(self, key: Any, stored_as: str | None, entry: Entry) -> jax.stages.Compiled:
        start = time.perf_counter()
        with cache.watch() as hits, self._tracing() as trace:
            lowered = self.lower(key)
            if stored_as is not None and (why := stored.obstacle(lowered)):
                events.emit(events.NotStored(entry.name, why))
                stored_as = None
            with cache.apart() if stored_as is not None else nullcontext():
                compiled = lowered.compile()
        entry.origin = "disk" if hits else "compiled"
        entry.kernels = dict(trace.chosen)
        entry.bytes = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
        if stored_as is not None and hits:  # by a JAX that has no way to compile `apart`
            events.emit(events.NotStored(entry.name, "JAX's own cache has it"))
        elif stored_as is not None:
            note = {"model": self.name, "program": entry.name, "device": self.place.device.device_kind,
                    "kernels": entry.kernels, "bytes": entry.bytes, "seconds": time.perf_counter() - start}
            self._writer.submit(self._store, stored_as, note, compiled)
        return compiled

    def _store(self, stored_as: str, note: dict[str, Any], compiled: jax.stages.Compiled) -> None:
        where = stored.store()
        try:
            if where is not None:
                where.put(stored_as, note, stored.pack(compiled))
        except Exception as why:  # a full disk, another user's folder, a program that JAX cannot write
            events.emit(events.NotStored(note["program"], str(why)))

    def prepare(self, *keys: Any) -> list[Future]:
        """Start compiling what has not been started, or has failed."""
        with self._lock:
            for key in keys:
                if key not in self._pending or _failed(self._pending[key]):
                    try:
                        self._pool.submit(self._take_turn)
                    except RuntimeError as error:
                        raise Closed() from error
                    self._pending[key] = self._turns.setdefault(key, Future())
            return [self._pending[key] for key in keys]

    def _take_turn(self) -> None:
        with self._lock:
            ahead = self.place.is_local and self.awaited in self._turns  # processes of a mesh compile in one order
            key = self.awaited if ahead else next(iter(self._turns), None)
            future = self._turns.pop(key, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._make(key))
        except BaseException as error:
            future.set_exception(error)

    def fetch(self, *keys: Any) -> Future:
        """Start to take in the background what is on the disk; what is not waits until it is needed."""
        def one_by_one() -> None:
            for key in keys:
                stored_as, where = self._stored_as(key), stored.store()
                if stored_as and where and where.has(stored_as):
                    self.prepare(key)

        return self._pool.submit(one_by_one)

    def compile_all(self, *keys: Any) -> None:
        """Compile these now. Raises what the first that fails raises."""
        for future in self.prepare(*keys):
            future.result()

    def get(self, key: Any, real: int = 1, padded: int = 1) -> Callable:
        """The program of `key`, waited for if need be, and counted as a hit: `real` of `padded` are no padding."""
        found = self._ready.get(key) or self._await(key)
        entry = self.ledger[str(key)]
        entry.hits += 1
        entry.tokens += real
        entry.padding += padded - real
        return found

    def _await(self, key: Any) -> Callable:
        self.awaited, began = key, time.perf_counter()
        try:
            return self.prepare(key)[0].result()
        finally:
            self.awaited, self.waited = None, self.waited + time.perf_counter() - began

    def took(self, key: Any, seconds: float) -> None:
        """What runs `key` took so long; this time counts for a fifth of what is usual."""
        usual = self.usual[key] = 0.8 * self.usual.get(key, seconds) + 0.2 * seconds
        if entry := self.ledger.entries.get(str(key)):
            entry.usual = usual

    def nearest(self, holding: Sequence[Any], why: Callable[[Any], str]) -> Any:
        """Which of the keys that can hold a step, its own first, it runs on: the first that is ready, while its own is
        compiled in the background; if none is, its own, which `get` waits for. `why(own)` says what is new in it."""
        own = holding[0]
        ran_on = next((key for key in holding if key in self._ready), own)
        if own not in self._pending:
            self._missed(str(own), why(own), str(ran_on))
            self.prepare(own)
        return ran_on

    def _missed(self, name: str, why: str, ran_on: str) -> None:
        self.ledger[name].missed = f"{why}; ran on {ran_on}"
        events.emit(events.Missed(name, why, ran_on))

    def is_ready(self, key: Any) -> bool:
        return key in self._ready

    def keep_only(self, wanted: Callable[[Any], bool]) -> None:
        """Forget the programs of all other keys."""
        with self._lock:
            for key in [key for key in self._pending if not wanted(key)]:
                del self._pending[key]
                self._ready.pop(key, None)
                self.usual.pop(key, None)
                self.ledger.entries.pop(str(key), None)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            left, self._turns = self._turns, {}
        for future in left.values():
            future.cancel()
        outside = not threading.current_thread().name.startswith(THREADS)  # else a model is collected in one of them
        self._pool.shutdown(outside)
        self._writer.shutdown(outside)
        self._ready.clear()
        self._pending.clear()


def _failed(future: Future) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)
