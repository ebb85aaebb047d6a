"""Constrained decoding: which tokens may come next, so that the text follows a schema, a regex, a grammar or a list.

llguidance does the work (https://github.com/guidance-ai/llguidance: an Earley parser over lexemes, walked along the
trie of the vocabulary); this file tells it how a tokenizer spells. A mask is a row of W = ceil(vocab / 32) words.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from jaxinfer.errors import InvalidRequest
from jaxinfer.frontend.text_stream import Detokenizer
from jaxinfer.frontend.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# One way to write a document, json.dumps' own. Free white space lets a model write blanks for ever (vllm#4093,
# vllm#12744); none at all makes small ones close their arrays early, since they learnt `, ` (mellea#1510).
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Text that is bound to come may be cut into tokens in any way, as the model learnt to. llguidance would otherwise
# allow only the tokens that it gets by encoding that text: a call into Python for each mask, and with the blank that
# SentencePiece puts before a text the wrong tokens.
FREE = '%llguidance {"no_forcing": true}'
MOST_CHOICES = 1999  # llguidance follows as many rules at a time
GRAMMARS_KEPT = 64  # the latest of each tokenizer; one takes a millisecond or so to compile


class Grammar:
    """What a text must look like, compiled for one tokenizer. Any number of threads and requests may share one."""

    def __init__(self, start: LLMatcher):
        self._start = start  # never advanced: copies share what they learn about its lexemes, but not their place

    def matcher(self) -> Matcher:
        """The state of a request that has drawn nothing yet."""
        return Matcher(self._start.deep_copy())


class Matcher:
    """Where one request is in its grammar. Both methods raise InvalidRequest when it cannot be followed further: a
    token that the mask forbade, or a grammar that exceeds llguidance's limits; after that they always do."""

    def __init__(self, state: LLMatcher):
        self._state = state

    def mask(self, out_W: np.ndarray) -> None:
        """Write the tokens that may come next, uint32[W]: token t is bit t % 32 of word t // 32.

        Where the text may end, all of the model's end tokens are among them.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._state, out_W.view(np.int32)[None])
        self._check()

    def accept(self, token: int) -> bool:
        """Go past a token that was drawn; True when the text is complete, so that only the end may follow."""
        self._state.consume_token(token)
        self._check()
        return self._state.is_stopped()

    def _check(self) -> None:
        if self._state.is_error():
            raise InvalidRequest(f"the constraint cannot be followed any further: {_brief(self._state.get_error())}")


def compile_grammar(
    tokenizer: Tokenizer,
    *,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    choice: Sequence[str] | None = None,
    eos: frozenset[int],
    vocab: int,
) -> Grammar:
    """The Grammar of the one constraint that is given.

    `json_schema`: an object or its JSON text; documents come as json.dumps writes them, properties in the schema's
    order (its own "x-guidance" overrides that). `regex`: the whole text, in the syntax of Rust's regex crate.
    `grammar`: llguidance's Lark, or GBNF. `choice`: the texts to choose from. `eos` are the ids that end a text,
    `vocab` is the width of the logits; ids that the tokenizer does not know are never allowed.

    Raises InvalidRequest, with the name of the field, for what llguidance does not understand or no text fulfils.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "choice": choice}
    ((field, value),) = ((name, value) for name, value in given.items() if value is not None)
    try:
        lark = _LARK[field](value)
        lark.encode()  # llguidance does not say that it cannot take lone surrogates
        return _vocabulary(tokenizer, frozenset(i for i in eos if i < vocab), vocab).compile(lark)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field} cannot be followed: {error}") from error
    except ImportError as error:
        problem = f"{field} needs the package llguidance, which is not installed: pip install 'jaxinfer[constrained]'"
        raise InvalidRequest(problem) from error


# A constraint as a grammar in Lark. Each raises ValueError for what cannot be one.


def _json_schema(schema: Any) -> str:
    schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"a schema is a JSON object, not {schema!r:.80}; {{}} allows any document")
    try:
        return f"start: %json {json.dumps({'x-guidance': SPACING, **schema}, ensure_ascii=False, allow_nan=False)}"
    except TypeError as error:
        raise ValueError(f"it is not JSON: {error}") from error


def _regex(regex: Any) -> str:
    from llguidance import regex_to_lark

    if not isinstance(regex, str):
        raise ValueError(f"a regex is a string, not {regex!r:.80}")
    if (len(regex) - len(regex.rstrip("\\"))) % 2:
        raise ValueError("it ends in a backslash that escapes nothing")  # in Lark it would escape the closing slash
    return f"start: /{regex_to_lark(regex, '')}/"


def _grammar(grammar: Any) -> str:
    from llguidance import grammar_from

    if not isinstance(grammar, str):
        raise ValueError(f"a grammar is a string, not {grammar!r:.80}")
    return grammar_from("grammar", grammar)


def _choice(choice: Any) -> str:
    if isinstance(choice, str) or not isinstance(choice, Sequence) or not all(isinstance(text, str) for text in choice):
        raise ValueError(f"it must be a sequence of strings, not {choice!r:.80}")
    if not 1 <= len(choice) <= MOST_CHOICES:
        raise ValueError(f"it has {len(choice)} texts; there must be 1 to {MOST_CHOICES} to choose from")
    # A string in Lark is one in JSON, except that DEL may not stand for itself.
    return "start: " + " | ".join(json.dumps(t, ensure_ascii=False).replace("\x7f", "\\u007f") for t in choice)


_LARK: dict[str, Callable[[Any], str]] = {
    "json_schema": _json_schema,
    "regex": _regex,
    "grammar": _grammar,
    "choice": _choice,
}


class _Vocabulary:
    """A tokenizer's tokens as bytes, in llguidance's trie, and the latest grammars over them."""

    def __init__(self, tokenizer: Tokenizer, eos: frozenset[int], vocab: int):
        from llguidance import LLTokenizer, TokenizerWrapper

        detokenizer = Detokenizer(tokenizer.backend)
        if detokenizer.spelling is None:
            raise ValueError("this model's tokenizer cannot spell its tokens one by one")
        if not eos:
            raise ValueError("this model names no end-of-text token, so that no text could end")
        tokens = SimpleNamespace(
            tokens=[detokenizer.spell(token, first=False) for token in range(vocab)],
            # An end token is never text, even where its file does not call it special.
            special_token_ids=sorted(detokenizer.special | eos),
            eos_token_id=min(eos),
            bos_token_id=tokenizer.bos_id,
        )
        self._tokenizer = LLTokenizer(TokenizerWrapper(tokens), eos_token=sorted(eos))  # FREE: it never encodes
        self._words = -(-vocab // 32)
        self.compile = lru_cache(GRAMMARS_KEPT)(self._compile)

    def _compile(self, lark: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        start = LLMatcher(self._tokenizer, f"{lark}\n{FREE}", log_level=0, limits=limits)
        if start.is_error():
            raise ValueError(_brief(start.get_error()))
        grammar = Grammar(start)
        try:
            grammar.matcher().mask(np.empty(self._words, np.uint32))
        except InvalidRequest as error:
            raise ValueError(f"this model has no text for it ({error})") from error
        return grammar


_vocabularies: WeakKeyDictionary[Tokenizer, dict[tuple[frozenset[int], int], _Vocabulary]] = WeakKeyDictionary()
_building = threading.Lock()


def _vocabulary(tokenizer: Tokenizer, eos: frozenset[int], vocab: int) -> _Vocabulary:
    with _building:  # 0.3 seconds for 49,152 tokens: whoever wants the same one waits for it
        known = _vocabularies.setdefault(tokenizer, {})
        if (eos, vocab) not in known:
            known[eos, vocab] = _Vocabulary(tokenizer, eos, vocab)
        return known[eos, vocab]


def _brief(message: str) -> str:
    """llguidance's reason, without our line in what it shows of the grammar, and no line of it at full length."""
    if message.startswith("NoExtensionBias"):
        return "there is no token that may come next"
    return "\n".join(line[:160] for line in message.splitlines() if FREE not in line and line != "<non-verbose/>")
