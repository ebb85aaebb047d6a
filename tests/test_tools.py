"""Calls of tools: what the grammar allows, and that an answer is taken apart the same however it comes in pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import InvalidRequest
from jaxinfer.frontend.constraint import compile_grammar
from jaxinfer.frontend.tokenizer import Tokenizer
from jaxinfer.serving.openai.tools import HERMES, LLAMA, Reader, grammar_of, style_of
from tests import tiny
from tests.serving import CITY

TOOLS = [{"name": "weather", "parameters": CITY}, {"name": "clock", "parameters": None}]
ROME, CLOCK = ("weather", '{"city": "Rome"}'), ("clock", '{"now": [1, "}"]}')


def written(style, *calls):
    each = [f"{style.begin}{name}{style.middle}{arguments}{style.end}" for name, arguments in calls]
    return (style.between or "").join(each)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny.tokenizer(), named={"eos_token": "</s>"})


def allows(tokenizer, lark, text):
    """Whether a text may be written to its end."""
    matcher = compile_grammar(tokenizer, grammar=lark, eos=frozenset({1}), vocab=320).matcher()
    try:
        for token in tokenizer.encode(text):
            matcher.accept(token)
        matcher.accept(1)
    except InvalidRequest:
        return False
    return True


@pytest.mark.parametrize("style", [HERMES, LLAMA], ids=["hermes", "llama"])
def test_a_call_must_be_of_a_tool_and_follow_its_schema(style, tokenizer):
    for must in (True, False):
        lark = grammar_of(style, TOOLS, must=must, many=True)
        assert allows(tokenizer, lark, written(style, ROME)) and allows(tokenizer, lark, written(style, CLOCK))
        assert not allows(tokenizer, lark, written(style, ("weather", '{"city": "Bonn"}')))
        assert not allows(tokenizer, lark, written(style, ("wether", '{"city": "Rome"}')))
        assert not allows(tokenizer, lark, written(style, ROME)[:-1])
        assert allows(tokenizer, lark, "No call.") != must
        assert allows(tokenizer, lark, "a < b, {c}") != must


def test_text_may_come_before_a_call_and_calls_after_it_where_the_style_has_that(tokenizer):
    lark = grammar_of(HERMES, TOOLS, must=False, many=True)
    assert allows(tokenizer, lark, "Let me see.\n" + written(HERMES, ROME, CLOCK))
    assert not allows(tokenizer, lark, written(HERMES, ROME) + "\nThere.")
    once = grammar_of(HERMES, TOOLS, must=False, many=False)
    assert allows(tokenizer, once, written(HERMES, ROME)) and not allows(tokenizer, once, written(HERMES, ROME, CLOCK))
    llama = grammar_of(LLAMA, TOOLS, must=False, many=True)
    assert allows(tokenizer, llama, "See " + written(LLAMA, ("wether", "1")))  # no call: it does not come first


def told(style, pieces):
    """Text, and calls put together from what each piece told."""
    reader, text, calls = Reader(style), "", []
    for piece in pieces:
        for change in reader.push(piece):
            text += change.text
            if change.call:
                calls.append([change.call.name, ""])
            if change.arguments:
                calls[change.index][1] += change.arguments
    text += "".join(change.text for change in reader.finish())
    assert [[call.name, call.arguments] for call in reader.calls] == calls
    return text, [tuple(call) for call in calls]


@given(st.data())
def test_an_answer_is_the_same_in_any_pieces(data):
    style = data.draw(st.sampled_from([HERMES, LLAMA]))
    before = data.draw(st.sampled_from(["", "Let me see. ", "a <tool_ b {"])) if style.anywhere else ""
    calls = [ROME, CLOCK][: data.draw(st.integers(0, 2 if style.between else 1))]
    whole = before + written(style, *calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert told(style, pieces) == (before, calls)


@pytest.mark.parametrize("style", [HERMES, LLAMA], ids=["hermes", "llama"])
def test_a_call_that_is_cut_off_shows_what_there_was(style):
    assert told(style, [style.begin + "weather" + style.middle + '{"city": "Ro']) == ("", [("weather", '{"city": "Ro')])
    assert told(style, [style.begin[:4]]) == (style.begin[:4], [])
    assert told(style, [style.begin + "weath"]) == ("", [])


def test_the_style_is_read_off_the_template():
    assert style_of("... <tool_call> ...") is HERMES
    assert style_of('{% if tools %} "parameters": dictionary of argument name and its value') is LLAMA
    with pytest.raises(InvalidRequest, match="tools"):
        style_of("<tool_call><function=x>")
    assert json.loads(ROME[1]) == {"city": "Rome"}
