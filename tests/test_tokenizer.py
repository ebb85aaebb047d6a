"""Text in and out: what the tokenizers promise on every machine, with vocabularies trained here."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from jaxinfer.errors import CorruptFile, InvalidRequest, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.gguf import open_gguf
from jaxinfer.frontend.gguf_tokenizer import SPLITS, from_gguf
from jaxinfer.frontend.tokenizer import Tokenizer, from_directory

TEXT = [
    "The quick brown fox, isn't it? We've 1234 reasons; they'll cost $3.50 (or 007).",
    "Съешь ещё этих мягких французских булок. Ελληνικά γράμματα. עברית וגם العربية.",
    "हिन्दी में लिखा ภาษาไทย 日本語と中文的字 한국어 문장",
    "def f(x):\n    return {\n\t'a': x ** 2,\n    }\n\n\n",
    "naïve café résumé e\u0301 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ½ ⅻ    spaces\t\ttabs \n \n",
]
TRICKY = [
    "", " ", "  ", "\n\n", " a", "  a  b", "a   1", "12345 678", "👩‍👩‍👧‍👦👍🏽", "\ufffd", "�<s>x</s> y", "e\u0301é",
    "\u200b\u00a0x", "<|end|> <|end|>a", *TEXT,
]  # fmt: skip


def byte_level(size: int = 420) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<|end|>"], show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend


def sentencepiece(prefix: bool = True) -> Backend:
    words = sorted({word for line in TEXT[:3] for word in line.replace(" ", "▁").split("▁")})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += sorted({char for word in words for char in word} | {"▁", "▁▁", "▁th", "th", "he", "▁the"})
    backend = Backend(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("t", "h"), ("▁", "th"), ("▁", "▁"), ("h", "e")],
                   byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )  # fmt: skip
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def word_piece() -> Backend:
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "it", "##s", ".", "fox", "the"])}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[CLS]"])
    return backend


BACKENDS = {
    "byte level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece without prefix": sentencepiece(prefix=False),
    "metaspace": metaspace(),
    "word piece": word_piece(),
}
TOKENIZERS = {kind: Tokenizer(backend) for kind, backend in BACKENDS.items()}
ROUND_TRIPS = ["byte level", "sentencepiece", "sentencepiece without prefix"]


def save(folder: Path, backend: Backend, **files: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def pieces(tokenizer: Tokenizer, ids: list[int], **how: bool) -> list[str]:
    stream = tokenizer.stream(**how)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("kind", BACKENDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_pieces_of_a_stream_join_to_the_decoded_text(kind, data, skip):
    tokenizer = Tokenizer(BACKENDS[kind])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=24))
    assert "".join(pieces(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", BACKENDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_decoding_is_that_of_the_library_unless_a_run_of_byte_tokens_is_broken(kind, data, skip):
    backend = BACKENDS[kind]
    bytes_apart = [i for i in range(backend.get_vocab_size()) if not (backend.id_to_token(i) or "").startswith("<0x")]
    ids = data.draw(st.lists(st.sampled_from(bytes_apart), max_size=24))
    told = TOKENIZERS[kind].decode(ids, skip_special=skip)  # by one that remembers what others' tokens said
    assert told == backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ROUND_TRIPS)
@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_survives_encoding_and_streaming(kind, text):
    tokenizer = Tokenizer(BACKENDS[kind])
    assert "".join(pieces(tokenizer, tokenizer.encode(text), skip_special=False)) == text


@pytest.mark.parametrize("kind", ROUND_TRIPS)
@pytest.mark.parametrize("text", ["日本語", "👩‍👩‍👧‍👦", "नमस्ते", "a👍🏽b"])
def test_a_stream_shows_whole_characters_as_soon_as_they_are_complete(kind, text):
    tokenizer = Tokenizer(BACKENDS[kind])
    shown = pieces(tokenizer, tokenizer.encode(text))
    assert "\ufffd" not in "".join(shown)
    assert shown[-1] == "", "the last character was complete with the last token"


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_an_incomplete_character_becomes_a_replacement_at_the_end_only(kind):
    tokenizer = Tokenizer(BACKENDS[kind])
    ids = tokenizer.encode("👍🏽👍🏽")[:-1]
    *shown, rest = pieces(tokenizer, ids)
    assert "".join(shown).startswith("👍🏽👍") and set(rest) == {"\ufffd"}
    assert tokenizer.decode(ids) == "".join(shown) + rest


def test_broken_bytes_leave_their_neighbours_alone():
    tokenizer = Tokenizer(BACKENDS["sentencepiece"])
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in (0xE2, 0x82, 0xAC, 0xFF, 0x41)]
    assert tokenizer.decode(ids) == "€\ufffdA"


def test_special_tokens_are_skipped_unless_asked_for():
    tokenizer = Tokenizer(BACKENDS["byte level"])
    ids = tokenizer.encode("<s>fox<tool> it</s>")
    assert tokenizer.decode(ids) == "fox<tool> it"
    assert tokenizer.decode(ids, skip_special=False) == "<s>fox<tool> it</s>"


def test_an_id_beyond_the_vocabulary_says_nothing_and_numpy_ids_are_ids():
    tokenizer = Tokenizer(BACKENDS["sentencepiece"])
    assert tokenizer.decode(np.array([10**6, *tokenizer.encode("the fox")], np.int32)) == "the fox"


@pytest.mark.parametrize("bad", [None, 3, b"bytes", "\ud800"])
def test_what_is_not_text_is_refused(bad):
    with pytest.raises(InvalidRequest, match=r"must be a str|surrogates"):
        Tokenizer(BACKENDS["byte level"]).encode(bad)


def test_a_directory_says_its_special_tokens_in_three_files(tmp_path):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    folder = save(tmp_path, byte_level(), tokenizer_config=config, generation_config={"eos_token_id": [1, 2]},
                  special_tokens_map={"pad_token": "<|end|>", "eos_token": "ignored"})  # fmt: skip
    tokenizer = from_directory(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {1, 2})
    assert tokenizer.named == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|end|>"}
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()


def test_the_post_processor_adds_the_bos_and_a_rendered_chat_gets_no_second(tmp_path):
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = from_directory(save(tmp_path, backend, tokenizer_config=config))
    assert tokenizer.encode("fox")[0] == 0 and tokenizer.encode("fox", add_special=False)[0] != 0
    text = tokenizer.render_chat([{"role": "user", "content": "fox"}])
    assert tokenizer.encode(text, add_special=False) == tokenizer.encode("fox")


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, None), (False, True), (False, False)])
def test_add_bos_token_and_add_eos_token_outrank_the_post_processor(tmp_path, bos, eos):
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos, "add_eos_token": eos}
    tokenizer = from_directory(save(tmp_path, backend, tokenizer_config=config))
    inside = tokenizer.encode("fox", add_special=False)
    assert tokenizer.encode("fox") == [0] * bool(bos) + inside + [1] * bool(eos)


def test_truncation_and_padding_in_the_file_do_not_touch_prompts(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = from_directory(save(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode(TEXT[0]), skip_special=False) == TEXT[0]


def test_tokens_known_to_the_config_alone_are_added_with_their_ids(tmp_path):
    backend = byte_level()
    size = backend.get_vocab_size()
    config = {"added_tokens_decoder": {str(size): {"content": "<new>", "special": True}}, "pad_token": "<pad>"}
    tokenizer = from_directory(save(tmp_path, backend, tokenizer_config=config))
    assert tokenizer.encode("<new><pad>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == ""
    config["added_tokens_decoder"] = {"7": {"content": "<new>"}}
    with pytest.raises(CorruptFile, match=r"tokenizer_config\.json.*'<new>' is token 7"):
        from_directory(save(tmp_path, backend, tokenizer_config=config))


@pytest.mark.parametrize("place", ["config", "list", "jinja", "json", "named jinja"])
def test_a_chat_template_is_found_in_every_usual_place(tmp_path, place):
    config: dict = {}
    save(tmp_path, byte_level())
    if place == "config":
        config["chat_template"] = "here"
    elif place == "list":
        config["chat_template"] = [{"name": "default", "template": "here"}, {"name": "tool_use", "template": "tools"}]
    elif place == "json":
        (tmp_path / "chat_template.json").write_text('{"chat_template": "here"}')
    else:
        config["chat_template"] = "outranked"
        (tmp_path / "chat_template.jinja").write_text("here")
    if place == "named jinja":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = from_directory(tmp_path)
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.chat_template == "here" == tokenizer.render_chat(message)
    with_tools = tokenizer.render_chat(message, tools=[{"type": "function"}])
    assert with_tools == ("tools" if place in ("list", "named jinja") else "here")


def test_without_a_template_a_chat_is_refused(tmp_path):
    with pytest.raises(InvalidRequest, match=r"no chat template.*plain prompt"):
        from_directory(save(tmp_path, byte_level())).render_chat([{"role": "user", "content": "x"}])


def test_a_missing_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(ModelNotFound, match=r"looked for tokenizer\.json"):
        from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ModelNotFound, match=r"convert tokenizer\.model once"):
        from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "Quantum"}}', b"\xff\xfe"])
def test_a_corrupt_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"tokenizer\.json is not a readable tokenizer"):
        from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config", "chat_template"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_corrupt_config_is_named(tmp_path, name, content):
    save(tmp_path, byte_level())
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"{name}\.json"):
        from_directory(tmp_path)


@pytest.mark.parametrize("config", [{"bos_token": 3}, {"chat_template": 3}, {"chat_template": [{"name": "a"}]}])
def test_a_config_of_the_wrong_types_is_refused(tmp_path, config):
    with pytest.raises(CorruptFile, match=str(tmp_path)):
        from_directory(save(tmp_path, byte_level(), tokenizer_config=config))


def test_an_end_of_text_that_is_no_token_id_is_refused(tmp_path):
    with pytest.raises(CorruptFile, match=r"generation_config\.json: eos_token_id is 'x'"):
        from_directory(save(tmp_path, byte_level(), generation_config={"eos_token_id": "x"}))


# --- GGUF --------------------------------------------------------------------------------------------------------


def gguf_of(backend: Backend, **more: object) -> dict[str, object]:
    """The metadata that llama.cpp's converter would write for a byte-level backend."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    types = {token.content: 3 if token.special else 4 for token in backend.get_added_tokens_decoder().values()}
    fields = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [types.get(token, 1) for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]], "bos_token_id": 0, "eos_token_id": 1, **more,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("text", TRICKY)
def test_a_byte_level_tokenizer_rebuilt_from_gguf_gives_the_ids_of_the_original(text):
    assert from_gguf(gguf_of(BACKENDS["byte level"])).encode(text) == BACKENDS["byte level"].encode(text).ids


def cut(name: str, text: str) -> list[str]:
    """Where a named split cuts, with the byte alphabet undone."""
    parts = SPLITS[name].pre_tokenizer().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in parts]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt-2", ["It", "'s", "  ", " 12345", " I", "'", "M", " aBC", "-", "d", "\n\n", " x"]),
        ("smollm", ["It", "'s", "   ", "1", "2", "3", "4", "5", " I", "'", "M", " aBC", "-", "d", "\n\n", " x"]),
        ("llama-bpe", ["It", "'s", "  ", " ", "123", "45", " I", "'M", " aBC", "-d", "\n\n", " x"]),
        ("qwen2", ["It", "'s", "  ", " ", "1", "2", "3", "4", "5", " I", "'M", " aBC", "-d", "\n\n", " x"]),
        ("tekken", ["It", "'s", "  ", " ", "1", "2", "3", "4", "5", " I", "'M", " a", "BC", "-d", "\n\n", " x"]),
        ("gpt-4o", ["It's", "  ", " ", "123", "45", " I'M", " a", "BC", "-d", "\n\n", " x"]),
    ],
)
def test_each_split_cuts_words_digits_and_blanks_in_its_own_way(name, parts):
    text = "It's   12345 I'M aBC-d\n\n x"
    assert "".join(parts) == text
    assert cut(name, text) == parts


@pytest.mark.parametrize("name", SPLITS)
@given(text=st.text(max_size=60))
@settings(max_examples=25, deadline=None)
def test_no_split_loses_text(name, text):
    assert "".join(part for part in cut(name, text)) == text


def test_gguf_bos_and_eos_follow_the_flags_and_the_models_habit():
    inside = from_gguf(gguf_of(BACKENDS["byte level"])).encode("fox", add_special=False)
    wanted = {
        ("gpt-2", None, None): inside, ("gpt-2", True, False): [0, *inside], ("gpt-2", True, True): [0, *inside, 1],
        ("llama-bpe", None, None): [0, *inside], ("llama-bpe", False, None): inside,
    }  # fmt: skip
    for (pre, bos, eos), ids in wanted.items():
        metadata = gguf_of(BACKENDS["byte level"], pre=pre, add_bos_token=bos, add_eos_token=eos)
        assert from_gguf(metadata).encode("fox") == ids, (pre, bos, eos)


def test_gguf_knows_the_tokens_that_end_a_turn():
    backend = byte_level()
    backend.add_special_tokens(["<|eot_id|>", "<eom>"])
    eom = backend.token_to_id("<eom>")
    tokenizer = from_gguf(gguf_of(backend, eom_token_id=eom))
    assert tokenizer.eos_ids == {1, backend.token_to_id("<|end|>"), backend.token_to_id("<|eot_id|>"), eom}
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (0, backend.get_vocab_size())


def test_gguf_carries_named_chat_templates():
    metadata = gguf_of(BACKENDS["byte level"]) | {
        "tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"],
    }  # fmt: skip
    assert from_gguf(metadata).chat_templates == {"default": "plain", "tool_use": "tools"}


def test_an_unknown_pre_tokenizer_or_model_is_named_with_the_known_ones():
    with pytest.raises(UnsupportedModel, match=r"'klingon'.*'llama-bpe'"):
        from_gguf(gguf_of(BACKENDS["byte level"], pre="klingon"))
    with pytest.raises(UnsupportedModel, match=r"'bert'.*'gpt2', 'llama', 't5'"):
        from_gguf(gguf_of(BACKENDS["byte level"], model="bert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tokens must be an array"),
        ({"merges": None}, "merges must be an array"),
        ({"merges": ["a"]}, r"merges\[0\] is not two tokens"),
        ({"merges": ["a absent-token"]}, "merges does not fit the tokens"),
        ({"token_type": [1]}, "token_type has 1 entries for"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        ({"model": "llama", "scores": None}, "scores must be an array"),
        ({"model": "llama", "scores": [0.0]}, "scores has 1 entries for"),
        ({"model": "t5", "scores": [0.0]}, "scores has 1 entries for"),
    ],
)
def test_gguf_metadata_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(CorruptFile, match=message):
        from_gguf(gguf_of(BACKENDS["byte level"], **change))


def test_a_phi_3_mark_swallows_the_blanks_after_it():
    tokens = ["<unk>", "<s>", "<|user|>", "▁", "h", "i", "\n"]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1], "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    assert from_gguf(metadata).encode("<|user|>\nhi") == [1, 2, 3, 6, 4, 5]
    assert from_gguf(metadata | {"general.architecture": "phi3"}).encode("<|user|>\nhi") == [1, 2, 3, 4, 5]


# --- the real model ----------------------------------------------------------------------------------------------


@pytest.mark.smollm2
def test_smollm2_reads_and_writes_every_script():
    path = Path(os.environ.get("JAXINFER_SMOLLM2", "/work/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not path.is_file():
        pytest.skip("no SmolLM2 here")
    tokenizer = from_gguf(open_gguf(path)[0])
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, {2}, 49152)
    for text in TRICKY:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text == "".join(pieces(tokenizer, ids, skip_special=False))
