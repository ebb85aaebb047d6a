"""Sampling refuses nonsense on construction, and says which field and what would be right."""

import pytest

from jaxinfer import Sampling
from jaxinfer.errors import InvalidRequest


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
