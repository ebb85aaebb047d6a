"""Sampling refuses nonsense on construction, and says which field and what would be right; a Sequence counts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import Sampling
from jaxinfer.errors import InvalidRequest
from jaxinfer.request import Output, Sequence, Timings

SENSE = {
    "max_tokens": lambda v: type(v) is int and v >= 1,
    "temperature": lambda v: type(v) in (int, float) and 0 <= v < math.inf,
    "top_k": lambda v: type(v) is int and 0 <= v < 2**31,
    "top_p": lambda v: type(v) in (int, float) and 0 < v <= 1,
    "min_p": lambda v: type(v) in (int, float) and 0 <= v <= 1,
    "seed": lambda v: v is None or (type(v) is int and 0 <= v < 2**32),
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


@pytest.mark.parametrize(("field", "value", "right"), [
    *(("max_tokens", v, "an integer >= 1") for v in (0, -1, 1.5, True, None, "9")),
    *(("temperature", v, ">= 0") for v in (-0.1, float("nan"), float("inf"), "1", None)),
    *(("top_k", v, "an integer >= 0") for v in (-1, 2.0, 2**31)),
    *(("top_p", v, "in (0, 1]") for v in (0, -1, 1.01, float("nan"))),
    *(("min_p", v, "in [0, 1]") for v in (-0.1, 1.1)),
    *(("seed", v, "in [0, 2**32) or None") for v in (-1, 2**32, 1.0, "x")),
    *(("stop", v, "non-empty strings") for v in ([""], [3], 5)),
    *(("stop_tokens", v, "token ids") for v in (["a"], [1.0], 7)),
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


def test_a_change_is_checked_like_a_new_one():
    with pytest.raises(InvalidRequest, match="top_p is 2"):
        Sampling().but(top_p=2)


@given(prompt=st.integers(1, 9), drawn=st.integers(0, 9), drawing=st.integers(0, 2), more=st.integers(0, 3),
       data=st.data())
def test_a_sequence_wants_steps_until_all_its_tokens_are_drawn_or_being_drawn(prompt, drawn, drawing, more, data):
    sequence = Sequence(0, [7] * (prompt + drawn), prompt, Sampling(max_tokens=max(1, drawn + drawing + more)))
    sequence.drawing, sequence.read = drawing, data.draw(st.integers(0, prompt + drawn + drawing))
    assert sequence.drawn == drawn + drawing
    assert sequence.unread == prompt + drawn + drawing - sequence.read
    assert sequence.wants == (sequence.drawn < sequence.sampling.max_tokens)
    sequence.ended = "stop"
    assert not sequence.wants


@pytest.mark.parametrize(("tokens", "rate"), [(0, 0.0), (1, 0.0), (2, 0.5), (9, 4.0)])
def test_the_rate_counts_the_tokens_after_the_first(tokens, rate):
    assert Timings(0.5, 1.0, 3.0, tokens).tokens_per_second == rate


def test_an_output_shows_its_text_and_its_rate_in_a_notebook():
    shown = []
    printer = type("Printer", (), {"text": staticmethod(shown.append)})
    Output((1, 2), "hi", (3, 4, 5), "stop", Timings(0.5, 1.0, 3.0, 3))._repr_pretty_(printer, False)
    assert shown == ["'hi'\n[3 tokens, stop, 1.0 tokens/s]"]
