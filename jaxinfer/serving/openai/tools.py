"""Calls of tools: what a model may write, as a grammar, and what it wrote, as calls.

A model writes a call as its chat template taught it to; of these styles two are known. The grammar lets it write text
and, from the mark on that begins a call, nothing but a call of a tool that there is, with arguments that follow the
tool's schema. So what is read back needs no guessing.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxinfer.errors import InvalidRequest
from jaxinfer.frontend.constraint import SPACING


class Style(NamedTuple):
    """A call is `begin` name `middle` arguments `end`; the next one comes after `between` (None: there is one only).
    Text may come before the `mark`, with which the first call begins, where `anywhere`; else the mark comes first."""

    begin: str
    middle: str
    end: str
    between: str | None
    mark: str
    anywhere: bool


HERMES = Style('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", "<tool_call>", True)
LLAMA = Style('{"name": "', '", "parameters": ', "}", None, '{"name": "', False)


def style_of(template: str) -> Style:
    """The style that a chat template teaches. Raises InvalidRequest if it teaches none that is known."""
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if "tools" in template and '"parameters": dictionary of argument name' in template:
        return LLAMA
    raise InvalidRequest("tools are written by this model's chat template in no way that is known; Hermes' "
                         "(<tool_call>) and Llama 3's are")


def grammar_of(style: Style, tools: Sequence[dict[str, Any]], *, must: bool, many: bool) -> str:
    """What may be written, in Lark: text or calls, or calls alone if one `must` be made; several if `many`.

    `tools` have names and, perhaps, schemas of their "parameters".
    """
    rest = style.begin.removeprefix(style.mark)
    again = f" ({_literal((style.between or '') + style.begin)} call)*" if many and style.between is not None else ""
    calls = f"{_literal(rest) + ' ' if rest else ''}call{again}"
    escaped = re.escape(style.mark).replace("/", r"\/")
    if must:
        lines = [f"start: {_literal(style.mark)} {calls}"]
    elif style.anywhere:
        lines = [f"start: TEXT | before {calls}", f"TEXT: /(?s:.*)/ & ~/(?s:.*){escaped}(?s:.*)/",
                 f"before[lazy]: /(?s:.*){escaped}/"]
    else:
        lines = [f"start: TEXT | {_literal(style.mark)} {calls}", f"TEXT: /(?s:.*)/ & ~/{escaped}(?s:.*)/"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        schema = {"x-guidance": SPACING, **(tool.get("parameters") or {}), "type": "object"}
        lines += [f"call_{i}: {_literal(tool['name'] + style.middle)} args_{i} {_literal(style.end)}",
                  f"args_{i}: %json {json.dumps(schema)}"]
    return "\n".join(lines)


def _literal(text: str) -> str:
    return json.dumps(text)


@dataclass
class Call:
    """A call, and its id for whoever answers it. `arguments` is JSON, or its beginning if the answer was cut off."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(frozen=True)
class Change:
    """Text; or the beginning of a call, or more of its arguments."""

    text: str = ""
    index: int = 0
    call: Call | None = None  # that begins
    arguments: str = ""


class Reader:
    """Takes an answer apart as it comes. `calls` are those that there were so far."""

    def __init__(self, style: Style):
        self.style, self.calls = style, list[Call]()
        self._held, self._state, self._begun = "", self._text, False
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> Iterator[Change]:
        """What more of the answer has told."""
        self._held += text
        before = None
        while self._held and before != (self._held, self._state):
            before = self._held, self._state
            yield from self._state()

    def finish(self) -> Iterator[Change]:
        """What was held back as it might have begun a call."""
        if self._state == self._text and self._held:
            yield Change(self._held)
        self._held = ""

    def _text(self) -> Iterator[Change]:
        at = self._held.find(self.style.begin)
        if at == 0 or (at > 0 and self.style.anywhere):
            if at:
                yield Change(self._held[:at])
            self._held, self._state = self._held[at + len(self.style.begin):], self._name
            return
        if self._begun and not self.style.anywhere:
            keep = 0
        else:
            keep = next((n for n in range(min(len(self._held), len(self.style.begin) - 1), 0, -1)
                         if self._held.endswith(self.style.begin[:n])), 0)
            if not self.style.anywhere and keep < len(self._held):
                keep = 0
        show, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep:]
        if show:
            self._begun = True
            yield Change(show)

    def _name(self) -> Iterator[Change]:
        name, found, rest = self._held.partition(self.style.middle)
        if found:
            self._held, self._state = rest, self._arguments
            self.calls.append(Call(name))
            yield Change(index=len(self.calls) - 1, call=self.calls[-1])

    def _arguments(self) -> Iterator[Change]:
        """A JSON object, to the brace that closes it."""
        end = next((i + 1 for i, char in enumerate(self._held) if self._closes(char)), None)
        more, self._held = self._held[:end], "" if end is None else self._held[end:]
        if end is not None:
            self._state = self._after
        self.calls[-1].arguments += more
        yield Change(index=len(self.calls) - 1, arguments=more)

    def _closes(self, char: str) -> bool:
        if self._quoted:
            self._quoted = char != '"' or self._escaped
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def _after(self) -> Iterator[Change]:
        whole = self.style.end + (self.style.between or "")
        if len(self._held) >= len(whole):
            self._held, self._state = self._held[len(whole):], self._text
        yield from ()
