"""/v1/completions: texts or token ids are continued."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator

from jaxinfer.errors import InvalidRequest
from jaxinfer.request import Logprob, Output, Request
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.serving.aside import aside
from jaxinfer.serving.openai import logprobs
from jaxinfer.serving.openai.drawing import sampling_of, usage_of
from jaxinfer.serving.openai.feed import Feed
from jaxinfer.serving.openai.models import find_language
from jaxinfer.serving.openai.sse import DONE, failed, writing
from jaxinfer.serving.openai.wire import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompts
from jaxinfer.serving.operations import Events
from jaxinfer.serving.problems import Problem
from jaxinfer.serving.site import Site

MAX_TOKENS = 16  # OpenAI's default


class Completions:
    def __init__(self, site: Site):
        self.site = site

    async def create(self, ask: CompletionRequest) -> Completion | Events:
        handle, model = find_language(self.site, ask.model)
        model.check_room()
        requests = self._requests(ask)
        feed = Feed(handle, requests, pieces=bool(ask.stream))
        about = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": ask.model}
        if ask.stream:
            return Events(_chunks(feed, ask, model, about), failed)
        async with feed:
            outputs = await feed.outputs()
        told = lambda: [_choice(ask, model, output, i * (ask.n or 1) + j) for i, output in enumerate(outputs)
                        for j, output in enumerate(_samples(output))]
        spelt = ask.logprobs is not None or ask.prompt_logprobs is not None  # token by token
        choices = await aside(told) if spelt else told()
        return Completion(**about, choices=choices, system_fingerprint=f"v{outputs[0].version}",
                          usage=usage_of(outputs))

    def _requests(self, ask: CompletionRequest) -> list[Request]:
        if ask.suffix:
            raise Problem(400, "suffix is not supported: no model here fills a gap between two texts", "unsupported",
                          "suffix")
        if ask.best_of not in (None, ask.n or 1):
            raise Problem(400, "best_of is not supported; ask for n, with logprobs to choose by", "unsupported",
                          "best_of")
        if ask.stream and ask.echo and ask.logprobs is not None:
            raise InvalidRequest("echo with logprobs cannot be streamed; ask for them without stream")
        sampling = sampling_of(ask, max_tokens=MAX_TOKENS if ask.max_tokens is None else ask.max_tokens,
                               echo=bool(ask.echo), logprobs=ask.logprobs)
        if ask.echo and ask.logprobs is not None:
            sampling = sampling.but(prompt_logprobs=max(ask.logprobs, ask.prompt_logprobs or 0))
        return [Request(prompt, sampling, ask.priority or 0, timeout=self.site.settings.request_timeout)
                for prompt in prompts_of(ask.prompt, "prompt")]


def prompts_of(given: Prompts, field: str) -> list[str | list[int]]:
    """One text, several texts, one prompt of token ids or several of these: always as several."""
    many = [given] if isinstance(given, str) else given
    if all(isinstance(one, int) for one in many):
        return [many]  # type: ignore[list-item]
    if any(isinstance(one, int) for one in many):
        raise InvalidRequest(f"{field} mixes token ids with prompts; give one prompt of ids, or several prompts")
    return many  # type: ignore[return-value]


async def _chunks(feed: Feed, ask: CompletionRequest, model: LanguageModel, about: dict) -> AsyncGenerator[bytes]:
    counted = bool(ask.stream_options and ask.stream_options.include_usage)
    about = about | {"system_fingerprint": f"v{model.version}"} | ({"usage": None} if counted else {})
    outputs: list[Output] = []
    told = defaultdict[int, logprobs.Told](lambda: logprobs.Told(model.tokenizer, ask.logprobs or 0))  # by choice
    with writing() as event:
        async with feed:
            async for i, piece in feed:
                index = i * (ask.n or 1) + piece.index
                logs = None
                if piece.logprobs is not None:
                    logs = told[index].add(zip(piece.tokens, piece.logprobs, strict=True))
                choice = CompletionChoice(index, piece.text, logs, piece.finish_reason)  # type: ignore[arg-type]
                yield event(Completion(**about, choices=[choice]))
                if piece.output is not None:
                    outputs.append(piece.output)
        if counted:
            yield event(Completion(**{**about, "usage": usage_of(outputs)}, choices=[]))
    yield DONE


def _samples(output: Output) -> tuple[Output, ...]:
    return output.samples or (output,)


def _choice(ask: CompletionRequest, model: LanguageModel, output: Output, index: int) -> CompletionChoice:
    choice = CompletionChoice(index, output.text, _told(ask, model, output),
                              output.finish_reason)  # type: ignore[arg-type]
    if ask.prompt_logprobs is not None:
        choice.prompt_logprobs = logprobs.of_prompt(model.tokenizer, output.prompt_logprobs or ())
    return choice


def _told(ask: CompletionRequest, model: LanguageModel, output: Output) -> CompletionLogprobs | None:
    if ask.logprobs is None:
        return None
    pairs: list[tuple[int, Logprob | None]] = list(zip(output.tokens, output.logprobs or (), strict=True))
    if ask.echo:
        pairs = [*zip(output.prompt_tokens, output.prompt_logprobs or (), strict=True), *pairs]
    return logprobs.Told(model.tokenizer, ask.logprobs).add(pairs)
