"""A registry of more models than fit: whoever is asked is awake, and answers as if all were; budgets are kept."""

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.compiler import Key
from jaxinfer.errors import Closed, CorruptFile, Expired, InvalidOption, OutOfMemory, Rejected, RequestFailed
from jaxinfer.runtime.stash import Stash
from tests import tiny
from tests.running import blocked, eventually, seen_events
from tests.test_text_encoder import path as bert  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("in_haste")

LONE = dict(max_context=128, max_rows=2, batch_invariant=True)  # one bucket: little to compile
HOW = dict(max_tokens=8, ignore_eos=True)
PROMPT = "The sky is blue"
NAMES = "a", "b", "c"
TIGHT = 1.5  # models that fit
X = np.arange(4, dtype=np.float32)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three models of one shape and different weights."""
    return {name: tiny.write(tmp_path_factory.mktemp(name), tiny.PLAIN, seed) for seed, name in enumerate(NAMES)}


def made(path, **options):
    """A model that compiles nothing that no request of ours runs on."""
    lm = ji.load(path, **LONE | options)
    lm.warmup = lambda **_: lm._engine.executables.compile_all(Key("copy")) or lm(PROMPT, **HOW)
    return lm


@pytest.fixture(scope="module")
def alone(paths):
    """What each answers where all fit, and the bytes that one takes."""
    answers = {}
    for name in NAMES:
        with made(paths[name]) as lm:
            answers[name], nbytes = lm(PROMPT, **HOW).tokens, lm.nbytes
    assert len(set(answers.values())) == 3
    return answers, nbytes


@contextmanager
def registry_of(paths, nbytes, names=NAMES, fit=TIGHT, host_memory=None, **options):
    registry = ji.Registry(int(fit * nbytes), host_memory)
    try:
        for name in names:
            registry.load(name, lambda name=name: made(paths[name], **options), needs=nbytes)
        yield registry
    finally:
        registry.close()


@pytest.fixture(scope="module")
def shared(paths, alone):
    with registry_of(paths, alone[1]) as registry:
        yield registry


@pytest.fixture
def registry(shared):
    """Of three models of which one fits; those that sleep are in their checkpoints."""
    yield shared
    assert eventually(lambda: shared._dormitory._thread is None), "something is still moved"
    assert list(shared) == list(NAMES)


@contextmanager
def watched(registry):
    """The most bytes that its models took of the device, by its books."""
    books, most, stop = registry._dormitory._books, [0], threading.Event()

    def watch():
        while not stop.wait(0.0005):
            most[0] = max(most[0], books.used("cpu"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def tiers(registry):
    return {place.name[0]: place.tier for place in registry.tiers}


# --- asleep and awake ---


@pytest.mark.parametrize("fit, host_memory, asleep", [(2.5, None, "disk"), (1.5, "1GiB", "host")])
def test_threads_that_ask_more_models_than_fit_are_answered_as_if_all_did(paths, alone, fit, host_memory, asleep):
    answers, nbytes = alone
    keep = registry_of(paths, nbytes, fit=fit, host_memory=host_memory)
    with keep as registry, seen_events(events.Compiling) as made:
        assert sorted(tiers(registry).values()) == sorted(["device"] * int(fit) + [asleep] * (3 - int(fit)))
        wrong, count = [], dict.fromkeys(NAMES, 0)

        def ask(name, n):
            for _ in range(n):
                tokens = registry[name](PROMPT, **HOW).tokens
                count[name] += 1
                if tokens != answers[name]:
                    wrong.append((name, tokens))

        threads = [threading.Thread(target=ask, args=(name, 6)) for name in NAMES for _ in range(2)]
        with watched(registry) as most:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        assert count == dict.fromkeys(NAMES, 12) and not wrong
        assert nbytes <= most[0] <= registry._dormitory.budget
        assert not made, "a model that woke compiled something"
        table = registry.tiers
        assert sum(place.hits + place.misses for place in table) == 39 and table.hit_rate < 1
        registry["a"](PROMPT, **HOW)
        registry["a"](PROMPT, **HOW)
        assert registry.tiers.hit_rate > table.hit_rate
        assert all(place.wakes and place.rate > 0 for place in table if place.misses)
        assert "L1 device" in repr(table) and "<table>" in table._repr_html_() and "hit rate" in str(table)


def test_the_least_recently_used_sleeps_and_what_it_held_is_given_back(registry):
    handles = {name: registry[name] for name in NAMES}
    handles["a"](PROMPT, **HOW)
    assert tiers(registry) == {"a": "device", "b": "disk", "c": "disk"}
    engine = handles["a"].version.model._engine
    held = [weakref.ref(x) for x in jax.tree.leaves((engine.weights, engine.state, engine.last_S))]
    handles["b"](PROMPT, **HOW)
    gc.collect()
    assert tiers(registry) == {"a": "disk", "b": "device", "c": "disk"}
    assert not [x for x in held if x() is not None], "a model that sleeps holds on to the device's memory"
    assert registry.tiers["a/1"].bytes == handles["a"].nbytes and handles["a"].stats.waiting == 0


def test_a_request_that_runs_pins_its_model_and_the_next_waits_for_it(registry, alone):
    answers, _ = alone
    a, b = registry["a"], registry["b"]
    a(PROMPT, **HOW)
    with blocked(a.version.model):
        waiting = b.submit(PROMPT, **HOW)
        late = a.submit(PROMPT, **HOW)  # for whom b is put to sleep again
        time.sleep(0.1)
        assert tiers(registry)["a"] == "device" and not waiting.done() and not late.done()
        assert b.stats.waiting == 1
    assert waiting.result(30).tokens == answers["b"] and late.result(30).tokens == answers["a"]


def test_two_models_that_are_never_idle_take_turns(registry, alone):
    answers, _ = alone
    stop, count, wrong = threading.Event(), dict.fromkeys("ab", 0), []

    def ask(name):
        waiting = []
        while not stop.is_set():
            waiting.append(registry[name].submit(PROMPT, **HOW))
            if len(waiting) > 3:
                count[name] += 1
                if waiting.pop(0).result(30).tokens != answers[name]:
                    wrong.append(name)
        for answer in waiting:
            answer.result(30)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    assert eventually(lambda: min(count.values()) > 20, 60)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not wrong and registry.tiers["a/1"].wakes > 1 and registry.tiers["b/1"].wakes > 1


def test_by_hand(registry, alone):
    answers, _ = alone
    registry.wake("a")
    registry.wake("b")
    assert tiers(registry) == {"a": "disk", "b": "device", "c": "disk"}
    registry.sleep("b")
    registry.sleep("b")
    assert set(tiers(registry).values()) == {"disk"}
    assert registry["b"](PROMPT, **HOW).tokens == answers["b"] and registry.tiers["b/1"].misses > 0


def test_without_a_budget_nobody_sleeps_but_who_is_sent(paths, alone):
    answers, _ = alone
    registry = ji.Registry()
    try:
        for name in "ab":
            registry.load(name, lambda name=name: made(paths[name]))
        assert set(tiers(registry).values()) == {"device"} and registry._dormitory._thread is None
        registry.sleep("a")
        assert tiers(registry) == {"a": "disk", "b": "device"}
        assert registry["a"](PROMPT, **HOW).tokens == answers["a"] and set(tiers(registry).values()) == {"device"}
    finally:
        registry.close()


def test_a_copy_on_the_host_is_made_once_for_a_device_with_a_memory_of_its_own(paths, alone):
    """As on a GPU: what lies on the host is a copy, which stays while the model is awake."""
    answers, nbytes = alone
    with registry_of(paths, nbytes, host_memory="1GiB") as registry:
        beds = {one: bed for one, bed in registry._dormitory._beds.items()}
        for one, bed in beds.items():
            registry.wake(one.name[0])
            one.keeps, bed.stash.aliased = True, False
        for name in NAMES:
            assert registry[name](PROMPT, **HOW).tokens == answers[name]
        copies = {one.name: bed.stash._host for one, bed in beds.items()}
        (awake,) = (one for one in beds if one.awake)
        for name in NAMES * 2:
            assert registry[name](PROMPT, **HOW).tokens == answers[name]
        for one, bed in beds.items():
            kinds = {x.sharding.memory_kind for x in jax.tree.leaves(bed.stash._host)}
            assert one is awake or (bed.stash._host is copies[one.name] and kinds == {"pinned_host"})
            assert one.copied == (bed.stash._host is not None) and "pinned_host" not in {
                x.sharding.memory_kind for x in jax.tree.leaves(bed.rooms[0].engine.weights)}
        assert registry._dormitory._books.copies == sum(one.holds for one in beds) > 0


# --- waiting for one that sleeps ---


@contextmanager
def asleep(registry, name):
    """It sleeps, and cannot be woken in the `with` block."""
    registry.sleep(name)
    (bed,) = [bed for one, bed in registry._dormitory._beds.items() if one.name == f"{name}/1"]
    fetch, go, entered = bed.stash.fetch, threading.Event(), threading.Event()
    bed.stash.fetch = lambda: (entered.set(), go.wait(30), fetch())[-1]
    try:
        yield entered
    finally:
        go.set()
        bed.stash.fetch = fetch


def test_a_queue_is_bounded_and_deadlines_and_cancelling_hold_while_a_model_sleeps(paths, alone):
    answers, nbytes = alone
    with registry_of(paths, nbytes, names="a", max_waiting=3) as registry:
        with asleep(registry, "a"):
            late = registry["a"].submit(PROMPT, **HOW, timeout=0.05)
            later = registry["a"].submit(PROMPT, **HOW, queue_timeout=0.05)
            with pytest.raises(Expired, match=r"timeout of 0\.05 s is over"):
                late.result(30)
            with pytest.raises(Expired, match="its prompt had not begun to be read"):
                later.result(30)
            assert eventually(lambda: registry["a"].stats.waiting == 0)
            waiting = [registry["a"].submit(PROMPT, **HOW) for _ in range(3)]
            with pytest.raises(Rejected, match="the queue is full: 3 requests"):
                registry["a"].submit(PROMPT, **HOW)
            assert waiting[0].cancel() and eventually(lambda: registry["a"].stats.waiting == 2)
            assert waiting[1].cancel() and eventually(lambda: registry["a"].stats.waiting == 1)
            two = registry["a"].submit(PROMPT, n=2, temperature=1.0, seed=1, **HOW)
        assert waiting[2].result(30).tokens == answers["a"] and len(two.result(30).samples) == 2


def test_who_gave_up_wakes_nobody(registry):
    registry["b"](PROMPT, **HOW)
    wakes = registry.tiers["a/1"].wakes
    with blocked(registry["b"].version.model):
        answer = registry["a"].submit(PROMPT, **HOW)
        assert answer.cancel()
    with suppress(CancelledError):
        answer.result(30)
    assert eventually(lambda: registry._dormitory._thread is None)
    assert registry.tiers["a/1"].wakes == wakes  # "b" may have been on its way to make room


def test_a_failure_to_wake_harms_whoever_waits_and_nobody_else(registry, alone):
    answers, _ = alone
    registry.sleep("a")
    (bed,) = [bed for one, bed in registry._dormitory._beds.items() if one.name == "a/1"]
    read, broken = bed.stash._again, [True]

    def again():
        if broken:
            raise CorruptFile("model.safetensors ends early")
        return read()

    bed.stash._again = again
    with pytest.raises(RequestFailed, match=r"could not be woken: model.safetensors ends early") as failed:
        registry["a"](PROMPT, **HOW)
    assert isinstance(failed.value.__cause__, CorruptFile)
    with pytest.raises(CorruptFile):
        registry.wake("a")
    assert registry["b"](PROMPT, **HOW).tokens == answers["b"]
    broken.clear()
    assert registry["a"](PROMPT, **HOW).tokens == answers["a"]


def test_pages_that_cannot_be_made_leave_it_asleep(registry, alone):
    answers, _ = alone
    registry.sleep("a")
    engine = registry["a"].version.model._engine
    reset = engine._reset

    def full():
        raise RuntimeError("RESOURCE_EXHAUSTED")

    engine._reset = full
    with pytest.raises(RequestFailed, match="RESOURCE_EXHAUSTED"):
        registry["a"](PROMPT, **HOW)
    assert tiers(registry)["a"] == "disk" and not engine.weights
    engine._reset = reset
    assert registry["a"](PROMPT, **HOW).tokens == answers["a"]


def test_a_disk_that_is_full_keeps_the_others_awake(paths, alone, tmp_path, monkeypatch):
    """Weights that were rounded are in no checkpoint: they would have to be written."""
    with registry_of(paths, alone[1], names="ab", fit=1.2, quantize="int8") as registry:
        first = registry["b"](PROMPT, **HOW).tokens
        registry.sleep("b")
        awake, other = ("a", "b")
        assert registry[awake](PROMPT, **HOW).tokens != first
        (bed,) = [bed for one, bed in registry._dormitory._beds.items() if one.name == f"{awake}/1"]
        store = bed.stash.store
        monkeypatch.setattr(bed.stash, "_spill", None)

        def full(params=None):
            raise OutOfMemory("no room on the disk")

        bed.stash.store = full
        with pytest.raises(RequestFailed, match="no room on the disk"):
            registry[other](PROMPT, **HOW)
        assert tiers(registry) == {awake: "device", other: "disk"} and registry[awake](PROMPT, **HOW)
        bed.stash.store = store
        assert registry[other](PROMPT, **HOW).tokens == first


def test_closing_one_that_sleeps_tells_whoever_waits(paths, alone):
    with registry_of(paths, alone[1], names="ab") as registry:
        with asleep(registry, "a") as entered:
            waiting = registry["a"].submit(PROMPT, **HOW)
            assert entered.wait(30)
            registry.unload("a", drain=0)
            with pytest.raises(Closed):
                waiting.result(30)
        assert registry["b"](PROMPT, **HOW).tokens == alone[0]["b"] and list(registry) == ["b"]


def test_draining_one_that_sleeps_serves_whoever_waits(paths, alone):
    with registry_of(paths, alone[1], names="a") as registry:
        with asleep(registry, "a") as entered:
            waiting = registry["a"].submit(PROMPT, **HOW)
            assert entered.wait(30)
            closer = threading.Thread(target=registry.unload, args=("a",))
            closer.start()
        assert waiting.result(30).tokens == alone[0]["a"]
        closer.join(30)
        assert not list(registry)


def test_a_registry_is_closed_whatever_is_going_on(paths, alone):
    before = {thread.name for thread in threading.enumerate()}
    with registry_of(paths, alone[1]) as registry:
        answers = [registry[name].submit(PROMPT, **HOW) for name in NAMES * 3]
    for answer in answers:
        with suppress(Closed):
            assert answer.result(30)
    assert eventually(lambda: {thread.name for thread in threading.enumerate()} <= before)


# --- versions ---


def test_weights_are_swapped_in_one_that_sleeps_and_stay_when_it_sleeps_again(paths, alone):
    answers, nbytes = alone
    with registry_of(paths, nbytes, names="ab", fit=1.9) as registry, made(paths["c"]) as other:
        registry["b"](PROMPT, **HOW)
        assert tiers(registry) == {"a": "disk", "b": "device"}
        assert registry["a"].swap(other.params) == 2
        for _ in range(2):
            output = registry["a"](PROMPT, **HOW)
            assert (output.tokens, output.version) == (answers["c"], 2)
            assert registry["b"](PROMPT, **HOW).tokens == answers["b"]
        assert registry.load("a", lambda: made(paths["a"])) == 3
        assert registry.roll_back("a") == 1 and registry["a"](PROMPT, **HOW).tokens == answers["a"]


def test_weights_that_have_no_room_beside_the_old_are_refused(paths, alone):
    weights = sum(x.nbytes for x in jax.tree.leaves(made(paths["a"]).params))
    with registry_of(paths, alone[1], names="a", fit=1 + 0.5 * weights / alone[1]) as registry:
        with pytest.raises(OutOfMemory, match=r"a/1 with other weights needs .*, beside .* policy='frugal'"):
            registry["a"].swap(registry["a"].params)
        assert registry["a"](PROMPT, **HOW).tokens == alone[0]["a"]


def test_labels_are_of_versions_that_sleep_as_well(paths, alone):
    answers, nbytes = alone
    with registry_of(paths, nbytes, names="a") as registry:
        registry.load("a", lambda: made(paths["b"]), label="canary", policy="available")
        assert registry.labels("a") == {"stable": 1, "canary": 2}
        for label, name in (("stable", "a"), ("canary", "b"), ("stable", "a")):
            assert registry.at("a", label)(PROMPT, **HOW).tokens == answers[name]
        registry.flip("a", 2)
        assert registry.versions("a") == [2] and registry["a"](PROMPT, **HOW).tokens == answers["b"]
        assert registry.load("a", lambda: made(paths["c"])) == 3, "frugally: both do not fit"
        assert registry["a"](PROMPT, **HOW).tokens == answers["c"] and len(registry.tiers) == 1


def test_what_is_too_large_is_refused_with_the_numbers(paths, alone):
    answers, nbytes = alone
    with registry_of(paths, nbytes, names="a") as registry:
        with pytest.raises(OutOfMemory, match=r"a new model needs 954 MiB .* device_memory is"):
            registry.load("b", lambda: pytest.fail("it was made"), needs="1GB")
        with pytest.raises(OutOfMemory, match="b/1 needs"):
            registry.load("b", lambda: ji.endpoint(lambda p, x: x + p[0], np.zeros(10**6, np.float32), example=X))
        assert list(registry) == ["a"] and registry["a"](PROMPT, **HOW).tokens == answers["a"]


def test_streamed_weights_do_not_sleep(paths, alone):
    registry = ji.Registry(device_memory="1GiB")
    try:
        deep = tiny.write(paths["a"].parent / "deep", {**tiny.PLAIN, "num_hidden_layers": 12, "hidden_size": 256,
                                                       "head_dim": 64})
        registry.load("s", lambda: made(deep, device_memory="12MiB"))
        with pytest.raises(InvalidOption, match="s/1 cannot sleep: its weights are streamed"):
            registry.sleep("s")
        assert registry["s"](PROMPT, **HOW)
    finally:
        registry.close()


# --- other models ---


def test_endpoints_and_encoders_sleep_and_wake(bert, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    weights = {"w": np.arange(1 << 16, dtype=np.float32).reshape(4, -1), "b": jnp.ones(3, jnp.bfloat16)}
    make = lambda: ji.endpoint(lambda p, x: (x @ p["w"]).sum(1) + p["b"][0], weights, example=X, max_batch=2)
    read = lambda: setattr(encoder := ji.load(bert), "warmup", lambda **_: encoder.embed("w1 w2")) or encoder
    with read() as encoder, make() as f:
        encoder.warmup()
        f.warmup()
        vector, value, larger = encoder.embed("w1 w2"), float(f(X)), max(f.nbytes, encoder.nbytes)
    registry = ji.Registry(larger)
    try:
        registry.load("encoder", read)
        registry.load("f", make)
        for _ in range(2):
            assert float(registry["f"](X)) == value and tiers(registry) == {"e": "disk", "f": "device"}
            np.testing.assert_array_equal(registry["encoder"].embed("w1 w2"), vector)
            assert tiers(registry) == {"e": "device", "f": "disk"}
        reply = registry["f"].submit(X)
        registry["f"].refit()
        assert float(reply.result(30)) == value
        assert not [path for path in tmp_path.rglob("*") if path.is_file()], "the file has a name"
        registry.sleep("f")
        np.testing.assert_array_equal(registry["f"].params["w"], weights["w"])
    finally:
        registry.close()


def test_an_endpoint_keeps_deadlines_and_tells_of_failures_while_it_sleeps():
    registry = ji.Registry()
    try:
        add = lambda p, x: x + p
        registry.load("f", lambda: ji.endpoint(add, np.float32(1), example=X, max_batch=2, max_waiting=2))
        f = registry["f"]
        with asleep(registry, "f"):
            with pytest.raises(Expired):
                f(X, timeout=0.05)
            replies = [f.submit(X) for _ in range(2)]
            with pytest.raises(Rejected):
                f.submit(X)
            assert replies[0].cancel()
            replies[0] = f.submit(X)
        assert all((reply.result(30) == X + 1).all() for reply in replies)
        registry.sleep("f")
        (bed,) = registry._dormitory._beds.values()
        fetch, bed.stash.fetch = bed.stash.fetch, lambda: 1 / 0
        with pytest.raises(RequestFailed, match="could not be woken: division by zero"):
            f(X)
        bed.stash.fetch = fetch
        assert (f(X) == X + 1).all()
    finally:
        registry.close()


# --- where weights lie ---


@given(data=st.data())
def test_weights_come_back_to_the_bit_from_wherever_they_were(data):
    """Also by way of pinned memory, for a device that has a memory of its own; from the disk to such a one they come
    through one buffer, which a CPU would take over."""
    dtypes = st.sampled_from((np.float32, jnp.bfloat16, np.int8, jnp.float8_e4m3fn, np.bool_))
    made = data.draw(st.lists(st.tuples(dtypes, st.lists(st.integers(0, 9), max_size=3)), max_size=6), "arrays")
    rng = np.random.default_rng(0)
    params = [jax.device_put(rng.normal(size=shape).astype(dtype)) for dtype, shape in made]
    before = [np.array(x) for x in params]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in params]
    aliased = data.draw(st.booleans(), "aliased")
    stash = Stash(like, aliased, None)
    try:
        ways = ("host", "disk", "drop") if aliased else ("host",)
        for what in data.draw(st.lists(st.sampled_from(ways), max_size=6), "moves"):
            if what == "host":
                stash.copy(params)
            elif what == "disk":
                stash.store(params)
            elif stash.stored:
                stash.drop()
            else:
                continue
            params = stash.fetch()
            for x, wanted, shape in zip(params, before, like, strict=True):
                assert x.dtype == wanted.dtype and x.sharding == shape.sharding
                assert np.asarray(x).tobytes() == wanted.tobytes()
    finally:
        stash.forget()
