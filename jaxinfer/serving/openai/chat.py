"""/v1/chat/completions: a conversation is answered, in words or by calling a tool."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, cast

from jaxinfer.errors import InvalidRequest
from jaxinfer.request import Output, Piece, Request
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.serving.aside import aside
from jaxinfer.serving.openai import logprobs
from jaxinfer.serving.openai.conversation import prompt_of, template_of
from jaxinfer.serving.openai.drawing import ANY_OBJECT, sampling_of, usage_of
from jaxinfer.serving.openai.feed import Feed
from jaxinfer.serving.openai.models import find_language
from jaxinfer.serving.openai.sse import DONE, failed, writing
from jaxinfer.serving.openai.tools import Change, Reader, Style, grammar_of, style_of
from jaxinfer.serving.openai.wire import (
    Called,
    CalledDelta,
    Chat,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatReason,
    ChatRequest,
    ChunkChoice,
    Delta,
    Message,
    NamedTool,
    ObjectFormat,
    SchemaFormat,
    Tool,
    ToolCall,
    ToolDelta,
)
from jaxinfer.serving.operations import Events
from jaxinfer.serving.site import Site


class Chats:
    def __init__(self, site: Site):
        self.site = site

    async def create(self, ask: ChatRequest) -> Chat | Events:
        handle, model = find_language(self.site, ask.model)
        model.check_room()
        request, style = await aside(partial(self._request, ask, model))
        feed = Feed(handle, [request], pieces=bool(ask.stream))
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": ask.model}
        if ask.stream:
            return Events(_chunks(feed, ask, model, style, about), failed)
        async with feed:
            output, = await feed.outputs()
        choices = [_choice(ask, model, style, i, one) for i, one in enumerate(output.samples or (output,))]
        chat = Chat(**about, choices=choices, usage=usage_of([output]), system_fingerprint=f"v{output.version}")
        if ask.prompt_logprobs is not None:
            chat.prompt_logprobs = logprobs.of_prompt(model.tokenizer, output.prompt_logprobs or ())
        return chat

    def _request(self, ask: ChatRequest, model: LanguageModel) -> tuple[Request, Style | None]:
        """What the engine is asked, and how a call of a tool would be written in its answer."""
        tools, must = _tools(ask)
        more: dict[str, Any] = _format(ask)
        if ask.top_logprobs is not None and not ask.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true")
        if ask.logprobs:
            more["logprobs"] = ask.top_logprobs or 0
        style = style_of(template_of(model.tokenizer)) if tools else None
        if style is not None:
            if more.keys() & {"json_schema"} or ask.structured_outputs is not None:
                raise InvalidRequest("tools and response_format (or structured_outputs) cannot both rule an answer; "
                                     'leave one out, or set tool_choice to "none"')
            named = ask.tool_choice.function.name if isinstance(ask.tool_choice, NamedTool) else None
            these = [_told_of(tool) for tool in tools if named in (None, tool.function.name)]
            if not these:
                raise InvalidRequest(f"tool_choice names {named!r}, which is not one of the tools")
            more["grammar"] = grammar_of(style, these, must=must,
                                         many=named is None and ask.parallel_tool_calls is not False)
        prompt = prompt_of(model.tokenizer, ask.messages, tools, ask.add_generation_prompt, ask.chat_template_kwargs)
        return Request(prompt, sampling_of(ask, max_tokens=_most(ask, model), **more), ask.priority or 0,
                       timeout=self.site.settings.request_timeout), style


def _told_of(tool: Tool) -> dict[str, Any]:
    return {"name": tool.function.name, "parameters": tool.function.parameters}


def _tools(ask: ChatRequest) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be."""
    if not ask.tools:
        if ask.tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice asks for a call; give tools to choose from")
        return [], False
    if ask.tool_choice == "none":
        return [], False
    names = [tool.function.name for tool in ask.tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("tools has the same name twice")
    return ask.tools, ask.tool_choice not in (None, "auto")


def _format(ask: ChatRequest) -> dict[str, Any]:
    match ask.response_format:
        case SchemaFormat(json_schema=named):
            schema = named.schema
        case ObjectFormat():
            schema = ANY_OBJECT
        case _:
            return {}
    if ask.structured_outputs is not None:
        raise InvalidRequest("response_format and structured_outputs are both given; an answer can follow one")
    return {"json_schema": schema}


def _most(ask: ChatRequest, model: LanguageModel) -> int:
    """Tokens that may be drawn: without a limit, as many as the context holds."""
    if None not in (ask.max_tokens, ask.max_completion_tokens) and ask.max_tokens != ask.max_completion_tokens:
        raise InvalidRequest("max_tokens and max_completion_tokens differ; give one of them")
    given = ask.max_completion_tokens if ask.max_tokens is None else ask.max_tokens
    return model.max_context if given is None else given


def _reason(reason: str | None, reader: Reader | None) -> ChatReason | None:
    called = reader is not None and reader.calls and reason == "stop"
    return "tool_calls" if called else cast("ChatReason | None", reason)


def _choice(ask: ChatRequest, model: LanguageModel, style: Style | None, index: int, output: Output) -> ChatChoice:
    reader = Reader(style) if style is not None else None
    message = Message(output.text)
    if reader is not None:
        changes = [*reader.push(output.text), *reader.finish()]
        if reader.calls:
            message.content = "".join(change.text for change in changes) or None
            message.tool_calls = [ToolCall(call.id, Called(call.name, call.arguments)) for call in reader.calls]
    told = logprobs.of_chat(model.tokenizer, output.logprobs or (), ask.top_logprobs or 0) if ask.logprobs else None
    reason = _reason(output.finish_reason, reader)
    assert reason is not None
    return ChatChoice(index, message, reason, told)


async def _chunks(feed: Feed, ask: ChatRequest, model: LanguageModel, style: Style | None, about: dict
                  ) -> AsyncGenerator[bytes]:
    counted = bool(ask.stream_options and ask.stream_options.include_usage)
    about = about | {"system_fingerprint": f"v{model.version}"} | ({"usage": None} if counted else {})
    readers: dict[int, Reader | None] = defaultdict(lambda: Reader(style) if style is not None else None)
    begun, usage = set[int](), None
    with writing() as event:
        chunk = lambda *choice: event(ChatChunk(**about, choices=[ChunkChoice(*choice)]))
        async with feed:
            async for _, piece in feed:
                index = piece.index
                if index not in begun:
                    begun.add(index)
                    yield chunk(index, Delta("assistant", ""))
                told = _told(ask, model, piece)
                for delta in _deltas(piece, reader := readers[index]):
                    yield chunk(index, delta, told)
                    told = None
                if told is not None:  # of tokens that showed no text, an end token for one
                    yield chunk(index, Delta(content=""), told)
                if piece.finish_reason is not None:
                    yield chunk(index, Delta(), None, _reason(piece.finish_reason, reader))
                if piece.output is not None:
                    usage = usage_of([piece.output])
        if counted:
            yield event(ChatChunk(**{**about, "usage": usage}, choices=[]))
    yield DONE


def _told(ask: ChatRequest, model: LanguageModel, piece: Piece) -> ChatLogprobs | None:
    if not ask.logprobs or not piece.logprobs:
        return None
    return logprobs.of_chat(model.tokenizer, piece.logprobs, ask.top_logprobs or 0)


def _deltas(piece: Piece, reader: Reader | None) -> list[Delta]:
    if reader is None:
        return [Delta(content=piece.text)] if piece.text else []
    changes = [*reader.push(piece.text), *(reader.finish() if piece.finish_reason else ())]
    return [_delta(change) for change in changes]


def _delta(change: Change) -> Delta:
    if change.text:
        return Delta(content=change.text)
    if change.call is not None:
        begun = ToolDelta(change.index, CalledDelta(change.call.name, ""), change.call.id, "function")
        return Delta(tool_calls=[begun])
    return Delta(tool_calls=[ToolDelta(change.index, CalledDelta(arguments=change.arguments))])
