"""Ladders cover every step, in at most sixteen buckets, and the ledger shows them."""

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.compiler import Bucket, Ledger, default_ladder


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


def test_the_ledger_is_a_table_for_terminals_and_notebooks():
    ledger = Ledger()
    entry = ledger["forward[<T>]"]
    entry.hits, entry.tokens, entry.padding, entry.kernels = 2, 3, 1, {"attend": "visits"}
    assert entry.waste == 0.25 and ledger["forward[<T>]"] is entry and len(ledger) == 1
    header, row = str(ledger).splitlines()
    assert "padding" in header and "forward[<T>]" in row and "25%" in row and "attend:visits" in row
    assert "forward[&lt;T&gt;]" in ledger._repr_html_() and "<T>" not in ledger._repr_html_()
