"""Constrained decoding: whatever the logits say, the text is what was asked for, and any such text may come."""

import ast
import gc
import json
import re
import subprocess
import sys
import threading
import weakref

import jsonschema
import llguidance
import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxinfer.errors import InvalidRequest
from jaxinfer.frontend.constraint import Grammar, Matcher, compile_grammar
from jaxinfer.frontend.gguf import open_gguf
from jaxinfer.frontend.gguf_tokenizer import from_gguf
from jaxinfer.frontend.tokenizer import Tokenizer
from tests import tiny

MANY = settings(max_examples=max(100, settings.default.max_examples))
# Pieces of regexes that Python and Rust read alike; random tokens seldom leave the wide ones.
NARROW = ["a", "b", "[a-c]", r"\.", "é", " ", "/", r"\\", '"', "[0-9]", "th", r"\{"]
WIDE = [*NARROW, "[^a-y]", "."]
SEEDS = st.integers(0, 2**32 - 1)
PADDING = 13  # logits beyond the last token, and a vocabulary that fills no round number of words


def from_json() -> Tokenizer:
    """Byte-level, as tests.tiny has it; the model ends with </s>, and with a token that looks like text."""
    return Tokenizer(tiny.tokenizer(), named={"bos_token": "<s>", "eos_token": "</s>"}, eos_ids=[262])


def rebuilt(model: str, tokens: list[str], byte: int, **more: object) -> Tokenizer:
    """A tokenizer from GGUF metadata: three control tokens, the `tokens`, and the model's two ends."""
    names = ["<unk>", "<s>", "</s>", *tokens, "<|im_end|>"]
    types = [2, 3, 3, *(byte if t.startswith("<0x") else 1 for t in tokens), 3]
    values = {"model": model, "tokens": names, "token_type": types, "bos_token_id": 1, "eos_token_id": 2,
              "unknown_token_id": 0, **more}
    return from_gguf({"general.architecture": "llama"} | {f"tokenizer.ggml.{k}": v for k, v in values.items()})


def byte_level() -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return rebuilt("gpt2", [*alphabet, "Ġt", "he", "Ġthe"], 1, merges=["Ġ t", "h e", "Ġt he"], pre="gpt-2")


def sentencepiece() -> Tokenizer:
    """With byte fallback: most of ASCII is there twice, as a character and as a byte."""
    letters = [chr(i) for i in range(33, 127)] + ["▁", "é", "▁t", "he", "▁the", '":', '▁"', "▁▁"]
    tokens = [*(f"<0x{i:02X}>" for i in range(256)), *letters]
    return rebuilt("llama", tokens, 6, scores=[0.0] * (len(tokens) + 4))


TOKENIZERS = {"tokenizer.json": from_json(), "GGUF byte level": byte_level(), "GGUF SentencePiece": sentencepiece()}
TINY = TOKENIZERS["tokenizer.json"]


def width(tokenizer: Tokenizer) -> int:
    return tokenizer.backend.get_vocab_size() + PADDING


def compiled(tokenizer: Tokenizer = TINY, **constraint) -> Grammar:
    return compile_grammar(tokenizer, eos=tokenizer.eos_ids, vocab=width(tokenizer), **constraint)


def ids(matcher: Matcher, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens that the mask allows, in order; it is written over junk."""
    out_W = np.full(-(-width(tokenizer) // 32), 0xDEADBEEF, np.uint32)
    matcher.mask(out_W)
    return np.flatnonzero(np.unpackbits(out_W.view(np.uint8), bitorder="little"))


def allowed(matcher: Matcher, tokenizer: Tokenizer = TINY) -> set[int]:
    return set(ids(matcher, tokenizer).tolist())


def drawn(grammar: Grammar, seed: int, tokenizer: Tokenizer = TINY, most: int = 20_000) -> str:
    """A text of random tokens, each the largest of random logits under the mask; those of the ends are a bit larger."""
    matcher, rng, text = grammar.matcher(), np.random.default_rng(seed), tokenizer.stream()
    shown, ends = "", sorted(tokenizer.eos_ids)
    for _ in range(most):
        may = ids(matcher, tokenizer)
        end = np.isin(may, ends)
        assert may[-1] < tokenizer.backend.get_vocab_size(), "a token that does not exist was allowed"
        assert end.sum() in (0, len(ends)), "some ends were allowed and others not"
        token = int(may[np.argmax(rng.normal(size=len(may)) + 2 * end)])
        if token in ends:
            assert matcher.accept(token)
            return shown + text.finish()
        shown += text.push(token)
        if matcher.accept(token):
            assert allowed(matcher, tokenizer) == tokenizer.eos_ids
            return shown + text.finish()
    raise AssertionError(f"no end after {most} tokens: {shown[-80:]!r}")


def follow(grammar: Grammar, text: str, tokenizer: Tokenizer = TINY) -> Matcher:
    """The matcher after `text`, each of whose tokens it must allow. (Its first blank is the tokenizer's own.)"""
    tokens = tokenizer.encode("\n" + text, add_special=False)
    tokens = tokens[next(i for i in range(len(tokens) + 1) if tokenizer.decode(tokens[:i]).endswith("\n")) :]
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    if (special | tokenizer.eos_ids) & set(tokens):
        assume(False)  # "<s>" spelt out
    matcher = grammar.matcher()
    for token in tokens:
        assert token in allowed(matcher, tokenizer), (text, tokens, token)
        matcher.accept(token)
    return matcher


# --- JSON ---

NAMES = st.sampled_from(["a", "name", "ключ", 'q"}', "x y", "\\", "\n"])
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.text(max_size=4))


@st.composite
def intervals(draw, least: int, most: int, *names: str) -> dict:
    """Some of two bounds, of which the lower is the first."""
    bounds = sorted([draw(st.integers(least, most)), draw(st.integers(least, most))])
    return {name: bound for name, bound in zip(names, bounds, strict=True) if draw(st.booleans())}


@st.composite
def objects(draw, inner: st.SearchStrategy) -> dict:
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def arrays(draw, inner: st.SearchStrategy) -> dict:
    least = draw(st.integers(0, 2))
    return {"type": "array", "items": draw(inner), "minItems": least, "maxItems": least + draw(st.integers(0, 3))}


@st.composite
def strings(draw) -> dict:
    least = draw(st.integers(0, 3))
    return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(0, 6))}


def json_schemas() -> st.SearchStrategy[dict]:
    """Schemas whose documents come to an end by themselves, whatever is drawn."""
    leaves = st.one_of(
        st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["null", "boolean"]}]),
        st.builds(lambda bounds: {"type": "integer", **bounds}, intervals(-1000, 1000, "minimum", "maximum")),
        st.builds(
            lambda bounds: {"type": "number", **bounds},
            intervals(-50, 50, "minimum", "maximum").filter(lambda bounds: len(set(bounds.values())) == len(bounds)),
        ),
        strings(),
        st.builds(lambda values: {"enum": values}, st.lists(PLAIN, min_size=1, max_size=4, unique_by=json.dumps)),
        st.builds(lambda value: {"const": value}, PLAIN),
        st.builds(lambda regex: {"type": "string", "pattern": f"^{regex}$"}, regexes(NARROW)),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            objects(inner),
            arrays(inner),
            st.builds(lambda these: {"anyOf": these}, st.lists(inner, min_size=1, max_size=3)),
        ),
        max_leaves=8,
    )


def documents(schema: dict) -> st.SearchStrategy:
    """Documents of a schema out of `json_schemas`, with their properties in its order."""
    match schema:
        case {"enum": values}:
            return st.sampled_from(values)
        case {"const": value}:
            return st.just(value)
        case {"anyOf": these}:
            return st.one_of(*map(documents, these))
        case {"type": "object", "properties": properties, "required": required}:
            optional = st.sets(st.sampled_from(sorted(properties))) if properties else st.just(set())
            all_of_them = st.fixed_dictionaries({name: documents(inner) for name, inner in properties.items()})
            kept = lambda whole, some: {k: whole[k] for k in properties if k in some or k in required}
            return st.builds(kept, all_of_them, optional)
        case {"type": "array", "items": items, "minItems": least, "maxItems": most}:
            return st.lists(documents(items), min_size=least, max_size=most)
        case {"type": "integer" | "number"}:
            return st.integers(schema.get("minimum", -5000), schema.get("maximum", 5000))
        case {"pattern": pattern}:
            return st.from_regex(re.compile(pattern.removeprefix("^").removesuffix("$"), re.ASCII), fullmatch=True)
        case {"type": "string", "minLength": least, "maxLength": most}:
            there = st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")  # llguidance wants DEL escaped
            return st.text(there, min_size=least, max_size=most)
        case {"type": kinds}:
            values = {"null": [None], "boolean": [True, False]}
            return st.sampled_from([value for kind in np.atleast_1d(kinds) for value in values[kind]])
    raise AssertionError(schema)


# --- regexes ---


@st.composite
def repeated(draw, inner: st.SearchStrategy[str]) -> str:
    least = draw(st.integers(0, 2))
    how = draw(st.sampled_from(["?", "*", "+", f"{{{least},{least + draw(st.integers(0, 2))}}}"]))
    return f"(?:{draw(inner)}){how}"


def regexes(atoms: list[str]) -> st.SearchStrategy[str]:
    return st.recursive(
        st.sampled_from(atoms),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map("".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda these: f"(?:{'|'.join(these)})"),
            repeated(inner),
        ),
        max_leaves=6,
    )


# --- what is drawn ---


@pytest.mark.parametrize("kind", TOKENIZERS)
@MANY
@given(schema=json_schemas(), seed=SEEDS)
def test_random_tokens_under_the_mask_are_a_document_of_the_schema(kind, schema, seed):
    text = drawn(compiled(TOKENIZERS[kind], json_schema=schema), seed, TOKENIZERS[kind])
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


@MANY
@given(regex=regexes(NARROW), seed=SEEDS)
def test_random_tokens_under_the_mask_match_the_whole_regex(regex, seed):
    assert re.fullmatch(regex, drawn(compiled(regex=regex), seed))


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), seed=SEEDS)
def test_random_tokens_under_the_mask_are_one_of_the_choices(texts, seed):
    assert drawn(compiled(choice=texts), seed) in texts


SUMS = {
    "Lark": 'start: term (("+" | "-") term){0,3}\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,3}/',
    "GBNF": 'root ::= term ([+-] term)*\nterm ::= [1-9] [0-9]? | "(" root ")"',
}


@pytest.mark.parametrize("syntax", SUMS)
@given(seed=SEEDS)
def test_random_tokens_under_the_mask_follow_the_grammar(syntax, seed):
    grammar, rng, text = compiled(grammar=SUMS[syntax]), np.random.default_rng(seed), ""
    matcher = grammar.matcher()
    for step in range(400):
        may = allowed(matcher)
        if may >= TINY.eos_ids:
            ast.parse(text, mode="eval")
            if step > 20 or may == TINY.eos_ids:
                break
        closing = {t for t in may if TINY.decode([t]) == ")"} if step > 20 else set()
        token = int(rng.choice(sorted(closing or may - TINY.eos_ids)))
        text += TINY.decode([token])
        assert set(text) <= set("0123456789+-()")
        matcher.accept(token)
    else:
        raise AssertionError(text)


# --- what can be drawn ---


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data(), schema=json_schemas())
def test_every_document_of_the_schema_may_be_written_as_json_dumps_does(kind, data, schema):
    document = data.draw(documents(schema))
    tokenizer = TOKENIZERS[kind]
    text = json.dumps(document, ensure_ascii=False)
    matcher = follow(compiled(tokenizer, json_schema=schema), text, tokenizer)
    assert allowed(matcher, tokenizer) >= tokenizer.eos_ids


@given(data=st.data(), regex=regexes(WIDE))
def test_every_match_of_the_regex_may_be_written(data, regex):
    text = data.draw(st.from_regex(regex, fullmatch=True))
    assert allowed(follow(compiled(regex=regex), text)) >= TINY.eos_ids


def test_a_document_has_one_spacing_unless_the_schema_says_another():
    schema = {"type": "array", "items": {"type": "integer"}}
    comma, blank = TINY.encode(","), TINY.encode(" ")
    assert allowed(follow(compiled(json_schema=schema), "[1,")) == set(blank)
    assert not allowed(follow(compiled(json_schema=schema), "[")) & {*blank, *comma}
    compact = {"x-guidance": {"whitespace_flexible": False}, **schema}
    assert not allowed(follow(compiled(json_schema=compact), "[1,")) & set(blank)


def test_a_schema_is_an_object_or_its_text():
    schema = {"type": "object", "properties": {"b": {"const": 1}, "a": {"const": 2}}, "required": ["a", "b"]}
    for given_as in (schema, json.dumps(schema)):
        follow(compiled(json_schema=given_as), '{"b": 1, "a": 2}')


# --- where a text may end ---


def test_a_text_is_complete_when_only_the_end_may_follow():
    matcher = compiled(regex="ab?").matcher()
    a, b = TINY.encode("a")[0], TINY.encode("b")[0]
    assert allowed(matcher) == {a}
    assert not matcher.accept(a)
    assert allowed(matcher) == {b} | TINY.eos_ids
    assert matcher.accept(b)
    assert allowed(matcher) == TINY.eos_ids


@pytest.mark.parametrize("end", sorted(TINY.eos_ids))
def test_each_of_the_models_ends_ends_the_text(end):
    matcher = compiled(regex="a*").matcher()
    assert matcher.accept(end)


def test_an_end_token_that_looks_like_text_is_never_text():
    like_text = TINY.decode([262])
    assert 262 in TINY.eos_ids and like_text == "w2 "
    matcher = follow(compiled(regex="x.*"), "x")
    assert 263 in allowed(matcher)  # its neighbour, "w3 ", is text
    inside = follow(compiled(json_schema={"type": "string"}), '"')
    assert 263 in allowed(inside) and 262 not in allowed(inside)


def test_special_tokens_are_no_text_but_a_grammar_may_name_them():
    user = TINY.backend.token_to_id("<|user|>")
    assert user not in allowed(compiled(regex=r"(?s:.*)").matcher())
    assert allowed(compiled(grammar='start: <|user|> "a"').matcher()) == {user}


def test_a_character_may_be_written_byte_by_byte():
    tokenizer = TOKENIZERS["GGUF SentencePiece"]
    matcher = compiled(tokenizer, choice=["日", "é"]).matcher()
    names = lambda: {tokenizer.backend.id_to_token(token) for token in allowed(matcher, tokenizer)}
    assert names() == {"<0xE6>", "<0xC3>", "é"}
    matcher.accept(tokenizer.backend.token_to_id("<0xE6>"))
    assert names() == {"<0x97>"}


def test_text_that_must_come_may_be_cut_into_tokens_in_any_way():
    tokenizer = TOKENIZERS["GGUF SentencePiece"]
    spelt = {tokenizer.decode([t]) for t in allowed(compiled(tokenizer, choice=["there"]).matcher(), tokenizer)}
    assert spelt == {"t"}
    inside = compiled(tokenizer, choice=["a the"]).matcher()
    inside.accept(tokenizer.backend.token_to_id("a"))
    names = {tokenizer.backend.id_to_token(t) for t in allowed(inside, tokenizer)}
    assert names == {"▁", "▁t", "▁the", "<0x20>"}
    forced = compiled(grammar='%llguidance {"no_forcing": false}\nstart: "w3 w4 "').matcher()
    assert allowed(forced) == {TINY.encode("w")[0], 263}


# --- many at once ---


def test_matchers_of_one_grammar_are_independent():
    grammar = compiled(json_schema={"type": "array", "items": {"enum": ["left", "right"]}, "maxItems": 2})
    ahead, behind = grammar.matcher(), grammar.matcher()
    before = allowed(behind)
    for token in TINY.encode('["left", "r'):
        ahead.accept(token)
        assert allowed(behind) == before
    assert {TINY.decode([token]) for token in allowed(ahead)} == {"i"}
    with pytest.raises(InvalidRequest):
        behind.accept(TINY.encode("x")[0])
    assert {TINY.decode([token]) for token in allowed(ahead)} == {"i"}
    assert allowed(grammar.matcher()) == before


def test_a_tokenizer_is_prepared_once_by_any_number_of_threads_and_forgotten_with_it(monkeypatch):
    built, real = [], llguidance.LLTokenizer

    def counted(*given, **more):
        built.append(1)
        return real(*given, **more)

    monkeypatch.setattr(llguidance, "LLTokenizer", counted)
    tokenizer, texts = from_json(), []

    def work(tokenizer, seed):
        texts.append(drawn(compiled(tokenizer, regex="(ab){3}|(cd)+e"), seed, tokenizer))

    threads = [threading.Thread(target=work, args=(tokenizer, seed)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len(texts) == 8 and all(re.fullmatch("(ab){3}|(cd)+e", text) for text in texts)
    assert compiled(tokenizer, regex="x") is compiled(tokenizer, regex="x")
    there = weakref.ref(tokenizer)
    del tokenizer, threads, thread
    gc.collect()
    assert there() is None


# --- what is refused ---

SURROGATE = "\ud800"
BAD = [
    ("json_schema", {"type": "strin"}, "Invalid type: strin"),
    ("json_schema", {"not": {"type": "string"}}, "Unimplemented keys.*not"),
    ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ("json_schema", {"type": "string", "format": "klingon"}, "Unknown format: klingon"),
    ("json_schema", {"type": "string", "pattern": "(?=a)"}, "look-ahead"),
    ("json_schema", {"enum": []}, "Unsatisfiable"),
    ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "minimum .3. is greater"),
    ("json_schema", {"$ref": "http://example.com/x"}, "example.com"),
    ("json_schema", {"x-guidance": {"spaces": 3}}, "unknown field `spaces`"),
    ("json_schema", {"const": float("nan")}, "not JSON compliant"),
    ("json_schema", {"const": {1, 2}}, "set is not JSON serializable"),
    ("json_schema", {"const": SURROGATE}, "surrogate"),
    ("json_schema", "{type: string}", "Expecting property name"),
    ("json_schema", "[" * 100_000, "recursion"),
    ("json_schema", "true", "a schema is a JSON object"),
    ("json_schema", 3, "a schema is a JSON object, not 3"),
    ("regex", "(", "unclosed group"),
    ("regex", "[", "unclosed character class"),
    ("regex", "*a", "repetition operator missing expression"),
    ("regex", "a(?=b)", "look-ahead"),
    ("regex", r"(a)\1", "backreferences are not supported"),
    ("regex", "a\\", "backslash"),
    ("regex", "(" * 10_000 + ")" * 10_000, "nest"),
    ("regex", SURROGATE, "surrogates not allowed"),
    ("regex", b"a", "a regex is a string"),
    ("grammar", "start: foo", 'unknown name: "foo"'),
    ("grammar", 'start: "a', "1"),
    ("grammar", "start: " + "(" * 10_000, "too deeply nested"),
    ("grammar", "start: <nope>", "unknown special token"),
    ("grammar", "start: start", "this model has no text for it .*no token that may come"),
    ("grammar", "root ::= nope", "nope"),
    ("grammar", "", "GBNF"),
    ("grammar", f'start: "{SURROGATE}"', "surrogates not allowed"),
    ("grammar", 3, "a grammar is a string, not 3"),
    ("choice", [], "0 texts"),
    ("choice", "yes", "sequence of strings, not 'yes'"),
    ("choice", ["yes", 3], "sequence of strings"),
    ("choice", [SURROGATE], "surrogates not allowed"),
]


@pytest.mark.parametrize(("field", "value", "reason"), BAD)
def test_what_cannot_be_followed_is_refused_with_the_field_and_the_reason(field, value, reason):
    with pytest.raises(InvalidRequest, match=rf"^{field} cannot be followed: (?s:.*){reason}") as refused:
        compiled(**{field: value})
    assert "%llguidance" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_token_that_the_mask_forbids_fails_the_matcher_for_good():
    matcher = compiled(choice=["yes"]).matcher()
    with pytest.raises(InvalidRequest, match="doesn't satisfy the grammar"):
        matcher.accept(TINY.encode("n")[0])
    with pytest.raises(InvalidRequest, match="doesn't satisfy the grammar"):
        allowed(matcher)
    with pytest.raises(InvalidRequest, match="doesn't satisfy the grammar"):
        matcher.accept(TINY.encode("y")[0])


def test_a_model_that_cannot_end_or_be_spelt_is_refused():
    with pytest.raises(InvalidRequest, match=r"regex cannot be followed: .* no end-of-text token"):
        compile_grammar(TINY, regex="a", eos=frozenset([1000]), vocab=400)
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(InvalidRequest, match=r"choice cannot be followed: .* one by one"):
        compile_grammar(Tokenizer(backend), choice=["a"], eos=frozenset([1]), vocab=2)


def test_without_llguidance_the_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for constraint in ({"json_schema": {}}, {"regex": "a"}, {"grammar": 'start: "a"'}, {"choice": ["a"]}):
        with pytest.raises(InvalidRequest, match=r"pip install 'jaxinfer\[constrained\]'"):
            compiled(from_json(), **constraint)


def test_importing_the_module_needs_neither_llguidance_nor_jax():
    code = "import sys, jaxinfer.frontend.constraint; print({'llguidance', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# --- a real vocabulary ---


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Tokenizer:
    return from_gguf(open_gguf(smollm2_path)[0])


@pytest.mark.smollm2
def test_smollm2_may_begin_a_choice_only_as_the_choices_begin(smollm2):
    matcher = compiled(smollm2, choice=["yes", "no"]).matcher()
    assert sorted(smollm2.decode([token]) for token in allowed(matcher, smollm2)) == ["n", "no", "y", "ye", "yes"]
    assert matcher.accept(smollm2.encode("yes")[0])
    assert allowed(matcher, smollm2) == smollm2.eos_ids


@pytest.mark.smollm2
def test_a_text_that_no_token_continues_fails_where_that_shows(smollm2):
    matcher = compiled(smollm2, json_schema={"const": "\U00040000"}).matcher()  # no token begins its UTF-8
    with pytest.raises(InvalidRequest, match="there is no token that may come next"):
        while allowed(matcher, smollm2):
            matcher.accept(min(allowed(matcher, smollm2)))


@pytest.mark.smollm2
@given(schema=json_schemas(), seed=SEEDS)
def test_smollm2_writes_documents_of_the_schema(smollm2, schema, seed):
    text = json.dumps(schema, ensure_ascii=False)
    assume(smollm2.decode(smollm2.encode(text)) == text)  # its vocabulary lacks some bytes
    jsonschema.validate(json.loads(drawn(compiled(smollm2, json_schema=schema), seed, smollm2)), schema)
