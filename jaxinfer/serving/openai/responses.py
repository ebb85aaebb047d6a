"""/v1/responses, as far as it is text: a conversation in, one message out, whole or as typed events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Any

from jaxinfer.errors import InvalidRequest
from jaxinfer.request import Output, Request
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.serving.aside import aside
from jaxinfer.serving.openai.conversation import prompt_of
from jaxinfer.serving.openai.drawing import ANY_OBJECT, sampling_of
from jaxinfer.serving.openai.feed import Feed
from jaxinfer.serving.openai.models import find_language
from jaxinfer.serving.openai.sse import event, writing
from jaxinfer.serving.openai.wire_responses import (
    Cached,
    Drawn,
    Incomplete,
    ObjectShape,
    OutputMessage,
    OutputText,
    Reasoned,
    Response,
    ResponseError,
    ResponseEvent,
    ResponseRequest,
    ResponseUsage,
    SchemaShape,
    TextOptions,
)
from jaxinfer.serving.operations import Events
from jaxinfer.serving.problems import detail_of
from jaxinfer.serving.site import Site


class Responses:
    def __init__(self, site: Site):
        self.site = site

    async def create(self, ask: ResponseRequest) -> Response | Events:
        handle, model = find_language(self.site, ask.model)
        model.check_room()
        request = await aside(partial(self._request, ask, model))
        feed = Feed(handle, [request], pieces=bool(ask.stream))
        if ask.stream:
            stream = _Stream(ask)
            return Events(stream.events(feed), stream.failed)
        response, message = _begun(ask)
        async with feed:
            output, = await feed.outputs()
        return _ended(response, message, output)

    def _request(self, ask: ResponseRequest, model: LanguageModel) -> Request:
        prompt = prompt_of(model.tokenizer, _messages(ask))
        match ask.text and ask.text.format:
            case SchemaShape(schema=schema):
                more = {"json_schema": schema}
            case ObjectShape():
                more = {"json_schema": ANY_OBJECT}
            case _:
                more = {}
        most = model.max_context if ask.max_output_tokens is None else ask.max_output_tokens
        return Request(prompt, sampling_of(Drawn.of(ask), max_tokens=most, **more), ask.priority or 0,
                       timeout=self.site.settings.request_timeout)


def _messages(ask: ResponseRequest) -> list[Mapping[str, Any]]:
    messages: list[Mapping[str, Any]] = []
    if ask.instructions:
        messages.append({"role": "system", "content": ask.instructions})
    if isinstance(ask.input, str):
        return [*messages, {"role": "user", "content": ask.input}]
    for i, item in enumerate(ask.input):
        if item.get("type", "message") != "message":
            raise InvalidRequest(f"input[{i}] is of the type {item['type']!r:.40}; messages are taken here, and no "
                                 "other items")
        messages.append({"role": item.get("role"), "content": item.get("content")})
    return messages


def _begun(ask: ResponseRequest) -> tuple[Response, OutputMessage]:
    """The answer before it has any text, and the message that it will have."""
    message = OutputMessage(f"msg_{uuid.uuid4().hex}", [], "in_progress")
    response = Response(
        id=f"resp_{uuid.uuid4().hex}", created_at=int(time.time()), model=ask.model, status="in_progress", output=[],
        instructions=ask.instructions, max_output_tokens=ask.max_output_tokens, metadata=ask.metadata or {},
        temperature=1.0 if ask.temperature is None else ask.temperature, top_p=1.0 if ask.top_p is None else ask.top_p,
        text=ask.text or TextOptions())
    return response, message


def _ended(response: Response, message: OutputMessage, output: Output) -> Response:
    cut = output.finish_reason == "length"
    message.content, message.status = [OutputText(output.text)], "incomplete" if cut else "completed"
    response.output, response.status = [message], message.status
    response.incomplete_details = Incomplete("max_output_tokens") if cut else None
    asked, drawn = len(output.prompt_tokens), len(output.tokens)
    response.usage = ResponseUsage(asked, Cached(output.reused), drawn, Reasoned(0), asked + drawn)
    return response


class _Stream:
    """One answer as events, which are numbered."""

    def __init__(self, ask: ResponseRequest):
        self.response, self.message = _begun(ask)
        self.number, self._write = 0, event

    def _event(self, kind: str, **more: Any) -> bytes:
        self.number += 1
        return self._write(ResponseEvent(type=kind, sequence_number=self.number - 1, **more), kind)

    def failed(self, error: BaseException) -> bytes:
        detail = detail_of(error)
        self.response.status, self.response.error = "failed", ResponseError(detail.code or detail.type, detail.message)
        return self._event("response.failed", response=self.response)

    async def events(self, feed: Feed) -> AsyncGenerator[bytes]:
        item, part = {"output_index": 0}, {"item_id": self.message.id, "output_index": 0, "content_index": 0}
        begun = False
        with writing() as self._write:
            async with feed:
                async for _, piece in feed:
                    if not begun:
                        begun = True
                        yield self._event("response.created", response=self.response)
                        yield self._event("response.in_progress", response=self.response)
                        yield self._event("response.output_item.added", item=self.message, **item)
                        yield self._event("response.content_part.added", part=OutputText(""), **part)
                    if piece.text:
                        yield self._event("response.output_text.delta", delta=piece.text, logprobs=[], **part)
                    if piece.output is not None:
                        response = _ended(self.response, self.message, piece.output)
                        yield self._event("response.output_text.done", text=piece.output.text, logprobs=[], **part)
                        yield self._event("response.content_part.done", part=self.message.content[0], **part)
                        yield self._event("response.output_item.done", item=self.message, **item)
                        yield self._event(f"response.{response.status}", response=response)
