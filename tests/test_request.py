"""Sampling refuses nonsense on construction, and says which field and what would be right; a Sequence counts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import Sampling
from jaxinfer.errors import InvalidRequest
from jaxinfer.request import Output, Request, Score, Sequence, Timings

whole = lambda least, most=math.inf: lambda v: type(v) is int and least <= v <= most
number = lambda least, most: lambda v: type(v) in (int, float) and least <= v <= most
maybe = lambda right: lambda v: v is None or right(v)
SENSE = {
    "max_tokens": whole(0),
    "temperature": number(0, 1e6),
    "top_k": whole(0, 2**31 - 1),
    "top_p": number(math.nextafter(0, 1), 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(1e-6, 1e6),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "n": whole(1, 1024),
    "seed": maybe(whole(0, 2**32 - 1)),
    "logprobs": maybe(whole(0, 20)),
    "prompt_logprobs": maybe(whole(0, 20)),
}
REQUEST_SENSE = {
    "priority": whole(-100, 100),
    "queue_timeout": maybe(number(math.nextafter(0, 1), math.nextafter(math.inf, 0))),
    "timeout": maybe(number(math.nextafter(0, 1), math.nextafter(math.inf, 0))),
    "reuse": lambda v: type(v) is bool,
}
ANYTHING = st.one_of(st.integers(), st.floats(), st.integers(-2, 2), st.floats(-1, 2), st.none(), st.booleans(),
                     st.text(max_size=2), st.complex_numbers(), st.sampled_from((2**31 - 1, 2**31, 2**32 - 1, 2**32)))


@pytest.mark.parametrize("field", SENSE)
@given(value=ANYTHING)
def test_a_number_is_taken_if_it_makes_sense_and_refused_by_name_if_not(field, value):
    if SENSE[field](value):
        assert getattr(Sampling(**{field: value}), field) == value
    else:
        with pytest.raises(InvalidRequest) as caught:
            Sampling(**{field: value})
        assert str(caught.value).startswith(f"{field} is {value!r}; it must be")


@pytest.mark.parametrize("field", REQUEST_SENSE)
@given(value=ANYTHING)
def test_a_request_is_checked_like_its_sampling(field, value):
    if REQUEST_SENSE[field](value):
        assert getattr(Request("x", **{field: value}), field) == value
    else:
        with pytest.raises(InvalidRequest) as caught:
            Request("x", **{field: value})
        assert str(caught.value).startswith(f"{field} is {value!r}; it must be")


@pytest.mark.parametrize(("field", "value", "right"), [
    *(("max_tokens", v, "an integer >= 0") for v in (-1, 1.5, True, None, "9")),
    *(("min_tokens", v, "an integer >= 0") for v in (-1, 1.5, None)),
    *(("temperature", v, ">= 0") for v in (-0.1, float("nan"), float("inf"), "1", None)),
    *(("top_k", v, "an integer >= 0") for v in (-1, 2.0, 2**31)),
    *(("top_p", v, "in (0, 1]") for v in (0, -1, 1.01, float("nan"))),
    *(("min_p", v, "in [0, 1]") for v in (-0.1, 1.1)),
    *(("seed", v, "in [0, 2**32) or None") for v in (-1, 2**32, 1.0, "x")),
    *(("stop", v, "non-empty strings") for v in ([""], [3], 5)),
    *(("stop_tokens", v, "token ids") for v in (["a"], [1.0], 7, [-1], [True], "12")),
    *(("allowed_tokens", v, "token ids") for v in (["a"], [-1], 7, {3: 4})),
    *(("logit_bias", v, "must map token ids to numbers")
      for v in (None, [3], {3: None}, {3: math.nan}, {3: math.inf}, {-1: 1.0}, {"3": 1.0}, {3: "1"}, {3: True})),
    *(("choice", v, "non-empty strings") for v in ([""], "yes", [3])),
    *(("regex", v, "a string") for v in (3, b"a")),
    *(("ignore_eos", v, "True or False") for v in (1, None, "yes")),
    *(("echo", v, "True or False") for v in (0, None)),
    *(("json_schema", v, "must be a JSON object") for v in (3, "3", [1], "[]")),
])
def test_nonsense_is_refused(field, value, right):
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}") and right in str(caught.value)


def test_what_makes_sense_is_taken():
    made = Sampling(temperature=1, top_p=1, stop="end", stop_tokens=[3])
    assert made.stop == ("end",) and made.stop_tokens == (3,)
    assert made.but(seed=3).seed == 3 and made.but() is made
    with pytest.raises(InvalidRequest, match=r"unknown sampling options \['topk'\]"):
        made.but(topk=3)


@pytest.mark.parametrize(("fields", "message"), [
    ({"allowed_tokens": ()}, "allowed_tokens is empty"),
    ({"choice": ()}, "choice is empty"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; it must be at most max_tokens, 8"),
    ({"regex": "a", "choice": ("a",)}, "regex and choice were given; an answer can follow one of them"),
    ({"json_schema": "{"}, "json_schema is no JSON"),
    ({"json_schema": {"enum": [object()]}}, "json_schema is no JSON"),
    ({"logits": 3}, "logits is a int; it must be a JAX function"),
    ({"logit_bias": dict.fromkeys(range(513), 1.0)}, "logit_bias has 513 tokens; it may have 512"),
])
def test_nonsense_in_combination_is_refused_too(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(("fields", "edits"), [
    ({}, False), ({"temperature": 1.0, "top_k": 3, "seed": 4, "stop": "x", "logprobs": 3, "n": 2}, False),
    ({"repetition_penalty": 1.1}, True), ({"presence_penalty": -1}, True), ({"frequency_penalty": 0.5}, True),
    ({"logit_bias": {3: 0.0}}, True), ({"min_tokens": 1}, True), ({"allowed_tokens": (3,)}, True),
    ({"logits": lambda logits_V, context: logits_V}, True), ({"choice": ("a",)}, True),
    ({"json_schema": {}}, True), ({"regex": ""}, True), ({"grammar": "start: /a/"}, True),
])
def test_a_sampling_knows_whether_something_is_done_to_the_logits(fields, edits):
    assert Sampling(**fields).edits == edits
    assert Sampling(**fields).constrained == bool({"choice", "json_schema", "regex", "grammar"} & set(fields))


def test_options_go_to_the_request_or_to_its_sampling_by_name():
    made = Request("x", Sampling(max_tokens=3)).but(priority=2, timeout=1, top_k=5)
    assert (made.priority, made.timeout, made.sampling) == (2, 1, Sampling(max_tokens=3, top_k=5))
    assert made.but(Sampling(seed=1), reuse=False) == Request("x", Sampling(seed=1), 2, None, 1, False)
    with pytest.raises(InvalidRequest, match=r"sampling is a dict; it must be a jaxinfer\.Sampling"):
        made.but({"top_k": 3})
    with pytest.raises(InvalidRequest, match="sampling is a NoneType"):
        Request("x", None)


def test_a_change_is_checked_like_a_new_one():
    with pytest.raises(InvalidRequest, match="top_p is 2"):
        Sampling().but(top_p=2)


@given(prompt=st.integers(1, 9), drawn=st.integers(0, 9), drawing=st.integers(0, 2), most=st.integers(0, 20),
       data=st.data())
def test_a_sequence_has_to_read_what_is_drawn_or_being_drawn_and_not_yet_read(prompt, drawn, drawing, most, data):
    sequence = Sequence(0, [7] * (prompt + drawn), prompt, Sampling(max_tokens=most))
    assert sequence.most == prompt + most and sequence.unread == prompt + drawn
    sequence.total += drawing
    sequence.read = data.draw(st.integers(0, sequence.total))
    assert sequence.unread == prompt + drawn + drawing - sequence.read


@pytest.mark.parametrize(("sampling", "task", "plain"), [
    (Sampling(temperature=1.0, top_p=0.9, stop="x"), "draw", True), (Sampling(logprobs=0), "draw", False),
    (Sampling(min_tokens=1), "draw", False), (Sampling(), "score", False), (Sampling(), "embed", False),
])
def test_a_plain_sequence_draws_and_nothing_else(sampling, task, plain):
    assert Sequence(0, [7], 1, sampling, task=task).plain == plain


@given(logprobs=st.lists(st.floats(-50, 0), max_size=9))
def test_perplexity_is_that_of_the_mean_token(logprobs):
    score = Score((7,) * (len(logprobs) + 1), tuple(logprobs))
    if logprobs:
        assert score.perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)))
        assert score.total == pytest.approx(sum(logprobs))
    else:
        assert math.isnan(score.perplexity) and score.total == 0


@pytest.mark.parametrize(("tokens", "rate"), [(0, 0.0), (1, 0.0), (2, 0.5), (9, 4.0)])
def test_the_rate_counts_the_tokens_after_the_first(tokens, rate):
    assert Timings(0.5, 1.0, 3.0, tokens).tokens_per_second == rate


def test_an_output_shows_its_text_and_its_rate_in_a_notebook():
    shown = []
    printer = type("Printer", (), {"text": staticmethod(shown.append)})
    Output((1, 2), "hi", (3, 4, 5), "stop", Timings(0.5, 1.0, 3.0, 3))._repr_pretty_(printer, False)
    assert shown == ["'hi'\n[3 tokens, stop, 1.0 tokens/s]"]
