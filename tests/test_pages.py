"""Pages are free or held, never both; a window's pages are exactly those that a token to come can still see."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxinfer.scheduler import PageGroup, Pool

SIZE = 5


class AnyUseOfAPool(RuleBasedStateMachine):
    """Taking, sharing and releasing in any order, beside a plain list with one entry per holder."""

    def __init__(self):
        super().__init__()
        self.pool, self.held = Pool(SIZE), []

    @precondition(lambda self: self.pool.free)
    @rule()
    def take(self):
        page = self.pool.take()
        assert page in range(SIZE) and page not in self.held
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data):
        page = data.draw(st.sampled_from(self.held))
        self.pool.share(page)
        self.held.append(page)

    @rule(data=st.data())
    def release(self, data):
        gone = [page for page in self.held if data.draw(st.booleans())]
        for page in gone:
            self.held.remove(page)
        self.pool.release([None, *gone])

    @precondition(lambda self: len(set(self.held)) < SIZE)
    @rule(data=st.data())
    def a_free_page_is_neither_shared_nor_released(self, data):
        page = data.draw(st.sampled_from(sorted(set(range(SIZE)) - set(self.held))))
        with pytest.raises(AssertionError, match="cannot be shared"):
            self.pool.share(page)
        with pytest.raises(AssertionError, match="released twice"):
            self.pool.release([page])

    @invariant()
    def every_page_is_free_or_held(self):
        assert self.pool.holders == [self.held.count(page) for page in range(SIZE)]
        assert self.pool.free == SIZE - len(set(self.held))


TestAnyUseOfAPool = AnyUseOfAPool.TestCase
TestAnyUseOfAPool.settings = settings(stateful_step_count=30)


@given(page_size=st.integers(1, 5), window=st.one_of(st.none(), st.integers(1, 12)), read=st.integers(0, 40),
       count=st.integers(1, 20))
def test_a_sequence_needs_the_pages_that_the_tokens_it_reads_can_see(page_size, window, read, count):
    group, end = PageGroup("kv", page_size, 0, window), read + count
    reach = window or end
    seen = {q // page_size for p in range(read, end) for q in range(max(0, p - reach + 1), p + 1)}
    assert group.first(read) == min(seen)
    assert group.need(read, end) == len(seen)
