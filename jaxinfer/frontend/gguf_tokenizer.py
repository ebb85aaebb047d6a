"""Tokenizers rebuilt from GGUF metadata (`tokenizer.ggml.*`): a few names and arrays that say what to build.

Where the file leaves a choice, the model's original tokenizer decides. The splits below are facts about those models
(their tokenizer.json, and llama.cpp's table of names), checked against llama.cpp's vocabularies and answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.text_stream import METASPACE
from jaxinfer.frontend.tokenizer import NAMED, Tokenizer

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class Split:
    """How a byte-level vocabulary cuts text before its merges apply.

    With `whole_first` a piece that is itself a token stays whole; `bos` is the habit where the file is silent.
    """

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_first: bool = False
    bos: bool = False

    def normalizer(self) -> Any:
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> Any:
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        if self.regex is not None:
            steps.append(pre_tokenizers.Split(Regex(self.regex), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.regex is None))
        return pre_tokenizers.Sequence(steps)


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    """Words cut where lower case turns to upper, as OpenAI's o200k and Mistral's Tekken do."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = f"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _TAIL


_GPT2 = Split()
_GPT2_DIGITS = Split(digits=True)
_LLAMA3 = Split(_WORDS % r"\p{N}{1,3}", whole_first=True, bos=True)
_CL100K = Split(_WORDS % r"\p{N}{1,3}")
_QWEN2 = Split(_WORDS % r"\p{N}", nfc=True)
_O200K = Split(_cased(_CONTRACTION + "?", r"\p{N}{1,3}"))

SPLITS: dict[str, Split] = {
    "gpt-2": _GPT2, "phi-2": _GPT2,
    "olmo": Split(nfc=True),
    "smollm": _GPT2_DIGITS, "starcoder": _GPT2_DIGITS, "refact": _GPT2_DIGITS,
    "command-r": Split(digits=True, nfc=True),
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "dbrx": _CL100K, "smaug-bpe": _CL100K,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
    "tekken": Split(_cased("", r"\p{N}"), whole_first=True, bos=True),
    "gpt-4o": _O200K,
}  # fmt: skip

# These end a turn whatever eos_token_id says: generation_config.json would list them, GGUF has no such list.
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Models: "gpt2" (byte-level BPE, split as `pre` names it), "llama" (SentencePiece BPE, merges from the scores),
    "t5" (SentencePiece unigram). Raises UnsupportedModel for another model or an unknown `pre`, CorruptFile for
    arrays that are missing or contradict each other.
    """
    return _Reader(metadata).tokenizer()


def where(key: str) -> str:
    return f"GGUF metadata tokenizer.ggml.{key}"


class _Reader:
    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata
        self.model = self.get("model")
        self.tokens: list[str] = list(self.array("tokens"))
        types = self.get("token_type")
        self.types: list[int] = list(map(int, types)) if types is not None else [1] * len(self.tokens)
        self.same_length("token_type", self.types)
        self.ids = {name: self.id_of(name) for name in NAMED}

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def array(self, key: str) -> Any:
        value = self.get(key)
        if value is None or isinstance(value, str) or not hasattr(value, "__len__"):
            raise CorruptFile(f"{where(key)} must be an array, and is {type(value).__name__}")
        return value

    def same_length(self, key: str, values: Any) -> None:
        if len(values) != len(self.tokens):
            raise CorruptFile(f"{where(key)} has {len(values)} entries for {len(self.tokens)} tokens")

    def id_of(self, name: str) -> int | None:
        long = {"unk_token": "unknown_token", "sep_token": "seperator_token", "pad_token": "padding_token"}
        key = f"{long.get(name, name)}_id"  # "seperator" is how the format spells it
        value = self.get(key)
        if value is None or int(value) in (-1, 0xFFFFFFFF):
            return None
        if not 0 <= int(value) < len(self.tokens):
            raise CorruptFile(f"{where(key)} is {value}; there are {len(self.tokens)} tokens")
        return int(value)

    def tokenizer(self) -> Tokenizer:
        builders = {"gpt2": self.byte_level, "llama": self.sentencepiece, "t5": self.unigram}
        if self.model not in builders:
            raise UnsupportedModel(
                f"{where('model')} is {self.model!r}, which is not one of {sorted(builders)}; nothing was loaded"
            )
        backend, bos, eos = builders[self.model]()
        self.add_marked(backend)
        named = {name: self.tokens[i] for name, i in self.ids.items() if i is not None}
        before, after = self.wants("bos", bos), self.wants("eos", eos)
        return Tokenizer(
            backend, vocab_size=len(self.tokens), named=named, eos_ids=self.ends(), affixes=(before, after),
            templates=self.templates(),
        )  # fmt: skip

    def wants(self, which: str, default: bool) -> list[int]:
        token, wish = self.ids[f"{which}_token"], self.get(f"add_{which}_token")
        return [token] if token is not None and (default if wish is None else bool(wish)) else []

    def ends(self) -> set[int]:
        named = {int(i) for key in ("eot", "eom") if (i := self.get(f"{key}_token_id")) is not None}
        marked = {i for i, kind in enumerate(self.types) if kind in (CONTROL, USER_DEFINED)}
        return named | {i for i in marked if self.tokens[i] in TURN_ENDS}

    def templates(self) -> dict[str, str]:
        prefix = "tokenizer.chat_template"
        named = {key.removeprefix(f"{prefix}."): key for key in self.metadata if key.startswith(f"{prefix}.")}
        keys = {"default": prefix, **named} if prefix in self.metadata else named
        return {name: self.metadata[key] for name, key in keys.items()}

    def vocabulary(self, tokens: list[str]) -> dict[str, int]:
        return {token: i for i, token in enumerate(tokens)}

    def add_marked(self, backend: Backend) -> None:
        """Control and unknown tokens are special, user-defined ones merely whole; both are found before merges."""
        named = {i for i in self.ids.values() if i is not None}
        # Phi-3 swallows the blanks after its marks, which a GGUF file cannot say.
        rstrip = self.model == "llama" and self.metadata.get("general.architecture") == "phi3"
        added = []
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in (CONTROL, UNKNOWN, USER_DEFINED) or i in named:
                special = kind != USER_DEFINED or i in named
                strips = rstrip and kind != UNKNOWN and token not in ("<s>", "<unk>", "<|endoftext|>")
                if token and backend.token_to_id(token) == i:
                    added.append(AddedToken(token, special=special, normalized=False, rstrip=strips))
        backend.add_tokens(added)

    def byte_level(self) -> tuple[Backend, bool, bool]:
        name = self.get("pre", "gpt-2")
        if name not in SPLITS:
            raise UnsupportedModel(
                f"{where('pre')} is {name!r}, which is not one of {sorted(SPLITS)}; nothing was loaded"
            )
        split = SPLITS[name]
        merges = self.merges()
        try:
            model = models.BPE(self.vocabulary(self.tokens), merges, ignore_merges=split.whole_first)
        except Exception as error:
            raise CorruptFile(f"{where('merges')} does not fit the tokens: {error}") from error
        backend = Backend(model)
        if split.nfc:
            backend.normalizer = split.normalizer()
        backend.pre_tokenizer = split.pre_tokenizer()
        backend.decoder = decoders.ByteLevel()
        return backend, split.bos, False

    def merges(self) -> list[tuple[str, str]]:
        merges = [tuple(merge.split(" ")) for merge in self.array("merges")]
        wrong = next((i for i, merge in enumerate(merges) if len(merge) != 2), None)
        if wrong is not None:
            raise CorruptFile(f"{where('merges')}[{wrong}] is not two tokens and a space")
        return merges

    def sentencepiece(self) -> tuple[Backend, bool, bool]:
        scores = self.array("scores")
        self.same_length("scores", scores)
        gemma = str(self.metadata.get("general.architecture", "")).startswith("gemma")
        if gemma:
            # Runs of blanks are stored as blanks; the order of the tokens, not of their scores, is the merges'.
            self.tokens = [METASPACE * len(t) if t.isspace() and not t.strip(" ") else t for t in self.tokens]
            scores = range(0, -len(self.tokens), -1)
        vocabulary = self.vocabulary(self.tokens)
        merges = self.merges() if self.get("merges") is not None else self.derived_merges(vocabulary, scores)
        unknown = self.ids["unk_token"]
        backend = Backend(
            models.BPE(
                vocabulary, merges, fuse_unk=True, byte_fallback=BYTE in self.types,
                unk_token=self.tokens[unknown] if unknown is not None else None,
            )
        )  # fmt: skip
        prefix = bool(self.get("add_space_prefix", True))
        backend.normalizer = normalizers.Sequence(self.charsmap() + self.metaspace(prefix))
        backend.decoder = self.decoder(prefix)
        return backend, True, False

    def derived_merges(self, vocabulary: dict[str, int], scores: Any) -> list[tuple[str, str]]:
        """Every way to cut a token into two others, best score first, as transformers derives them.

        SentencePiece keeps no merges: it joins whichever neighbours make the token of the highest score.
        """
        normal = [i for i, kind in enumerate(self.types) if kind not in (UNKNOWN, CONTROL, BYTE)]
        normal.sort(key=scores.__getitem__, reverse=True)
        merges: list[tuple[str, str]] = []
        for _, tied in groupby(normal, key=scores.__getitem__):
            pairs, tokens = [], [self.tokens[i] for i in tied]
            for token in tokens:  # the longer left part first
                cuts = [cut for cut in range(len(token) - 1, 0, -1) if token[:cut] in vocabulary]
                pairs += [(token[:cut], token[cut:]) for cut in cuts if token[cut:] in vocabulary]
            if len(tokens) > 1:  # among equals too, then the longer right part
                pairs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1])))
            merges += pairs
        return merges

    def unigram(self) -> tuple[Backend, bool, bool]:
        scores = self.array("scores")
        self.same_length("scores", scores)
        unknown = self.ids["unk_token"]
        if unknown is None:
            raise CorruptFile(f"{where('unknown_token_id')} is missing; a unigram model needs it")
        pieces = list(zip(self.tokens, map(float, scores), strict=True))
        backend = Backend(models.Unigram(pieces, unknown, BYTE in self.types))
        prefix = bool(self.get("add_space_prefix", True))
        steps = self.charsmap()
        if self.get("remove_extra_whitespaces", True):
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        backend.normalizer = normalizers.Sequence(steps + self.metaspace(prefix))
        backend.decoder = self.decoder(prefix)
        return backend, False, True

    def metaspace(self, prefix: bool) -> list[Any]:
        """Blanks become U+2581, and one goes before each stretch of text, even before a blank, as SentencePiece
        does (and llama.cpp, and Llama 2's tokenizer.json; transformers 5's GGUF reader leaves it out there)."""
        return [*([normalizers.Prepend(METASPACE)] if prefix else []), normalizers.Replace(" ", METASPACE)]

    def charsmap(self) -> list[Any]:
        table = self.get("precompiled_charsmap")
        return [normalizers.Precompiled(bytes(bytearray(table)))] if table is not None and len(table) else []

    def decoder(self, prefix: bool) -> Any:
        steps = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
