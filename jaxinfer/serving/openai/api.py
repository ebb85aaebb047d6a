"""The operations of OpenAI's API, and of vLLM's beside it."""

from __future__ import annotations

from jaxinfer.serving.openai import wire, wire_responses
from jaxinfer.serving.openai.chat import Chats
from jaxinfer.serving.openai.completions import Completions
from jaxinfer.serving.openai.embeddings import Embedder
from jaxinfer.serving.openai.models import Models
from jaxinfer.serving.openai.responses import Responses
from jaxinfer.serving.openai.tokens import Tokenizing
from jaxinfer.serving.operations import Operation
from jaxinfer.serving.site import Part, Site


def operations(site: Site) -> list[Operation]:
    models, tokens = Models(site), Tokenizing(site)
    return [
        Operation("GET", "/v1/models", "List the models", models.list, None, wire.ModelList),
        Operation("GET", "/v1/models/{model:path}", "Tell of one model", models.get, None, wire.ModelCard),
        Operation("POST", "/v1/completions", "Continue texts", Completions(site).create, wire.CompletionRequest,
                  wire.Completion, wire.Completion),
        Operation("POST", "/v1/chat/completions", "Answer a conversation", Chats(site).create, wire.ChatRequest,
                  wire.Chat, wire.ChatChunk),
        Operation("POST", "/v1/responses", "Answer in text", Responses(site).create, wire_responses.ResponseRequest,
                  wire_responses.Response, wire_responses.ResponseEvent),
        Operation("POST", "/v1/embeddings", "Embed texts", Embedder(site).create, wire.EmbeddingRequest,
                  wire.Embeddings),
        Operation("POST", "/tokenize", "Text or messages to token ids", tokens.tokenize, wire.TokenizeRequest,
                  wire.Tokens),
        Operation("POST", "/detokenize", "Token ids to text", tokens.detokenize, wire.DetokenizeRequest,
                  wire.Detokenized),
    ]


def part(site: Site) -> Part:
    return Part(operations=operations(site))
