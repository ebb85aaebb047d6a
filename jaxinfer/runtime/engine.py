"""The engine: one thread that plans, packs and dispatches the next step before it reads the last one back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.compiler import Executables
from jaxinfer.errors import Closed, StepFailed
from jaxinfer.graph import State
from jaxinfer.request import FinishReason, Sequence
from jaxinfer.runtime.pack import Packer
from jaxinfer.scheduler import Plan, Scheduler


@dataclass(frozen=True)
class News:
    """What the engine tells of a sequence: it began to be read, a token was drawn, or it ended (or several at once)."""

    sequence: Sequence
    token: int | None = None
    ended: FinishReason | None = None
    error: BaseException | None = None
    at: float = 0.0


@dataclass(frozen=True)
class Flight:
    """A dispatched step, not yet read back."""

    plan: Plan
    tokens_R: jax.Array


class Engine:
    """Runs sequences on one model version. `tell` is called with every `News`, from the engine's thread.

    The state lives here and nowhere else: it is donated to each step and replaced by what the step returns.
    """

    def __init__(self, executables: Executables, scheduler: Scheduler, params: Any, make_state: Callable[[], State],
                 tell: Callable[[News], None], device: jax.Device):
        self.executables, self.scheduler, self.params, self.tell = executables, scheduler, params, tell
        self.packer = Packer(scheduler.max_rows, executables.table_width)
        self._device, self._make_state = device, make_state
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._reset()
        self._thread = threading.Thread(target=self._loop, name="jaxinfer-engine", daemon=True)
        self._thread.start()

    def _reset(self) -> None:
        self.state = self.last_S = None  # the old pool goes before the new one comes
        self.state = self._make_state()
        self.last_S = jax.device_put(jnp.zeros(self.scheduler.max_rows, jnp.int32), self._device)

    # From any thread.

    def submit(self, *sequences: Sequence) -> None:
        def enter():
            for sequence in sequences:
                self.scheduler.submit(sequence)
        self._post(enter)

    def cancel(self, id: int, reason: FinishReason = "cancelled") -> None:
        """End a sequence between two steps; `tell` hears of it unless it had ended already."""
        def leave():
            sequence = self.scheduler.cancel(id, reason)
            if sequence:
                self.tell(News(sequence, ended=reason))
        self._post(leave)

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            if self._closing:
                raise Closed("this model is closed; load it again to use it")
            self._inbox.append(action)
            self._wake.notify()

    @property
    def closed(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Stop after the step that runs now. Sequences that have not ended fail with `Closed`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # In the engine's thread.

    def _loop(self) -> None:
        error: BaseException = Closed("the model was closed while this request was waiting or running")
        try:
            self._run()
        except BaseException as unexpected:
            error = StepFailed(f"the engine stopped: {unexpected}")
            error.__cause__ = unexpected
        with self._wake:
            self._closing, actions = True, tuple(self._inbox)
        for action in actions:
            action()
        for sequence in tuple(self.scheduler.sequences.values()):
            self.scheduler.cancel(sequence.id)
            self.tell(News(sequence, ended="cancelled", error=error))
        self.state = self.params = None

    def _run(self) -> None:
        flying: Flight | None = None
        while True:
            with self._wake:
                while not (self._inbox or self._closing or flying or self.scheduler.running or self.scheduler.waiting):
                    self._wake.wait()
                actions, closing = tuple(self._inbox), self._closing
                self._inbox.clear()
            for action in actions:
                action()
            if closing:
                break
            plan = None
            try:
                plan = self.scheduler.plan()
                if plan and flying and not self.executables.ready(*_shape(plan)):
                    plan, late = flying.plan, plan
                    self._commit(flying)  # nobody should wait for a compile to see tokens that are there
                    plan, flying = late, None
                ahead = self._dispatch(plan) if plan else None
                last, flying = flying, ahead
                if last:
                    plan = last.plan
                    self._commit(last)
            except Exception as error:
                flying = None
                self._recover(plan, error)
        if flying:
            jax.block_until_ready(flying.tokens_R)

    def _dispatch(self, plan: Plan) -> Flight:
        tokens, rows, greedy = _shape(plan)
        now = time.perf_counter()
        for row in plan.rows:
            if row.start == 0:
                self.tell(News(self.scheduler.sequences[row.sequence], at=now))
        bucket = self.executables.bucket(tokens, rows, greedy)
        run, remember_R = self.packer.pack(plan, bucket)
        draws = [] if greedy else [self.packer.draws(plan, bucket.rows)]
        forward = self.executables.forward(bucket, tokens)
        sample = self.executables.sample(bucket.rows, greedy, rows)
        self.state, logits_RV = forward(self.params, self.state, self.last_S, run)
        self.last_S, tokens_R = sample(logits_RV, self.last_S, remember_R, *draws)
        return Flight(plan, tokens_R)

    def _commit(self, flight: Flight) -> None:
        tokens = np.asarray(flight.tokens_R)[: len(flight.plan.rows)].tolist()
        now = time.perf_counter()
        for drawn in self.scheduler.commit(flight.plan, tokens):
            self.tell(News(drawn.sequence, drawn.token, drawn.ended, at=now))

    def _recover(self, plan: Plan | None, error: Exception) -> None:
        """The donated state went with the step: rebuild it and read every running sequence again. Those of a step
        that fails twice end as failed; so does everybody if no step could even be planned."""
        failed = self.scheduler.rewind(plan)
        if plan is None:
            failed = [s for s in tuple(self.scheduler.sequences.values()) if self.scheduler.cancel(s.id, "failed")]
        for sequence in failed:
            failure = StepFailed(f"the step failed, and failed again when it was repeated: {error}")
            failure.__cause__ = error
            self.tell(News(sequence, ended="failed", error=failure))
        self._reset()


def _shape(plan: Plan) -> tuple[int, int, bool]:
    """A step's tokens and rows, and whether all that it draws is greedy."""
    greedy = not any(row.draws and row.sampling.temperature > 0 for row in plan.rows)
    return sum(len(row.tokens) for row in plan.rows), len(plan.rows), greedy
