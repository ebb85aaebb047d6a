"""Graph + bucket -> Executable: compiled once, found by shape, never by surprise."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxinfer import events, kernels
from jaxinfer.compiler import cache
from jaxinfer.compiler.buckets import Bucket, Ladder
from jaxinfer.compiler.ledger import Ledger
from jaxinfer.graph import Graph, Run, forward
from jaxinfer.kernels.sampling import Draws


class Executables:
    """The compiled `forward` and `sample` steps of one model on one device.

    `params` and `state` may be arrays or `ShapeDtypeStruct`s: only shapes are read. `table_width` is the number of
    pages per row of each page table. Compiles run on two threads; `forward` and `sample` block only when nothing
    that is ready can serve.
    """

    def __init__(self, graph: Graph, ladder: Ladder, *, params: Any, state: Any, max_rows: int,
                 table_width: dict[str, int], device: jax.Device, platform: str | None = None):
        self.graph, self.ladder, self.max_rows, self.table_width = graph, ladder, max_rows, table_width
        self.platform = platform or device.platform
        self.sharding = SingleDeviceSharding(device)
        self.params, self.state = jax.tree.map(self._like, (params, state))
        self.ledger = Ledger()
        for bucket in ladder.buckets:
            _ = self.ledger[f"forward[{bucket}]"]
        self._ready: dict[str, Callable] = {}
        self._pending: dict[str, Future] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="jaxinfer-compile")

    def _like(self, x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding)

    def _ints(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    # What is compiled.

    def lower_forward(self, bucket: Bucket) -> jax.stages.Lowered:
        """`forward(params, state, last_S, run) -> state, logits_RV` at `bucket`, its state donated."""
        ints = self._ints
        tables = {name: ints(bucket.rows, width) for name, width in self.table_width.items()}
        R = bucket.rows
        run = Run(ints(bucket.tokens), ints(R + 1), ints(R), ints(R), tables, bucket.longest)

        def step(params, state, last_S, run):
            return forward(self.graph, params, state, last_S, run)

        return jax.jit(step, donate_argnames="state").lower(self.params, self.state, ints(self.max_rows), run)

    def lower_sample(self, rows: int, greedy: bool) -> jax.stages.Lowered:
        """`sample(logits_RV, last_S, slot_R[, draws]) -> last_S, tokens_R` for `rows` rows."""
        args = self._ints(rows, self.graph.vocab, dtype=jnp.float32), self._ints(self.max_rows), self._ints(rows)
        if greedy:
            return jax.jit(kernels.sample_greedy).lower(*args)
        floats, ints = self._ints(rows, dtype=jnp.float32), self._ints(rows)
        draws = Draws(floats, ints, floats, floats, self._ints(rows, dtype=jnp.uint32), ints)
        return jax.jit(kernels.sample).lower(*args, draws)

    def _compile(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Callable:
        events.emit(events.Compiling(name))
        start = time.perf_counter()
        with cache.watch() as hits, kernels.tracing(self.platform) as trace:
            compiled = lower().compile()
        entry = self.ledger[name]
        entry.origin, entry.seconds = "disk" if hits else "compiled", time.perf_counter() - start
        entry.kernels = dict(trace.chosen)
        memory = compiled.memory_analysis()
        entry.bytes = getattr(memory, "temp_size_in_bytes", 0)
        with self._lock:
            self._ready[name] = compiled
        events.emit(events.Compiling(name, entry.seconds, entry.origin))
        return compiled

    def _start(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> Future:
        with self._lock:
            if name not in self._pending:
                self._pending[name] = self._pool.submit(self._compile, name, lower)
            return self._pending[name]

    # How it is found.

    def _start_forward(self, bucket: Bucket) -> Future:
        return self._start(f"forward[{bucket}]", lambda: self.lower_forward(bucket))

    def _start_sample(self, rows: int, greedy: bool) -> Future:
        return self._start(_sample_name(rows, greedy), lambda: self.lower_sample(rows, greedy))

    def _wait(self, name: str, future: Future) -> Callable:
        """A compile that failed is forgotten once it was reported, so that the next step tries again."""
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if future.done():
                    self._pending.pop(name, None)
            raise

    def bucket(self, tokens: int, rows: int, greedy: bool = True) -> Bucket:
        """The bucket that a step of this shape will run in: its own if that is ready; else the next larger one that
        is, while its own is compiled in the background; else its own, which `forward` then waits for."""
        own = self.ladder.fit(tokens, rows)
        if self._is_ready(own, greedy):
            return own
        name = f"forward[{own}]"
        if name in self._ready:
            name = _sample_name(own.rows, greedy)
        larger = [b for b in self.ladder.buckets if b.holds(own) and self._is_ready(b, greedy)]
        ran_on = min(larger, key=lambda b: b.tokens, default=own)
        new = name not in self._pending
        self._start_forward(own)
        self._start_sample(own.rows, greedy)
        if new:
            why = f"run.tokens_T [{tokens}] and run.kv_lens_R [{rows}] want {own}"
            self.ledger[name].missed = f"{why}; ran on {ran_on}"
            events.emit(events.Missed(name, why, str(ran_on)))
        return ran_on

    def ready(self, tokens: int, rows: int, greedy: bool) -> bool:
        """Whether a step of this shape can run without waiting for a compile."""
        own = self.ladder.fit(tokens, rows)
        return any(b.holds(own) and self._is_ready(b, greedy) for b in self.ladder.buckets)

    def _is_ready(self, bucket: Bucket, greedy: bool) -> bool:
        return f"forward[{bucket}]" in self._ready and _sample_name(bucket.rows, greedy) in self._ready

    def forward(self, bucket: Bucket, tokens: int) -> Callable:
        """The Executable of `bucket`, counted as a hit with `tokens` real tokens."""
        name = f"forward[{bucket}]"
        found = self._ready.get(name) or self._wait(name, self._start_forward(bucket))
        self._count(name, tokens, bucket.tokens)
        return found

    def sample(self, rows: int, greedy: bool, real: int) -> Callable:
        """The sampler for `rows` rows, of which `real` are no padding."""
        name = _sample_name(rows, greedy)
        found = self._ready.get(name) or self._wait(name, self._start_sample(rows, greedy))
        self._count(name, real, rows)
        return found

    def _count(self, name: str, real: int, padded: int) -> None:
        entry = self.ledger[name]
        entry.hits += 1
        entry.tokens += real
        entry.padding += padded - real

    def prepare(self, bucket: Bucket) -> None:
        """Start compiling what a step of this bucket needs when its rows are greedy."""
        self._start_forward(bucket)
        self._start_sample(bucket.rows, True)

    def warmup(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Compile everything (or what `buckets` need), so that no step compiles afterwards."""
        buckets = tuple(self.ladder.buckets if buckets is None else buckets)
        started = {f"forward[{b}]": self._start_forward(b) for b in buckets}
        for rows, greedy in itertools.product(sorted({b.rows for b in buckets}), (True, False)):
            started[_sample_name(rows, greedy)] = self._start_sample(rows, greedy)
        for name, future in started.items():
            self._wait(name, future)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ready.clear()
        self._pending.clear()


def _sample_name(rows: int, greedy: bool) -> str:
    return f"sample{'_greedy' if greedy else ''}[R={rows}]"

