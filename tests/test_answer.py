"""One handle for every way to wait: callback, future, iterator, async iterator and await see the same."""

import asyncio
import gc
import sys
import threading
from concurrent.futures import CancelledError, wait
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.request import Output, Piece, Timings
from jaxinfer.runtime.answer import Answer
from tests import tiny
from tests.running import at_rest, blocked, endings, eventually

pytestmark = pytest.mark.usefixtures("in_haste")

ASK = dict(max_tokens=12, ignore_eos=True, logprobs=1)
LONG = dict(max_tokens=240, ignore_eos=True)


@pytest.fixture(scope="module")
def lm(tiny_path):
    with ji.load(tiny_path, **tiny.ONE_BUCKET) as lm:
        yield lm


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "lm" in request.fixturenames:
        lm = request.getfixturevalue("lm")
        assert eventually(lambda: at_rest(lm)), "something runs on"


def same(*outputs):
    """All equal but for their times."""
    bare = [replace(o, timings=None, samples=tuple(replace(s, timings=None) for s in o.samples)) for o in outputs]
    return all(o == bare[0] for o in bare)


@pytest.mark.parametrize("n", [1, 3])
def test_every_way_to_wait_sees_the_same(lm, n):
    ask, called, done = {**ASK, "n": n, "temperature": 1.0, "seed": 3, "reuse": False}, [], []
    answer = lm.submit("Once", **ask, on_piece=called.append)
    answer.add_done_callback(lambda a: done.append(a.result()))
    whole = answer.result(30)
    assert answer.exception() is None and answer.done() and not answer.cancelled() and done == [whole]
    pieces = list(lm.submit("Once", **ask))
    streamed = list(lm.stream("Once", **ask))

    async def main():
        awaited = await lm.submit("Once", **ask)
        taken = [piece async for piece in lm.submit("Once", **ask)]
        astreamed = [piece async for piece in lm.astream("Once", **ask)]
        return awaited, taken, astreamed, await lm.agenerate("Once", **ask)

    awaited, taken, astreamed, generated = asyncio.run(main())
    assert same(whole, awaited, generated, *(p[-1].output for p in (called, pieces, streamed, taken, astreamed)))
    for seen in (called, pieces, streamed, taken, astreamed):
        assert [p.output is None for p in seen] == [True] * (len(seen) - 1) + [False]
        samples = whole.samples or (whole,)
        assert len(samples) == n and {p.index for p in seen} == set(range(n))
        for i, sample in enumerate(samples):
            own = [p for p in seen if p.index == i]
            assert "".join(p.text for p in own) == sample.text
            assert sum((p.tokens for p in own), ()) == sample.tokens
            assert sum((p.logprobs for p in own), ()) == sample.logprobs
            assert [p.finish_reason for p in own] == [None] * (len(own) - 1) + [sample.finish_reason]


def test_samples_are_all_answers_and_the_first_is_the_answer(lm):
    output = lm("Once", n=3, temperature=1.0, seed=5, **ASK)
    assert len({s.tokens for s in output.samples}) == 3
    assert replace(output, samples=()) == output.samples[0]


def test_a_result_can_be_waited_for_and_the_wait_has_an_end(lm):
    with blocked(lm):
        answer = lm.submit("x", max_tokens=1)
        for ask in (answer.result, answer.exception):
            with pytest.raises(TimeoutError):
                ask(0.02)
        assert not answer.done() and wait([answer], 0.02).not_done == {answer}
    assert wait([answer], 30).done == {answer} and len(answer.result(0).tokens) == 1


def test_pieces_are_taken_once_and_by_threads_too(lm):
    answer, seen = lm.submit("Once", **ASK), []
    take = lambda: seen.extend(answer)
    thread = threading.Thread(target=take)
    thread.start()
    thread.join(30)
    assert seen[-1].output is answer.result(0) and sum((p.tokens for p in seen), ()) == answer.result().tokens


def test_a_cancelled_answer_says_so_to_everybody(lm):
    with endings() as ended, blocked(lm):
        answer, seen = lm.submit("x", **LONG), []
        answer.add_done_callback(seen.append)
        assert answer.cancel() and answer.cancelled() and seen == [answer]
        for ask in (answer.result, answer.exception, lambda: next(iter(answer))):
            with pytest.raises(CancelledError):
                ask()

        async def main():
            await answer

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(main())
        assert eventually(lambda: [e.reason for e in ended] == ["cancelled"])


def test_cancelling_a_task_that_awaits_cancels_the_request(lm):
    async def main():
        answer = lm.submit("x", **LONG)
        task = asyncio.ensure_future(answer)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return answer

    with endings() as ended, blocked(lm):
        assert asyncio.run(main()).cancelled()
        assert eventually(lambda: [e.reason for e in ended] == ["cancelled"])


def test_a_timeout_of_asyncio_cancels_the_request(lm):
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.03):
                await lm.agenerate("x", **LONG)

    with endings() as ended, blocked(lm):
        asyncio.run(main())
        assert eventually(lambda: [e.reason for e in ended] == ["cancelled"])


@pytest.mark.parametrize("leave", ["break", "raise", "cancel"])
def test_leaving_an_async_for_cancels_the_request(lm, leave):
    async def main():
        answer = lm.submit("x", **LONG)

        async def take():
            async for _ in answer:
                if leave == "break":
                    break
                if leave == "raise":
                    raise LookupError("enough")
                task.cancel()

        task = asyncio.ensure_future(take())
        await asyncio.wait([task])
        task.cancelled() or task.exception()
        gc.collect()
        return answer

    assert asyncio.run(main()).cancelled()


def test_dropping_or_closing_a_stream_cancels_the_request(lm):
    with endings() as ended:
        stream = lm.stream("x", **LONG)
        next(stream)
        stream.close()
        stream.close()
        with pytest.raises(CancelledError):
            list(stream)
        del stream
        stream = lm.stream("x", **LONG)
        next(stream)
        del stream
        gc.collect()
        assert eventually(lambda: [e.reason for e in ended] == ["cancelled"] * 2)


def test_an_event_loop_that_is_closed_under_a_stream_harms_nobody_else(lm):
    loop = asyncio.new_event_loop()
    answer = lm.submit("x", **LONG)
    pieces = aiter(answer)
    loop.run_until_complete(anext(pieces))
    loop.close()
    assert eventually(answer.done) and answer.cancelled()
    assert len(lm("x", max_tokens=3, ignore_eos=True).tokens) == 3


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), SystemExit(3)])
@pytest.mark.parametrize("when", ["first", "last"])
def test_a_callback_that_raises_fails_its_own_request_only(lm, error, when):
    def broken(piece):
        if when == "first" or piece.output:
            raise error

    expected = lm("Once", **ASK)
    with endings() as ended:
        neighbour, answer = lm.submit("Once", **ASK), lm.submit("x", on_piece=broken, **ASK)
        assert answer.exception(30) is error
        with pytest.raises(type(error)):
            list(answer)
        assert same(neighbour.result(30), replace(expected, reused=neighbour.result().reused))
        assert sorted(e.reason for e in ended) == ["failed", "length"]


def test_a_callback_may_cancel_its_own_request(lm):
    seen = []

    def enough(piece):
        seen.append(piece)
        answer.cancel()

    with endings() as ended:
        with blocked(lm):
            answer = lm.submit("x", on_piece=enough, **LONG)
        assert eventually(lambda: [e.reason for e in ended] == ["cancelled"] * 2) and answer.cancelled()
    assert len(seen) == 1, "it went on"


def test_a_callback_is_called_on_the_delivery_thread_in_order(lm):
    seen = []
    output = lm.submit("Once", on_piece=lambda p: seen.append((threading.current_thread().name, p)), **ASK).result(30)
    assert {name for name, _ in seen} == {"jaxinfer-delivery"}
    assert sum((p.tokens for _, p in seen), ()) == output.tokens


PIECE = Piece("a", (1,))
OUTPUT = Output((1,), "a", (1,), "length", Timings(0, 0, 0, 1))
ACTS = st.lists(st.sampled_from(("piece", "cancel", "last", "fail")), max_size=8)


@given(acts=ACTS)
def test_an_answer_ends_once_however_its_two_sides_race(acts):
    abandoned, answer, pieces, end = [], Answer(lambda: abandoned.append(1)), 0, None
    for act in acts:  # as the delivery thread does it: nothing after the end
        if act == "cancel":
            assert answer.cancel() == (end in (None, "cancel"))
            end = end or "cancel"
        elif end in (None, "cancel") and act == "piece":
            answer.deliver(PIECE)
            pieces += end is None
        elif end in (None, "cancel"):
            assert answer.settle() == (end is None)
            if end is None:
                end = act
                assert not answer.cancel() and answer.settle()
                answer.deliver(replace(PIECE, output=OUTPUT)) if act == "last" else answer.fail(KeyError("x"))
    assert answer.done() == (end is not None) and answer.cancelled() == (end == "cancel") == bool(abandoned)
    if end:
        seen = []
        try:
            seen.extend(answer)
        except (CancelledError, KeyError) as error:
            assert isinstance(error, KeyError if end == "fail" else CancelledError)
        assert bool(seen and seen[-1].output) == (end == "last")
        if end == "last":
            assert len(seen) == pieces + 1 and answer.result(0) is OUTPUT


@pytest.mark.parametrize("fresh", [True, False])
def test_who_waits_for_several_answers_hears_of_a_cancelled_one(lm, fresh):
    with blocked(lm):
        answers = [lm.submit("x", **LONG), lm.submit("y", **LONG)]
        if fresh:
            answers[0].cancel()
        found = threading.Thread(target=wait, args=(answers,), kwargs={"return_when": "FIRST_COMPLETED"}, daemon=True)
        found.start()
        answers[0].cancel()
        found.join(30)
        assert not found.is_alive()
        answers[1].cancel()


def test_a_done_callback_that_exits_harms_nobody_else(lm):
    def leave(_):
        sys.exit(3)

    with blocked(lm):
        answers = [lm.submit("Once", **ASK) for _ in range(4)]
        answers[0].add_done_callback(leave)
    assert same(*(replace(answer.result(30), reused=0) for answer in answers))


def test_a_stream_keeps_its_model(tiny_path):
    stream = ji.load(tiny_path, **tiny.ONE_BUCKET).stream("x", **ASK)
    gc.collect()
    assert len(list(stream)) > 0
