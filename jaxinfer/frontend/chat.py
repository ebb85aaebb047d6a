"""Chat templates: messages -> the prompt that a model was trained on, rendered in a sandbox.

A template comes with a checkpoint and is code by a stranger. It sees plain data, reads no underscore names,
writes at most `MAX_TEXT` characters and multiplies nothing beyond that; else it renders as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range

from jaxinfer.errors import InvalidRequest

DEEPEST = 64  # lists and dicts within each other
MAX_TEXT = 1 << 24  # characters; the longest contexts hold a quarter of that


def render(
    template: str,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    add_generation_prompt: bool = True,
    /,
    **variables: Any,
) -> str:
    """The text of a conversation under a jinja2 chat template.

    Messages are dicts with `role` and `content` (text, or a list of typed parts); beside `tool_calls` the content
    may be missing. Raises InvalidRequest, naming message and field, and also when the template itself refuses.
    """
    seen = {
        "messages": _messages(messages),
        "tools": _tools(tools),
        "documents": None,
        "add_generation_prompt": bool(add_generation_prompt),
        "range": _ranges(),
        **{name: _plain(value, name) for name, value in variables.items()},
    }
    pieces, length = [], 0
    try:
        for piece in _compiled(template).generate(seen):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise SecurityError(f"it writes more than {MAX_TEXT} characters")
    except Exception as error:  # whatever a stranger's code can raise
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise InvalidRequest(f"the model's chat template refuses these messages{line}: {error}") from error
    return "".join(pieces)


def _messages(messages: Any) -> list[dict]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest(
            f'messages is {_kind(messages)}; it must be a list of at least one {{"role": ..., "content": ...}}'
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f'{where} is {_kind(message)}; it must be a dict with "role" and "content"')
    # OpenAI's clients send `content: None` and `tool_calls: None`; templates expect such keys to be missing.
    plain = {key: value for key, value in _plain(message, where).items() if value is not None}
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        kind = _kind(message.get("role"))
        raise InvalidRequest(f'{where}["role"] is {kind}; it must be text such as "user"')
    content = plain.get("content")
    if content is None and not plain.get("tool_calls"):
        raise InvalidRequest(f'{where}["content"] is missing; only "tool_calls" can stand in for it')
    if not isinstance(content, str | list | None):
        raise InvalidRequest(f'{where}["content"] is {_kind(content)}; it must be text or a list of parts')
    for i, part in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidRequest(f'{where}["content"][{i}] must be a dict with a "type", such as "text"')
    # One thought, three names in use: templates read the first or the second.
    names = ("reasoning_content", "thinking", "reasoning")
    thought = next((plain[name] for name in names if name in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _tools(tools: Any) -> list[dict] | None:
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise InvalidRequest(f"tools is {_kind(tools)}; it must be a list of JSON schemas (dicts)")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequest(f"tools[{i}] is {_kind(tool)}; it must be a JSON schema (a dict)")
    return _plain(tools, "tools")


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain JSON types: an object's methods are out of a template's reach."""
    if depth > DEEPEST:
        raise InvalidRequest(f"{where[:80]} is nested deeper than {DEEPEST} lists and dicts")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # enums and their like shrink to what they are
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise InvalidRequest(f"{where} is {_kind(value)}; it must be text, a number, a list or a dict")


def _kind(value: Any) -> str:
    return "missing" if value is None else "empty" if value in ("", [], ()) else f"a {type(value).__name__}"


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks a reply's text for training; it renders as its inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(inside, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscore names, which are Python's own."""

    def __init__(*args, **kwargs):  # `self` among the arguments, as a template may call an attribute that
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name, value):
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace's attribute may not start with an underscore: {name!r}")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator, left, right):
        """A product may not outgrow the largest text: 'x' * 10**12 would take the machine's memory."""
        if operator == "**" and (abs(left) > 1 << 32 or abs(right) > 32):
            raise SecurityError(f"{left} ** {right} is too large")
        sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
        repeats = any(hasattr(side, "__len__") for side in (left, right))
        if operator == "*" and repeats and sizes[0] * sizes[1] > MAX_TEXT:
            raise SecurityError(f"a repetition of more than {MAX_TEXT} items")
        return super().call_binop(context, operator, left, right)


def _ranges() -> Callable[..., range]:
    """`range` for one rendering, `MAX_TEXT` steps in all: nested loops need not write anything to take forever."""
    left = MAX_TEXT

    def limited(*bounds: int) -> range:
        nonlocal left
        steps = safe_range(*bounds)
        left -= len(steps)
        if left < 0:
            raise SecurityError(f"its loops take more than {MAX_TEXT} steps")
        return steps

    return limited


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it stands; jinja2's own filter escapes HTML."""
    layout = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
        "dict": lambda *pairs, **named: dict(*pairs, **named),
    }
    return sandbox.from_string(template)
