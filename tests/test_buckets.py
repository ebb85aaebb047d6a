"""Ladders cover every step, in at most sixteen buckets; a bucket holds what can run padded to it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.compiler import Bucket, default_ladder, invariant_ladder
from jaxinfer.compiler.buckets import STEPS, decode, mixed, powers, prompt

MAX_ROWS, MAX_CONTEXT = st.integers(1, 4096), st.integers(2, 2**17)


@given(max_rows=MAX_ROWS, max_context=MAX_CONTEXT, chunks=st.sampled_from((0, 1, None)), data=st.data())
def test_every_step_fits_a_bucket_of_at_most_sixteen(max_rows, max_context, chunks, data):
    ladder = default_ladder(max_rows, max_context, chunks)
    assert len(ladder.buckets) == len(set(ladder.buckets)) <= 16
    rows, tokens = data.draw(st.integers(1, max_rows)), data.draw(st.integers(1, ladder.chunk))
    steps = [decode(rows), prompt(tokens), *([mixed(rows, tokens)] if chunks else [])]
    if chunks is None:  # any rows
        tokens = data.draw(st.integers(rows, ladder.budget))
        steps.append(Bucket(min(tokens - rows + 1, ladder.chunk), rows, tokens, data.draw(st.integers(0, rows - 1))))
    for step in steps:
        holding = ladder.holding(step)
        assert holding and holding[0] == min(holding, key=lambda b: (b.tokens, b.rows, b.longest))
        assert all(b in ladder.buckets and b.holds(step) for b in holding)
    assert ladder.holding(decode(rows))[0].tokens < 2 * rows or chunks == 1 or (chunks is None and rows <= 16)
    assert ladder.holding(decode(max_rows))[0].longest == 1, "a full house decodes in a step made for decoding"
    assert any(b.holds(prompt(tokens)) for b in ladder.prompts)


@given(max_rows=MAX_ROWS, max_context=MAX_CONTEXT, data=st.data())
def test_one_bucket_holds_everything_where_nothing_may_depend_on_it(max_rows, max_context, data):
    (bucket,) = invariant_ladder(max_rows, max_context).buckets
    singles = data.draw(st.integers(0, max_rows))
    chunks = data.draw(st.integers(0 if singles else 1, max(max_rows - singles, 0 if singles else 1)))
    tokens = data.draw(st.integers(singles + chunks, bucket.tokens))
    assert bucket.holds(Bucket(max(1, tokens - singles), singles + chunks, tokens, singles))


def test_what_a_bucket_holds():
    assert decode(8).holds(decode(3)) and not decode(8).holds(decode(9))
    assert not decode(8).holds(prompt(1)), "a prompt's chunk is no decode row"
    assert prompt(32).holds(prompt(7)) and not prompt(32).holds(prompt(64))
    assert prompt(32).holds(decode(1)) and not prompt(32).holds(decode(2))
    assert mixed(4, 32).holds(mixed(2, 20)) and not mixed(4, 32).holds(mixed(5, 20))
    assert not decode(8, STEPS).holds(decode(8)) and not decode(8).holds(decode(8, STEPS))


BUCKETS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(0, 4)).map(
    lambda sizes: Bucket(*sizes[:3], min(sizes[1], sizes[3])))


@given(one=BUCKETS, other=BUCKETS, third=BUCKETS)
def test_holding_is_an_order_and_nothing_shrinks(one, other, third):
    assert one.holds(one)
    assert not (one.holds(other) and other.holds(third)) or one.holds(third)
    assert not (one.holds(other) and other.holds(one)) or one == other
    if one.holds(other):
        assert one.longest >= other.longest and one.rows >= other.rows and one.tokens >= other.tokens


@given(most=st.integers(1, 5000), least=st.integers(1, 64), factor=st.integers(2, 4))
def test_no_rung_is_further_than_a_factor_from_the_one_before(most, least, factor):
    rungs = powers(most, least=min(least, most), factor=factor)
    assert rungs[0] == min(least, most) and rungs[-1] == most
    assert all(a < b <= factor * a for a, b in pairwise(rungs))
