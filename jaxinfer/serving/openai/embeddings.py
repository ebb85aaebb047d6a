"""/v1/embeddings: texts as vectors, by an encoder's own pipeline or as the mean of a language model's last states."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.runtime.encoder import Encoded, TextEncoder
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.serving.aside import aside, begun_aside, withdraw
from jaxinfer.serving.openai.completions import prompts_of
from jaxinfer.serving.openai.models import find
from jaxinfer.serving.openai.wire import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from jaxinfer.serving.problems import Problem
from jaxinfer.serving.site import Site


class Embedder:
    def __init__(self, site: Site):
        self.site = site

    async def create(self, ask: EmbeddingRequest) -> Embeddings:
        handle = find(self.site, ask.model)
        model, texts = handle.version.model, prompts_of(ask.input, "input")
        if isinstance(model, LanguageModel | TextEncoder) and len(texts) > model.max_waiting:  # never let in
            raise InvalidRequest(f"input has {len(texts)} texts; at most {model.max_waiting} can wait")
        if isinstance(model, LanguageModel):
            tokens = await aside(lambda: [model.tokens_of(text) for text in texts])
            vectors = await handle.aembed(tokens, timeout=self.site.settings.request_timeout)
            count = sum(map(len, tokens))
        elif isinstance(model, TextEncoder):
            if not all(isinstance(text, str) for text in texts):
                raise InvalidRequest(f"input has token ids; {ask.model} takes texts")
            found = await self._encode(handle, texts)
            vectors, count = np.stack([one.vector for one in found]), sum(one.tokens for one in found)
        else:
            raise Problem(400, f"{ask.model} embeds no texts", "wrong_model", "model")
        if ask.dimensions not in (None, vectors.shape[1]):
            raise InvalidRequest(f"dimensions is {ask.dimensions}; {ask.model} has {vectors.shape[1]}, and its vectors "
                                 "cannot be cut")
        write = _base64 if ask.encoding_format == "base64" else np.ndarray.tolist
        data = [Embedding(i, write(vector)) for i, vector in enumerate(vectors)]
        return Embeddings(data, ask.model, EmbeddingUsage(count, count))

    async def _encode(self, handle: Any, texts: list[Any]) -> list[Encoded]:
        asks, seconds = [((text,), {}) for text in texts], self.site.settings.request_timeout
        replies = await begun_aside(lambda: handle.submit_all(asks, timeout=seconds), withdraw)
        try:
            return [await reply for reply in replies]
        finally:
            withdraw(replies)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
