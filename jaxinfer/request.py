"""What is asked of a model, and what comes back: Request, Sampling, Sequence, Piece, Output."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from jaxinfer.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "expired", "rejected", "failed"]
CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")
MOST_BIASES, MOST_LOGPROBS, MOST_SAMPLES = 512, 20, 1024


class Rule(NamedTuple):
    """What a number must be."""

    kind: type
    right: Callable[[Any], bool]
    wanted: str


SAMPLING_RULES = {
    "max_tokens": Rule(int, lambda v: v >= 0, "an integer >= 0"),
    "min_tokens": Rule(int, lambda v: v >= 0, "an integer >= 0"),
    "temperature": Rule(float, lambda v: 0 <= v <= 1e6, "a finite number >= 0 (0 is greedy)"),
    "top_k": Rule(int, lambda v: 0 <= v < 2**31, "an integer >= 0 (0 is off)"),
    "top_p": Rule(float, lambda v: 0 < v <= 1, "a number in (0, 1] (1 is off)"),
    "min_p": Rule(float, lambda v: 0 <= v <= 1, "a number in [0, 1] (0 is off)"),
    "repetition_penalty": Rule(float, lambda v: 1e-6 <= v <= 1e6, "a number in [1e-6, 1e6] (1 is off)"),
    "presence_penalty": Rule(float, lambda v: -2 <= v <= 2, "a number in [-2, 2] (0 is off)"),
    "frequency_penalty": Rule(float, lambda v: -2 <= v <= 2, "a number in [-2, 2] (0 is off)"),
    "n": Rule(int, lambda v: 1 <= v <= MOST_SAMPLES, f"an integer from 1 to {MOST_SAMPLES}"),
}
MAYBE_RULES = {  # None is off
    "seed": Rule(int, lambda v: 0 <= v < 2**32, "an integer in [0, 2**32) or None"),
    "logprobs": Rule(int, lambda v: 0 <= v <= MOST_LOGPROBS, f"an integer from 0 to {MOST_LOGPROBS}, or None"),
    "prompt_logprobs": Rule(int, lambda v: 0 <= v <= MOST_LOGPROBS, f"an integer from 0 to {MOST_LOGPROBS}, or None"),
}
REQUEST_RULES = {
    "priority": Rule(int, lambda v: -100 <= v <= 100, "an integer from -100 (first) to 100 (last)"),
    "queue_timeout": Rule(float, lambda v: v > 0, "seconds > 0, or None"),
    "timeout": Rule(float, lambda v: v > 0, "seconds > 0, or None"),
}


def _check(name: str, value: Any, rule: Rule) -> None:
    whole = type(value) is int
    ok = whole if rule.kind is int else (whole or isinstance(value, float)) and math.isfinite(value)
    if not ok or not rule.right(value):
        raise InvalidRequest(f"{name} is {value!r}; it must be {rule.wanted}")


def check_options(**options: Any) -> None:
    """Raises InvalidRequest for an option of a request that has no meaning; None says nothing."""
    for name, value in options.items():
        if value is not None or name == "priority":
            _check(name, value, REQUEST_RULES[name])


def _items(name: str, values: Any, right: Callable[[Any], bool], wanted: str) -> tuple:
    if isinstance(values, str | bytes) or not isinstance(values, SequenceOf) or not all(map(right, values)):
        raise InvalidRequest(f"{name} is {values!r}; it must be a sequence of {wanted}")
    return tuple(values)


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_bias(token: Any, bias: Any) -> bool:
    return _is_token(token) and type(bias) in (int, float) and not math.isnan(bias) and bias != math.inf


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when to stop. Nonsense is refused on construction with `InvalidRequest`.

    Length: at most `max_tokens` new tokens; no stop token before `min_tokens`; `ignore_eos` goes on after the model's
    own. `stop`: strings that end the text and are not part of it; `stop_tokens`: token ids that end it.

    Drawing: `temperature` 0 is greedy. `top_k` 0, `top_p` 1 (nucleus, Holtzman et al., 2020) and `min_p` 0 are off.
    `seed`: None draws a fresh one; the n-th draw of a request depends on its seed and n alone. `n` samples share the
    prompt; sample i draws with `seed + i`.

    What may be drawn: `repetition_penalty` (Keskar et al., 2019: prompt and answer; 1 is off), `presence_penalty` and
    `frequency_penalty` (OpenAI's: answer only; 0 is off), `logit_bias` (token id -> what is added, -inf forbids it),
    `allowed_tokens` (no others), and at most one of `json_schema` (a dict or JSON), `regex`, `grammar` (Lark, as
    llguidance has it) and `choice` (one of these texts), which the whole answer follows. `logits` is your own pure
    JAX function `(logits_V, context) -> logits_V` (context: `jaxinfer.kernels.Context`).

    What comes back: `logprobs` (natural, of the model's own distribution: of each new token and of the so many
    likeliest, 0 to 20), `prompt_logprobs` (the same for the prompt), `echo` (the text begins with the prompt's).

    >>> Sampling(temperature=-1)
    Traceback (most recent call last):
    jaxinfer.errors.InvalidRequest: temperature is -1; it must be a finite number >= 0 (0 is greedy)
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_tokens: tuple[int, ...] | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None
    logits: Callable[[Any, Any], Any] | None = None

    def __post_init__(self):
        for name, rule in SAMPLING_RULES.items():
            _check(name, getattr(self, name), rule)
        for name, rule in MAYBE_RULES.items():
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), rule)
        for name in ("ignore_eos", "echo"):
            if type(getattr(self, name)) is not bool:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}")
        said = (self.stop,) if isinstance(self.stop, str) else self.stop
        put = lambda name, value: object.__setattr__(self, name, value)
        put("stop", _items("stop", said, lambda v: type(v) is str and v != "", "non-empty strings"))
        put("stop_tokens", _items("stop_tokens", self.stop_tokens, _is_token, "token ids"))
        if self.allowed_tokens is not None:
            put("allowed_tokens", _items("allowed_tokens", self.allowed_tokens, _is_token, "token ids"))
            if not self.allowed_tokens:
                raise InvalidRequest("allowed_tokens is empty; it must name at least one token id, or be None")
        if not isinstance(self.logit_bias, Mapping) or not all(_is_bias(*item) for item in self.logit_bias.items()):
            raise InvalidRequest(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        if len(self.logit_bias) > MOST_BIASES:
            raise InvalidRequest(f"logit_bias has {len(self.logit_bias)} tokens; it may have {MOST_BIASES}; "
                                 "allowed_tokens takes any number")
        put("logit_bias", dict(self.logit_bias))
        self._check_constraint(put)
        if self.logits is not None and not callable(self.logits):
            raise InvalidRequest(f"logits is a {type(self.logits).__name__}; it must be a JAX function "
                                 "(logits_V, context) -> logits_V")

    def _check_constraint(self, put: Callable[[str, Any], None]) -> None:
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidRequest(f"{' and '.join(given)} were given; an answer can follow one of them")
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None and type(getattr(self, name)) is not str:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it must be a string")
        if self.choice is not None:
            put("choice", _items("choice", self.choice, lambda v: type(v) is str and v != "", "non-empty strings"))
            if not self.choice:
                raise InvalidRequest("choice is empty; it must name at least one text")
        schema = self.json_schema
        try:
            if isinstance(schema, str):
                schema = json.loads(schema)
            right = schema is None or (isinstance(schema, Mapping) and json.dumps(schema) is not None)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"json_schema is no JSON: {error}") from error
        if not right:
            raise InvalidRequest(f"json_schema is {self.json_schema!r}; it must be a JSON object: a dict, or its text")

    @property
    def constrained(self) -> bool:
        """Whether the answer must follow a schema, an expression, a grammar or a choice."""
        return any(getattr(self, name) is not None for name in CONSTRAINTS)

    @property
    def edits(self) -> bool:
        """Whether something is done to the logits before a token is drawn from them."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        return bool(penalties or self.logit_bias or self.min_tokens or self.allowed_tokens is not None
                    or self.logits is not None or self.constrained)

    def but(self, **changes: Any) -> Sampling:
        """This Sampling with some fields changed; a name that is not a field is an `InvalidRequest`."""
        unknown = sorted(set(changes) - set(self.__dataclass_fields__))
        if unknown:
            raise InvalidRequest(f"unknown sampling options {unknown}; known are {sorted(self.__dataclass_fields__)}")
        return replace(self, **changes) if changes else self


Prompt = str | SequenceOf[int]


@dataclass(frozen=True)
class Request:
    """A prompt (text or token ids), how to answer it, and how to treat it meanwhile.

    `priority`: lower goes first; who waits AGEING seconds longer has caught up with the level above, so that nobody
    starves. `queue_timeout`: seconds until the prompt begins to be read, `timeout`: seconds until the answer is
    whole; past either the request ends as "expired". `reuse`: whether it shares what others with the same beginning
    have computed, and leaves its own for them.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    queue_timeout: float | None = None
    timeout: float | None = None
    reuse: bool = True

    def __post_init__(self):
        check_options(**{name: getattr(self, name) for name in REQUEST_RULES})
        if type(self.reuse) is not bool:
            raise InvalidRequest(f"reuse is {self.reuse!r}; it must be True or False")
        if not isinstance(self.sampling, Sampling):
            raise InvalidRequest(f"sampling is a {type(self.sampling).__name__}; it must be a jaxinfer.Sampling")

    def but(self, sampling: Sampling | None = None, **options: Any) -> Request:
        """This Request with another `sampling`, and with options of either changed by name."""
        if sampling is not None and not isinstance(sampling, Sampling):
            raise InvalidRequest(f"sampling is a {type(sampling).__name__}; it must be a jaxinfer.Sampling")
        own = {name: options.pop(name) for name in REQUEST_OPTIONS if name in options}
        return replace(self, sampling=(sampling or self.sampling).but(**options), **own)


REQUEST_OPTIONS = (*REQUEST_RULES, "reuse")


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample's tokens, and how many of them the model has read.

    `tokens` are committed (the prompt, then what was drawn); up to `total` there are more that are being drawn on the
    device and not yet known to the host. `unread` is the only number that tells prefill from decode from resume.
    `order` is its place in the queue. `task` is "draw", "score" or "embed": what its prompt is read for. Pages of one
    `namespace` may be shared (None: never). A fork waits until `after` has read the prompt that they share.
    """

    id: int
    tokens: list[int]
    prompt: int
    sampling: Sampling
    stops: frozenset[int] = frozenset()
    order: tuple[float, int] = (0.0, 0)
    namespace: Any = None
    task: Literal["draw", "score", "embed"] = "draw"
    after: Sequence | None = None
    version: int = 0  # of the weights that it runs on
    read: int = 0
    total: int = field(init=False)
    most: int = field(init=False)  # tokens at which it ends
    slot: int | None = None
    pages: dict[str, list[int | None]] = field(default_factory=dict)
    matcher: Any = None  # of its grammar, if its answer follows one
    node: Any = None  # the prefix tree's, for the first `indexed` tokens
    indexed: int = 0
    known: int = 0  # tokens that others may find in the prefix tree
    reused: int = 0  # tokens of the prompt that it found there
    fetched: bool = False  # whether the disk has been asked for what it kept of them
    ended: FinishReason | None = None
    failures: int = 0
    plain: bool = field(init=False)  # draws and nothing else: several steps may go in one call

    def __post_init__(self):
        self.total, self.most = len(self.tokens), self.prompt + self.sampling.max_tokens
        self.plain = not (self.sampling.edits or self.sampling.logprobs is not None or self.task != "draw")

    @property
    def unread(self) -> int:
        return self.total - self.read

    @property
    def begun(self) -> bool:
        """Whether the model has read of it, or drawn for it, even if it has to begin again."""
        return self.slot is not None or self.total > self.prompt

    @property
    def space(self) -> tuple[int, Any]:
        """Whose pages it may share: those of one namespace that the same weights have made."""
        return self.version, self.namespace


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


class Logprob(NamedTuple):
    """A token's natural log-probability, its rank (1 is the likeliest), and the likeliest tokens with theirs."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer: text that is final, and the tokens it came with, of sample `index`.

    `finish_reason` says how that sample ended, with its last piece; the last piece of all carries the Output.
    """

    text: str
    tokens: tuple[int, ...]
    output: Output | None = None
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[Logprob, ...] | None = None


@dataclass(frozen=True)
class Output:
    """A finished request. `finish_reason`: "stop" (a stop token, a stop string or a grammar's end) or "length"; what
    there was of a request that ended otherwise ("expired", "failed", ...) is the `output` of the error that says so.

    `prompt_logprobs` has None for the first token, which nothing precedes. With `n` > 1 `samples` are all answers,
    the first of which this one is. `reused` prompt tokens were found computed already. `version` is the number of the
    weights that drew the last token (the only ones, unless a swap was to go on with what ran).
    """

    prompt_tokens: tuple[int, ...]
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[Logprob, ...] | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    samples: tuple[Output, ...] = ()
    reused: int = 0
    version: int = 0

    def _repr_pretty_(self, printer, _cycle):
        rate = self.timings.tokens_per_second
        printer.text(f"{self.text!r}\n[{len(self.tokens)} tokens, {self.finish_reason}, {rate:.1f} tokens/s]")


@dataclass(frozen=True)
class Score:
    """How likely a text is to the model: the natural log-probability of each of its `tokens` after the first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """The text's log-probability, given its first token."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability; NaN for a text of one token."""
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else math.nan
