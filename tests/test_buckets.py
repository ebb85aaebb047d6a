"""Ladders cover every step, in at most sixteen buckets; a bucket holds what can run padded to it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.compiler import Bucket, default_ladder, powers


@given(max_rows=st.integers(1, 4096), max_context=st.integers(2, 2**17), data=st.data())
def test_every_step_fits_a_bucket_of_at_most_sixteen(max_rows, max_context, data):
    ladder = default_ladder(max_rows, max_context)
    assert len(ladder.buckets) == len(set(ladder.buckets)) <= 16
    rows = data.draw(st.integers(1, max_rows))
    decode = ladder.fit(rows, rows)
    assert decode.longest == 1 and decode.rows == decode.tokens >= rows and decode in ladder.buckets
    if ladder.prompt[-1] > 1:
        tokens = data.draw(st.integers(2, ladder.prompt[-1]))
        prompt = ladder.fit(tokens, 1)
        assert prompt.rows == 1 and prompt.longest == prompt.tokens >= tokens and prompt in ladder.buckets


def test_a_decode_step_is_padded_only_to_decode_steps():
    assert Bucket(1, 8, 8).holds(Bucket(1, 3, 3))
    assert not Bucket(512, 1, 512).holds(Bucket(1, 1, 1))
    assert not Bucket(1, 8, 8).holds(Bucket(32, 1, 32))
    assert not Bucket(32, 1, 32).holds(Bucket(64, 1, 64))


BUCKETS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8)).map(lambda sizes: Bucket(*sizes))


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


@given(max_rows=st.integers(1, 4096), max_context=st.integers(2, 2**17), data=st.data())
def test_a_step_runs_in_the_smallest_bucket_that_holds_it(max_rows, max_context, data):
    ladder = default_ladder(max_rows, max_context)
    rows, tokens = data.draw(st.integers(1, max_rows)), data.draw(st.integers(2, ladder.prompt[-1]))
    for step in (Bucket(1, rows, rows), Bucket(tokens, 1, tokens)):
        assert ladder.fit(step.tokens, step.rows) == min(b for b in ladder.buckets if b.holds(step))
