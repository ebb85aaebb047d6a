"""What /v1/responses takes and gives, as types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from jaxinfer.serving.openai.wire import Asked, Drawing, Name, Share


class PlainShape(Asked, tag_field="type", tag="text"):
    pass


class ObjectShape(Asked, tag_field="type", tag="json_object"):
    pass


class SchemaShape(Asked, tag_field="type", tag="json_schema"):
    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextOptions(Asked):
    """`format`: what the text must look like."""

    format: PlainShape | ObjectShape | SchemaShape | None = None


class ResponseRequest(Asked):
    """Text in and out. Nothing is kept, so that there is no previous response to go on from."""

    model: str
    input: str | Annotated[list[dict[str, Any]], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    previous_response_id: None = None
    tools: Annotated[list[Any], Meta(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None


class Drawn(Drawing):
    """The part of it that says how tokens are drawn."""

    @staticmethod
    def of(ask: ResponseRequest) -> Drawn:
        return Drawn(model=ask.model, temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k, min_p=ask.min_p,
                     seed=ask.seed)


class OutputText(Struct):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    type: Literal["output_text"] = "output_text"


Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputMessage(Struct):
    id: str
    content: list[OutputText]
    status: Status
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class Cached(Struct):
    cached_tokens: int


class Reasoned(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: Cached
    output_tokens: int
    output_tokens_details: Reasoned
    total_tokens: int


class Incomplete(Struct):
    reason: Literal["max_output_tokens"]


class ResponseError(Struct):
    code: str
    message: str


class Response(Struct, kw_only=True):
    id: str
    created_at: int
    model: str
    status: Status
    output: list[OutputMessage]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    temperature: float
    top_p: float
    text: TextOptions
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    tools: list[Any] = []
    tool_choice: Literal["none"] = "none"
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    store: bool = False
    object: Literal["response"] = "response"


class ResponseEvent(Struct, kw_only=True):
    """One event: `type` says which of the fields there are."""

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    item: OutputMessage | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET
