"""Tokens back to text, one token at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable

import tokenizers

METASPACE = "▁"
# Each byte that is part of no character becomes one U+FFFD, as in the ByteFallback decoder of `tokenizers`.
_EACH_BYTE = "jaxinfer.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> the byte that it spells."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class Spelling:
    """How a decoder spells a token as bytes; the text is those bytes joined, less the spaces cut at the start.

    `errors` is the codec's way with broken bytes, `cut` the spaces cut from the start of the whole text, and
    `cut_first` says that the first token loses all its U+2581 (the Metaspace decoder). One departure from
    `tokenizers`: where a run of byte tokens is broken somewhere, it gives up the run's good characters too; here
    they stay, so that a character may be shown as soon as it is complete.
    """

    def __init__(self, spell: Callable[[str], bytes], errors: str, cut: int = 0, cut_first: bool = False):
        self.spell, self.errors, self.cut, self.cut_first = spell, errors, cut, cut_first


def _byte_level() -> Spelling:
    alphabet = byte_alphabet()

    def spell(token: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in token])
        except KeyError:  # an added token, written as it is
            return token.encode()

    return Spelling(spell, errors="replace")


def _sentencepiece(replaced: list[tuple[str, str]], bytes_too: bool, cut: int) -> Spelling:
    def spell(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        if bytes_too and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass  # a token that only looks like a byte
        return token.encode()

    return Spelling(spell, errors=_EACH_BYTE, cut=cut)


def spelling_of(decoder: dict | None) -> Spelling | None:
    """The spelling of a decoder (as in tokenizer.json), or None where text cannot be told token by token."""
    if decoder is None:
        return None
    steps: list[dict] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level()
    if kinds == ["Metaspace"]:
        mark, cut_first = steps[0]["replacement"], steps[0].get("prepend_scheme", "always") != "never"
        spelling = _sentencepiece([(mark, " ")], bytes_too=False, cut=0)
        spelling.cut_first = cut_first
        return spelling
    replaced: list[tuple[str, str]] = []
    while kinds and kinds[0] == "Replace" and "String" in steps[0]["pattern"]:
        replaced.append((steps[0]["pattern"]["String"], steps[0]["content"]))
        kinds, steps = kinds[1:], steps[1:]
    if kinds in ([], ["ByteFallback"], ["Fuse"], ["ByteFallback", "Fuse"]) and replaced:
        return _sentencepiece(replaced, "ByteFallback" in kinds, cut=0)
    if kinds == ["ByteFallback", "Fuse", "Strip"] and steps[2]["content"] == " " and not steps[2]["stop"]:
        return _sentencepiece(replaced, bytes_too=True, cut=steps[2]["start"])
    return None


class Detokenizer:
    """Token ids -> text for one tokenizer: all at once (`decode`), or as a TextStream (`stream`)."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        self.spelling = spelling_of(state)
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.texts: dict[int, str] = {}  # of tokens that leave no character open, where none was

    def spell(self, token: int, first: bool) -> bytes:
        """The bytes of one token; none for an id beyond the vocabulary (embeddings padded to a round size)."""
        assert self.spelling is not None
        if first and self.spelling.cut_first:
            return (self.backend.id_to_token(token) or "").replace(METASPACE, "").encode()
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self.spelling.spell(self.backend.id_to_token(token) or "")
        return known

    def decode(self, ids: Iterable[int], skip_special: bool) -> str:
        if self.spelling is None:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)
        stream = TextStream(self, skip_special)
        return "".join([stream.push(token) for token in ids]) + stream.finish()


class TextStream:
    """The text of tokens as they come: the pieces joined are what `Tokenizer.decode` says of all of them.

    >>> stream = tokenizer.stream()                                                         # doctest: +SKIP
    >>> for token in ids: print(stream.push(token), end="")                                 # doctest: +SKIP
    >>> print(stream.finish())                                                              # doctest: +SKIP

    A decoder that looks back at earlier text (WordPiece) gives everything at `finish`.
    """

    def __init__(self, detokenizer: Detokenizer, skip_special: bool = True):
        self._detokenizer, self._skip_special = detokenizer, skip_special
        self._first, self._held = True, []
        self._texts: dict[int, str] = {}  # the detokenizer's, while no character is open and nothing is to be cut
        spelling = detokenizer.spelling
        if spelling is not None:
            self._cut = spelling.cut
            self._decoder = codecs.getincrementaldecoder("utf-8")(spelling.errors)

    def push(self, token: int) -> str:
        """The text that has become final with this token: "" while a character is incomplete."""
        text = self._texts.get(token)
        return self._spell(token) if text is None else text

    def _spell(self, token: int) -> str:
        """The same, of a token whose text is not known, or depends on those before it."""
        if self._skip_special and token in self._detokenizer.special:
            return ""
        if self._detokenizer.spelling is None:
            self._held.append(token)
            return ""
        known, closed = self._detokenizer.texts, self._texts is self._detokenizer.texts
        spelt = self._detokenizer.spell(token, self._first)
        self._first = self._first and self._detokenizer.backend.id_to_token(token) is None
        text = self._trimmed(self._decoder.decode(spelt))
        self._texts = {} if self._first or self._cut or self._decoder.getstate()[0] else known
        if closed and self._texts is known and token not in self._detokenizer.special:
            known[token] = text
        return text

    def finish(self) -> str:
        """What is left: the bytes of an incomplete character become U+FFFD. The stream is over."""
        if self._detokenizer.spelling is None:
            held, self._held = self._held, []
            return self._detokenizer.decode(held, self._skip_special)
        return self._trimmed(self._decoder.decode(b"", final=True))

    def _trimmed(self, text: str) -> str:
        while self._cut and text:
            if not text.startswith(" "):
                self._cut = 0
                break
            text, self._cut = text[1:], self._cut - 1
        return text
