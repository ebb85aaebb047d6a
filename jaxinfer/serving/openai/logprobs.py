"""Log-probabilities in the three shapes that clients read: completions', chats', and vLLM's of a prompt."""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.frontend.tokenizer import Tokenizer
from jaxinfer.request import Logprob
from jaxinfer.serving.openai.wire import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

LEAST = -9999.0  # JSON has no infinity


class Told:
    """Log-probabilities of one choice as completions have them, token by token as they come: each token's text begins
    where those before it end."""

    def __init__(self, tokenizer: Tokenizer, most: int):
        self.tokenizer, self.most = tokenizer, most
        self._text, self._offset = tokenizer.stream(skip_special=False), 0

    def add(self, told: Iterable[tuple[int, Logprob | None]]) -> CompletionLogprobs:
        """Of these tokens, with what is known of each (None: nothing precedes it)."""
        found = CompletionLogprobs([], [], [], [])
        for token, logprob in told:
            found.text_offset.append(self._offset)
            self._offset += len(self._text.push(token))
            name = _name(self.tokenizer, token)
            found.tokens.append(name)
            found.token_logprobs.append(None if logprob is None else _finite(logprob.logprob))
            top = None
            if logprob is not None and self.most:
                top = {_name(self.tokenizer, other): _finite(value) for other, value in logprob.top[: self.most]}
                top.setdefault(name, _finite(logprob.logprob))
            found.top_logprobs.append(top)
        return found


def of_chat(tokenizer: Tokenizer, told: Iterable[Logprob], most: int) -> ChatLogprobs:
    return ChatLogprobs([
        TokenLogprob(*_spelt(tokenizer, one.token, one.logprob),
                     [TopLogprob(*_spelt(tokenizer, token, value)) for token, value in one.top[:most]])
        for one in told])


def of_prompt(tokenizer: Tokenizer, told: Iterable[Logprob | None]) -> PromptLogprobs:
    """By token id; the token itself has its rank, and the likeliest ones have theirs by their order."""
    found: PromptLogprobs = []
    for one in told:
        if one is None:
            found.append(None)
            continue
        ranked = {token: (value, i + 1) for i, (token, value) in enumerate(one.top)}
        ranked[one.token] = one.logprob, one.rank
        found.append({str(token): PromptLogprob(_finite(value), rank, _name(tokenizer, token))
                      for token, (value, rank) in ranked.items()})
    return found


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)


def _spelt(tokenizer: Tokenizer, token: int, logprob: float) -> tuple[str, float, list[int]]:
    spelt = tokenizer.spell(token)
    return spelt.decode("utf-8", "replace"), _finite(logprob), list(spelt)


def _name(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as text; one that is no whole characters as OpenAI writes it: "bytes:\xe2\x80"."""
    spelt = tokenizer.spell(token)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)
