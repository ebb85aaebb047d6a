"""The engine: one thread that plans, packs and dispatches the next step before it reads the last one back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import events
from jaxinfer.compiler import Bucket, Executables, Key
from jaxinfer.compiler.buckets import STEPS
from jaxinfer.compiler.executables import COPIES
from jaxinfer.errors import Closed, RequestFailed, StepFailed
from jaxinfer.graph import Run
from jaxinfer.request import FinishReason, Sequence
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.living import call_on
from jaxinfer.runtime.pack import Packer
from jaxinfer.runtime.prefix_tiers import PageMover
from jaxinfer.runtime.record import Spill
from jaxinfer.scheduler import Drawn, Plan, Scheduler
from jaxinfer.scheduler.lower import Move

CLOSED = "the model was closed while this request was waiting or running"
TOGETHER = 0.05  # seconds that several decode steps in one call may take: nobody should see a stream stutter


class News(NamedTuple):
    """What the engine tells of a step: who began to be read, what was drawn and who ended by it, log-probabilities
    by sequence, and what was read of a prompt for its own sake: (sequence, position of the first, arrays). Where
    somebody listens, also how many tokens of whose prompts it read."""

    at: float
    began: tuple[Sequence, ...] = ()
    drawn: Iterable[Drawn] = ()  # to be gone through once
    logprobs: dict[int, Any] | None = None
    read: tuple[Sequence, int, Any] | None = None
    chunks: Chunks | None = None


class Chunks(NamedTuple):
    """Of a step dispatched at `began`: how many tokens it read of the prompts of which sequences. It is done when it
    is told of, or if nothing was drawn when `logits_RV` is there."""

    began: float
    tokens: list[tuple[int, int]]
    logits_RV: Any = None


class Pulse(NamedTuple):
    """What an engine's thread has been doing since when: `deciding`, or waiting for the device, which is to do what
    `keys` name, if anything."""

    since: float
    deciding: bool
    keys: tuple[Key, ...] = ()


class Abandoned(BaseException):
    """Another engine has taken over: this one's thread must touch nothing any more."""


@dataclass
class Flight:
    """A dispatched step, not yet read back. `tokens` [R] or [steps, R] is None while a grammar's masks, which depend
    on the step before, are still to be made."""

    plan: Plan
    rows: np.ndarray  # the bucket's row of each row of the plan
    remember_R: np.ndarray
    then: tuple[Key, ...]
    fancy: bool  # whether a row of it wanted more than to draw; by the time it is read back, that row may have left
    key: Key  # of what runs the model
    planned: float  # seconds that it took to be planned, and to be packed;
    packed: float
    began: float  # when it was dispatched, without what it waited for compiles, and when that was done
    left: float = 0.0
    logits_RV: Any = None
    tokens: Any = None
    logprobs: Any = None
    read: Any = None


class Engine:
    """Runs sequences on one model version. `tell` is called with `News` of every step, and `failed` with a sequence
    and an error, both from the engine's thread.

    The state lives here and nowhere else: it is donated to each step and replaced by what the step returns. Where the
    scheduler keeps pages below the device, `mover` has them, on the disk in `spill`.

    If it is `supervised`, and its thread dies or stands still, `successor` makes another engine that goes on.
    """

    def __init__(self, executables: Executables, scheduler: Scheduler, weights: dict[int, Any],
                 tell: Callable[[News], None], failed: Callable[[Sequence, BaseException], None], queue: Admission,
                 spill: Spill | None = None):
        self.executables, self.scheduler = executables, scheduler
        self.weights = weights  # by version: the newest, and those that somebody still runs on
        self.tell, self.failed = tell, failed
        self.queue = queue  # of those that are not yet begun to be read
        self.supervised, self.model = False, executables.name  # what its events call it
        self.pulse: Pulse | None = None  # None while there is nothing to do
        self.died: BaseException | None = None
        self._abandoned, self._heir = False, None
        self._unread: list[tuple[Plan, Key, float]] = []  # steps whose end nobody has waited for, and when they began
        self._read_at = 0.0  # when the last one was waited for
        self.packer = Packer(scheduler.max_rows, executables.table_width, executables.graph.vocab)
        self._step_seconds = 1.0  # of a decode step, on average
        self._committed = 0.0  # when the last step was; 0 after a pause
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.spill = spill
        self.mover = PageMover(executables, scheduler, spill, self._post) if scheduler.tree.lower else None
        self.state = self.last_S = self.history_SL = None
        if weights:  # else it takes over from one that has lain down
            self._reset()
        self._thread = threading.Thread(target=self._loop, name="jaxinfer-engine", daemon=True)
        self._thread.start()

    def _reset(self) -> None:
        self.state = self.last_S = self.history_SL = None  # the old pool goes before the new one comes
        self.state, self.last_S = self.executables.empty("state"), self.executables.empty("last_S")

    # From any thread.

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences which `queue` let in."""
        def enter():
            for sequence in sequences:
                if sequence.ended is None:
                    self.newest.scheduler.submit(sequence)
        self._post(enter)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence between two steps. Whoever calls this tells its caller."""
        def leave():
            self.newest.scheduler.cancel(sequence.id, reason)
            sequence.ended = sequence.ended or reason
            self.queue.leave([sequence.id])
        self._post(leave)

    def swap(self, params: Any, onward: bool, version: int) -> None:
        """Between two steps, let new sequences run on other weights (`Scheduler.swap`), of this version."""
        def change():
            engine = self.newest
            engine.weights = {**engine.weights, version: params}
            engine.scheduler.swap(version, onward)
            engine._forget_weights()

        call_on(self._thread, self._post, change)

    def lie_down(self) -> bool:
        """Between two steps, let go of the weights, the pages and what they hold; False if somebody is here."""
        gone: list[bool] = []

        def let_go():
            engine = self.newest
            if not engine.scheduler.sequences:
                with suppress(Exception):  # a step for somebody who has left may be flying: it reads them
                    jax.block_until_ready(engine.state)
                if engine._abandoned:  # meanwhile another has taken over, and has them
                    return
                engine.weights, engine.state, engine.last_S, engine.history_SL = {}, None, None, None
                engine.scheduler.rewind()
                if engine.mover:
                    engine.mover.forget()
                gone.append(True)

        call_on(self._thread, self._post, let_go)
        return bool(gone)

    def rise(self, params: Any) -> None:
        """Take the weights again, and empty pages. Raises what goes wrong, and lies as before."""
        failed: list[Exception] = []

        def take():
            engine = self.newest
            try:
                engine.weights = {engine.scheduler.version: params}
                engine._reset()
                jax.block_until_ready(engine.state)  # whatever does not fit is to be told here
            except Exception as error:
                engine.weights, engine.state, engine.last_S = {}, None, None
                failed.append(error)

        call_on(self._thread, self._post, take)
        if failed:
            raise failed[0]

    @property
    def busy(self) -> bool:
        """Whether somebody is here, or about to be."""
        return bool(self._inbox or self.scheduler.sequences)

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            if self._heir is None:
                self._check_open()
                self._inbox.append(action)
                self._wake.notify_all()
                return
        self._heir._post(action)

    def _check_open(self) -> None:
        if self._closing:
            raise Closed()

    @property
    def closed(self) -> bool:
        return self.newest._closing

    @property
    def newest(self) -> Engine:
        """The engine that goes on where this one stopped: itself, as a rule."""
        return self if self._heir is None else self._heir.newest

    def close(self) -> None:
        """Stop after the step that runs now. Sequences that have not ended fail with `Closed`."""
        if self._heir is not None:
            self._heir.close()
            return
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self.queue.close()
        if threading.current_thread() is not self._thread and not self._abandoned:
            self._thread.join()
            if self.died is not None:
                self._end_all(Closed, CLOSED)

    # What supervision asks for.

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def successor(self, pulse: Pulse | None, why: str) -> Engine | None:
        """Another engine in the place of this one, whose thread has died, or has not got on since `pulse`. None if it
        has meanwhile, or is closed.

        Who ran fails. Who waits goes on there, unless the thread stands still while it decides, in the middle of the
        books perhaps: then they fail too, and the books are begun anew.
        """
        with self._wake:
            if self._closing or self._abandoned or (self.alive and self.pulse is not pulse):
                return None
            self._abandoned = True
        scheduler, failing = self._books(not (self.alive and pulse is not None and pulse.deciding))
        for sequence in failing:
            failure = StepFailed(f"the engine stopped while this request was in it: {why}")
            self._tell_failed(sequence, failure, self.died)
        self.state = self.history_SL = None  # the old pool goes before the new one comes
        if self.mover:
            self.mover.abandon()
        try:
            heir = Engine(self.executables, scheduler, self.weights, self.tell, self.failed, self.queue, self.spill)
        except Exception as error:
            self.scheduler = scheduler
            self._end_all(StepFailed, f"the engine stopped, and could not be started again: {error}", error)
            raise
        heir.supervised, heir.model = True, self.model
        with self._wake:
            while self._inbox:
                heir._post(self._inbox.popleft())
            self._heir, closing = heir, self._closing
            self.weights = {}
        if closing:
            heir.close()
        return heir

    def _books(self, tidy: bool) -> tuple[Scheduler, list[Sequence]]:
        """The books for who takes over, and who fails: those that ran; or in new books, unless the old ones are `tidy`,
        all that are known."""
        known = list(self.scheduler.sequences.values())
        if tidy:
            with suppress(Exception):  # the thread may have died of what is wrong in them
                failing = [sequence for sequence in known if sequence.begun]
                for sequence in failing:
                    self.scheduler.cancel(sequence.id, "failed")
                self.scheduler.rewind()
                return self.scheduler, failing
        return self.scheduler.anew(), known

    def give_up(self, why: str) -> None:
        """It has stopped, and nothing goes on: whoever waits or runs is told."""
        with self._wake:
            if self._closing or self._abandoned:
                return
            self._abandoned = True
        self._end_all(StepFailed, f"the engine stopped: {why}", self.died)

    # In the engine's thread.

    def _loop(self) -> None:
        kind, message, cause = Closed, CLOSED, None
        try:
            self._run()
        except Abandoned:
            return
        except BaseException as unexpected:
            self.died = unexpected
            if self._abandoned or (self.supervised and not self._closing):
                return  # whoever supervises it sees to the rest
            kind, message, cause = StepFailed, f"the engine stopped: {unexpected}", unexpected
        self._end_all(kind, message, cause)

    def _end_all(self, kind: type[RequestFailed], message: str, cause: BaseException | None = None) -> None:
        """Take nothing in any more, and end whatever has not ended."""
        with self._wake:
            self._closing, actions = True, tuple(self._inbox)
            self._inbox.clear()
        self.queue.close()
        for action in actions:
            with suppress(Exception):  # one that killed the thread may be among those behind it
                action()
        end = self._tell_failed if self._abandoned and self.alive else self._end_one  # the books are in its hands
        for sequence in tuple(self.scheduler.sequences.values()):
            end(sequence, kind(message), cause)
        if self.mover:
            self.mover.close()
        self.state = self.history_SL = None
        self.weights = {}

    def _beat(self, deciding: bool = True, *more: Key) -> float:
        """Say what comes next: to decide, or to wait for the device. `more` is about to be dispatched. Returns the
        time."""
        keys = *(key for _, key, _ in self._unread), *more
        with self._wake:
            if self._abandoned:
                raise Abandoned()
            self.pulse = Pulse(time.perf_counter(), deciding, keys)
            return self.pulse.since

    def _run(self) -> None:
        flying: Flight | None = None
        while True:
            with self._wake:
                while not (self._inbox or self._closing or flying or not self.scheduler.idle):
                    self.pulse = None
                    self._wake.wait()
                self._beat()
                closing = self._closing
            for _ in range(len(self._inbox)):
                self._inbox.popleft()()  # one by one: those behind one that fails are still there
            if closing:
                break
            plan = None
            try:
                if flying and not self.executables.runs_ahead:
                    plan = flying.plan
                    self._commit(flying)
                    plan = flying = None
                if self.mover:
                    self.mover.open()
                plan = self.scheduler.plan(self._steps(), self._rungs())
                if plan is None:
                    self._move(self.scheduler.moves())
                if plan and flying and not self._is_ready(plan):
                    plan, late = flying.plan, plan
                    self._commit(flying)  # nobody should wait for a compile to see tokens that are there
                    plan, flying = late, None
                ahead = self._dispatch(plan) if plan else None
                last, flying = flying, ahead
                if last is None:  # a pause
                    self._committed, self._unread = 0.0, self._unread[-1:] if ahead else []
                else:
                    plan = last.plan
                    self._commit(last)
                if ahead and ahead.tokens is None:
                    plan = ahead.plan
                    self._sample(ahead)
            except Exception as error:
                flying = None
                self._beat()
                self._recover(plan, error)
        if flying:
            with suppress(Exception):  # whoever it was for is told that the model has closed
                jax.block_until_ready(flying.tokens)

    # One step.

    def _steps(self) -> int:
        """How many decode steps to ask for: several if they are so short that the host is what they would wait for."""
        s = self.scheduler
        rows = [rows for rows in self.executables.ladder.together if rows >= len(s.running)]
        if not rows or s.waiting or s.reading or not s.running or self._step_seconds * STEPS > TOGETHER:
            return 1
        key = Key("steps" if s.drawing else "greedy_steps", Bucket(1, rows[0], rows[0], rows[0], STEPS))
        self.executables.prepare(key)
        return STEPS if self.executables.is_ready(key) else 1

    def _rungs(self) -> set[int]:
        """The sizes of steps with prompts that need no compile."""
        if not (self.scheduler.waiting or self.scheduler.reading):
            return set()
        find = self.executables
        return {size for size, bucket in find.ladder.rungs.items() if find.is_ready(Key("forward", bucket))}

    def _then(self, plan: Plan) -> tuple[Key, ...]:
        """What follows `forward` in this step, for any number of rows."""
        if not self.scheduler.fancy:
            return (Key("sample" if self.scheduler.drawing else "greedy"),)
        drawing = self._drawing(plan).values()
        functions = dict.fromkeys(s.sampling.logits for s in drawing if s.sampling.logits)
        edited = any(s.sampling.edits for s in drawing)
        return (*(Key("logits", 0, function) for function in functions),
                Key("edited" if edited else "sample" if self.scheduler.drawing else "greedy"),
                *([Key("logprobs")] if any(s.sampling.logprobs is not None for s in drawing) else ()))

    def _is_ready(self, plan: Plan) -> bool:
        if plan.task != "draw" or plan.steps > 1:
            return True  # compiled before it was admitted, or asked for
        return self.executables.ready(_shape(plan), *self._then(plan))

    def _dispatch(self, plan: Plan) -> Flight | None:
        now = time.perf_counter()
        planned = now - self.pulse.since if self.pulse else 0.0
        began = tuple(s for b in plan.began if (s := self.scheduler.sequences.get(b.sequence)))
        if began:
            self.queue.leave([s.id for s in began])
            self.tell(News(now, began))
        shape, then, find = _shape(plan), self._then(plan), self.executables
        if plan.task != "draw":
            bucket = next(b for b in find.ladder.prompts if b.holds(shape))
        else:
            bucket = find.bucket(shape, *then) if plan.steps == 1 else find.holding(shape)[0]
        key = Key(plan.task if plan.task != "draw" else "forward", bucket)
        if plan.steps > 1:
            key = Key("greedy_steps" if then[0].kind == "greedy" else "steps", bucket)
        packing = time.perf_counter()
        packed = self._pack(plan, bucket)
        began, waited = self._beat(False, key), find.waited
        self._keep_house(plan)
        if packed is None:
            return None
        plan, run, rows, remember_R = packed
        flight = Flight(plan, rows, remember_R, (), self.scheduler.fancy > 0, key, planned, began - packing, began)
        self._launch(flight, run, then)
        flight.left, flight.began = time.perf_counter(), began + find.waited - waited
        self._unread.append((plan, key, flight.began))
        return flight

    def _launch(self, flight: Flight, run: Run, then: tuple[Key, ...]) -> None:
        """Give a step to the device."""
        plan, key, find = flight.plan, flight.key, self.executables
        bucket: Bucket = key.shape  # type: ignore[assignment]
        flight.then = tuple(key._replace(shape=bucket.rows) for key in then)
        program = find.get(key, len(plan.tokens), bucket.tokens)
        first = self.weights[plan.version], self.state, self.last_S, run
        if plan.steps > 1:
            draws = () if key.kind == "greedy_steps" else (self.packer.draws(plan, flight.rows, bucket.rows),)
            self.state, self.last_S, flight.tokens = program(*first, flight.remember_R, *draws)
            flight.tokens.copy_to_host_async()
            return
        if plan.task == "embed":
            self.state, *flight.read = program(*first)
            flight.tokens = np.zeros(bucket.rows, np.int32)
            return
        if plan.task == "draw":
            self.state, flight.logits_RV = program(*first)
        else:
            self.state, flight.logits_RV, flight.read = program(*first, self._targets(plan, bucket))
        self._beat(True, key)
        if not any(plan.draws):
            flight.tokens = np.zeros(bucket.rows, np.int32)  # a chunk of a prompt: nothing follows it
        elif not any(s.matcher is not None for s in self._drawing(plan).values()):
            self._sample(flight)

    def _pack(self, plan: Plan, bucket: Bucket) -> tuple[Plan, Run, np.ndarray, np.ndarray] | None:
        """The step's arrays. Rows that cannot be packed fail, and the others go on without them."""
        try:
            run, remember_R, rows = self.packer.pack(plan, bucket)
        except Exception:
            errors = {}
            for r, id in enumerate(plan.ids):
                try:
                    self.packer.pack(plan.only([r]), bucket)
                except Exception as error:
                    errors[r] = error
                    if sequence := self.scheduler.sequences.get(id):
                        self._fail(sequence, f"this request could not be packed: {error}", error)
            if not errors:
                raise
            plan = plan.only([r for r in range(len(plan.ids)) if r not in errors])
            run, remember_R, rows = self.packer.pack(plan, bucket)  # for who was let in without a row, if for nobody
            if not plan.ids:
                return None
        return plan, run, rows, remember_R

    def _keep_house(self, plan: Plan) -> None:
        """Before the step: move pages, and write down the tokens of who wants them looked at."""
        self._move(plan.moves)
        for began in plan.began:
            if began.sampling.edits and began.sequence in self.scheduler.sequences:
                tokens_L = np.full(self.executables.max_context, self.executables.graph.vocab, np.int32)
                tokens_L[: len(began.tokens)] = began.tokens
                if self.history_SL is None:
                    self.history_SL = self.executables.empty("history_SL")
                self.history_SL = self.executables.get(Key("history"))(
                    self.history_SL, np.int32(began.slot), tokens_L)

    def _move(self, moves: list[Move]) -> None:
        """Copy pages that are forked; send pages down that are evicted, and bring back others."""
        for kind, alike in groupby(moves, itemgetter(0)):
            if kind == "copy":
                self._copy(list(alike))
            else:
                assert self.mover is not None
                self.state = self.mover.move(kind, list(alike), self.state)

    def _copy(self, moves: list[Move]) -> None:
        for at in range(0, len(moves), COPIES):
            sources = {g.name: np.zeros(COPIES, np.int32) for g in self.scheduler.groups}
            targets = {g.name: np.full(COPIES, g.pages, np.int32) for g in self.scheduler.groups}
            for i, (_, name, source, target) in enumerate(moves[at:at + COPIES]):
                sources[name][i], targets[name][i] = source, target
            self.state = self.executables.get(Key("copy"))(self.state, sources, targets)

    def _targets(self, plan: Plan, bucket: Bucket) -> np.ndarray:
        """The token after each token of the only row."""
        reader = self.scheduler.sequences.get(plan.ids[0])
        following = () if reader is None else reader.tokens[plan.starts[0] + 1: plan.starts[0] + 1 + plan.lens[0]]
        targets_T = np.zeros(bucket.tokens, np.int32)
        targets_T[: len(following)] = following
        return targets_T

    def _drawing(self, plan: Plan) -> dict[int, Sequence]:
        """The sequences for which the step draws and does more, by their rows in the plan, but for those that have
        ended since."""
        if not self.scheduler.fancy:
            return {}
        found = ((r, self.scheduler.sequences.get(id)) for r, id in enumerate(plan.ids) if plan.draws[r])
        return {r: sequence for r, sequence in found if sequence}

    def _sample(self, flight: Flight) -> None:
        """Draw from the step's logits: users' functions, then edits, then the draw, then its log-probabilities."""
        plan, logits_RV, drawing = flight.plan, flight.logits_RV, self._drawing(flight.plan)
        R, real = logits_RV.shape[0], len(plan.ids)
        history_SL, flight.logits_RV, counts = self.history_SL, None, plan.counts if drawing else []
        for key in flight.then:
            found = self.executables.get(key, real, R)
            if key.kind == "logits":
                chosen_R, length_R, prompt_R = np.zeros(R, bool), np.zeros(R, np.int32), np.zeros(R, np.int32)
                seed_R, slot_R = np.zeros(R, np.uint32), np.zeros(R, np.int32)
                for r, s in drawing.items():
                    if s.sampling.logits is key.function:
                        at = flight.rows[r]
                        chosen_R[at], length_R[at], prompt_R[at] = True, s.prompt + counts[r], s.prompt
                        seed_R[at], slot_R[at] = s.sampling.seed or 0, plan.slots[r]
                edited_RV = found(logits_RV, history_SL, slot_R, chosen_R, length_R, prompt_R, seed_R)
                flight.logits_RV, logits_RV = logits_RV if flight.logits_RV is None else flight.logits_RV, edited_RV
            elif key.kind == "logprobs":
                raw_RV = logits_RV if flight.logits_RV is None else flight.logits_RV
                flight.logprobs = found(raw_RV, flight.tokens)
            elif key.kind == "greedy":
                self.last_S, flight.tokens = found(logits_RV, self.last_S, flight.remember_R)
            else:
                draws = self.packer.draws(plan, flight.rows, R)
                if key.kind == "sample":
                    self.last_S, flight.tokens = found(logits_RV, self.last_S, flight.remember_R, draws)
                else:
                    self.last_S, self.history_SL, flight.tokens = found(
                        logits_RV, self.last_S, flight.remember_R, draws, self._edits(flight, drawing, R), history_SL)
        flight.logits_RV = None
        flight.tokens.copy_to_host_async()  # else half a millisecond goes by from their being drawn to their being read

    def _edits(self, flight: Flight, drawing: dict[int, Sequence], R: int):
        edits, counts = self.packer.no_edits(R), flight.plan.counts
        for r, sequence in drawing.items():
            if sequence.sampling.edits:
                try:
                    self.packer.edit(edits, flight.rows[r], sequence, counts[r])
                except Exception as error:
                    self._fail(sequence, f"what may be drawn next could not be said: {error}", error)
        return edits

    # What became of it.

    def _commit(self, flight: Flight) -> None:
        plan, waits = flight.plan, flight.read is not None or any(flight.plan.draws)
        self._beat(False)
        start, ready = max(flight.left, self._read_at), 0.0
        if watched := events.observed():
            jax.block_until_ready(flight.tokens)
            ready = time.perf_counter()
        tokens_NR = np.asarray(flight.tokens).reshape(plan.steps, -1)[:, flight.rows].tolist()
        logprobs = jax.tree.map(np.asarray, flight.logprobs)
        read = jax.tree.map(np.asarray, flight.read)
        if waits:
            self._took(plan)
        now = self._beat()
        if self._committed and plan.singles == len(plan.ids):
            self._step_seconds += 0.3 * ((now - self._committed) / plan.steps - self._step_seconds)
        self._committed = now
        told = None
        if logprobs is not None:
            told = {id: (logprobs, row) for id, row in zip(plan.ids, flight.rows.tolist(), strict=True)}
        reader = self.scheduler.sequences.get(plan.ids[0]) if read is not None else None
        drawn = self.scheduler.commit(plan, tokens_NR)
        if flight.fancy or min(map(min, tokens_NR)) < 0:
            drawn = self._look_at(list(drawn))
        chunks = None
        if watched and plan.singles < len(plan.ids):
            lens = list(zip(plan.ids, plan.lens, strict=True))[plan.singles:]
            chunks = Chunks(flight.began, lens, None if waits else flight.logits_RV)
        self.tell(News(now, (), drawn, told, (reader, plan.starts[0], read) if reader else None, chunks))
        if len(self.weights) > 1:
            self._forget_weights()
        if watched:
            stages = {"plan": flight.planned, "pack": flight.packed, "dispatch": flight.left - flight.began}
            if waits:
                stages |= {"execute": max(ready - start, 0.0), "read back": now - max(ready, start)}
            stages["commit"] = time.perf_counter() - now
            events.emit(events.Stepped(self.model, len(plan.ids), len(plan.tokens) * plan.steps,
                                       sum(plan.draws) * plan.steps, stages))

    def _took(self, last: Plan) -> None:
        """The steps up to this one are done: since one was waited for they took so long together, each its part by its
        tokens. Nobody waits for a chunk of a prompt after which nothing is drawn."""
        now, done = time.perf_counter(), [step for step in self._unread if step[0].number <= last.number]
        self._unread = [step for step in self._unread if step[0].number > last.number]
        seconds, self._read_at = now - max(done[0][2], self._read_at), now
        padded = [key.shape.tokens for _, key, _ in done]  # type: ignore[union-attr]
        for (_, key, _), count in zip(done, padded, strict=True):
            self.executables.took(key, seconds * count / sum(padded))
        tokens = sum(len(plan.tokens) for plan, _, _ in done)
        reading = all(plan.singles < len(plan.ids) and plan.task == "draw" for plan, _, _ in done)
        if self.mover and reading and tokens >= self.scheduler.tree.page_size:
            self.mover.costs.note("token", seconds / tokens)

    def _forget_weights(self) -> None:
        used = self.scheduler.keep_versions()
        self.weights = {version: params for version, params in self.weights.items() if version in used}
        if self.mover:
            self.mover.sweep()

    def _look_at(self, drawn: list[Drawn]) -> list[Drawn]:
        """Fail who could not draw, and tell grammars what was drawn."""
        for s, token, ended in drawn:
            if token is not None and token < 0:
                self._fail(s, "no token could be drawn: the logits are not numbers, or every token is forbidden")
            elif s.matcher is not None and token is not None and not ended:
                drawn = self._advance(s, token, drawn)
        return drawn

    def _advance(self, sequence: Sequence, token: int, drawn: list[Drawn]) -> list[Drawn]:
        """Tell a grammar what was drawn; an answer to which nothing can be added has ended."""
        try:
            if sequence.matcher.accept(token):
                self.scheduler.cancel(sequence.id, "stop")
                return [(s, t, "stop" if s is sequence else ended) for s, t, ended in drawn]
        except Exception as error:
            self._fail(sequence, f"the grammar refused the token {token}: {error}", error)
        return drawn

    def _fail(self, sequence: Sequence, message: str, cause: BaseException | None = None) -> None:
        """End one request, with an error of its own; its neighbours go on."""
        self._end_one(sequence, RequestFailed(message), cause)

    def _end_one(self, sequence: Sequence, error: RequestFailed, cause: BaseException | None) -> None:
        self.scheduler.cancel(sequence.id, "failed")
        self._tell_failed(sequence, error, cause)

    def _tell_failed(self, sequence: Sequence, error: RequestFailed, cause: BaseException | None) -> None:
        error.__cause__ = cause
        self.queue.leave([sequence.id])
        self.failed(sequence, error)

    def _recover(self, plan: Plan | None, error: Exception) -> None:
        """The donated state went with the step: rebuild it and read every running sequence again. Those of a step
        that fails twice end as failed; so does everybody if no step could even be planned."""
        failed = self.scheduler.rewind(plan)
        if plan is None:
            failed = [s for s in tuple(self.scheduler.sequences.values()) if self.scheduler.cancel(s.id, "failed")]
        for sequence in failed:
            self._tell_failed(sequence, StepFailed("the step failed, and failed again when it was repeated: "
                                                   f"{error}"), error)
        self._unread = []
        if self.mover:
            self.mover.forget()
        if self.weights:  # else it has lain down, and has no pages
            self._reset()


def _shape(plan: Plan) -> Bucket:
    """A step's own shape, unpadded."""
    longest = 1 if plan.singles == len(plan.ids) else max(plan.lens)
    return Bucket(longest, len(plan.ids), len(plan.tokens), plan.singles, plan.steps)
