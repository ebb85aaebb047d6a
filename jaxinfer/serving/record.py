"""What a server remembers of the events it has seen: counts, histograms, and the last so many of each duration."""

from __future__ import annotations

import threading
import time
import weakref
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from jaxinfer import events
from jaxinfer.runtime.language import Statistics
from jaxinfer.runtime.registry import ModelVersion

LAST = 2048  # of each stage's durations
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BYTES = (0, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 26, 1 << 30)
# Which of these a request has, as what: by the name of the histogram.
BOUNDS = {"first_token_seconds": SECONDS, "inter_token_seconds": SECONDS, "output_token_seconds": SECONDS,
          "request_seconds": SECONDS, "queue_seconds": SECONDS, "prefill_seconds": SECONDS, "decode_seconds": SECONDS,
          "inference_seconds": SECONDS, "prompt_length": COUNTS, "answer_length": COUNTS, "step_tokens": COUNTS,
          "copied_bytes": BYTES}
SHOWN = ("first_token_seconds", "inter_token_seconds", "request_seconds")  # of which the last ones are remembered
COMPILES = ("compiled", "disk")


@dataclass
class Histogram:
    """How many values were at most each of `bounds`, or more than all; and their sum.

    >>> histogram = Histogram((1, 10))
    >>> histogram.add(0.5, 1, 3, 100)
    >>> histogram.counts, histogram.total
    ([2, 1, 1], 104.5)
    """

    bounds: tuple[float, ...]
    total: float = 0.0
    counts: list[int] = field(init=False)

    def __post_init__(self):
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, *values: float) -> None:
        for value in values:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value


@dataclass
class Stage:
    """All durations of one stage: how many, their sum in seconds, and the last ones."""

    count: int = 0
    seconds: float = 0.0
    last: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    def add(self, seconds: float) -> None:
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        self.last.append(seconds)


class ModelRecord:
    """Of one model."""

    def __init__(self):
        self.histograms = {name: Histogram(bounds) for name, bounds in BOUNDS.items()}
        self.reasons: Counter[str] = Counter()  # how requests ended
        self.totals: Counter[str] = Counter()
        self.retired: Counter[str] = Counter()  # what versions counted that have gone
        self.last = {name: deque[float](maxlen=LAST) for name in SHOWN}

    def add(self, name: str, *values: float) -> None:
        self.histograms[name].add(*values)
        if name in SHOWN:
            self.last[name].extend(values)


class Record:
    """An observer of events (`events.observe(record)`), called from whichever thread emits them.

    `stages` are those a request goes through, of all models: queue, tokenise, plan, pack, dispatch, execute, read back,
    commit, detokenise, serialise.
    """

    def __init__(self):
        self.models: dict[str, ModelRecord] = defaultdict(ModelRecord)
        self.stages: dict[str, Stage] = defaultdict(Stage)
        self.compiles: dict[str, Stage] = {origin: Stage() for origin in COMPILES}
        self.totals: Counter[str] = Counter()
        self.since = time.monotonic()
        self._gone: weakref.WeakSet[Any] = weakref.WeakSet()  # and what served them
        self._lock = threading.Lock()

    def __call__(self, event: events.Event) -> None:
        with self._lock:
            match event:
                case events.RequestEnded():
                    self._ended(event)
                case events.Stepped(model, _, tokens, drawn, stages):
                    self.models[model].add("step_tokens", tokens)
                    self.models[model].totals["drawn"] += drawn
                    for stage, seconds in stages.items():
                        self.stages[stage].add(seconds)
                case events.Timed(stage, seconds):
                    self.stages[stage].add(seconds)
                case events.Compiling(_, float(seconds), origin):
                    self.compiles[origin].add(seconds)
                case events.Missed():
                    self.totals["misses"] += 1
                case events.Retried():
                    self.totals["retries"] += 1
                case events.Swapped(model):
                    self.models[model].totals["swaps"] += 1
                case events.Retired(model, served, stats):
                    self.models[model].retired.update(_counted(stats))
                    self._gone.add(served)
                case events.Stopped(model, _, revived):
                    self.models[model].totals["revived" if revived else "lost"] += 1

    def _ended(self, event: events.RequestEnded) -> None:
        record, marks = self.models[event.model], event.marks
        record.reasons[event.reason] += 1
        record.totals["generated"] += event.tokens
        if marks is None:
            return
        add = record.add
        add("request_seconds", marks.ended - marks.submitted)
        add("queue_seconds", (marks.began or marks.ended) - marks.submitted)
        self.stages["queue"].add((marks.began or marks.ended) - marks.submitted)
        if marks.began is None:
            return
        add("inference_seconds", marks.ended - marks.began)
        if not event.prompt_tokens:  # an endpoint's, or an encoder's
            add("copied_bytes", event.copied)
            return
        record.totals["prompt"] += event.prompt_tokens
        record.totals["reused"] += event.reused
        add("prompt_length", event.prompt_tokens)
        add("answer_length", event.tokens)
        self.stages["detokenise"].add(marks.detokenised)
        drawn = [times for times in marks.drawn if times]
        for times in drawn:
            add("inter_token_seconds", *gaps(times))
            if len(times) > 1:
                add("output_token_seconds", (times[-1] - times[0]) / (len(times) - 1))
        if drawn:
            first, last = min(times[0] for times in drawn), max(times[-1] for times in drawn)
            add("first_token_seconds", first - marks.submitted)
            add("prefill_seconds", first - marks.began)
            add("decode_seconds", last - first)

    def counted(self, versions: Iterable[ModelVersion]) -> dict[str, Counter[str]]:
        """What all versions of each name have counted: these, and those that have gone."""
        told = [(version, _counted(version.model.stats)) for version in versions]
        with self._lock:
            found = {name: Counter(record.retired) for name, record in self.models.items()}
            for version, counts in told:
                if version.model not in self._gone:
                    found.setdefault(version.name, Counter()).update(counts)
        return found

    def slowest(self) -> list[tuple[str, Stage]]:
        """The stages, the one that took the most time in all first."""
        with self._lock:
            return sorted(self.stages.items(), key=lambda item: -item[1].seconds)


def _counted(stats: Any) -> dict[str, int]:
    if isinstance(stats, Statistics):
        return {"steps": stats.steps, "preemptions": stats.preempted}
    return {"steps": stats.batches, "bytes_in": stats.bytes_in, "bytes_copied": stats.bytes_copied}


def gaps(times: Iterable[float]) -> list[float]:
    """Between each of them and the next."""
    return [after - before for before, after in pairwise(times)]


def quantile(values: Iterable[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed; 0 of none.

    >>> quantile([3, 1, 2, 4], 0.5), quantile([3, 1, 2, 4], 0.99), quantile([], 0.5)
    (2, 4, 0.0)
    """
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0
