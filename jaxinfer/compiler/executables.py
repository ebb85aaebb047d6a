"""Graph + bucket -> Executable: compiled once, found by its key, never by surprise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import kernels
from jaxinfer.compiler.buckets import Bucket, Ladder, decode, prompt
from jaxinfer.compiler.fingerprint import Unknown, fingerprint
from jaxinfer.compiler.placement import Placement
from jaxinfer.compiler.programs import Programs
from jaxinfer.errors import InvalidRequest
from jaxinfer.graph import Graph, Run, forward, hidden
from jaxinfer.kernels import BIASES, Edits
from jaxinfer.kernels.sampling import Draws

MOST_FUNCTIONS = 16  # users' logits functions whose programs are kept
COPIES = 8  # pages per call of "copy"


class Key(NamedTuple):
    """Which program: its `kind`, the bucket or the rows it is padded to, and a user's function if it runs one."""

    kind: str
    shape: Bucket | int = 0
    function: Callable | None = None

    def __str__(self) -> str:
        shape = f"R={self.shape}" if isinstance(self.shape, int) else str(self.shape)
        if self.function is not None:
            shape = f"{getattr(self.function, '__name__', 'function')}@{id(self.function):x},{shape}"
        return f"{self.kind}[{shape}]" if self.shape else self.kind


class Executables(Programs):
    """The compiled programs of one model on one device, or as it is placed on several.

    `params` and `state` may be arrays or `ShapeDtypeStruct`s: only shapes are read. `table_width` is the number of
    pages per row of each page table, `max_context` the tokens of a row's history, `forced` names implementations that
    ops take wherever they can. `get` blocks only when nothing that is ready can serve.

    Kinds: "forward" (params, state, last_S, run) -> state, logits_RV; of several steps, with how each row draws,
    "greedy_steps" and "steps" -> state, last_S, tokens_NR; "score" and "embed" read a prompt for its own sake;
    "greedy", "sample" and "edited" draw; "logprobs"; "logits" runs a user's function; "zeros", "copy" and "history"
    keep house; with `tiered`, "export" and "import" of each state group move a page from the device and back.
    """

    runs_ahead = True  # whether a step may be dispatched before the one before it has been read back
    gives_logits = "forward"  # the kind of program that does
    restarts = True  # whether another engine can go on with them where one stopped in the middle of a step

    def __init__(self, graph: Graph, ladder: Ladder, *, params: Any, state: Any, max_rows: int, max_context: int,
                 table_width: dict[str, int], device: jax.Device | Placement, platform: str | None = None,
                 forced: Mapping[str, str] | None = None, tiered: bool = False):
        super().__init__(device, name=graph.name, platform=platform, forced=forced)
        self.graph, self.ladder, self.max_rows, self.max_context = graph, ladder, max_rows, max_context
        self.table_width = table_width
        self.params = self.place.abstract(graph.spec, params)
        placed = lambda x, axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.place.along(*axes))
        self.state = {name: [jax.tree.map(partial(placed, axes=pages.axes), pages) for pages in layers]
                      for name, layers in state.items()}
        for whole in (key for bucket in ladder.buckets for key in _forwards(bucket)):
            for key in self.parts(whole):
                _ = self.ledger[str(key)]
        kinds = ("export", "import") if tiered else ()
        self.moving = tuple(Key(f"{kind} {group.name}") for kind in kinds for group in graph.groups)
        self._functions: dict[Callable, None] = {}  # users', the latest last
        self.holding = lru_cache(4096)(ladder.holding)  # in every step anew

    def empty(self, what: str) -> Any:
        """What a model begins with, zero and where it is to lie: "state", all pages; "last_S" or "history_SL".

        XLA makes the pages: memory of the host's that they merely alias would be copied when the first step donates
        them. It would also compile what makes the others, in the middle of a step perhaps.
        """
        if what == "state":
            return Programs.get(self, Key("zeros"))()  # not a leader's `get`: the others have been told
        zeros = np.zeros((self.max_rows,) if what == "last_S" else (self.max_rows, self.max_context), np.int32)
        return jax.make_array_from_callback(zeros.shape, self.place.whole, lambda index: zeros[index])

    # What is compiled.

    def traced(self, key: Key) -> Any:
        """All that `lower(key)` reads."""
        if key.function is not None:
            raise Unknown("a user's logits function")
        return replace(self.graph, spec=None), self._shapes, self.max_rows, self.max_context, self.table_width

    @cached_property
    def _shapes(self) -> str:
        return fingerprint(self.params, self.state)

    def parts(self, key: Key) -> tuple[Key, ...]:
        """The programs that `key` is made of: itself, unless its layers come one by one."""
        return (key,)

    def lower(self, key: Key) -> jax.stages.Lowered:
        """The program of `key` for abstract arguments."""
        kind, shape = key.kind, key.shape
        whole, logits = self.place.whole, self.place.logits
        pages = jax.tree.map(lambda x: x.sharding, self.state)
        if isinstance(shape, Bucket):
            run, last_S = self._run(shape), self._array(self.max_rows)
            first, donate = (self.params, self.state, last_S, run), "state"
            if kind == "forward":
                return self._lower(partial(forward, self.graph), *first, donate=donate, out=(pages, logits))
            if shape.steps > 1:
                how = (self._draws(shape.rows),) if kind == "steps" else ()
                return self._lower(partial(_steps, self.graph, shape.steps), *first, self._array(shape.rows), *how,
                                   donate=donate, out=(pages, whole, whole))
            if kind == "score":
                return self._lower(partial(_score, self.graph), *first, self._array(shape.tokens), donate=donate,
                                   out=(pages, logits, whole))
            return self._lower(partial(_embed, self.graph), *first, donate=donate, out=(pages, whole, whole))
        if kind == "zeros":
            return self._lower(partial(_zeros, self.state), out=pages)
        if kind == "copy":
            pairs = {group.name: self._array(COPIES) for group in self.graph.groups}
            return self._lower(_copy, self.state, pairs, pairs, donate="state", out=pages)
        if key in self.moving:
            kind, _, group = kind.partition(" ")
            layers, page, one = self.state[group], self._array(), self.page(group)
            if kind == "export":
                out = jax.tree.map(lambda x: x.sharding, one)
                return self._lower(kernels.export_page, layers, page, out=out)
            return self._lower(kernels.import_page, layers, page, one, donate="layers", out=pages[group])
        history_SL = self._array(self.max_rows, self.max_context)
        if kind == "history":
            return self._lower(kernels.begin_history, history_SL, self._array(), self._array(self.max_context),
                               donate="history_SL")
        R, V = shape, self.graph.vocab
        ints, logits_RV = self._array(R), jax.ShapeDtypeStruct((R, V), jnp.float32, sharding=logits)
        if kind == "logprobs":
            return self._lower(kernels.logprobs, logits_RV, ints)
        if kind == "logits":
            chosen_R, seed_R = self._array(R, dtype=jnp.bool_), self._array(R, dtype=jnp.uint32)
            return self._lower(partial(kernels.edit_logits, key.function),  # type: ignore[arg-type]
                               logits_RV, history_SL, ints, chosen_R, ints, ints, seed_R, out=logits)
        first = logits_RV, self._array(self.max_rows), ints
        if kind == "greedy":
            return self._lower(kernels.sample_greedy, *first)
        if kind == "sample":
            return self._lower(kernels.sample, *first, self._draws(R))
        return self._lower(kernels.sample_edited, *first, self._draws(R), self._edits(R), history_SL,
                           donate="history_SL")

    def page(self, group: str) -> Any:
        """The shapes of an exported page, and how it lies on the device."""
        layers = self.state[group]
        place = lambda x: jax.ShapeDtypeStruct((len(layers), *x.shape[1:]), x.dtype, sharding=x.sharding)
        return jax.tree.map(place, layers[0])

    def _lower(self, fn: Callable, *args: Any, donate: str = "", out: Any = None) -> jax.stages.Lowered:
        """`fn` for abstract arguments; `out` says how its results lie, whole on every device if they need not be cut.
        A fresh partial, since JAX would share its trace with steps for other platforms and meshes."""
        jitted = jax.jit(partial(fn), donate_argnames=donate or None, out_shardings=out or self.place.whole)
        return jitted.lower(*args)

    def _run(self, bucket: Bucket) -> Run:
        ints, R = self._array, bucket.rows
        tables = {name: ints(R, width) for name, width in self.table_width.items()}
        return Run(ints(bucket.tokens), ints(R + 1), ints(R), ints(R), tables, bucket.longest, bucket.singles)

    def _draws(self, R: int) -> Draws:
        floats, ints = self._array(R, dtype=jnp.float32), self._array(R)
        return Draws(floats, ints, floats, floats, self._array(R, dtype=jnp.uint32), ints)

    def _edits(self, R: int) -> Edits:
        floats, ints, wide = self._array(R, dtype=jnp.float32), self._array(R), partial(self._array, R, BIASES)
        mask = self._array(R, -(-self.graph.vocab // 32), dtype=jnp.uint32)
        return Edits(floats, floats, floats, wide(), wide(dtype=jnp.float32), mask, ints, ints)

    # How it is found.

    def bucket(self, shape: Bucket, *then: Key) -> Bucket:
        """The bucket that a step of this shape will run in: its own if that is ready, with what `then` follows on its
        logits; else the next larger one that is, while its own is compiled in the background; else its own, which
        `get` then waits for. The rows of `then` are those of the bucket."""
        holding = self.holding(shape)
        own = holding[0]
        ran_on = next((b for b in holding if self._is_ready(b, then)), own)
        if self._is_ready(own, then):
            return own
        needed = self._needed(own, then)
        new = [key for key in needed if key not in self._pending]
        self.prepare(*needed)
        if new:
            why = f"run.tokens_T [{shape.tokens}] and run.kv_lens_R [{shape.rows}] want {own}"
            self._missed(str(new[0]), why, str(ran_on))
        return ran_on

    def ready(self, shape: Bucket, *then: Key) -> bool:
        """Whether a step of this shape can run without waiting for a compile."""
        return any(self._is_ready(b, then) for b in self.holding(shape))

    def _is_ready(self, bucket: Bucket, then: Iterable[Key]) -> bool:
        return all(key in self._ready for key in self._needed(bucket, then))

    def _needed(self, bucket: Bucket, then: Iterable[Key]) -> list[Key]:
        return [*self.parts(_forward(bucket)), *(key._replace(shape=bucket.rows) for key in then)]

    def prepare_logits(self, function: Callable, busy: Iterable[Callable | None] = ()) -> list[Future]:
        """Trace a user's logits function, and start compiling it wherever `forward` is. The programs of the
        functions that were used the longest ago, and are not `busy`, are forgotten.

        Raises InvalidRequest where it does not make logits from logits.
        """
        if not isinstance(function, Hashable):
            raise InvalidRequest(f"logits is a {type(function).__name__} without a hash; wrap it in a function")
        with self._lock:
            known = function in self._functions
        if not known:
            kernels.check_logits_function(function, self.graph.vocab, self.max_context)
        with self._lock:
            self._functions.pop(function, None)
            self._functions[function] = None  # the latest
            compiling = {key.function for key, future in self._pending.items() if not future.done()}
            idle = [f for f in self._functions if f is not function and f not in busy and f not in compiling]
            for f in idle[: max(0, len(self._functions) - MOST_FUNCTIONS)]:
                del self._functions[f]
            kept = {None, *self._functions, *busy, *compiling}
            self.keep_only(lambda key: key.function in kept)
        return self.prepare(*(Key("logits", rows, function) for rows in self._rows))

    def prepare_kinds(self, *kinds: str) -> list[Future]:
        """Start compiling what follows `forward` wherever that is compiled."""
        rows = self._rows
        return self.prepare(*(Key(kind, r) for kind in kinds for r in ([0] if kind == "history" else rows)))

    def prepare_prompt(self, task: str, tokens: int) -> list[Future]:
        """Start compiling what reads a prompt of so many tokens for its own sake, chunk by chunk."""
        chunk = self.ladder.chunk
        sizes = {min(tokens, chunk), tokens % chunk or chunk}
        fit = lambda n: next(b for b in self.ladder.prompts if b.tokens >= n)
        buckets = {fit(n) for n in sizes}
        draws = (Key(kind, bucket.rows) for bucket in buckets for kind in ("greedy", "sample"))  # the token after it
        return self.prepare(*(Key(task, bucket) for bucket in buckets), *(draws if task == "score" else ()))

    @property
    def _rows(self) -> list[int]:
        """The row counts of steps that can run, or soon will."""
        with self._lock:
            ready = {key.shape.rows for key in self._pending if key.kind == self.gives_logits}  # type: ignore[union-attr]
        return sorted(ready | {bucket.rows for bucket in self.ladder.prompts})

    @cached_property
    def keys(self) -> list[Key]:
        """All programs, in the order in which requests want them: those of one short request, those that long prompts
        and many rows fit into, and the others. Users' functions, and scoring and embedding, are compiled when they are
        first asked for, before their request is admitted."""
        large = (self.holding(shape)[0] for shape in (prompt(self.ladder.chunk), decode(self.max_rows)))
        return [*_keys(dict.fromkeys((*self.first, *large, *self.ladder.buckets))), *self.moving]

    @property
    def least(self) -> list[Key]:
        """Those that serve one short request. Others run on what else is there, or wait for their own, which is the
        next to be compiled then."""
        draws = (Key(kind, bucket.rows) for bucket in self.first for kind in ("greedy", "sample"))
        return list(dict.fromkeys((Key("zeros"), *map(_forward, self.first), *draws)))

    @property
    def first(self) -> tuple[Bucket, Bucket]:
        """The smallest buckets that read a prompt, and that decode."""
        return self.holding(prompt(1))[0], self.holding(decode(1))[0]

    def warmup(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Compile everything (or what `buckets` need), so that no step compiles afterwards."""
        self.compile_all(*(self.keys if buckets is None else (*_keys(buckets), *self.moving)))

    def fetch_all(self) -> Future:
        """Start to take in the background what is on the disk of all that `warmup` would compile."""
        return self.fetch(*self.keys)

    def taken(self, op: str, how: str) -> list[str]:
        """The implementations that the programs of steps take of an op, up to the first program that takes `how`. Those
        that are being compiled anyway come first, then those that are traced quickly."""
        found: dict[str, None] = {}
        slow = lambda key: (key not in self._pending, isinstance(key.shape, Bucket))
        parts = (part for key in self.keys for part in self.parts(key))
        for key in sorted(parts, key=slow):
            if how in found:
                break
            if ways := self.chosen(key).get(op):
                found.update(dict.fromkeys(ways.split("+")))
        return list(found)

    def close(self) -> None:
        super().close()
        self._functions.clear()


def _keys(buckets: Iterable[Bucket]) -> list[Key]:
    """What a step in these buckets may need, one after the other, but for users' functions, scores and embeddings."""
    found = [*map(Key, ("zeros", "copy", "history"))]
    for bucket in buckets:
        draws = ("greedy", "sample", "edited", "logprobs") if bucket.steps == 1 else ()
        found += [*_forwards(bucket), *(Key(kind, bucket.rows) for kind in draws)]
    return list(dict.fromkeys(found))


def _forward(bucket: Bucket) -> Key:
    return _forwards(bucket)[0]


def _forwards(bucket: Bucket) -> list[Key]:
    """What runs the model in this bucket."""
    return [Key(kind, bucket) for kind in (("greedy_steps", "steps") if bucket.steps > 1 else ("forward",))]


def _steps(graph: Graph, steps: int, params, state, last_S, run: Run, slot_R, draws: Draws | None = None):
    """`steps` decode steps: each reads what the one before it drew."""
    def step(carry, i):
        state, last_S = carry
        tokens_T = jnp.where(i == 0, run.tokens_T, -1)
        here = replace(run, tokens_T=tokens_T, kv_lens_R=jnp.where(run.kv_lens_R > 0, run.kv_lens_R + i, 0))
        state, logits_RV = forward(graph, params, state, last_S, here)
        if draws is None:
            last_S, tokens_R = kernels.sample_greedy(logits_RV, last_S, slot_R)
        else:
            last_S, tokens_R = kernels.sample(logits_RV, last_S, slot_R, draws._replace(count=draws.count + i))
        return (state, last_S), tokens_R

    (state, last_S), tokens_NR = jax.lax.scan(step, (state, last_S), jnp.arange(steps, dtype=jnp.int32))
    return state, last_S, tokens_NR


def _score(graph: Graph, params, state, last_S, run: Run, targets_T):
    """`forward`, and how likely each token's successor in `targets_T` was."""
    state, x_TD = hidden(graph, params, state, last_S, run)
    return state, *scored(graph, params, x_TD, run, targets_T)


def _embed(graph: Graph, params, state, last_S, run: Run):
    """The sum of the run's final hidden states, and the last one: `state, sum_D, last_D`."""
    state, x_TD = hidden(graph, params, state, last_S, run)
    return state, *pooled(x_TD, run)


def scored(graph: Graph, params, x_TD, run: Run, targets_T):
    head = partial(graph.head, params)
    return head(x_TD[run.last_R]), kernels.prompt_logprobs(head, x_TD, targets_T)


def pooled(x_TD, run: Run):
    return jnp.where(run.valid_T[:, None], x_TD, 0).sum(0), x_TD[run.last_R[-1]]


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _copy(state, from_C, to_C):
    return {name: [kernels.copy(pages, from_C[name], to_C[name]) for pages in layers]
            for name, layers in state.items()}
