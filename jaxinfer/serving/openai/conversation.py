"""From OpenAI's messages to the prompt that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jaxinfer.errors import InvalidRequest
from jaxinfer.frontend.tokenizer import Tokenizer
from jaxinfer.serving.openai.wire import Tool

TEXTS = ("text", "input_text", "output_text", "refusal")


def prompt_of(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] | None = None,
              add_generation_prompt: bool | None = None, variables: Mapping[str, Any] | None = None) -> list[int]:
    """The token ids of a conversation under the model's chat template. Raises InvalidRequest for what the template
    refuses, for parts that are no text, and for tools that it has no place for."""
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    told = None if not tools else [msgspec.to_builtins(tool) for tool in tools]
    begin = add_generation_prompt is None or add_generation_prompt
    clash = sorted({"messages", "tools", "add_generation_prompt", "self"} & set(variables or ()))
    if clash:
        raise InvalidRequest(f"chat_template_kwargs has {clash[0]!r}, which is a field of the request itself")
    render = lambda tools: tokenizer.render_chat(plain, tools=tools, add_generation_prompt=begin, **(variables or {}))
    text = render(told)
    if told and "tool_use" not in tokenizer.chat_templates and text == render(None):
        raise InvalidRequest("tools are not for this model: its chat template has no place for them")
    return tokenizer.encode(text, add_special=False)


def template_of(tokenizer: Tokenizer) -> str:
    """The chat template that a conversation with tools is rendered by."""
    return tokenizer.chat_templates.get("tool_use") or tokenizer.chat_template or ""


def _plain(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates know it: content is text, a developer is the system, arguments are objects."""
    plain = dict(message)
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if isinstance(plain.get("content"), list):
        plain["content"] = text_of(plain["content"], f"{where}.content")
    calls = plain.get("tool_calls")
    if isinstance(calls, list):
        plain["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return plain


def text_of(parts: Sequence[Any], where: str) -> str:
    """The text of a list of parts."""
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXTS:
            raise InvalidRequest(f"{where}[{i}] is of the type {kind!r:.40}; the models here take text only")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{i}] has no text")
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f'{where} must be {{"id": ..., "type": "function", "function": {{"name": ..., '
                             '"arguments": ...}}')
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) and arguments else arguments or {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}.function.arguments is no JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}
