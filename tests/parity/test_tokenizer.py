"""Ids, text and prompts equal those of transformers, of sentencepiece and of llama.cpp's published answers."""

# ruff: noqa: E402  (transformers decides whether this file runs at all)
from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

import gguf
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from jaxinfer.frontend.gguf import open_gguf
from jaxinfer.frontend.gguf_tokenizer import from_gguf
from jaxinfer.frontend.tokenizer import Tokenizer, from_directory

CORPUS = [
    "The quick brown fox jumps over the lazy dog; isn't it? We've 1234 reasons, they'll cost $3.50 (or 007).",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "נוסח לדוגמה בעברית. نص عربي للتجربة مع أرقام ١٢٣. हिन्दी में लिखा हुआ वाक्य। ข้อความภาษาไทยไม่มีช่องว่าง",
    "日本語の文章と中文的句子,以及한국어 문장입니다. 二〇二四年。全角ＡＢＣ１２３",
    "def f(x: int) -> dict:\n    return {\n\t'a': x ** 2,  # note\n    }\n\n\nclass HTMLParser:\r\n  pass\n",
    "naïve café résumé Ångström ½ ⅻ x² 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️‍🔥    four   three  two\t\ttabs \n \n  end  ",
]
TEXTS = [
    *CORPUS, *(line[1:] for line in CORPUS), "", " ", "  ", "\n", "\n\n \n", "\t", "Hello", " Hello", "  Hello",
    "a  1  22",    "e\u0301 vs é", "I'M YOU'RE we'D", "\u200b\u00a0\u3000x", "\x00\x7f", "<s>Hi</s> <s> Hi",
    "<|im_start|>user\nHi<|im_end|>\n",
    "3.14159 1,000,000 0xFF", "camelCase HTTPServer iOS", "\ufffd�", "............ !!!! ----",
    "ﷺ ℌ ﬁ", " a\u0300\u0316b",
]  # fmt: skip
# Hypothesis mixes all of Unicode with what the splits treat specially.
ANY_TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("  \n\t\r'sSaAzZ09½é日👍🏽\u200d\u0301▁")), max_size=40
)


def same(ours: Tokenizer, theirs: Any, text: str) -> None:
    for special in (True, False):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special=special) == ids, (text, special)
    for skip in (True, False):
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip), text


# --- SmolLM2 -----------------------------------------------------------------------------------------------------

SMOLLM2 = Path(os.environ.get("JAXINFER_SMOLLM2", "/work/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.is_file(), reason="no SmolLM2 here")


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokenizer, Any]:
    theirs = transformers.AutoTokenizer.from_pretrained(str(SMOLLM2.parent), gguf_file=SMOLLM2.name)
    return from_gguf(open_gguf(SMOLLM2)[0]), theirs


@pytest.fixture(scope="module")
def smollm2_exact(smollm2) -> tuple[Tokenizer, Any]:
    """SmolLM2's own tokenizer.json sets digits apart before it looks for words, which the GGUF reader of transformers
    5.23 leaves out: it tells "a  1" (two spaces before a digit) otherwise than the original."""
    ours, theirs = smollm2
    exact = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs.backend_tokenizer)
    exact.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return ours, exact


@needs_smollm2
@pytest.mark.smollm2
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_gives_transformers_ids(smollm2_exact, text):
    same(*smollm2_exact, text)


@needs_smollm2
@pytest.mark.smollm2
@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_smollm2_gives_transformers_ids_on_any_text(smollm2_exact, text):
    same(*smollm2_exact, text)


@needs_smollm2
@pytest.mark.smollm2
def test_smollm2_gives_the_ids_of_the_gguf_reader_where_its_split_does_not_matter(smollm2):
    for text in TEXTS:
        if "  1" not in text and not any(char.isnumeric() and not char.isascii() for char in text):
            same(*smollm2, text)


@needs_smollm2
@pytest.mark.smollm2
@given(ids=st.lists(st.integers(0, 49151), max_size=30), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_smollm2_decodes_any_ids_as_transformers_does(smollm2, ids, skip):
    ours, theirs = smollm2
    assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


# --- Byte-level vocabularies -------------------------------------------------------------------------------------


def trained(pre: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    vocabulary = backend.get_vocab()
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return vocabulary, merges


def splitting(regex: str | None) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"), byte_level])


def byte_level_gguf(folder: Path, pre: str, **flags: bool) -> Path:
    """A GGUF file with a vocabulary trained under the split that transformers knows by that name."""
    vocabulary, merges = trained(splitting(GGUF_PRE_TOKENIZER_SPLITS.get(pre)))
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    for key, number in {"context_length": 64, "embedding_length": 8, "block_count": 1, "head_count": 1}.items():
        getattr(writer, f"add_{key}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 5 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    for key, number in {"unk": 0, "bos": 1, "eos": 2}.items():
        getattr(writer, f"add_{key}_token_id")(number)
    for key, flag in flags.items():
        getattr(writer, f"add_{key}")(flag)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "tiny.gguf"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
@pytest.mark.parametrize("bos", [True, False])
def test_byte_level_gguf_gives_the_ids_of_transformers_reader(tmp_path, pre, bos):
    path = byte_level_gguf(tmp_path, pre, add_bos_token=bos, add_eos_token=not bos)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    ours = from_gguf(open_gguf(path)[0])
    for text in TEXTS:
        if pre != "qwen2" or unicodedata.is_normalized(
            "NFC", text
        ):  # the reader forgets Qwen's NFC, which the next test has
            same(ours, theirs, text)


@pytest.mark.parametrize(
    ("pre", "kind"), [("gpt-2", "GPT2"), ("qwen2", "Qwen2"), ("command-r", "Cohere"), ("olmo", "GPTNeoX")]
)
@given(text=ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_byte_level_gguf_gives_the_ids_of_the_models_own_class(pre, kind, text):
    vocabulary, merges = VOCABULARIES.setdefault(pre, trained(splitting(GGUF_PRE_TOKENIZER_SPLITS.get(pre))))
    if (pre, kind) not in PAIRS:
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(merge) for merge in merges],
                  "token_type": [1] * len(tokens)}  # fmt: skip
        ours = from_gguf({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
        theirs = getattr(transformers, f"{kind}Tokenizer")(vocab=vocabulary, merges=merges, add_prefix_space=False)
        PAIRS[pre, kind] = ours, theirs.backend_tokenizer
    ours, backend = PAIRS[pre, kind]
    # Without its class's special tokens, which are not those of this vocabulary.
    if not any(token.content in text for token in backend.get_added_tokens_decoder().values()):
        assert ours.encode(text) == backend.encode(text, add_special_tokens=False).ids


VOCABULARIES: dict[str, Any] = {}
PAIRS: dict[tuple[str, str], Any] = {}


# --- Directories saved by transformers ---------------------------------------------------------------------------


def saved(folder: Path, kind: str) -> Any:
    vocabulary, merges = trained(splitting(None))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "byte level":
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer, backend.decoder = splitting(None), decoders.ByteLevel()
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    elif kind in ("GPT2", "Qwen2"):
        theirs = getattr(transformers, f"{kind}Tokenizer")(vocab=vocabulary, merges=merges, **named)
    elif kind == "Llama":
        spelled, joined = llama_pieces(sentencepiece_model(folder, "bpe"))
        theirs = transformers.LlamaTokenizer(vocab=spelled, merges=joined, **named)
    elif kind == "added tokens":
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer, backend.decoder = splitting(None), decoders.ByteLevel()
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<new>", **named)
        theirs.add_tokens(["<tool>", transformers.AddedToken("<strip>", lstrip=True, rstrip=True)])
    else:
        raise AssertionError(kind)
    theirs.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["byte level", "GPT2", "Qwen2", "Llama", "added tokens"])
def test_a_saved_directory_gives_transformers_ids_and_special_tokens(tmp_path, kind):
    theirs = saved(tmp_path, kind)
    ours = from_directory(tmp_path)
    for text in [*TEXTS, "a <tool> b <strip>  c<new>"]:
        same(ours, theirs, text)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, {theirs.eos_token_id})
    assert ours.named == theirs.special_tokens_map | ours.named
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_a_saved_directory_adds_bos_and_eos_as_transformers_does(tmp_path, bos, eos):
    spelled, joined = llama_pieces(sentencepiece_model(tmp_path, "bpe"))
    how = {"add_bos_token": bos, "add_eos_token": eos}
    transformers.LlamaTokenizer(vocab=spelled, merges=joined, **how).save_pretrained(tmp_path)
    same(from_directory(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path), CORPUS[0])


# --- SentencePiece -----------------------------------------------------------------------------------------------

MODELS: dict[str, bytes] = {}


def sentencepiece_model(folder: Path, kind: str, **options: Any) -> Path:
    """A small model as Llama's is made: every byte has a piece, digits stand alone, blanks are kept."""
    llama = {"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
             "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}  # fmt: skip
    key = f"{kind} {options}"
    if key not in MODELS:
        (folder / "corpus.txt").write_text("\n".join(CORPUS * 3))
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"), model_prefix=str(folder / "tiny"), model_type=kind, vocab_size=640,
            hard_vocab_limit=False, character_coverage=1.0, minloglevel=2, user_defined_symbols=["<tool>"],
            **(options or llama),
        )  # fmt: skip
        MODELS[key] = (folder / "tiny.model").read_bytes()
    (folder / "tiny.model").write_bytes(MODELS[key])
    return folder / "tiny.model"


def proto_of(path: Path) -> Any:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def sentencepiece_gguf(path: Path, model: str) -> Path:
    """The GGUF file that llama.cpp's converter makes of a SentencePiece model."""
    proto = proto_of(path)
    writer = gguf.GGUFWriter(path.with_suffix(".gguf"), "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    for key, number in {"unk": 0, "bos": 1, "eos": 2}.items():
        getattr(writer, f"add_{key}_token_id")(number)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    if charsmap := proto.normalizer_spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(charsmap)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.with_suffix(".gguf")


def llama_pieces(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """transformers' own conversion of a SentencePiece model."""
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = [(piece.piece, piece.score) for piece in proto_of(path).pieces]
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    return vocabulary, generate_merges(vocabulary, dict(pieces))


def spoken(text: str) -> bool:
    """SentencePiece has no control tokens in text, drops U+0000 and takes U+2581 for a blank."""
    return not any(mark in text for mark in ("<s>", "</s>", "<unk>", "<tool>", "\0", "▁", "<0x"))


NMT = {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc"}


@pytest.mark.parametrize(("kind", "model"), [("bpe", "llama"), ("unigram", "t5")])
def test_sentencepiece_gguf_gives_the_ids_of_sentencepiece(tmp_path, kind, model):
    path = sentencepiece_model(tmp_path, kind)
    ours = from_gguf(open_gguf(sentencepiece_gguf(path, model))[0])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))

    @given(text=st.one_of(st.sampled_from(TEXTS), ANY_TEXT))
    @settings(max_examples=250, deadline=None)
    def check(text: str) -> None:
        if spoken(text):
            ids = theirs.encode(text)
            assert ours.encode(text, add_special=False) == ids
            assert ours.decode(ids) == theirs.decode(ids)

    check()
    assert ours.encode("a") == ([1, *theirs.encode("a")] if kind == "bpe" else [*theirs.encode("a"), 2])


def test_a_normalising_unigram_gguf_gives_the_ids_of_sentencepiece(tmp_path):
    path = sentencepiece_model(tmp_path, "unigram", **NMT)
    ours = from_gguf(open_gguf(sentencepiece_gguf(path, "t5"))[0])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in filter(spoken, TEXTS):
        assert ours.encode(text, add_special=False) == theirs.encode(text), text


def test_sentencepiece_gguf_gives_the_ids_of_transformers_conversion(tmp_path):
    """...where no blank leads the text and no special token parts it: there transformers' LlamaTokenizer leaves out
    the prefix blank, while SentencePiece, llama.cpp and Llama 2's own tokenizer.json write it, as we do."""
    path = sentencepiece_model(tmp_path, "bpe")
    ours = from_gguf(open_gguf(sentencepiece_gguf(path, "llama"))[0])
    spelled, joined = llama_pieces(path)
    theirs = transformers.LlamaTokenizer(vocab=spelled, merges=joined, add_bos_token=True)
    theirs.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    for text in TEXTS:
        if not text.startswith(" ") and "s>" not in text:
            same(ours, theirs, text)


# --- llama.cpp's vocabularies and answers ------------------------------------------------------------------------

VOCABS = Path(os.environ.get("JAXINFER_GGML_VOCABS", "absent"))  # llama.cpp's models/, in the sdist of llama-cpp-python
NAMES = ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "starcoder", "refact", "command-r"]


@pytest.mark.skipif(not VOCABS.is_dir(), reason="JAXINFER_GGML_VOCABS does not name llama.cpp's models folder")
@pytest.mark.parametrize("name", NAMES)
def test_real_vocabularies_give_the_published_ids(name):
    file = VOCABS / f"ggml-vocab-{name}.gguf"
    ours = from_gguf(open_gguf(file)[0])
    texts = file.with_name(f"{file.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    answers = file.with_name(f"{file.name}.out").read_text().split("\n")
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        assert ours.encode(text, add_special=False) == [int(token) for token in answer.split()], text


# --- Chat templates ----------------------------------------------------------------------------------------------

TEMPLATES = {
    "llama 3": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' ~ (date_string | default('26 Jul 2024')) ~ '\\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) ~ '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system ~ '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim ~ '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' ~ call.name ~ '", ' }}
        {{- '"parameters": ' ~ call.arguments | tojson ~ '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{% if messages[0].role == 'system' %}{% set told = messages[0].content ~ '\n\n' %}
{% set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}
{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}
{{ '[INST] ' + (told if loop.first else '') + m.content + ' [/INST]' }}{% elif m.content is defined %}
{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}""",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == "user" and message.content is string %}
        {%- set ns.seen = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is defined %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- else %}
        {{- '<|im_start|>' + message.role }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' ~ call.function.name ~ call.function.arguments | tojson ~ '\\n</tool_call>' }}
    {%- endfor %}
    {%- if message.reasoning_content %}
        {{- '\\n<think>' ~ message.reasoning_content ~ '</think>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "gemma": """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + (message['content'] | default('') | trim) + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "phi": """{% for message in messages %}
{{ '<|' ~ message.role ~ '|>' ~ '\n' }}{% generation %}{{ message.content }}<|end|>{% endgeneration %}

  {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
}
TOOLS = [
    {"type": "function", "function": {"name": "größe", "description": "a < b & 'c'", "parameters": {"type": "object"}}}
]
CALL = {"function": {"name": "größe", "arguments": {"of": "Zürich <&>", "n": [1, 2.5, None, True]}}}
CHATS = {
    "one turn": [{"role": "user", "content": "  Hi <b>&</b> \n"}],
    "system": [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "日本語 👍🏽"}],
    "several turns": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>x</think>\n\nb ", "reasoning": "hm"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"},
    ],
    "tools": [
        {"role": "user", "content": "how big?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"m2": 87.88}', "name": "größe"}, {"role": "assistant", "content": "87.88 km²"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def speakers() -> tuple[Any, Any]:
    vocabulary, merges = trained(splitting(None))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(models.BPE(vocabulary, merges)), **named
    )
    return theirs, lambda template: Tokenizer(theirs.backend_tokenizer, named=named, templates={"default": template})


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_a_chat_is_rendered_as_transformers_renders_it(speakers, style, chat):
    theirs, ours = speakers
    for tools in (None, TOOLS):
        for how in ({}, {"add_generation_prompt": False}, {"enable_thinking": False, "date_string": "1 Jan"}):
            how = {"add_generation_prompt": True, **how}
            wanted = theirs.apply_chat_template(
                CHATS[chat], tools=tools, chat_template=TEMPLATES[style], tokenize=False, **how
            )
            assert ours(TEMPLATES[style]).render_chat(CHATS[chat], tools=tools, **how) == wanted


@needs_smollm2
@pytest.mark.smollm2
@pytest.mark.parametrize("chat", ["one turn", "system", "several turns"])
def test_smollm2_chats_are_rendered_and_encoded_as_transformers_does(smollm2_exact, smollm2, chat):
    ours, theirs = smollm2
    for more in (True, False):
        text = ours.render_chat(CHATS[chat], add_generation_prompt=more)
        assert text == theirs.apply_chat_template(CHATS[chat], add_generation_prompt=more, tokenize=False)
        ids = smollm2_exact[1].encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False) == ids
        assert ids.count(1) == len(CHATS[chat]) + more + (chat != "system"), "one mark a turn, no second BOS"
