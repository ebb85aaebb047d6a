"""Encoders of text behind the same queue and batcher as endpoints: texts in, vectors or classes out.

Axes: T tokens, R rows, D width, C classes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.compiler.encoders import EncoderBucket, Encoders
from jaxinfer.errors import Closed, InvalidRequest
from jaxinfer.frontend.folder import Format
from jaxinfer.frontend.sentence import Pipeline
from jaxinfer.frontend.tokenizer import Tokenizer
from jaxinfer.graph import Encoder, Run
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.replies import Result
from jaxinfer.runtime.runner import Flight, Runner
from jaxinfer.runtime.served import Served, VersionedWork
from jaxinfer.runtime.versions import Version
from jaxinfer.scheduler.batcher import Ask, Batcher

Text = str | tuple[str, str]
TOKEN = 8  # bytes: a token's id and its segment


class Tokens(NamedTuple):
    """A text's token ids, and which text of a pair each is of."""

    ids: list[int]
    segments: list[int]


@dataclass(frozen=True)
class Encoded:
    """What an encoder says of a text of so many `tokens`: its `vector` [D]; with a head, the `logits` of its classes
    ([C], or [T, C] for every token)."""

    vector: np.ndarray
    tokens: int
    logits: np.ndarray | None = None


@dataclass
class Batch:
    key: EncoderBucket
    outputs: dict[str, Any]
    ends: np.ndarray
    started: float


class FlatWork(VersionedWork):
    """Runs an Encoder for a `Runner`: the rows of a batch stand side by side, and only the bucket's end is padding."""

    def __init__(self, programs: Encoders, ladder: dict[int, tuple[EncoderBucket, ...]], version: Version):
        super().__init__(version, programs)
        self.programs, self.ladder = programs, ladder

    def bucket(self, longest: int, tokens: int) -> EncoderBucket:
        """The smallest that so many tokens fit into."""
        return next(b for b in self.ladder[longest] if b.tokens >= tokens)

    def _ready(self, bucket: EncoderBucket, rows: int) -> EncoderBucket:
        """What a batch of so many rows runs on: its own bucket, or one that holds it while that is compiled."""
        if self.programs.is_ready(bucket):
            return bucket
        holding = [b for buckets in self.ladder.values() for b in buckets
                   if b.longest >= bucket.longest and b.tokens >= bucket.tokens and b.rows >= rows]
        why = lambda own: f"run.tokens_T [{own.tokens}] with rows of up to {own.longest} came for the first time"
        return self.programs.nearest(sorted(holding, key=lambda b: (b.tokens, b.longest)), why)

    def cost(self, longest: Any, count: int) -> float:
        """Seconds that a batch will take, as far as is known."""
        return self.seconds(self.bucket(longest, min(count * longest, self.ladder[longest][-1].tokens)))

    def dispatch(self, asks: list[Ask]) -> Flight:
        version, lens = self.version, np.array([len(ask.payload.ids) for ask in asks], np.int32)
        key = self.bucket(asks[0].shape, max(int(lens.sum()), -(-len(asks) * asks[0].shape // 2)))
        key = self._ready(key, len(asks))
        tokens_T, segment_T = np.zeros(key.tokens, np.int32), np.zeros(key.tokens, np.int32)
        lens_R, ends = np.zeros(key.rows, np.int32), np.zeros(key.rows + 1, np.int32)
        lens_R[: len(asks)] = lens
        np.cumsum(lens_R, out=ends[1:])
        for ask, start, n in zip(asks, ends.tolist(), lens.tolist(), strict=False):
            tokens_T[start: start + n], segment_T[start: start + n] = ask.payload
        self.bytes_in += TOKEN * int(ends[-1])
        self.bytes_copied += TOKEN * int(ends[-1])
        program = self.programs.get(key, int(ends[-1]), key.tokens)
        run = Run(tokens_T, ends, lens_R, np.zeros(key.rows, np.int32), {}, key.longest)
        started = time.perf_counter()
        return Flight(asks, version.number, Batch(key, program(version.params, run, segment_T), ends, started))

    def collect(self, flight: Flight) -> list[Result]:
        batch: Batch = flight.work
        vectors = np.array(batch.outputs["vector"])
        logits = np.array(batch.outputs["logits"]) if "logits" in batch.outputs else None
        self.took(batch.key, batch.started)
        per_token, results = self.programs.encoder.head_per_token, []
        for r in range(len(flight.asks)):
            own = slice(batch.ends[r], batch.ends[r + 1]) if per_token else r
            tokens = len(flight.asks[r].payload.ids)
            encoded = Encoded(vectors[r].copy(), tokens, None if logits is None else logits[own].copy())
            results.append(Result(encoded, bytes_copied=TOKEN * tokens))
        return results


class TextEncoder(Served):
    """What `jaxinfer.load` returns for an encoder. A text is a string, or a pair of them. `encoder(text)` is an
    `Encoded`: its vector and, with a classification head, its logits."""

    _work: FlatWork

    def __init__(self, graph: Encoder, programs: Encoders, params: Any, tokenizer: Tokenizer, pipeline: Pipeline,
                 ladder: dict[int, tuple[EncoderBucket, ...]], *, config: Any, save: Callable[..., Path],
                 max_delay: float, max_waiting: int, name: str, again: Callable[[], Any] | None = None):
        self._save, self.again = save, again
        self.graph, self.tokenizer, self.pipeline, self.config = graph, tokenizer, pipeline, config
        self.max_length = max(ladder)
        work = FlatWork(programs, ladder, Version(1, params))
        batcher = Batcher(2**20, max_delay, work.cost, room=lambda longest: ladder[longest][-1].tokens)
        super().__init__(Runner(work, batcher, Admission(max_waiting), name), work, programs, name)

    def embed(self, texts: Text | Iterable[Text], **options: Any) -> np.ndarray:
        """The vectors of texts, as the model's own pipeline pools and normalises them: float32 [texts, D]."""
        found = self._many([((text,), {}) for text in _texts(texts)], options)
        return np.stack([one.vector for one in found]) if found else np.zeros((0, self.graph.width), np.float32)

    def classify(self, texts: Text | Iterable[Text], **options: Any) -> list[dict[str, float]]:
        """How likely each label is for each text, the likeliest first: of all labels one (softmax), or each by itself
        (sigmoid) where a text may have any number of them.

        Raises InvalidRequest if the model has no classification head, classifies tokens, or gives numbers.
        """
        if self.graph.head is None or self.graph.head_per_token or self.graph.problem == "number":
            has = "has no head" if self.graph.head is None else "classifies tokens (encoder(text).logits)" if (
                self.graph.head_per_token) else "gives numbers (encoder(text).logits)"
            raise InvalidRequest(f"{self.name} {has}; classify is for models that classify texts")
        found = self._many([((text,), {}) for text in _texts(texts)], options)
        return [_probabilities(one.logits, self.graph) for one in found]

    def save(self, path: str | os.PathLike, format: Format = "safetensors") -> Path:
        """Write the encoder into a new folder, which `jaxinfer.load` takes, as `LanguageModel.save` does: config,
        tokenizer, pipeline, and the weights of this version as they are held."""
        with self.awake():
            if (params := self.params) is None:
                raise Closed()
            return self._save(path, params, format=format)

    def tokens_of(self, text: Text) -> list[int]:
        """The token ids of a text, as the model reads it: with its special tokens, and cut to `max_length`."""
        return self._tokens(text).ids

    def warmup(self, background: bool = False) -> None:
        """Compile every Executable now, so that no request waits for a compile afterwards. In the `background`: return
        once there is one into which any text fits; `coming` tells how far it is with the others."""
        ladder = self._work.ladder
        keys = [bucket for buckets in ladder.values() for bucket in buckets]
        self._compile([self._programs], keys, ladder[self.max_length][:1], background)

    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int, Tokens]:
        if kwargs or len(args) != 1:
            raise InvalidRequest(f"an encoder takes one text; {len(args)} arguments and {sorted(kwargs)} were given")
        tokens = self._tokens(args[0])
        longest = next(n for n in self._work.ladder if n >= len(tokens.ids))
        return longest, max(len(tokens.ids), -(-longest // 2)), tokens

    def _tokens(self, text: Text) -> Tokens:
        texts = (text,) if isinstance(text, str) else text
        if type(texts) is not tuple or len(texts) > 2 or not all(isinstance(t, str) for t in texts):
            raise InvalidRequest(f"text is a {type(text).__name__}; it must be a string, or a pair of strings")
        first, *rest = (t.lower() if self.pipeline.lower else t for t in texts)
        try:
            found = self.tokenizer.backend.encode(self.pipeline.prompt + first, *rest)  # type: ignore[arg-type]
        except TypeError as error:  # what a string of half a surrogate pair is to the tokenizer
            raise InvalidRequest(f"text is no Unicode: {error}") from error
        ids, segments = found.ids, found.type_ids
        if len(ids) > self.max_length:
            if rest:
                raise InvalidRequest(f"the pair has {len(ids)} tokens; at most {self.max_length} fit")
            after = found.special_tokens_mask[::-1].index(0)  # the special tokens at the end stay
            keep = [*range(self.max_length - after), *range(len(ids) - after, len(ids))]
            ids, segments = [ids[i] for i in keep], [segments[i] for i in keep]
        if not ids:
            raise InvalidRequest("text has no tokens; there must be at least one")
        return Tokens(ids, segments if self._has_segments else [0] * len(ids))

    @property
    def _has_segments(self) -> bool:
        return getattr(self.config, "segments", 0) > 1


def _texts(texts: Any) -> list[Text]:
    if isinstance(texts, str) or (type(texts) is tuple and len(texts) == 2):
        return [texts]
    if not isinstance(texts, Iterable):
        raise InvalidRequest(f"texts are a {type(texts).__name__}; they must be a text, or several")
    return list(texts)


def _probabilities(logits_C: np.ndarray, graph: Encoder) -> dict[str, float]:
    if graph.problem == "any":
        likely_C = 1 / (1 + np.exp(-logits_C))
    else:
        weights_C = np.exp(logits_C - logits_C.max())
        likely_C = weights_C / weights_C.sum()
    likely = sorted(zip(likely_C.tolist(), graph.labels, strict=True), reverse=True)
    return {label: probability for probability, label in likely}
