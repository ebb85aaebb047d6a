"""Text to tokens and back, and conversations to text: one Tokenizer, whatever file it came from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from jaxinfer import events
from jaxinfer.errors import CorruptFile, InvalidRequest, ModelNotFound
from jaxinfer.frontend import chat
from jaxinfer.frontend.text_stream import Detokenizer, TextStream

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes, decodes, streams, and renders chats.

    `backend` is a `tokenizers.Tokenizer`; `named` maps bos_token, eos_token, ... to their text; `affixes` are the
    ids put before and after a text (None: what the backend's own post-processor says); `templates` are the chat
    templates by name: "default" is the usual one, "tool_use" serves a conversation with tools.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int | None = None,
        named: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        affixes: tuple[Sequence[int], Sequence[int]] | None = None,
        templates: Mapping[str, str] | None = None,
    ):
        self.backend = backend
        self.named = dict(named or {})
        self.vocab_size = backend.get_vocab_size() if vocab_size is None else vocab_size
        self.bos_id = self._id("bos_token")
        own = self._id("eos_token")
        self.eos_ids = frozenset(eos_ids) | ({own} if own is not None else frozenset())
        self.chat_templates = dict(templates or {})
        self._affixes = affixes
        self._detokenizer = Detokenizer(backend)

    def _id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.named[name]) if name in self.named else None

    @property
    def chat_template(self) -> str | None:
        """The default chat template, in jinja2; None where the model has none."""
        return self.chat_templates.get("default")

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        `add_special` adds BOS and EOS where the model wants them; a rendered chat holds its own, so it takes False.
        """
        if not isinstance(text, str):
            raise InvalidRequest(f"the text to encode is a {type(text).__name__}; it must be a str")
        try:
            with events.timed("tokenise"):
                ids = self.backend.encode(text, add_special_tokens=add_special and self._affixes is None).ids
        except (TypeError, UnicodeError) as error:
            problem = "the text holds lone surrogates, which are not characters; replace them"
            raise InvalidRequest(problem) from error
        if add_special and self._affixes is not None:
            before, after = self._affixes
            return [*before, *ids, *after]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; an incomplete character becomes U+FFFD, an id beyond the vocabulary nothing."""
        return self._detokenizer.decode(ids, skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A new TextStream, which takes one token at a time."""
        return TextStream(self._detokenizer, skip_special)

    def spell(self, token: int) -> bytes:
        """The bytes of one token in the middle of a text; it need not be whole characters."""
        if self._detokenizer.spelling is None:
            return self._detokenizer.decode([token], False).encode()
        return self._detokenizer.spell(token, first=False)

    def render_chat(
        self,
        messages: Sequence[Mapping],
        *,
        tools: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation as the text the model was trained on; encode it with `add_special=False`.

        `variables` reach the template by name (`enable_thinking=False`). Raises InvalidRequest for malformed
        messages, and when there is no template or the template refuses.
        """
        names = ("tool_use", "default") if tools is not None else ("default",)
        template = next((self.chat_templates[name] for name in names if name in self.chat_templates), None)
        if template is None:
            known = f"; it has only {sorted(self.chat_templates)}" if self.chat_templates else ""
            raise InvalidRequest(f"the model has no chat template{known}: give it a plain prompt, not messages")
        return chat.render(template, messages, tools, add_generation_prompt, **{**self.named, **variables})

    def save(self, folder: Path) -> None:
        """Write what `from_directory` reads: tokenizer.json, and a tokenizer_config.json with the chat templates."""
        config: dict[str, Any] = dict(self.named)
        if self._affixes is not None:
            before, after = self._affixes
            config |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
        if self.chat_templates:
            config["chat_template"] = [{"name": n, "template": t} for n, t in self.chat_templates.items()]
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
        (folder / "tokenizer.json").write_text(self.backend.to_str(), "utf-8")


def from_directory(path: str | Path) -> Tokenizer:
    """The tokenizer of a directory in Hugging Face layout.

    Reads tokenizer.json, and where present tokenizer_config.json, special_tokens_map.json, generation_config.json
    and the chat template (chat_template.jinja, chat_template.json, additional_chat_templates/*.jinja, or within the
    config). Raises ModelNotFound without a tokenizer.json, CorruptFile for a file that cannot be read.
    """
    folder = Path(path)
    backend = _backend(folder)
    config = _json(folder / "tokenizer_config.json")
    tokens_map = _json(folder / "special_tokens_map.json")
    generation = _json(folder / "generation_config.json")
    marked = {name: config.get(name) or tokens_map.get(name) for name in NAMED}
    named = {name: _content(token, folder) for name, token in marked.items() if token}
    extra = config.get("additional_special_tokens") or tokens_map.get("additional_special_tokens") or []
    special = [*filter(None, marked.values()), *extra]
    _add_missing(backend, folder, config.get("added_tokens_decoder") or {}, special)
    affixes = None
    if "add_bos_token" in config or "add_eos_token" in config:  # outrank tokenizer.json's post-processor

        def wanted(end: str) -> list[int]:
            token = named.get(f"{end}_token") if config.get(f"add_{end}_token") else None
            number = backend.token_to_id(token) if token else None
            return [] if number is None else [number]

        affixes = wanted("bos"), wanted("eos")
    eos = generation.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(end) is int for end in ends):
        raise CorruptFile(f"{folder / 'generation_config.json'}: eos_token_id is {eos!r}, not a token id or a list")
    return Tokenizer(
        backend,
        named=named,
        eos_ids=ends,
        affixes=affixes,
        templates=_templates(folder, config),
    )


def _backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        others = ("tokenizer.model", "vocab.json", "vocab.txt")
        found = ", ".join(name for name in others if (folder / name).is_file())
        advice = f"; convert {found} once with transformers' save_pretrained" if found else ""
        raise ModelNotFound(f"no tokenizer in {folder}: looked for tokenizer.json{advice}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exception
        raise CorruptFile(f"{file} is not a readable tokenizer: {error}") from error
    backend.no_truncation()  # a file may ask for both; a prompt is neither cut nor filled up in silence
    backend.no_padding()
    return backend


def _json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise CorruptFile(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{file} holds a {type(value).__name__}; it must be a JSON object")
    return value


def _content(token: Any, folder: Path) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise CorruptFile(f"{folder}: the special token {token!r} must be text or an object with `content`")
    return content


def _added(token: Any, folder: Path, special: bool) -> AddedToken:
    flags = token if isinstance(token, dict) else {}
    names = ("single_word", "lstrip", "rstrip", "normalized")
    chosen = {name: bool(flags[name]) for name in names if name in flags}
    return AddedToken(_content(token, folder), special=bool(flags.get("special", special)), **chosen)


def _add_missing(backend: tokenizers.Tokenizer, folder: Path, decoder: dict, special: list) -> None:
    """Add the tokens that only tokenizer_config.json names, in the order of their ids."""
    have = {token.content for token in backend.get_added_tokens_decoder().values()}
    numbered = sorted(decoder.items(), key=lambda item: int(item[0]))
    tokens = [_added(token, folder, special=False) for _, token in numbered]
    tokens += [_added(token, folder, special=True) for token in special]
    for token in tokens:
        if token.content not in have:
            have.add(token.content)
            backend.add_tokens([token])
    for number, token in numbered:
        if (got := backend.token_to_id(_content(token, folder))) != int(number):
            file = folder / "tokenizer_config.json"
            raise CorruptFile(f"{file}: {token['content']!r} is token {number} there, {got} in tokenizer.json")


def _templates(folder: Path, config: dict) -> dict[str, str]:
    templates: dict[str, Any] = {}
    told = config.get("chat_template")
    if isinstance(told, str):
        templates["default"] = told
    elif isinstance(told, list) and all(isinstance(entry, dict) for entry in told):
        templates |= {entry.get("name"): entry.get("template") for entry in told}
    elif told is not None:
        file = folder / "tokenizer_config.json"
        raise CorruptFile(f"{file}: chat_template must be text or a list of named templates")
    legacy = _json(folder / "chat_template.json").get("chat_template")
    if legacy is not None:
        templates["default"] = legacy
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    for name, file in files.items():
        try:
            templates[name] = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFile(f"{file} is not UTF-8 text: {error}") from error
    for name, template in templates.items():
        if not isinstance(name, str) or not isinstance(template, str):
            raise CorruptFile(f"{folder}: the chat template {name!r} must have a name and a text")
    return templates
