"""Named models with versions: flips and swaps under load lose nothing and mix nothing, and one model's trouble is its
own."""

import asyncio
import gc
import logging
import threading
import time
import weakref
from contextlib import suppress

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.errors import Closed, InvalidOption, ModelNotFound, OutOfMemory, Rejected, StepFailed
from tests.running import eventually
from tests.test_coming import held
from tests.test_endpoint import Held

pytestmark = pytest.mark.usefixtures("in_haste")

X = np.zeros(4, np.float32)


def constant(number, **options):
    """A model that answers with its number, twice."""
    params = {"a": np.float32(number), "b": np.float32(number)}
    call = lambda params, x: {"a": x + params["a"], "b": x + params["b"]}
    return lambda: ji.endpoint(call, params, example=X, **{"max_batch": 4, **options})


def numbers(result):
    return set(np.concatenate(list(result.values())).tolist())


@pytest.fixture
def registry():
    registry = ji.Registry()
    yield registry
    registry.close()


def test_a_version_is_loaded_flipped_to_and_the_old_one_closed(registry):
    assert registry.load("m", constant(1)) == 1
    handle, old = registry["m"], registry["m"].version.model
    assert numbers(handle(X)) == {1.0} and registry.versions("m") == [1]
    assert registry.load("m", constant(2)) == 2
    assert numbers(handle(X)) == {2.0} == numbers(handle.submit(X).result(10)) and registry.versions("m") == [2]
    with pytest.raises(Closed):
        old(X)
    reply = handle.submit(X)
    reply.result(10)
    assert reply.version == 2 == handle.version.number
    assert asyncio.run(handle.asubmit(X))["a"].tolist() == [2.0] * 4


def test_the_first_version_of_a_name_serves_with_one_program_and_the_next_gets_its_label_with_all(registry):
    first, second = constant(1)(), constant(2)()
    with held(first.functions, lambda key: key.rows != 4) as (go, _):
        registry.load("m", lambda: first)
        assert numbers(registry["m"](X)) == {1.0} and (first.coming.ready, first.coming.total) == (1, 3)
        go.set()
        assert eventually(lambda: first.coming.ready == 3)
    with held(second.functions, lambda key: key.rows == 1) as (go, begun):
        loader = threading.Thread(target=registry.load, args=("m", lambda: second))
        loader.start()
        assert eventually(lambda: begun) and registry.versions("m") == [1]
        assert numbers(registry["m"](X)) == {1.0}
        go.set()
        loader.join(20)
    assert registry.labels("m") == {"stable": 2} and second.coming is None
    assert len(second.ledger) == 3 and all(entry.seconds for entry in second.ledger)


def test_where_memory_is_counted_a_model_is_compiled_whole():
    registry = ji.Registry("1GiB")
    registry.load("m", constant(1))
    ledger = registry["m"].ledger
    assert registry["m"].coming is None and len(ledger) == 3 and all(entry.seconds for entry in ledger)
    registry.close()


def test_labels_hold_versions_side_by_side(registry):
    registry.load("m", constant(1))
    registry.load("m", constant(2), label="canary")
    assert registry.labels("m") == {"stable": 1, "canary": 2} and registry.versions("m") == [1, 2]
    assert numbers(registry["m"](X)) == {1.0} and numbers(registry.at("m", "canary")(X)) == {2.0}
    registry.flip("m", 2)
    assert registry.labels("m") == {"stable": 2, "canary": 2} and registry.versions("m") == [2]
    assert registry.roll_back("m") == 1 and numbers(registry["m"](X)) == {1.0}
    assert registry.labels("m") == {"stable": 1, "canary": 2}
    registry.unload("m", 2)
    assert registry.labels("m") == {"stable": 1}
    with pytest.raises(ModelNotFound, match="no version with the label 'canary'"):
        registry.at("m", "canary")
    with pytest.raises(ModelNotFound, match="no version 7; loaded are"):
        registry.flip("m", 7)
    registry.unload("m")
    with pytest.raises(ModelNotFound, match="there is no model 'm'"):
        registry["m"]


def test_a_version_that_was_closed_is_made_again_to_roll_back(registry):
    registry.load("m", constant(1))
    with pytest.raises(ModelNotFound, match="no earlier stable version"):
        registry.roll_back("m")
    registry.load("m", constant(2))
    assert registry.roll_back("m") == 1 and numbers(registry["m"](X)) == {1.0} and registry.versions("m") == [1]


@pytest.mark.parametrize("policy", ["available", "frugal"])
def test_a_load_that_fails_leaves_the_old_version_serving(registry, policy):
    registry.load("m", constant(1))
    for broken in (lambda: 1 / 0, lambda: ji.endpoint(lambda x: x.sum(), example=X)):
        with pytest.raises((ZeroDivisionError, InvalidOption)):
            registry.load("m", broken, policy=policy)
        assert numbers(registry["m"](X)) == {1.0} and registry.versions("m") == [1]
    with pytest.raises(ZeroDivisionError):
        registry.load("new", lambda: 1 / 0)
    assert list(registry) == ["m"]


def test_numbers_are_never_given_twice(registry):
    registry.load("m", constant(1))
    handle, numbers = registry["m"], []
    weights = {"a": np.float32(7), "b": np.float32(7)}
    swappers = [threading.Thread(target=lambda: numbers.extend(handle.swap(weights) for _ in range(20)))
                for _ in range(4)]
    for thread in swappers:
        thread.start()
    for thread in swappers:
        thread.join(20)
    assert sorted(numbers) == list(range(2, 82))
    assert registry.load("m", constant(2)) == 82
    reply = handle.submit(X)
    assert reply.result(10) is not None and reply.version == 82


def test_a_first_load_that_fails_leaves_one_that_waited_for_it(registry):
    go, entered, loaded = threading.Event(), threading.Event(), []

    def fail():
        entered.set()
        go.wait(10)
        raise ZeroDivisionError

    def load(make):
        with suppress(ZeroDivisionError):
            loaded.append(registry.load("m", make))

    threads = [threading.Thread(target=load, args=(make,)) for make in (fail, constant(5))]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    time.sleep(0.1)
    go.set()
    for thread in threads:
        thread.join(20)
    assert loaded == [1] and numbers(registry["m"](X)) == {5.0}


def test_a_frugal_load_frees_the_old_weights_first_and_keeps_every_label(registry):
    registry.load("m", constant(1))
    registry.load("m", constant(2), label="canary")
    registry.flip("m", 2)
    handle, weights, told = registry["m"], weakref.ref(registry["m"].params["a"]), []

    def make():
        gc.collect()
        told.append((weights(), registry.at("m", "canary")))
        with pytest.raises(Rejected, match="is being loaded") as caught:
            handle(X)
        assert caught.value.retry_after > 0
        if len(told) == 2:
            raise ZeroDivisionError
        return constant(3)()

    assert registry.load("m", make, policy="frugal") == 3
    assert told[0][0] is None and registry.labels("m") == {"stable": 3, "canary": 3}
    with pytest.raises(ZeroDivisionError):
        registry.load("m", make, policy="frugal", label="canary")
    assert registry.labels("m") == {"stable": 3, "canary": 3} and numbers(told[0][1](X)) == {3.0}


def test_a_roll_back_is_one_step_and_needs_no_stable_version(registry):
    for number in (1, 2, 3):
        registry.load("m", constant(number))
    assert registry.roll_back("m") == 2
    with pytest.raises(ModelNotFound, match="no earlier stable version"):
        registry.roll_back("m")
    registry.load("m", constant(4), label="canary")
    registry.load("m", constant(5))
    with pytest.raises(ModelNotFound, match="no version 99; loaded are"):
        registry.unload("m", 99)
    registry.unload("m", 5)
    assert registry.roll_back("m") == 2 and numbers(registry["m"](X)) == {2.0}
    assert set(registry._shelves["m"].make) == {2, 4}, "what makes versions that nobody can ask for is kept"


def test_the_policy_follows_from_the_memory_that_is_free(registry):
    registry.load("m", constant(1))
    order = []

    def made(number):
        def make():
            order.append(list(registry.versions("m")))
            return constant(number)()
        return make

    registry.load("m", made(2))
    registry.load("m", made(3), needs="900TiB")
    registry.load("m", made(4), needs="900TiB", policy="available")
    assert order == [[1], [], [3]], "the old version goes first only where both do not fit"
    with pytest.raises(InvalidOption, match="policy is 'brave'"):
        registry.load("m", made(5), policy="brave")


def test_a_version_is_drained_before_it_is_closed(registry):
    held = Held()
    registry.load("m", lambda: held.endpoint(max_batch=1, max_delay=0))
    held.go.clear()
    replies = [registry["m"].submit(np.full(2, i, np.float32)) for i in range(5)]
    loader = threading.Thread(target=registry.load, args=("m", constant(2)))
    loader.start()
    assert eventually(lambda: registry.labels("m") == {"stable": 2})
    assert loader.is_alive() and registry.versions("m") == [1, 2]
    held.go.set()
    assert [reply.result(10).tolist() for reply in replies] == [[i, i] for i in range(5)]
    loader.join(10)
    assert registry.versions("m") == [2]


def test_what_an_iterator_gives_is_asked_again_of_the_next_version(registry):
    registry.load("m", constant(1))
    handle, old = registry["m"], registry["m"].version.model
    ask = old.map

    def flipped_meanwhile(requests):
        registry.load("m", constant(2))
        return ask(requests)

    old.map = flipped_meanwhile
    assert [numbers(result) for result in handle.map(X for _ in range(5))] == [{2.0}] * 5


def test_one_models_overload_and_end_leave_the_others_alone(registry):
    held = Held()
    registry.load("slow", lambda: held.endpoint(max_batch=1, max_waiting=2, max_delay=0))
    registry.load("fast", constant(1))
    held.go.clear()
    replies = [registry["slow"].submit(np.zeros(2, np.float32)) for _ in range(2)]
    with pytest.raises(Rejected):
        replies += [registry["slow"].submit(np.zeros(2, np.float32)) for _ in range(9)]
    start = time.perf_counter()
    assert all(numbers(registry["fast"](X)) == {1.0} for _ in range(50)) and time.perf_counter() - start < 10
    threading.Timer(0.2, held.go.set).start()
    registry["slow"].close()
    assert all(reply.done() for reply in replies) and numbers(registry["fast"](X)) == {1.0}


def raises():
    """A function that fails on the device for one of its requests."""
    def refuse(x):
        if (x == 13).any():
            raise ValueError("unlucky")
        return x

    return ji.endpoint(lambda w, x: jax.pure_callback(refuse, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + w["big"][0],
                       {"big": np.zeros(2**16, np.float32)}, example=X, max_batch=4)


def dies():
    """A model whose thread ends in the middle of its work."""
    model = raises()

    def crash(*args, **kwargs):
        raise SystemExit

    model.warmup()
    model._runner.batcher.take = crash
    return model


@pytest.mark.parametrize("make, error", [(raises, StepFailed), (dies, Closed)])
def test_one_models_crash_leaves_the_results_and_the_memory_of_others_alone(registry, caplog, make, error):
    caplog.set_level(logging.CRITICAL, "jax")  # it logs the error, whose traceback holds what the function was given
    registry.load("good", constant(1))
    arrays = jax.tree.leaves(registry["good"].params)
    nbytes = registry["good"].nbytes
    registry.load("bad", make)
    weights = weakref.ref(registry["bad"].params["big"])
    wrong, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            try:
                assert numbers(registry["good"].submit(X).result(10)) == {1.0}
            except Exception as found:
                wrong.append(found)
                return

    asker = threading.Thread(target=ask)
    asker.start()
    replies = []
    for value in (13, 5, 13):
        with suppress(Closed):  # it may have died by now
            replies.append(registry["bad"].submit(np.full(4, value, np.float32)))
    ended = [reply.exception(10) for reply in replies]
    assert isinstance(ended[0], error) and all(it is None or isinstance(it, error) for it in ended)
    assert make is dies or (ended[1] is None and registry["bad"](X).tolist() == [0] * 4), "it is dead for good"
    stop.set()
    asker.join(20)
    assert not wrong and registry["good"].nbytes == nbytes
    assert all(a is b and not a.is_deleted()
               for a, b in zip(jax.tree.leaves(registry["good"].params), arrays, strict=True))
    registry.unload("bad")
    del replies, ended
    gc.collect()
    assert weights() is None, "what died holds on to its memory"
    registry.load("bad", constant(2))
    assert numbers(registry["bad"](X)) == {2.0} and numbers(registry["good"](X)) == {1.0}


def test_a_version_that_exceeds_its_memory_is_refused_and_leaves_no_array_behind(registry):
    wide = {"w": np.zeros((4, 2**16), np.float32)}
    make = lambda memory: lambda: ji.endpoint(lambda p, x: (x @ p["w"]).sum(1), wide, example=X, memory=memory)
    registry.load("m", constant(1))
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    with pytest.raises(OutOfMemory, match=r"needs .* bytes, for its weights.* memory is 1,048,576"):
        registry.load("m", make("1MiB"))
    gc.collect()
    assert {id(array) for array in jax.live_arrays()} <= before, "weights of a refused version stayed"
    assert numbers(registry["m"](X)) == {1.0} and registry.versions("m") == [1]
    assert registry.load("big", make("1GiB")) == 1 and registry["big"].nbytes < 2**30


@settings(max_examples=3)
@given(changes=st.lists(st.sampled_from(("load", "swap", "roll back", "canary", "flip")), min_size=2, max_size=8))
def test_no_request_is_lost_and_no_result_mixed_whatever_changes_under_load(changes):
    registry = ji.Registry()
    marks = {registry.load("m", constant(1)): 1}  # what each version answers
    handle, wrong, count, stop, seen = registry["m"], [], [0] * 3, threading.Event(), set()

    def ask(i):
        while not stop.is_set():
            try:
                if i:
                    reply = handle.submit(X)
                    found = numbers(reply.result(10))
                    seen.add((reply.version, *found))
                else:
                    found = numbers(handle(X))
                if len(found) != 1:
                    wrong.append(found)
                count[i] += 1
            except Exception as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number, change in enumerate(changes, 2):
            if change == "load":
                marks[registry.load("m", constant(number))] = number
            elif change == "canary":
                marks[registry.load("m", constant(number), label="canary")] = number
            elif change == "swap":
                marks[handle.swap({"a": np.float32(-number), "b": np.float32(-number)})] = -number
            elif change == "flip" and "canary" in registry.labels("m"):
                registry.flip("m", registry.labels("m")["canary"])
            elif change == "roll back":
                with suppress(ModelNotFound):  # there is none before
                    registry.roll_back("m")
        before = list(count)
        assert eventually(lambda: all(now > then for now, then in zip(count, before, strict=True)) or wrong)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
        registry.close()
    assert not wrong and min(count) > 0
    assert seen <= set(marks.items()), "an output names a version that did not make it"
