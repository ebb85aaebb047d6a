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

TOGETHER = 0.05  # seconds that several decode steps in one call may take: nobody should see a stream stutter


class News(NamedTuple):
    """What the engine tells of a step: who began to be read, what was drawn and who ended by it, log-probabilities
    by sequence, and what was read of a prompt for its own sake: (sequence, position of the first, arrays)."""

    at: float
    began: tuple[Sequence, ...] = ()
    drawn: Iterable[Drawn] = ()  # to be gone through once
    logprobs: dict[int, Any] | None = None
    read: tuple[Sequence, int, Any] | None = None


@dataclass
class Flight:
    """A dispatched step, not yet read back. `tokens` [R] or [steps, R] is None while a grammar's masks, which depend
    on the step before, are still to be made."""

    plan: Plan
    rows: np.ndarray  # the bucket's row of each row of the plan
    remember_R: np.ndarray
    then: tuple[Key, ...]
    fancy: bool  # whether a row of it wanted more than to draw; by the time it is read back, that row may have left
    began: float = 0.0  # when it was dispatched
    logits_RV: Any = None
    tokens: Any = None
    logprobs: Any = None
    read: Any = None


class Engine:
    """Runs sequences on one model version. `tell` is called with `News` of every step, and `failed` with a sequence
    and an error, both from the engine's thread.

    The state lives here and nowhere else: it is donated to each step and replaced by what the step returns. At most
    `max_waiting` requests and `max_waiting_tokens` tokens of theirs wait; what comes on top is rejected. Where the
    scheduler keeps pages below the device, `mover` has them, on the disk in `spill`.
    """

    def __init__(self, executables: Executables, scheduler: Scheduler, params: Any, tell: Callable[[News], None],
                 failed: Callable[[Sequence, BaseException], None], *, max_waiting: int, max_waiting_tokens: int,
                 spill: Spill | None = None):
        self.executables, self.scheduler = executables, scheduler
        self.weights = {scheduler.version: params}  # by version: the newest, and those that somebody still runs on
        self.tell, self.failed = tell, failed
        self.queue = Admission(max_waiting, max_waiting_tokens)  # of those that are not yet begun to be read
        self.packer = Packer(scheduler.max_rows, executables.table_width, executables.graph.vocab)
        self._step_seconds = 1.0  # of a decode step, on average
        self._committed = 0.0  # when the last step was; 0 after a pause
        self._drew = 0.0  # when the last draw was there
        self._unseen: list[tuple[float, Plan]] = []  # steps whose end nobody has waited for, and when they began
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.mover = PageMover(executables, scheduler, spill, self._post) if scheduler.tree.lower else None
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
                    self.scheduler.submit(sequence)
        self._post(enter)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence between two steps. Whoever calls this tells its caller."""
        def leave():
            self.scheduler.cancel(sequence.id, reason)
            sequence.ended = sequence.ended or reason
            self.queue.leave([sequence.id])
        self._post(leave)

    def swap(self, params: Any, onward: bool, version: int) -> None:
        """Between two steps, let new sequences run on other weights (`Scheduler.swap`), of this version."""
        def change():
            self.weights = {**self.weights, version: params}
            self.scheduler.swap(version, onward)
            self._forget_weights()

        call_on(self._thread, self._post, change)

    def lie_down(self) -> bool:
        """Between two steps, let go of the weights, the pages and what they hold; False if somebody is here."""
        gone: list[bool] = []

        def let_go():
            if not self.scheduler.sequences:
                with suppress(Exception):  # a step for somebody who has left may be flying: it reads them
                    jax.block_until_ready(self.state)
                self.weights, self.state, self.last_S, self.history_SL = {}, None, None, None
                self.scheduler.rewind()
                if self.mover:
                    self.mover.forget()
                gone.append(True)

        call_on(self._thread, self._post, let_go)
        return bool(gone)

    def rise(self, params: Any) -> None:
        """Take the weights again, and empty pages. Raises what goes wrong, and lies as before."""
        failed: list[Exception] = []

        def take():
            try:
                self.weights = {self.scheduler.version: params}
                self._reset()
                jax.block_until_ready(self.state)  # whatever does not fit is to be told here
            except Exception as error:
                self.weights, self.state, self.last_S = {}, None, None
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
            self._check_open()
            self._inbox.append(action)
            self._wake.notify_all()

    def _check_open(self) -> None:
        if self._closing:
            raise Closed()

    @property
    def closed(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Stop after the step that runs now. Sequences that have not ended fail with `Closed`."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self.queue.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # In the engine's thread.

    def _loop(self) -> None:
        kind, message, cause = Closed, "the model was closed while this request was waiting or running", None
        try:
            self._run()
        except BaseException as unexpected:
            kind, message, cause = StepFailed, f"the engine stopped: {unexpected}", unexpected
        with self._wake:
            self._closing, actions = True, tuple(self._inbox)
        self.queue.close()
        for action in actions:
            action()
        for sequence in tuple(self.scheduler.sequences.values()):
            self._fail(sequence, message, cause, kind)
        if self.mover:
            self.mover.close()
        self.state = self.history_SL = None
        self.weights = {}

    def _run(self) -> None:
        flying: Flight | None = None
        while True:
            with self._wake:
                while not (self._inbox or self._closing or flying or not self.scheduler.idle):
                    self._wake.wait()
                actions, closing = tuple(self._inbox), self._closing
                self._inbox.clear()
            for action in actions:
                action()
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
                    self._committed, self._unseen = 0.0, []
                else:
                    plan = last.plan
                    self._commit(last)
                if ahead and ahead.tokens is None:
                    plan = ahead.plan
                    self._sample(ahead)
            except Exception as error:
                flying = None
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
        began = tuple(s for b in plan.began if (s := self.scheduler.sequences.get(b.sequence)))
        if began:
            self.queue.leave([s.id for s in began])
            self.tell(News(now, began))
        shape, then, find = _shape(plan), self._then(plan), self.executables
        if plan.task != "draw":
            bucket = next(b for b in find.ladder.prompts if b.holds(shape))
        else:
            bucket = find.bucket(shape, *then) if plan.steps == 1 else find.holding(shape)[0]
        packed = self._pack(plan, bucket)
        self._keep_house(plan)
        if packed is None:
            return None
        plan, run, flight = packed
        flight.then = tuple(key._replace(shape=bucket.rows) for key in then)
        first, real = (self.weights[plan.version], self.state, self.last_S, run), len(plan.tokens)
        if plan.steps > 1:
            greedy = then[0].kind == "greedy"
            steps = find.get(Key("greedy_steps" if greedy else "steps", bucket), real, bucket.tokens)
            draws = () if greedy else (self.packer.draws(plan, flight.rows, bucket.rows),)
            self.state, self.last_S, flight.tokens = steps(*first, flight.remember_R, *draws)
            flight.tokens.copy_to_host_async()
            return flight
        if plan.task == "draw":
            step = find.get(Key("forward", bucket), real, bucket.tokens)
            flight.began = time.perf_counter()
            self.state, flight.logits_RV = step(*first)
        elif plan.task == "embed":
            self.state, *flight.read = find.get(Key("embed", bucket), real, bucket.tokens)(*first)
            flight.tokens = np.zeros(bucket.rows, np.int32)
            return flight
        else:
            score = find.get(Key("score", bucket), real, bucket.tokens)
            self.state, flight.logits_RV, flight.read = score(*first, self._targets(plan, bucket))
        if not any(plan.draws):
            flight.tokens = np.zeros(bucket.rows, np.int32)  # a chunk of a prompt: nothing follows it
        elif not any(s.matcher is not None for s in self._drawing(plan).values()):
            self._sample(flight)
        return flight

    def _pack(self, plan: Plan, bucket: Bucket) -> tuple[Plan, Run, Flight] | None:
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
        return plan, run, Flight(plan, rows, remember_R, (), self.scheduler.fancy > 0)

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
        plan = flight.plan
        tokens_NR = np.asarray(flight.tokens).reshape(plan.steps, -1)[:, flight.rows].tolist()
        logprobs = jax.tree.map(np.asarray, flight.logprobs)
        now = time.perf_counter()
        if self._committed and plan.singles == len(plan.ids):
            self._step_seconds += 0.3 * ((now - self._committed) / plan.steps - self._step_seconds)
        self._committed = now
        if self.mover:
            self._time_reading(flight, now)
        told = None
        if logprobs is not None:
            told = {id: (logprobs, row) for id, row in zip(plan.ids, flight.rows.tolist(), strict=True)}
        read = None
        if flight.read is not None and (reader := self.scheduler.sequences.get(plan.ids[0])):
            read = (reader, plan.starts[0], jax.tree.map(np.asarray, flight.read))
        drawn = self.scheduler.commit(plan, tokens_NR)
        if flight.fancy or min(map(min, tokens_NR)) < 0:
            drawn = self._look_at(list(drawn))
        self.tell(News(now, (), drawn, told, read))
        if len(self.weights) > 1:
            self._forget_weights()

    def _time_reading(self, flight: Flight, now: float) -> None:
        """Measure what a token of a prompt takes. Nobody waits for a chunk after which nothing is drawn: it is timed
        together with those that follow it."""
        assert self.mover is not None
        self._unseen.append((flight.began, flight.plan))
        if not any(flight.plan.draws):
            return
        steps, self._unseen = self._unseen, []
        start, self._drew = max(self._drew, steps[0][0]), now
        tokens = sum(len(plan.tokens) for _, plan in steps)
        reading = all(plan.singles < len(plan.ids) and plan.task == "draw" for _, plan in steps)
        if reading and tokens >= self.scheduler.tree.page_size:
            self.mover.costs.note("token", (now - start) / tokens)

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

    def _fail(self, sequence: Sequence, message: str, cause: BaseException | None = None,
              kind: type[RequestFailed] = RequestFailed) -> None:
        """End one request, with an error of its own; its neighbours go on."""
        error = kind(message)
        error.__cause__ = cause
        self.scheduler.cancel(sequence.id, "failed")
        self.queue.leave([sequence.id])
        self.failed(sequence, error)

    def _recover(self, plan: Plan | None, error: Exception) -> None:
        """The donated state went with the step: rebuild it and read every running sequence again. Those of a step
        that fails twice end as failed; so does everybody if no step could even be planned."""
        failed = self.scheduler.rewind(plan)
        if plan is None:
            failed = [s for s in tuple(self.scheduler.sequences.values()) if self.scheduler.cancel(s.id, "failed")]
        for sequence in failed:
            failure = StepFailed(f"the step failed, and failed again when it was repeated: {error}")
            failure.__cause__ = error
            self.queue.leave([sequence.id])
            self.failed(sequence, failure)
        if self.mover:
            self.mover.forget()
        if self.weights:  # else it has lain down, and has no pages
            self._reset()


def _shape(plan: Plan) -> Bucket:
    """A step's own shape, unpadded."""
    longest = 1 if plan.singles == len(plan.ids) else max(plan.lens)
    return Bucket(longest, len(plan.ids), len(plan.tokens), plan.singles, plan.steps)
