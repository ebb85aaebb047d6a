"""What OpenAI's clients send and read, as types: they are checked on the way in, and documented in /openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from jaxinfer.request import MOST_LOGPROBS

Count = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Top = Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)]
Ids = Annotated[list[TokenId], Meta(min_length=1)]
Name = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Text = Annotated[str, Meta(min_length=1)]
# One text or several; one prompt of token ids, or several.
Prompts = str | Annotated[list[str | TokenId | Ids], Meta(min_length=1, max_length=2048)]


class Asked(Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A request: a field that is not known is refused, as OpenAI does."""


# --- how tokens are drawn, in completions and in chats ---


class StreamOptions(Asked):
    """`include_usage`: one more chunk, without choices, counts the tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Structure(Asked):
    """vLLM's `structured_outputs`: one of these, which the whole answer follows."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[Text], Meta(min_length=1)] | None = None
    grammar: str | None = None


class Drawing(Asked):
    """OpenAI's fields, and from `top_k` on those that vLLM has beside them."""

    model: str
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    allowed_token_ids: Ids | None = None
    prompt_logprobs: Top | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    structured_outputs: Structure | None = None


# --- completions ---


class CompletionRequest(Drawing, kw_only=True):
    prompt: Prompts
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Top | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    suffix: str | None = None


class CompletionLogprobs(Struct):
    """One entry a token; `text_offset` is where its text begins in the choice's."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(Struct):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CachedTokens(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Completion(Struct):
    """A whole answer, and a chunk of one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


# --- chats ---


class Function(Asked):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Asked):
    type: Literal["function"]
    function: Function


class NamedFunction(Asked):
    name: str


class NamedTool(Asked):
    type: Literal["function"]
    function: NamedFunction


class NamedSchema(Asked):
    """`strict` or not, the answer follows the schema."""

    name: Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextFormat(Asked, tag_field="type", tag="text"):
    pass


class ObjectFormat(Asked, tag_field="type", tag="json_object"):
    pass


class SchemaFormat(Asked, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class ChatRequest(Drawing, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class Called(Struct):
    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    function: Called
    type: Literal["function"] = "function"


ChatReason = Literal["stop", "length", "tool_calls"]


class Message(Struct):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: Message
    finish_reason: ChatReason
    logprobs: ChatLogprobs | None = None


class Chat(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CalledDelta(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolDelta(Struct):
    """A part of a call: its id, type and name come first, then its arguments bit by bit."""

    index: int
    function: CalledDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolDelta] | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatReason | None = None


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


# --- embeddings, tokens, models ---


class EmbeddingRequest(Asked):
    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None


class Embedding(Struct):
    """`embedding` is a list of numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class TokenizeRequest(Asked):
    """`prompt`, or `messages` as the chat template renders them."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Asked):
    model: str
    tokens: list[TokenId]


class Detokenized(Struct):
    prompt: str


class ModelCard(Struct):
    id: str
    created: int
    owned_by: str
    max_model_len: int | None
    object: Literal["model"] = "model"


class ModelList(Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"
