"""From a body's fields to a Sampling, and from an Output to what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxinfer.errors import InvalidRequest
from jaxinfer.request import Output, Sampling
from jaxinfer.serving.openai.wire import CachedTokens, Drawing, Structure, Usage

SAME_NAMES = ("n", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty", "min_tokens", "ignore_eos",
              "prompt_logprobs")
ANY_OBJECT = {"type": "object"}


def sampling_of(ask: Drawing, *, max_tokens: int, **more: Any) -> Sampling:
    """The Sampling of a body. What OpenAI says of a field that is missing holds: `temperature` is 1."""
    given = {name: value for name in SAME_NAMES if (value := getattr(ask, name)) is not None}
    given |= {"temperature": 1.0 if ask.temperature is None else ask.temperature, "max_tokens": max_tokens}
    if ask.top_p == 0:
        given["top_k"] = 1  # no share at all still leaves the likeliest
    else:
        given |= {"top_p": ask.top_p or 1.0, "top_k": max(ask.top_k or 0, 0)}
    if ask.seed is not None:
        given["seed"] = ask.seed % 2**32
    if ask.stop is not None:
        given["stop"] = (ask.stop,) if isinstance(ask.stop, str) else tuple(ask.stop)
    if ask.logit_bias:
        given["logit_bias"] = {_token(key): bias for key, bias in ask.logit_bias.items()}
    if ask.stop_token_ids:
        given["stop_tokens"] = tuple(ask.stop_token_ids)
    if ask.allowed_token_ids is not None:
        given["allowed_tokens"] = tuple(ask.allowed_token_ids)
    if ask.structured_outputs is not None:
        given |= constraint_of(ask.structured_outputs)
    if ask.stream and ask.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed; ask for them without stream")
    if ask.stream_options is not None and not ask.stream:
        raise InvalidRequest("stream_options is for a stream; set stream to true, or leave it out")
    return Sampling(**given, **{name: value for name, value in more.items() if value is not None})


def constraint_of(structure: Structure) -> dict[str, Any]:
    given = {"json_schema": structure.json, "regex": structure.regex, "grammar": structure.grammar,
             "choice": None if structure.choice is None else tuple(structure.choice)}
    given = {name: value for name, value in given.items() if value is not None}
    if structure.json_object:
        given.setdefault("json_schema", ANY_OBJECT)
    if not given:
        raise InvalidRequest("structured_outputs is empty; it must say one of json, json_object, regex, choice, "
                             "grammar")
    return given


def _token(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise InvalidRequest(f"logit_bias has the key {key!r:.40}; its keys must be token ids")
    return int(key)


def usage_of(outputs: Iterable[Output]) -> Usage:
    """A prompt counts once, however many samples were drawn for it."""
    whole = list(outputs)
    asked = sum(len(output.prompt_tokens) for output in whole)
    drawn = sum(len(sample.tokens) for output in whole for sample in output.samples or (output,))
    return Usage(asked, drawn, asked + drawn, CachedTokens(sum(output.reused for output in whole)))
