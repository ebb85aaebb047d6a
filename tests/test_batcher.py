"""The batcher: a batch closes when it is full, when its oldest has waited long enough, when a deadline presses, or when
the device is idle; and nobody is lost, doubled or passed by those behind."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.scheduler.batcher import Ask, Batcher

DELAY, MOST = 1.0, 4


def batcher(cost=lambda shape, n: 0.0, **options) -> Batcher:
    return Batcher(MOST, DELAY, cost, **options)


def ask(number: int, at: float = 0.0, shape="any", **options) -> Ask:
    return Ask(shape, (options.pop("rank", 0.0), number), at, **options)


def numbers(asks: list[Ask]) -> list[int]:
    return [a.order[1] for a in asks]


def test_an_idle_device_takes_what_there_is():
    b = batcher()
    b.submit(ask(0))
    assert numbers(b.take(0.0)) == [] and numbers(b.take(0.0, idle=True)) == [0] and b.take(9.0, idle=True) == []


def test_a_full_batch_goes_at_once_and_the_rest_waits_for_its_own_oldest():
    b = batcher()
    for i in range(MOST + 2):
        b.submit(ask(i, at=i / 10))
    assert numbers(b.take(0.5)) == [0, 1, 2, 3] and numbers(b.take(0.5)) == [] and b.due() == 0.4 + DELAY
    assert numbers(b.take(0.4 + DELAY)) == [4, 5] and b.due() == inf


def test_a_deadline_goes_before_the_timer_by_what_the_batch_costs():
    b = batcher(cost=lambda shape, n: 0.1 * n)
    b.submit(ask(0, deadline=0.6))
    assert b.due() == 0.5
    b.submit(ask(1))
    assert abs(b.due() - 0.4) < 1e-9 and numbers(b.take(0.39)) == [] and numbers(b.take(0.41)) == [0, 1]


def test_a_batch_of_large_requests_is_full_of_few():
    b = batcher(room=lambda shape: 10)
    for i, size in enumerate((4, 4, 4, 11)):
        b.submit(ask(i, size=size))
    assert numbers(b.take(0.0)) == [0, 1] and numbers(b.take(0.0)) == [2] and numbers(b.take(0.0)) == [3]


def test_what_is_cancelled_holds_nobody_up():
    b = batcher()
    old, young = ask(0, at=0.0, deadline=0.2), ask(1, at=0.9)
    b.submit(old)
    b.submit(young)
    assert b.cancel(old) and not b.cancel(old) and b.due() == 0.9 + DELAY
    assert b.take(1.0) == [] and numbers(b.take(1.9)) == [1]


EVENTS = st.lists(st.tuples(st.sampled_from(("submit", "submit", "submit", "take", "idle", "cancel", "all")),
                            st.floats(0, 0.7), st.sampled_from("abc"), st.sampled_from((-1.0, 0.0, 0.0, 1.0)),
                            st.integers(1, 3)), max_size=60)


@given(events=EVENTS)
def test_nobody_is_lost_doubled_mixed_or_passed(events):
    b, now, waiting, taken = Batcher(MOST, DELAY, lambda shape, n: 0.0, lambda shape: 6), 0.0, [], []
    for number, (event, later, shape, rank, size) in enumerate(events):
        now += later
        if event == "submit":
            waiting.append(ask(number, now, shape, rank=rank, size=size))
            b.submit(waiting[-1])
        elif event == "cancel" and waiting:
            assert b.cancel(waiting[0])
            taken.append(waiting.pop(0))
        elif event == "all":
            assert b.take_all() == sorted(waiting, key=lambda a: a.order)
            taken, waiting = taken + waiting, []
        elif event in ("take", "idle"):
            batch = b.take(now, idle=event == "idle")
            assert len({a.shape for a in batch}) <= 1 and len(batch) <= MOST
            assert sum(a.size for a in batch) <= 6
            alike = [a for a in waiting if batch and a.shape == batch[0].shape]
            assert batch == sorted(alike, key=lambda a: a.order)[: len(batch)], "somebody was passed by"
            if not batch:
                assert event == "take" or not waiting
                assert all(now < a.at + DELAY for a in waiting), "the oldest waits on"
            taken, waiting = taken + batch, [a for a in waiting if a not in batch]
        assert sorted(numbers([a for queue in b.queues.values() for a in queue])) == sorted(numbers(waiting))
        assert b.due() == min((a.at + DELAY for a in waiting), default=inf)
    assert len(set(numbers(taken + waiting))) == len(taken + waiting)
