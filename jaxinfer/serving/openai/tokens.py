"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from jaxinfer.errors import InvalidRequest
from jaxinfer.runtime.language import LanguageModel
from jaxinfer.serving.aside import aside
from jaxinfer.serving.openai.conversation import prompt_of
from jaxinfer.serving.openai.models import find_language
from jaxinfer.serving.openai.wire import Detokenized, DetokenizeRequest, TokenizeRequest, Tokens
from jaxinfer.serving.site import Site


class Tokenizing:
    def __init__(self, site: Site):
        self.site = site

    async def tokenize(self, ask: TokenizeRequest) -> Tokens:
        _, model = find_language(self.site, ask.model)
        return await aside(lambda: _tokens(ask, model))

    async def detokenize(self, ask: DetokenizeRequest) -> Detokenized:
        _, model = find_language(self.site, ask.model)
        return Detokenized(await aside(
            lambda: model.tokenizer.decode(ask.tokens, skip_special=False)))


def _tokens(ask: TokenizeRequest, model: LanguageModel) -> Tokens:
    ids = _ids(ask, model)
    texts = [model.tokenizer.spell(i).decode("utf-8", "replace") for i in ids] if ask.return_token_strs else None
    return Tokens(len(ids), model.max_context, ids, texts)


def _ids(ask: TokenizeRequest, model: LanguageModel) -> list[int]:
    if (ask.prompt is None) == (ask.messages is None):
        raise InvalidRequest("prompt or messages must be given, and not both")
    if ask.messages is not None:
        if ask.add_special_tokens:
            raise InvalidRequest("add_special_tokens is for a prompt: a chat template writes its own")
        return prompt_of(model.tokenizer, ask.messages, ask.tools, ask.add_generation_prompt, ask.chat_template_kwargs)
    for name in ("tools", "add_generation_prompt", "chat_template_kwargs"):
        if getattr(ask, name) is not None:
            raise InvalidRequest(f"{name} is for messages")
    assert ask.prompt is not None
    return model.tokenizer.encode(ask.prompt, add_special=ask.add_special_tokens is not False)
