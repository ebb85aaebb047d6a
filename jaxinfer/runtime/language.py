"""The language model: text in, text out, over one engine."""

from __future__ import annotations

import asyncio
import itertools
import operator
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import CancelledError, Future
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxinfer import events
from jaxinfer.compiler import Ledger
from jaxinfer.compiler.placement import Placement, over_leaves
from jaxinfer.errors import Closed, Expired, InvalidOption, InvalidRequest, Rejected, RequestFailed
from jaxinfer.frontend.constraint import compile_grammar
from jaxinfer.frontend.folder import Format
from jaxinfer.frontend.tokenizer import Tokenizer
from jaxinfer.graph import Graph
from jaxinfer.request import CONSTRAINTS, REQUEST_OPTIONS, Output, Piece, Prompt, Request, Sampling, Score, Sequence
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.answer import Answer, Stream
from jaxinfer.runtime.delivery import Delivery, Ticket
from jaxinfer.runtime.engine import Engine
from jaxinfer.runtime.living import Living
from jaxinfer.runtime.memory import held
from jaxinfer.runtime.pack import check
from jaxinfer.runtime.prefix_tiers import PrefixTiers, added
from jaxinfer.runtime.ring import Ring
from jaxinfer.runtime.shards import Front, Shard
from jaxinfer.runtime.startup import Startup
from jaxinfer.runtime.tiers import Tiers
from jaxinfer.runtime.timeline import Timeline
from jaxinfer.runtime.versions import copied, fit
from jaxinfer.scheduler import AGEING

Ask = Prompt | Request


@dataclass(frozen=True)
class Statistics:
    """What a model is doing and has done. `waiting` and `running` requests; `steps` dispatched; sequences `preempted`;
    prompt tokens `read` and `reused` (found computed); pages in all, free, `kept` for those who begin alike, and `used`
    by who runs."""

    waiting: int
    waiting_tokens: int
    running: int
    steps: int
    preempted: int
    read: int
    reused: int
    pages: int
    pages_free: int
    pages_kept: int
    pages_used: int

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that need not be read."""
        return self.reused / max(self.read + self.reused, 1)


class LanguageModel(Living):
    """What `jaxinfer.load` returns. Safe to use from any number of threads and event loops at once.

    A prompt is text or token ids, or a `Request`. Options of `Sampling` and of `Request` may be given by name and
    override both. All methods raise `InvalidRequest` before anything is queued, `Rejected` when the queue is full
    (`generate`, `score` and `embed` wait instead), `RequestFailed` or one of its kinds (`Expired`, `Closed`) when a
    request ends otherwise than asked, what your own callback raised, and `Closed` after `close()`.
    """

    def __init__(self, graph: Graph, tokenizer: Tokenizer, shards: SequenceOf[Shard], *, config: Any,
                 eos: frozenset[int], max_context: int, startup: Startup, save: Callable[..., Path],
                 ring: Ring | None = None, again: Callable[[], Any] | None = None):
        self.graph, self.tokenizer, self.config = graph, tokenizer, config
        self.max_context = max_context
        self._front, self._eos = Front(shards), eos
        self._ids, self._numbers, self._swapping = itertools.count(1), itertools.count(2), threading.Lock()
        self._startup, self._load_seconds, self._save = startup, time.perf_counter() - startup.began, save
        self._ring, self.again = ring, again
        executables = self._engine.executables
        self._weights, self._pages = held(executables.params), held(executables.state)  # bytes
        for shard in shards:
            shard.delivery.end = shard.engine.end
        self.rename(graph.name)
        self._shut = weakref.finalize(self, self._front.close)  # also when it is dropped, and at exit

    # Asking.

    def submit(self, prompt: Ask, sampling: Sampling | None = None, *,
               on_piece: Callable[[Piece], object] | None = None, **options: Any) -> Answer:
        """Queue a request and return at once: the `Answer` is a future, an iterator and an awaitable of its pieces."""
        return self._submit(self._ask(prompt, sampling, options), on_piece)[0]

    def check_room(self) -> None:
        """Raises `Rejected` if `submit` would, whatever it was asked: a server that is flooded need not read prompts
        that it has no room for."""
        full: Rejected | None = None
        for shard in self._front.shards:
            try:
                return shard.engine.queue.check_room()
            except Rejected as error:
                full = error
        assert full is not None
        events.emit(events.RequestEnded(next(self._ids), "rejected", 0, 0, self._delivery.model, tag=events.tag()))
        raise full

    def __call__(self, prompt: Ask, sampling: Sampling | None = None, **options: Any) -> Output:
        """The whole answer to one prompt."""
        answer = self.submit(prompt, sampling, **options)
        try:
            return answer.result()
        finally:
            answer.cancel()  # if the wait was interrupted

    def stream(self, prompt: Ask, sampling: Sampling | None = None, **options: Any) -> Stream:
        """The answer piece by piece; the last piece carries the `Output`. Closing the iterator cancels the request."""
        return Stream(self.submit(prompt, sampling, **options), self)

    def generate(self, prompts: Ask | Iterable[Ask], sampling: Sampling | SequenceOf[Sampling] | None = None,
                 **options: Any) -> list[Output]:
        """The answers to many prompts, batched, in their order. `sampling` is one for all, or one for each."""
        many = _many(prompts)
        each = list(sampling) if isinstance(sampling, SequenceOf) else [sampling] * len(many)
        if len(each) != len(many):
            raise InvalidRequest(f"{len(each)} samplings were given for {len(many)} prompts; give one, or one for each")
        asked = [self._ask(p, s, dict(options)) for p, s in zip(many, each, strict=True)]
        return [answer for answer, _ in self._all(asked)]

    async def agenerate(self, prompt: Ask, sampling: Sampling | None = None, **options: Any) -> Output:
        """`__call__` for asyncio and notebook cells; cancelling the task cancels the request."""
        return await self.submit(prompt, sampling, **options)

    async def astream(self, prompt: Ask, sampling: Sampling | None = None, **options: Any) -> AsyncIterator[Piece]:
        """`stream` for asyncio."""
        async for piece in self.submit(prompt, sampling, **options):
            yield piece

    def chat(self, messages: str | SequenceOf[Mapping[str, Any]], sampling: Sampling | None = None, *,
             stream: bool = False, tools: Any = None, **options: Any) -> Any:
        """The answer to a conversation, by the model's own chat template: an Output, or with `stream` its pieces.

        `messages` is a list of {"role": ..., "content": ...}, or a text, which is one message of the user's.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.tokenizer.render_chat(messages, tools=tools)  # type: ignore[arg-type]
        prompt = self.tokenizer.encode(text, add_special=False)
        return (self.stream if stream else self)(prompt, sampling, **options)

    def score(self, texts: Ask | Iterable[Ask], **options: Any) -> list[Score]:
        """How likely each text is to the model: log-probabilities of its tokens, and its perplexity."""
        how = Sampling(max_tokens=0, prompt_logprobs=0)
        outputs = self._all([self._ask(text, how, dict(options)) for text in _read_only(texts, options)])
        told = ((output.prompt_tokens, output.prompt_logprobs or ()) for output, _ in outputs)
        return [Score(tokens, tuple(told.logprob for told in logprobs[1:] if told)) for tokens, logprobs in told]

    def embed(self, texts: Ask | Iterable[Ask], *, pooling: Literal["mean", "last"] = "mean", **options: Any
              ) -> np.ndarray:
        """The final hidden states of each text, as one vector each: float32 [texts, width].

        `pooling`: "mean" over all tokens, or the "last" token's. (After the final norm, as transformers'
        `last_hidden_state`.)
        """
        asked = self._ask_to_embed(texts, pooling, options)
        return _pooled([ticket for _, ticket in self._all(asked)], pooling)

    async def aembed(self, texts: Ask | Iterable[Ask], *, pooling: Literal["mean", "last"] = "mean", **options: Any
                     ) -> np.ndarray:
        """`embed` for asyncio; where the queue is full it raises `Rejected` at once. Cancelling the task cancels the
        requests."""
        asked = await asyncio.to_thread(self._ask_to_embed, texts, pooling, options)
        answers: list[tuple[Answer, Ticket]] = []
        try:
            for one in asked:
                answers.append(self._submit(one))
                await asyncio.sleep(0)  # others have something to do, too
            for answer, _ in answers:
                await answer
        finally:
            for answer, _ in answers:
                answer.cancel()
        return _pooled([ticket for _, ticket in answers], pooling)

    def _ask_to_embed(self, texts: Any, pooling: str, options: dict[str, Any]
                      ) -> list[tuple[Request, list[Sequence]]]:
        if pooling not in ("mean", "last"):
            raise InvalidRequest(f"pooling is {pooling!r}; it must be 'mean' or 'last'")
        how = Sampling(max_tokens=0)
        return [self._ask(text, how, dict(options), task="embed") for text in _read_only(texts, options)]

    # Looking.

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, as the model reads it. Raises InvalidRequest for what is none."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            ids = None if isinstance(prompt, bytes | bytearray) else [operator.index(i) for i in prompt]
        except TypeError:
            ids = None
        if ids is None:
            raise InvalidRequest(f"prompt is a {type(prompt).__name__}; it must be a string or a sequence of token ids")
        wrong = [i for i in ids if not 0 <= i < self.graph.vocab]
        if wrong:
            raise InvalidRequest(f"prompt has the token id {wrong[0]}; this model's are 0 to {self.graph.vocab - 1}")
        return ids

    @property
    def stats(self) -> Statistics:
        """What the model is doing, and has done so far."""
        each = [_statistics(shard.engine) for shard in self._front.shards]
        return Statistics(*map(sum, zip(*map(astuple, each), strict=True)))

    @property
    def max_waiting(self) -> int:
        """The requests that may wait; more are Rejected."""
        return sum(shard.engine.queue.max_waiting for shard in self._front.shards)

    @property
    def ledger(self) -> Ledger:
        """Every Executable: where it came from, what it cost, how it was used."""
        return self._front.ledger

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where each data shard lies: on which devices, which axes they cut, and which they could not and why."""
        return tuple(shard.engine.executables.place for shard in self._front.shards)

    @property
    def params(self) -> Any:
        """The weights, a pytree in the shape of `graph.spec`. On a mesh, leaves of several parts are copies: they are
        stored in another order. Raises InvalidOption where no process has all of them, or where they are streamed."""
        self._check_open()
        self._check_whole()
        with self.awake():
            return over_leaves(self.placements[0].restore, self.graph.spec, self._stored)

    @property
    def _stored(self) -> Any:
        return self._front.shards[0].weights

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent: `load_seconds` on weights, `compile_seconds` on Executables so far."""
        return {"load_seconds": self._load_seconds, "compile_seconds": sum(e.seconds for e in self.ledger)}

    @property
    def startup(self) -> Startup:
        """What the start was made of: config, tokenizer, weights, each program (from the disk, or compiled), warm-up,
        the first token; when each ran, and the bytes it moved."""
        found = replace(self._startup, phases={phase.name: replace(phase) for phase in self._startup})
        for entry in self.ledger:
            if entry.seconds:
                found.note(entry.name, entry.began, entry.began + entry.seconds, entry.read, entry.origin)
        if coming := self.coming:
            found.note("warm-up in the background", coming.began, coming.ended or time.perf_counter())
        if first := min((s.delivery.first for s in self._front.shards if s.delivery.first), default=None):
            found.note("first token", *first)
        return found

    @property
    def tiers(self) -> Tiers | None:
        """Where the weights lie if they are streamed (`load(device_memory=...)`); None if all are on the device."""
        return None if self._ring is None else self._ring.tiers

    @property
    def prefix_tiers(self) -> PrefixTiers | None:
        """The KV pages that the host and the disk keep of earlier prompts and answers, how often they were found, and
        what that takes, as it was measured (`load(prefix_host_memory=...)`); None if none are kept there."""
        return added(shard.engine.mover for shard in self._front.shards)

    @property
    def timeline(self) -> Timeline | None:
        """When each streamed layer was read, moved and computed from; None if none is."""
        return None if self._ring is None else self._ring.timeline

    # Weights.

    @property
    def version(self) -> int:
        """The number of the weights that new requests run on: 1, and one more with every swap."""
        return self._engine.scheduler.version

    def swap(self, params: Any, running: Literal["finish", "continue"] = "finish") -> int:
        """Take other weights of the same structure, shapes and dtypes, between two steps and with no compile. Where
        a weight is quantised, floats in its place are quantised as it was.

        What runs is to "finish" on the old weights, which stay until then and take turns with the new ones; or to
        "continue" on the new ones, with what was read by the old. Returns the new version's number. Raises
        InvalidOption if the weights do not match.
        """
        self._check_open()
        if running not in ("finish", "continue"):
            raise InvalidOption(f"running is {running!r}; it must be 'finish' or 'continue'")
        self._check_whole()
        params = copied(fit(params, self._engine.executables.params))
        with self.awake(beside=self._weights):
            placed = [over_leaves(place.put, self.graph.spec, params) for place in self.placements]
            with self._swapping:
                number = next(self._numbers)
                for shard, params in zip(self._front.shards, placed, strict=True):
                    shard.engine.swap(params, running == "continue", number)
        events.emit(events.Swapped(self._delivery.model, number))
        return number

    def renumber(self, version: int, numbers: Iterator[int]) -> None:
        """Be this version, and take the next `numbers` for those to come: a registry counts all of a name."""
        with self._swapping:
            for shard in self._front.shards:
                shard.engine.swap(shard.engine.weights[self.version], True, version)
            self._numbers = numbers

    def save(self, path: str | os.PathLike, format: Format = "safetensors") -> Path:
        """Write the model into a new folder, which `jaxinfer.load` takes: config, tokenizer, and the weights of this
        version as they are held, quantised or not, to the bit.

        "safetensors" is one file that a CPU reads where it is mapped; "orbax" a checkpoint for whoever trains on;
        "huggingface" the tensors that transformers knows, not quantised. Raises InvalidOption if there is something at
        `path`, SaveFailed if the disk is full; then nothing is there.
        """
        with self.awake():
            return self._save(path, self.params, format=format)

    @property
    def device(self) -> jax.Device:
        return self._engine.executables.place.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weights (of all versions that somebody runs on), the pages, and what the largest Executable
        needs beside them, on each device."""
        weights = self._weights * max(1, len(self._engine.weights)) if self._ring is None else self._ring.tiers.device
        return weights + self._pages + max((entry.bytes for entry in self.ledger), default=0)

    # Living.

    @property
    def rooms(self) -> list[Shard]:
        """Where requests are computed, each with weights and pages of its own."""
        return list(self._front.shards)

    @property
    def restless(self) -> str:
        """Why it cannot sleep, if it cannot."""
        if self._ring is not None:
            return "its weights are streamed"
        return "" if self._engine.executables.place.is_local else "its weights lie on devices of several processes"

    @property
    def _admissions(self) -> list[Admission]:
        return [shard.engine.queue for shard in self._front.shards]

    @property
    def _busy(self) -> bool:
        return any(shard.delivery.busy for shard in self._front.shards)

    def warmup(self, background: bool = False) -> None:
        """Compile every bucket now, so that no request waits for a compile afterwards. In the `background`: return once
        requests can be served, by the smallest buckets; `coming` tells how far it is with the others."""
        self._check_open()
        each = [shard.engine.executables for shard in self._front.shards]
        try:
            with self._startup.phase("warm-up"):
                self._compile(each, each[0].keys, each[0].least, background)
        except (CancelledError, RuntimeError):
            self._check_open()
            raise

    @property
    def hearts(self) -> tuple[Shard, ...]:
        return self._front.shards

    def rename(self, name: str) -> None:
        """Be called this in events."""
        for shard in self._front.shards:
            shard.engine.model = shard.delivery.model = name

    # Inside.

    @property
    def _engine(self) -> Engine:
        """What is true of all shards is asked of the first."""
        return self._front.shards[0].engine

    @property
    def _delivery(self) -> Delivery:
        return self._front.shards[0].delivery

    def _check_open(self) -> None:
        if self._engine.closed:
            raise Closed()

    def _check_whole(self) -> None:
        """Other processes make the engine's calls, and none but these; layers that stream are in no one place."""
        if not self._engine.executables.place.is_local:
            raise InvalidOption("the weights lie on devices of several processes: they can be neither had nor swapped")
        if self._ring is not None:
            raise InvalidOption("the weights are streamed: they can be neither had nor swapped; load the others anew")

    def _ask(self, prompt: Ask, sampling: Sampling | None, options: dict[str, Any], task: str = ""
             ) -> tuple[Request, list[Sequence]]:
        """What is asked for, with nothing in it that could not be served."""
        request = (prompt if isinstance(prompt, Request) else Request(prompt)).but(sampling, **options)
        sampling, tokens = request.sampling, self.tokens_of(request.prompt)
        if not tokens:
            raise InvalidRequest("prompt is empty: there is no token to continue from; give at least one")
        task = task or ("draw" if sampling.prompt_logprobs is None else "score")
        if sampling.max_tokens == 0 and task == "draw" and not sampling.echo:
            raise InvalidRequest("max_tokens is 0; it must be at least 1, unless prompt_logprobs or echo is asked for")
        room = self.max_context - len(tokens)
        if room < min(sampling.max_tokens, 1):
            raise InvalidRequest(
                f"prompt has {len(tokens)} tokens; at most {self.max_context - 1} fit, with one new token, into "
                f"max_context={self.max_context}"
            )
        changes: dict[str, Any] = {"max_tokens": min(sampling.max_tokens, room)}
        changes["min_tokens"] = min(sampling.min_tokens, changes["max_tokens"])
        if sampling.seed is None and sampling.temperature > 0:
            changes["seed"] = int.from_bytes(os.urandom(4), "little")
        sampling = sampling.but(**changes)
        wrong = check(sampling, self.graph.vocab)
        if wrong:
            raise InvalidRequest(wrong)
        if not self._engine.scheduler.fits(len(tokens) + sampling.max_tokens):
            raise InvalidRequest(f"{len(tokens)} prompt tokens and {sampling.max_tokens} new ones need more pages than "
                                 "there are; ask for fewer, or load the model with more memory")
        return Request(request.prompt, sampling, request.priority, request.queue_timeout, request.timeout,
                       request.reuse), self._sequences(request, sampling, tokens, task)

    def _sequences(self, request: Request, sampling: Sampling, tokens: list[int], task: Any) -> list[Sequence]:
        """One sequence per sample: the first reads the prompt, and the others wait to share it."""
        grammar = None
        if sampling.constrained:
            how = {name: getattr(sampling, name) for name in CONSTRAINTS}
            grammar = compile_grammar(self.tokenizer, **how, eos=self._eos, vocab=self.graph.vocab)
        eos = frozenset(token for token in self._eos if token < self.graph.vocab)
        stops = frozenset(sampling.stop_tokens) | (frozenset() if sampling.ignore_eos else eos)
        first = next(self._ids)
        namespace = "model" if request.reuse else first if sampling.n > 1 else None
        order = request.priority * AGEING + time.monotonic()
        sequences: list[Sequence] = []
        for i in range(sampling.n):
            how = sampling if i == 0 or sampling.seed is None else sampling.but(seed=(sampling.seed + i) % 2**32)
            id = next(self._ids) if i else first
            sequences.append(Sequence(
                id, list(tokens), len(tokens), how, stops, (order, id), namespace, "draw" if i else task,
                sequences[0] if i else None))
            sequences[-1].matcher = grammar.matcher() if grammar else None
        return sequences

    def _submit(self, asked: tuple[Request, list[Sequence]], on_piece: Callable[[Piece], object] | None = None,
                wait: bool = False) -> tuple[Answer, Ticket]:
        request, sequences = asked
        self._check_open()
        asked_for, echo = request.prompt, ""
        if request.sampling.echo:
            echo = asked_for if isinstance(asked_for, str) else self.tokenizer.decode(sequences[0].tokens)
        shard = self._front.pick(sequences[0].tokens)
        engine, delivery = shard.engine, shard.delivery
        submitted, compiling = time.perf_counter(), _prepare(engine, sequences[0])
        patience = min((s for s in (request.queue_timeout, request.timeout) if s is not None), default=None)
        try:
            engine.queue.enter({s.id: s.prompt for s in sequences}, wait, patience)
        except (Rejected, Expired) as error:
            reason = "expired" if isinstance(error, Expired) else "rejected"
            events.emit(events.RequestEnded(sequences[0].id, reason, sequences[0].prompt, 0, delivery.model,
                                            tag=events.tag()))
            raise
        answer = Answer(lambda: delivery.abandon(ticket), on_piece)
        ticket = delivery.expect(request, sequences, answer, submitted, echo)
        _when_done(compiling, partial(_enter, shard, sequences))
        return answer, ticket

    def _all(self, asked: list[tuple[Request, list[Sequence]]]) -> list[tuple[Output, Ticket]]:
        """Everything that is asked, in order; if one fails, the others are cancelled."""
        answers: list[tuple[Answer, Ticket]] = []
        try:
            answers.extend(self._submit(one, wait=True) for one in asked)
            return [(answer.result(), ticket) for answer, ticket in answers]
        finally:
            for answer, _ in answers:
                answer.cancel()


def _statistics(engine: Engine) -> Statistics:
    scheduler, tree = engine.scheduler, engine.scheduler.tree
    pools = tree.pools.values()
    return Statistics(
        engine.queue.waiting, engine.queue.waiting_tokens, len(scheduler.running), scheduler.steps,
        scheduler.preempted, scheduler.read, scheduler.reused,
        sum(p.size for p in pools), sum(p.free for p in pools), sum(tree.pages.values()),
        sum(pool.size - tree.obtainable(name) for name, pool in tree.pools.items()))


def _prepare(engine: Engine, sequence: Sequence) -> list[Future]:
    """Start compiling what only some requests need: it is there before they are admitted."""
    sampling, executables = sequence.sampling, engine.executables
    futures = []
    if sampling.logits is not None:
        busy = {s.sampling.logits for s in tuple(engine.scheduler.sequences.values())}
        futures += executables.prepare_logits(sampling.logits, busy)
    if sampling.edits:
        futures += executables.prepare_kinds("history", "edited")
    if sampling.logprobs is not None:
        futures += executables.prepare_kinds("logprobs")
    if sequence.task != "draw":
        futures += executables.prepare_prompt(sequence.task, sequence.prompt)
    return futures


def _read_only(texts: Any, options: dict[str, Any]) -> list[Any]:
    """The texts, if nothing is asked for that has to do with drawing."""
    many, wrong = _many(texts), sorted(set(options) - set(REQUEST_OPTIONS))
    if any(isinstance(text, Request) and text.sampling != Sampling() for text in many):
        wrong.append("sampling")
    if wrong:
        raise InvalidRequest(f"unknown options {wrong}; nothing is drawn here, and known are {list(REQUEST_OPTIONS)}")
    return many


def _pooled(tickets: list[Ticket], pooling: str) -> np.ndarray:
    vectors = []
    for ticket in tickets:
        assert ticket.pooled is not None
        sum_D, last_D = ticket.pooled
        vectors.append(sum_D / len(ticket.prompt) if pooling == "mean" else last_D)
    return np.stack(vectors).astype(np.float32) if vectors else np.zeros((0, 0), np.float32)


def _many(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Request):
        return [prompts]
    many = list(prompts)
    try:
        operator.index(many[0])
    except (IndexError, TypeError):
        return many
    return [many]  # one prompt of token ids


def _when_done(futures: list[Future], act: Callable[[BaseException | None], None]) -> None:
    """Call `act` once, when all futures are done, with the first error there was."""
    left, lock = [len(futures)], threading.Lock()
    if not futures:
        act(None)

    def one(_: Future) -> None:
        with lock:
            left[0] -= 1
            last = left[0] == 0
        if last:
            act(next((e for f in futures if (e := CancelledError() if f.cancelled() else f.exception())), None))

    for future in futures:
        future.add_done_callback(one)


def _enter(shard: Shard, sequences: list[Sequence], error: BaseException | None) -> None:
    try:
        if error is None:
            shard.gate.come(sequences)
        elif shard.engine.closed:
            raise Closed("the model was closed while this request was waiting") from error
        else:
            raise RequestFailed(f"what this request needs could not be compiled: {error}") from error
    except RequestFailed as failure:
        shard.fail(sequences, failure)
