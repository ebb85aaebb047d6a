"""What is asked of a model, and what comes back: Sampling, Sequence, Piece, Output."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxinfer.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when to stop. Nonsense is refused on construction with `InvalidRequest`.

    `max_tokens`: at most this many new tokens. `temperature`: 0 is greedy. `top_k`: 0 is off. `top_p` in (0, 1]:
    nucleus (Holtzman et al., 2020), 1 is off. `min_p` in [0, 1]: tokens under `min_p` times the likeliest are out.
    `seed`: None draws a fresh one; the n-th draw of a request depends on its seed and n alone. `stop`: strings that
    end the text and are not part of it. `stop_tokens`: token ids that end it, besides the model's own.

    >>> Sampling(temperature=-1)
    Traceback (most recent call last):
    jaxinfer.errors.InvalidRequest: temperature is -1; it must be a finite number >= 0 (0 is greedy)
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, number, right, wanted in (
            ("max_tokens", int, lambda v: v >= 1, "an integer >= 1"),
            ("temperature", float, lambda v: v >= 0, "a finite number >= 0 (0 is greedy)"),
            ("top_k", int, lambda v: 0 <= v < 2**31, "an integer >= 0 (0 is off)"),
            ("top_p", float, lambda v: 0 < v <= 1, "a number in (0, 1] (1 is off)"),
            ("min_p", float, lambda v: 0 <= v <= 1, "a number in [0, 1] (0 is off)"),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            ok = whole if number is int else (whole or isinstance(value, float)) and math.isfinite(value)
            if not ok or not right(value):
                raise InvalidRequest(f"{name} is {value!r}; it must be {wanted}")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed < 2**32):
            raise InvalidRequest(f"seed is {self.seed!r}; it must be an integer in [0, 2**32) or None")
        for name, kind, wanted in (("stop", str, "non-empty strings"), ("stop_tokens", int, "token ids")):
            values = getattr(self, name)
            if not isinstance(values, SequenceOf) or not all(type(v) is kind and v != "" for v in values):
                raise InvalidRequest(f"{name} is {values!r}; it must be a sequence of {wanted}")
            object.__setattr__(self, name, tuple(values))

    def but(self, **changes: Any) -> Sampling:
        """This Sampling with some fields changed; a name that is not a field is an `InvalidRequest`."""
        unknown = sorted(set(changes) - set(self.__dataclass_fields__))
        if unknown:
            raise InvalidRequest(f"unknown sampling options {unknown}; known are {sorted(self.__dataclass_fields__)}")
        return replace(self, **changes) if changes else self


@dataclass(eq=False)
class Sequence:
    """One request's tokens, and how many of them the model has read.

    `tokens` are committed (prompt, then drawn); `drawing` of them more are being drawn on the device and not yet
    known to the host. `unread` is the only number that tells prefill from decode from resume.
    """

    id: int
    tokens: list[int]
    prompt: int
    sampling: Sampling
    stops: frozenset[int] = frozenset()
    read: int = 0
    drawing: int = 0
    slot: int | None = None
    pages: dict[str, list[int | None]] = field(default_factory=dict)
    ended: FinishReason | None = None
    failures: int = 0

    @property
    def unread(self) -> int:
        return len(self.tokens) + self.drawing - self.read

    @property
    def drawn(self) -> int:
        return len(self.tokens) + self.drawing - self.prompt

    @property
    def wants(self) -> bool:
        """Whether another step could still add a token."""
        return self.ended is None and self.drawn < self.sampling.max_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds from submission: to the first step that read the prompt, to the first token, to the end."""

    queued: float
    first_token: float
    total: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """The rate after the first token."""
        return (self.tokens - 1) / (self.total - self.first_token) if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer: text that is final, the tokens it came with, and on the last piece the Output."""

    text: str
    tokens: tuple[int, ...]
    output: Output | None = None


@dataclass(frozen=True)
class Output:
    """A finished request. `finish_reason`: "stop" (a stop token or string) or "length"; a request that is cancelled or
    fails has no Output."""

    prompt_tokens: tuple[int, ...]
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings

    def _repr_pretty_(self, printer, _cycle):
        rate = self.timings.tokens_per_second
        printer.text(f"{self.text!r}\n[{len(self.tokens)} tokens, {self.finish_reason}, {rate:.1f} tokens/s]")
