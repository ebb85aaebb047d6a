"""Endpoints: whatever the pytrees, the shapes, the order of arrival and the company, each caller gets what the function
gives for its request alone; and whoever is refused or ends otherwise harms nobody."""

import asyncio
import gc
import threading
import time
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.alignment import aligned
from jaxinfer.compiler.functions import FunctionKey
from jaxinfer.errors import Closed, Expired, InvalidOption, InvalidRequest, Rejected, RequestFailed, StepFailed
from jaxinfer.runtime import padded
from tests.running import endings, eventually, retries, seen_events


def mlp(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def mlp_params(seed=0, wide=16):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(8, wide)).astype(np.float32), "v": rng.normal(size=(wide, 3)).astype(np.float32)}


@pytest.fixture(scope="module")
def f():
    with ji.endpoint(mlp, mlp_params(), example={"x": np.zeros(8, np.float32)}, max_batch=8) as f:
        yield f


def alone(x, params=None):
    return np.asarray(mlp(params or mlp_params(), np.asarray(x, np.float32)[None])[0])


class Held:
    """An endpoint whose batches, of these sizes, are read back only when they are let go, as if the device were
    busy."""

    def __init__(self):
        self.go, self.running, self.sizes = threading.Event(), threading.Event(), []

    def endpoint(self, **options):
        f = ji.endpoint(lambda x: x + 0, example=np.zeros(2, np.float32), **{"max_batch": 4, **options})
        f.warmup()
        collect = f._work.collect

        def hold(flight):
            self.running.set()
            self.sizes.append(len(flight.asks))
            self.go.wait(30)
            return collect(flight)

        f._work.collect = hold
        return f


# What comes back.


@pytest.mark.parametrize("seed", range(3))
def test_every_way_to_ask_gives_what_the_function_gives_alone(f, seed):
    x = np.random.default_rng(seed).normal(size=8).astype(np.float32)
    expected = alone(x)
    reply = f.submit(x)
    results = [f(x), f(x=x), f(x.tolist()), f(jnp.asarray(x)), reply.result(10), *f.map([x, {"x": x}])]

    async def ask():
        return [await f.asubmit(x), await f.submit(x=x)]

    for result in (*results, *asyncio.run(ask())):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert reply.version == f.version == 1


@settings(max_examples=10)
@given(data=st.data())
def test_company_and_order_change_nothing(f, data):
    seeds = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=40))
    asked = [np.random.default_rng(seed).normal(size=8).astype(np.float32) for seed in seeds]
    for x, result in zip(asked, f.map(asked), strict=True):
        np.testing.assert_allclose(result, alone(x), rtol=1e-5, atol=1e-6)


@jax.tree_util.register_dataclass
@dataclass
class Pair:
    left: np.ndarray
    right: np.ndarray


LEAVES = st.sampled_from(("float32", "bfloat16", "int32", "int8", "uint8", "bool", "float16"))
TREES = st.recursive(st.tuples(st.lists(st.integers(1, 3), max_size=2), LEAVES), lambda inner: st.one_of(
    st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3), st.tuples(inner, inner).map(list),
    st.tuples(inner, inner).map(lambda pair: Pair(*pair))), max_leaves=4)
IS_LEAF = lambda x: type(x) is tuple


@settings(max_examples=8)
@given(tree=TREES, data=st.data())
def test_any_pytree_goes_in_and_comes_out(tree, data):
    rng = np.random.default_rng(0)
    make = lambda spec: np.asarray(rng.integers(0, 2, spec[0])).astype(jnp.dtype(spec[1]))
    draw = lambda: jax.tree.map(make, tree, is_leaf=IS_LEAF)

    def call(tree):
        total = sum(x.astype(jnp.float32).reshape(x.shape[0], -1).sum(1) for x in jax.tree.leaves(tree))
        return {"same": tree, "total": total}

    with ji.endpoint(call, example=(draw(),), max_batch=4) as f, retries() as retried:
        asked = [draw() for _ in range(data.draw(st.integers(1, 9)))]
        for request, result in zip(asked, f.map(asked), strict=True):
            assert jax.tree.structure(result["same"]) == jax.tree.structure(request)
            for before, after in zip(jax.tree.leaves(request), jax.tree.leaves(result["same"]), strict=True):
                assert after.dtype == before.dtype and np.array_equal(after, before)
            assert float(result["total"]) == sum(float(x.astype(np.float32).sum()) for x in jax.tree.leaves(request))
    assert not retried


def read(params, ids, mask):
    """A toy encoder: junk in padded places would show in every result."""
    x_BLD = params["table"][ids] * mask[..., None]
    return {"tokens": jnp.cumsum(x_BLD, 1), "pooled": x_BLD.sum(1) / mask.sum(1, keepdims=True), "pairs": x_BLD[:, 1:]}


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_ragged_axes_are_padded_and_cut_again(lengths, seed):
    rng = np.random.default_rng(seed)
    params = {"table": rng.normal(size=(50, 4)).astype(np.float32)}
    example = {"ids": np.zeros(40, np.int32), "mask": np.ones(40, np.float32)}
    ragged = {"ids": {0: "length"}, "mask": {0: "length"}}
    with ji.endpoint(read, params, example=example, ragged=ragged, pad={"ids": 7}, max_batch=4) as f:
        assert f.ladders["length"] == (16, 32, 40)
        asked = [{"ids": rng.integers(0, 50, n).astype(np.int32), "mask": np.ones(n, np.float32)} for n in lengths]
        for request, result in zip(asked, f.map(asked), strict=True):
            expected = read(params, request["ids"][None], request["mask"][None])
            for name in expected:
                assert result[name].shape == expected[name][0].shape
                np.testing.assert_allclose(result[name], expected[name][0], rtol=1e-5, atol=1e-5)


@settings(max_examples=5)
@given(sides=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 24)), min_size=1, max_size=6))
def test_both_sides_of_an_image_are_ragged(sides):
    call = lambda image: {"brighter": 2 * image, "columns": image.sum(1), "light": image.sum((1, 2))}
    with ji.endpoint(call, example={"image": np.zeros((20, 24, 3), np.float32)}, max_batch=2,
                     ragged={"image": {0: "height", 1: "width"}}) as f:
        asked = [np.random.default_rng(0).normal(size=(*side, 3)).astype(np.float32) for side in sides]
        for image, result in zip(asked, f.map(asked), strict=True):
            for name, expected in call(image[None]).items():
                np.testing.assert_allclose(result[name], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call, pad", [
    (lambda x: x.mean(1), 0), (lambda x: x[:, ::-1], 0), (lambda x: jnp.concatenate([x, x], 1), 0),
    (lambda x: jax.nn.softmax(x), 0), (lambda x: x.max(1), 9), (lambda x: x.astype(jnp.bfloat16).mean(1), 0),
])
def test_a_result_that_padding_would_change_is_refused(call, pad):
    how = dict(example=np.zeros(40, np.float32), ragged={"0": {0: "n"}}, pad={"0": pad}, max_batch=2)
    with pytest.raises(InvalidOption, match=r"changes if a request of {'n': 17} is padded to {'n': 32}: mask"):
        ji.endpoint(call, **how)
    with ji.endpoint(call, **how, ladders={"n": None}) as f:
        np.testing.assert_allclose(f(np.ones(3, np.float32)), call(np.ones((1, 3), np.float32))[0], rtol=1e-5)


def test_a_pad_that_counts_for_nothing_is_taken():
    with ji.endpoint(jax.nn.softmax, example=np.zeros(4, np.float32), ragged={"0": {0: "n"}}, pad={"0": -np.inf},
                     max_batch=2) as f:
        np.testing.assert_allclose(f(np.ones(3, np.float32)), np.full(3, 1 / 3), rtol=1e-6)


def test_a_function_of_one_size_of_batch_is_given_no_other():
    with ji.endpoint(lambda x: x.reshape(8, 4), example=np.zeros(4, np.float32), ladders={"B": (8,)}) as f:
        assert f.map(np.eye(4, dtype=np.float32))[2].tolist() == [0, 0, 1, 0]


def test_an_axis_without_rungs_is_not_padded():
    with ji.endpoint(lambda x: x.mean(1), example=np.zeros(5, np.float32), ragged={"0": {0: "n"}},
                     ladders={"n": None}, max_batch=4) as f:
        for n in (3, 5, 9):
            assert float(f(np.arange(n, dtype=np.float32))) == (n - 1) / 2
        assert {e.name for e in f.ledger if e.hits} == {f"apply[B=1,n={n}]" for n in (3, 5, 9)}


def test_sizes_that_the_function_refuses_are_refused_at_the_door():
    with ji.endpoint(lambda x: x.reshape(x.shape[0], -1, 2).sum((1, 2)), example=np.ones(16, np.float32), max_batch=2,
                     ragged={"0": {0: "n"}}) as f:
        assert float(f(np.ones(6, np.float32))) == 6
        with pytest.raises(InvalidRequest, match="the function does not take the sizes n=5"):
            f(np.ones(5, np.float32))


@pytest.mark.parametrize("axis, out_axis", [(1, 1), (None, 0), (None, 1), ({"x": 1}, 1)])
def test_the_batch_may_be_elsewhere_or_nowhere(axis, out_axis):
    def call(x):
        return jnp.cumsum(x, 0)

    with ji.endpoint(call, example={"x": np.zeros(3, np.float32)}, axis=axis, out_axis=out_axis, max_batch=4) as f:
        asked = [np.random.default_rng(i).normal(size=3).astype(np.float32) for i in range(7)]
        for x, result in zip(asked, f.map(asked), strict=True):
            np.testing.assert_allclose(result, np.cumsum(x), rtol=1e-6)


def test_scalars_are_requests():
    with ji.endpoint(lambda a, b: a + b, example={"a": 0, "b": 0.0}, max_batch=4) as f:
        assert float(f(2, b=0.5)) == 2.5 and float(f(a=np.int32(3), b=1)) == 4.0


def test_scalars_share_batches():
    with ji.endpoint(lambda a: 2 * a, example={"a": 0.0}, max_batch=8) as f, retries() as retried:
        assert [float(y) for y in f.map([float(i) for i in range(32)])] == [2.0 * i for i in range(32)]
        assert f.stats.batches < 20 and not retried, "each went alone"


def test_flax_modules_are_taken_as_they_are():
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    module = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    dense = linen.Dense(3)
    variables = dense.init(jax.random.key(0), x)
    for f, expected in ((ji.endpoint(module, example=x[0], max_batch=4), module(x)),
                        (ji.endpoint(dense, variables, example=x[0], max_batch=4), dense.apply(variables, x)),
                        (ji.endpoint(dense, variables["params"], example=x[0]), dense.apply(variables, x))):
        with f:
            np.testing.assert_allclose(f.map(x), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidOption, match="no variables of its own"):
        ji.endpoint(dense, example=x[0])
    with pytest.raises(InvalidOption, match="has its own variables"):
        ji.endpoint(module, variables, example=x[0])


def test_padding_is_inert(f):
    """Promise 1: a batch of three in four places; the fourth may hold anything."""
    pack, junk = f._work._pack, []

    def poisoned(asks, key):
        arrays, buffers, copied = pack(asks, key)
        for array in arrays:
            array[len(asks):] = np.nan
            junk.append(len(array) - len(asks))
        return arrays, buffers, copied

    f._work._pack = poisoned
    try:
        asked = [np.full(8, i, np.float32) for i in range(13)]
        for x, result in zip(asked, f.map(asked), strict=True):
            np.testing.assert_allclose(result, alone(x), rtol=1e-5, atol=1e-6)
        assert sum(junk) > 0, "nothing was padded: nothing was tested"
    finally:
        f._work._pack = pack


def test_a_result_is_the_callers_own(f):
    results = f.map([np.ones(8, np.float32)] * 3)
    results[0] += 1
    assert np.array_equal(results[1], results[2]) and not np.array_equal(results[0], results[1])


@pytest.mark.parametrize("offset", [0, 4])
def test_memory_at_a_boundary_is_read_where_it_lies(offset):
    """The caller's array is changed after its request was launched, and before the device reads it."""
    launched, go = threading.Event(), threading.Event()

    def hold():
        launched.set()
        go.wait(10)
        return np.float32(1)

    call = lambda x: x * jax.pure_callback(hold, jax.ShapeDtypeStruct((), jnp.float32))
    raw = aligned((36,), np.uint8)
    with ji.endpoint(call, example=np.zeros(8, np.float32), max_batch=1) as f:
        x = raw[offset: offset + 32].view(np.float32)
        x[:] = 1
        reply = f.submit(x)
        assert launched.wait(10)
        x[:] = 2
        go.set()
        assert reply.result(10).tolist() == [1 if offset else 2] * 8
        assert reply.bytes_copied == f.stats.bytes_copied == (32 if offset else 0) and f.stats.bytes_in == 32


def test_the_bytes_that_are_copied_are_counted_for_each_request():
    held, x = Held(), aligned((2,), np.float32)
    with held.endpoint(max_delay=60) as f:
        first = f.submit(x)
        assert held.running.wait(10)
        others = [f.submit(x), f.submit(x.astype(np.float64)), f.submit([1, 2]), f.submit(x)]
        held.go.set()
        wait([first, *others], 10)
        assert [reply.bytes_copied for reply in (first, *others)] == [0, 8, 16, 16, 8], "those of a batch are written"
        assert f.stats.bytes_copied == 48 and f.stats.bytes_in == 40  # into it, and some were converted before


class Foreign:
    """All that is known of it is that it speaks DLPack, as a torch tensor does."""

    def __init__(self, array):
        self.array, self.asked = array, 0

    def __dlpack__(self, **kwargs):
        self.asked += 1
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_bfloat16_of_other_libraries_is_read_where_numpy_has_no_name_for_it():
    x = Foreign(jnp.arange(8, dtype=jnp.bfloat16))
    with ji.endpoint(lambda x: x + 1, example=np.zeros(8, jnp.bfloat16), max_batch=1) as f:
        assert f(x).tolist() == [*range(1, 9)]


def test_memory_of_other_libraries_is_read_through_dlpack(f):
    x = Foreign(np.arange(8, dtype=np.float32))
    np.testing.assert_allclose(f(x), alone(x.array), rtol=1e-5, atol=1e-6)
    assert x.asked == 1


# What is refused.


@pytest.mark.parametrize("args, kwargs, message", [
    ((np.zeros(7, np.float32),), {}, r"x is float32\[7\]; it must be float32\[8\]"),
    ((np.zeros((1, 8), np.float32),), {}, r"x is float32\[1, 8\]; it must be float32\[8\], for one request"),
    ((np.zeros(8, np.complex64),), {}, r"x is complex64\[8\]; it must be float32\[8\]"),
    ((np.zeros(8, np.int32),), {}, r"x is int32\[8\]; it must be float32\[8\]"),
    (("text",), {}, r"x is <U4\[\]; it must be float32\[8\]"),
    (([[1], [2, 3]],), {}, "x is a list, which is no array"),
    ((), {}, "arguments are missing: x"),
    ((), {"x": np.zeros(8, np.float32), "y": 1}, "arguments are unknown: y"),
    ((np.zeros(8, np.float32),), {"x": 1}, "arguments are given twice: x"),
    ((1, 2), {}, "2 arguments were given; there are 1"),
    ((np.zeros(8, np.float32),), {"timeout": -1}, "timeout is -1; it must be seconds > 0"),
    ((np.zeros(8, np.float32),), {"priority": 1000}, "priority is 1000"),
])
def test_what_does_not_fit_is_refused_at_the_door(f, args, kwargs, message):
    before = f.stats.requests
    with pytest.raises(InvalidRequest, match=message):
        f(*args, **kwargs)
    assert f.stats.requests == before and f.stats.waiting == 0


@pytest.mark.parametrize("fn, options, message", [
    (lambda x: x.sum(), {}, r"the output has shape \[\] for a batch of 64.*must have the batch as its axis 0"),
    (lambda x: {"y": x, "z": x.T}, {}, r"\['z'\] has shape \[4, 64\] for a batch of 64"),
    (lambda x: x.sum(0), {"ragged": {"x": {0: "n"}}, "ladders": {"n": None}}, r"has shape \[4\] for a batch of 64"),
    (lambda x: x.sum(0), {"ladders": {"B": (4,)}}, r"has shape \[4\] for a batch of 4 and \[4\] for a batch of 5"),
    (lambda x: None, {}, "returns no array"),
    (lambda x: x @ jnp.ones((3, 3)), {}, "cannot be traced for a batch"),
    (lambda x: x, {"axis": 2}, "axis of x is 2; it must be 0 to 1"),
    (lambda x: x, {"ragged": {"y": {0: "n"}}}, r"ragged names \['y'\]; the example's arrays are \['x'\]"),
    (lambda x: x, {"ragged": {"x": {3: "n"}}}, "it must map axes of it to names"),
    (lambda x: x, {"pad": {"y": 0}}, r"pad names \['y'\]"),
    (lambda x: x, {"ladders": {"n": (1,)}}, r"ladders names \['n'\]; the axes are \['B'\]"),
    (lambda x: x, {"ladders": {"B": (4, 2)}}, "must be rising sizes"),
    (lambda x: x, {"ladders": {"B": 4}}, "must be rising sizes"),
    (lambda x: x, {"out_axis": "a"}, "out_axis is 'a'; it must be an integer"),
    (lambda x: x, {"pad": {"x": "z"}}, "pad of x is 'z'; it must be a number that float32 can hold"),
    (lambda x: x, {"example": {"x": np.zeros(4, np.uint8)}, "pad": {"x": 300}}, "pad of x is 300"),
    (lambda x: x, {"max_batch": 0}, "max_batch is 0"),
    (lambda x: x, {"max_delay": -1}, "max_delay is -1"),
    (lambda x: x, {"nan": "maybe"}, "nan is 'maybe'"),
    (lambda x: x, {"example": {"timeout": 1}}, "arguments cannot be called timeout"),
    (lambda x: x, {"example": {"x": "text"}}, "example's x is a str"),
    (7, {}, "fn is a int; it must be a function or a Flax module"),
])
def test_what_contradicts_itself_is_no_endpoint(fn, options, message):
    with pytest.raises(InvalidOption, match=message):
        ji.endpoint(fn, **{"example": {"x": np.zeros(4, np.float32)}, **options})


def test_options_of_map_are_those_of_a_call(f):
    with pytest.raises(InvalidRequest, match=r"unknown options \['nope'\]; known are"):
        f.map([np.zeros(8, np.float32)], nope=3)


def test_nan_passes_is_flagged_or_is_rejected():
    example, bad, good = np.zeros(2, np.float32), np.array([1, np.nan], np.float32), np.ones(2, np.float32)
    divide = lambda x: {"y": x / x[:, ::-1]}
    asked = {"pass": (bad, good), "flag": (bad, np.zeros(2, np.float32)), "reject": (bad, np.zeros(2, np.float32))}
    for policy, (first, second) in asked.items():
        with ji.endpoint(divide, example=example, max_batch=2, nan=policy) as f:
            if policy == "pass":
                assert np.isnan(f(first)["y"]).all() and f.submit(first).result(10) and f.submit(second).flagged == ()
                continue
            if policy == "flag":
                replies = [f.submit(first), f.submit(second), f.submit(good)]
                assert all(reply.result(10) for reply in replies)
                assert [r.flagged for r in replies] == [("0", "output y"), ("output y",), ()]
                continue
            with pytest.raises(InvalidRequest, match="0 has NaN in it"):
                f(first)
            with pytest.raises(RequestFailed, match="output y has NaN in it"):
                f(second)
            assert f(good)["y"].tolist() == [1, 1]


# When a batch closes.


def test_an_idle_device_takes_what_there_is_and_a_busy_one_gathers():
    held = Held()
    with held.endpoint(max_delay=60) as f:
        first = f.submit(np.zeros(2, np.float32))
        assert held.running.wait(10), "a lone request waited for company"
        others = [f.submit(np.full(2, i, np.float32)) for i in range(6)]
        time.sleep(0.1)
        held.go.set()
        assert [r.result(10).tolist() for r in (first, *others)] == [[0, 0], *([i, i] for i in range(6))]
        assert sorted(held.sizes) == [1, 2, 4]


@pytest.mark.parametrize("max_batch, asked", [(8, 2), (2, 2)])
def test_a_batch_closes_while_a_long_one_is_computed(max_batch, asked):
    """By its timer, or because it is full; not only when the device is idle again."""
    def long(x):
        wide = jnp.ones((256, 256)) * x.sum()
        return x + jax.lax.fori_loop(0, 300, lambda _, y: jnp.tanh(y @ y), wide)[0, 0]

    with ji.endpoint(long, example=np.zeros(2, np.float32), max_batch=max_batch,
                     max_delay=0.01 if max_batch > asked else 60) as f:
        f.warmup()
        replies, launched, dispatch = [], [], f._work.dispatch

        def note(asks):
            launched.append((len(asks), bool(replies) and replies[0].done()))
            return dispatch(asks)

        f._work.dispatch = note
        replies.append(f.submit([0, 0]))
        assert eventually(lambda: launched)
        replies += [f.submit([0, 0]) for _ in range(asked)]
        wait(replies, 20)
    assert launched == [(1, False), (asked, False)]


def test_lower_priorities_go_first():
    held, order = Held(), []
    with held.endpoint(max_batch=1, max_delay=0.0) as f:
        first = f.submit(np.zeros(2, np.float32))
        assert held.running.wait(10)
        second = f.submit(np.zeros(2, np.float32), priority=-5)  # where the device takes a second one, this is it
        time.sleep(0.1)
        replies = {p: f.submit(np.zeros(2, np.float32), priority=p) for p in (3, -1, 0)}
        for p, reply in replies.items():
            reply.add_done_callback(lambda _, p=p: order.append(p))
        held.go.set()
        wait([first, second, *replies.values()], 10)
    assert order == [-1, 0, 3]


# Bounds, deadlines, cancels.


def test_a_full_queue_rejects_and_map_waits():
    held = Held()
    with held.endpoint(max_waiting=3, max_batch=1, max_delay=0) as f:
        replies = [f.submit(np.zeros(2, np.float32))]
        assert held.running.wait(10)
        replies += [f.submit(np.zeros(2, np.float32)) for _ in range(3)]
        with pytest.raises(Rejected, match="3 requests wait, and max_waiting=3") as caught:
            f.submit(np.zeros(2, np.float32))
        assert caught.value.queue_length == 3 and caught.value.retry_after > 0
        held.go.set()
        assert [r.result(10).tolist() for r in replies] == [[0, 0]] * 4
        asked = [np.full(2, i, np.float32) for i in range(20)]
        assert np.array_equal(f.map(asked), asked)


def test_several_requests_are_queued_together_or_not_at_all():
    held, x = Held(), np.zeros(2, np.float32)
    with held.endpoint(max_waiting=4, max_batch=4, max_delay=60) as f:
        first = f.submit(x)
        assert held.running.wait(10)
        second = f.submit(x)
        with pytest.raises(Rejected, match="1 requests wait"):
            f.submit_all([((x,), {})] * 4)
        with pytest.raises(InvalidRequest, match="must be float32"):
            f.submit_all([((x,), {}), (("no array",), {})])
        assert f.stats.waiting == 1, "of what was refused nothing waits"
        third, fourth = f.submit_all([((x + 1,), {}), ((x + 2,), {})], timeout=20)
        held.go.set()
        replies = first, second, third, fourth
        assert [reply.result(10).tolist() for reply in replies] == [[0, 0], [0, 0], [1, 1], [2, 2]]
        assert third.version == 1 and f.max_waiting == 4 and not f.closed
    assert f.closed and sorted(held.sizes) == [1, 3]


@pytest.mark.parametrize("name", ["timeout", "queue_timeout"])
def test_deadlines_fire_while_a_batch_runs(name):
    held = Held()
    with held.endpoint(max_batch=1, max_delay=0) as f, endings() as ended:
        running = [f.submit(np.zeros(2, np.float32))]
        assert held.running.wait(10)
        late, start = f.submit(np.zeros(2, np.float32), **{name: 0.2}), time.perf_counter()
        with pytest.raises(Expired, match=f"{name} of 0.2 s is over"):
            late.result(10)
        assert 0.1 < time.perf_counter() - start < 3 and not held.go.is_set()
        assert f.stats.waiting == 0
        held.go.set()
        wait(running, 10)
        assert sorted(e.reason for e in ended) == ["expired", "stop"]


def test_deadlines_of_those_that_have_ended_are_forgotten(f):
    from jaxinfer.runtime.timer import MOST, TIMER

    for _ in range(3):
        for reply in [f.submit(np.zeros(8, np.float32), timeout=3600) for _ in range(MOST)]:
            reply.result(20)
    assert len(TIMER._calls) <= 2 * MOST


def test_a_queue_timeout_is_over_once_the_batch_runs():
    held = Held()
    with held.endpoint() as f:
        reply = f.submit(np.ones(2, np.float32), queue_timeout=0.1)
        assert held.running.wait(10)
        time.sleep(0.3)
        held.go.set()
        assert reply.result(10).tolist() == [1, 1]


def test_a_cancelled_request_leaves_at_once():
    held = Held()
    with held.endpoint(max_batch=1, max_delay=0) as f, endings() as ended:
        running = [f.submit(np.zeros(2, np.float32))]
        assert held.running.wait(10)
        reply = f.submit(np.zeros(2, np.float32))
        assert reply.cancel() and wait([reply], 10).done and f.stats.waiting == 0
        with pytest.raises(CancelledError):
            reply.result()

        async def give_up():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(f.asubmit(np.zeros(2, np.float32)), 0.1)
            assert f.stats.waiting == 0

        asyncio.run(give_up())
        held.go.set()
        assert all(r.result(10) is not None for r in running) and not running[0].cancel()
        assert sorted(e.reason for e in ended) == ["cancelled", "cancelled", "stop"]


def test_thousands_of_callers_share_one_endpoint(f):
    asked = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)

    async def ask():
        return await asyncio.gather(*(f.asubmit(x) for x in asked))

    expected = np.asarray(mlp(mlp_params(), asked))
    np.testing.assert_allclose(asyncio.run(ask()), expected, rtol=1e-4, atol=1e-5)
    results = [None] * 200
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, f(asked[i]))) for i in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    np.testing.assert_allclose(results, expected[:200], rtol=1e-4, atol=1e-5)


# What goes wrong.


def test_a_request_that_breaks_its_batch_fails_alone():
    def refuse(x):
        if (x == 13).any():
            raise ValueError("unlucky")
        return x

    def call(x):
        return jax.pure_callback(refuse, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with (ji.endpoint(call, example=np.zeros(2, np.float32), max_batch=8) as f, endings() as ended,
          retries() as retried):
        f.warmup()
        replies = [f.submit(np.full(2, i, np.float32)) for i in range(10, 20)]
        errors = [reply.exception(20) for reply in replies]
        assert [isinstance(e, StepFailed) for e in errors] == [i == 13 for i in range(10, 20)]
        assert [r.result().tolist() for r, e in zip(replies, errors, strict=True) if e is None] == [
            [i, i] for i in range(10, 20) if i != 13]
        assert sorted(e.reason for e in ended) == ["failed", *["stop"] * 9]
        assert len(retried) == 1 and "unlucky" in str(retried[0].error)


def test_a_callback_that_exits_harms_nobody(f):
    def leave(_):
        raise SystemExit

    replies = [f.submit(np.zeros(8, np.float32)) for _ in range(5)]
    replies[0].add_done_callback(leave)
    assert all(reply.result(10) is not None for reply in replies) and f(np.zeros(8, np.float32)) is not None


def test_a_callback_may_ask_change_and_close_but_not_wait():
    with ji.endpoint(lambda p, x: x + p, np.float32(1), example=np.zeros(2, np.float32), max_batch=2) as f:
        seen, done = [], threading.Event()

        def act(_):
            try:
                for wait in (lambda: f([0, 0]), lambda: f.map([[0, 0]])):
                    with pytest.raises(InvalidRequest, match="ask with submit there"):
                        wait()
                seen.extend((f.refit(), f.swap(np.float32(2)), f.submit([0, 0])))
            finally:
                done.set()

        f.submit([0, 0]).add_done_callback(act)
        assert done.wait(20) and len(seen) == 3 and seen[2].result(20).tolist() == [2, 2]
        f.submit([0, 0]).add_done_callback(lambda _: f.close())
        assert eventually(lambda: not f._runner._thread.is_alive())


def test_closing_fails_what_waits_and_refuses_what_comes():
    held = Held()
    f = held.endpoint(max_batch=1, max_delay=0)
    replies = [f.submit(np.zeros(2, np.float32)) for _ in range(5)]
    assert held.running.wait(10)
    closer = threading.Thread(target=f.close)
    closer.start()
    time.sleep(0.1)
    held.go.set()
    closer.join(10)
    errors = [reply.exception(10) for reply in replies]
    assert errors[0] is None and isinstance(errors[-1], Closed) and {type(e) for e in errors} == {type(None), Closed}
    for ask in (f, f.submit):
        with pytest.raises(Closed):
            ask(np.zeros(2, np.float32))
    f.close()


def test_an_endpoint_that_is_dropped_is_closed():
    f = ji.endpoint(mlp, mlp_params(), example={"x": np.zeros(8, np.float32)}, max_batch=2)
    f(np.zeros(8, np.float32))
    thread, replies = f._runner._thread, [f.submit(np.zeros(8, np.float32)) for _ in range(3)]
    del f
    gc.collect()
    assert all(reply.result(10) is not None for reply in replies), "closed under a caller"
    del replies
    gc.collect()
    assert eventually(lambda: not thread.is_alive())


# Compiles and ladders.


def test_after_warmup_nothing_compiles_and_the_ledger_lists_it(f):
    f.warmup()
    seen = []
    with events.observe(seen.append):
        f.map([np.zeros(8, np.float32)] * 30)
    assert not [e for e in seen if isinstance(e, events.Compiling)]
    assert {f"apply[B={n}]" for n in (1, 2, 4, 8)} == {e.name for e in f.ledger}


def test_refit_fits_the_ladder_to_what_came():
    with ji.endpoint(read, {"table": np.ones((50, 4), np.float32)}, max_batch=4,
                     example={"ids": np.zeros(64, np.int32), "mask": np.ones(64, np.float32)},
                     ragged={"ids": {0: "n"}, "mask": {0: "n"}}) as f:
        ask = lambda n: f(np.zeros(n, np.int32), np.ones(n, np.float32))["tokens"]
        for n in (5, 5, 5, 20, 20):
            ask(n)
        with pytest.raises(InvalidOption, match="rungs is 0"):
            f.refit(rungs=0)
        assert f.refit(rungs=3)["n"] == (5, 20, 64) == f.ladders["n"]
        seen = []
        with events.observe(seen.append):
            assert ask(5).shape == (5, 4) and ask(21).shape == (21, 4)
        assert not [e for e in seen if isinstance(e, events.Compiling)]
        assert any(e.hits and e.name == "apply[B=1,n=5]" for e in f.ledger)
        assert len(f.ledger.entries) == 3 * len(f.ladders["B"]), "programs of the old ladder are kept"


LONG = dict(example={"ids": np.zeros(40, np.int32), "mask": np.ones(40, np.float32)}, max_batch=4,
            ragged={"ids": {0: "n"}, "mask": {0: "n"}})
TABLE = {"table": np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)}


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, 50, n).astype(np.int32), np.ones(n, np.float32)


def is_read(found, ids, mask):
    """Whether this is what `read` gives for a text alone; in numpy, for threads that ask without a pause."""
    x_LD = TABLE["table"][ids]
    expected = {"tokens": np.cumsum(x_LD, 0), "pooled": x_LD.mean(0), "pairs": x_LD[1:]}
    return all(found[name].shape == it.shape and np.allclose(found[name], it, atol=1e-4)
               for name, it in expected.items())


def test_the_old_ladder_serves_until_a_new_one_is_compiled_and_no_request_is_lost():
    with ji.endpoint(read, TABLE, **LONG) as f:
        f.warmup()
        old, lower, wrong, count, stop = f.ladders, f.functions.lower, [], [0] * 3, threading.Event()
        compiling, go, fitted = threading.Event(), threading.Event(), []

        def slow(key):
            compiling.set()
            go.wait(20)
            return lower(key)

        def ask(i):
            rng = np.random.default_rng(i)
            while not stop.is_set():
                asked = [text(n, i) for n in rng.integers(1, 30, 4)]
                try:
                    found = [reply.result(10) for reply in [f.submit(*one) for one in asked]]
                except Exception as error:
                    wrong.append(error)
                    return
                wrong.extend(one for result, one in zip(found, asked, strict=True) if not is_read(result, *one))
                count[i] += 4

        more = lambda than: eventually(lambda: wrong or all(n > m + 8 for n, m in zip(count, than, strict=True)))
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        assert more([0] * 3)
        f.functions.lower = slow
        refitter = threading.Thread(target=lambda: fitted.append(f.refit(rungs=3)))
        refitter.start()
        assert compiling.wait(10) and more(list(count)) and f.ladders == old, "who asked meanwhile had to wait"
        go.set()
        refitter.join(20)
        assert fitted == [f.ladders] != [old] and more(list(count))
        stop.set()
        for thread in threads:
            thread.join(20)
        assert not wrong


def test_a_miss_runs_on_a_larger_rung_while_its_own_is_compiled():
    with ji.endpoint(read, TABLE, **LONG) as f, seen_events(events.Missed) as missed:
        go, lower = threading.Event(), f.functions.lower
        f.functions.lower = lambda key: go.wait(20) and lower(key)
        for _ in range(2):
            assert is_read(f.submit(*text(5)).result(10), *text(5))
        assert [(m.name, m.ran_on) for m in missed] == [("apply[B=1,n=16]", "apply[B=1,n=32]")], (
            "the door had tried its example in the larger one")
        assert missed[0].why == "ids [1, 16], mask [1, 16] came for the first time"
        assert f.ledger["apply[B=1,n=16]"].missed.endswith("ran on apply[B=1,n=32]")
        go.set()
        assert eventually(lambda: f.functions.is_ready(FunctionKey(1, (("n", 16),))))
        assert is_read(f(*text(5)), *text(5)) and f.ledger["apply[B=1,n=16]"].hits == 1 and len(missed) == 1


@settings(max_examples=5)
@given(ready=st.sets(st.sampled_from([FunctionKey(b, (("n", n),)) for b in (1, 2, 4) for n in (16, 32, 40)])),
       lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_whatever_is_compiled_already_results_are_the_same(ready, lengths):
    with ji.endpoint(read, TABLE, **LONG) as f, retries() as retried:
        f.functions.compile_all(*ready)
        asked = [dict(zip(("ids", "mask"), text(n, n), strict=True)) for n in lengths]
        assert all(is_read(found, *one.values()) for found, one in zip(f.map(asked), asked, strict=True))
        assert not retried


def test_of_sizes_that_are_not_padded_the_last_programs_are_kept(monkeypatch):
    monkeypatch.setattr(padded, "MOST_PROGRAMS", 3)
    with ji.endpoint(lambda x: x.sum(1), example=np.zeros(5, np.float32), ragged={"0": {0: "n"}}, ladders={"n": None},
                     max_batch=2) as f:
        for n in (1, 2, 3, 1, 4, 5):
            assert float(f(np.ones(n, np.float32))) == n
            f.map([np.ones(n, np.float32)] * 4)
        assert len(f.ledger) <= 3 and len(f._work._buffers._free) <= 3
        assert {e.name for e in f.ledger if e.hits} >= {"apply[B=1,n=5]"} and float(f(np.ones(2, np.float32))) == 2


def test_a_new_size_is_traced_once_and_not_in_the_thread_that_serves_all():
    traced = []

    def halves(x):
        traced.append((threading.current_thread(), x.shape[1]))
        return x[:, : (x.shape[1] + 1) // 2]

    with ji.endpoint(halves, example=np.zeros(64, np.float32), ragged={"0": {0: "n"}}, ladders={"B": (1,)}) as f:
        f.warmup()
        traced.clear()
        assert [f(np.ones(n, np.float32)).shape for n in (3, 20, 3, 33, 64)] == [(2,), (10,), (2,), (17,), (32,)]
        assert traced == [(threading.current_thread(), n) for n in (3, 20, 33)]


@pytest.mark.parametrize(("max_batch", "length", "given"), [(64, 512, {}), (64, 8, {}), (1000, 4096, {"B": (1, 64)})])
def test_ladders_make_no_more_than_sixteen_executables_unless_they_are_asked_for(max_batch, length, given):
    with ji.endpoint(lambda x: 2 * x, example={"x": np.zeros(length, np.float32)}, ragged={"x": {0: "n"}},
                     max_batch=max_batch, ladders=given) as f:
        assert len(f.ladders["B"]) * len(f.ladders["n"]) <= 16
        assert f.ladders["B"][-1] == (64 if given else max_batch) and f.ladders["n"][-1] == length


# Versions.


def test_a_swap_is_atomic_and_compiles_nothing(f):
    x, old, new = np.ones(8, np.float32), f.params, mlp_params(1)
    f.warmup()
    seen = []
    try:
        with events.observe(seen.append):
            assert f.swap(new) == f.version == 2
            np.testing.assert_allclose(f(x), alone(x, new), rtol=1e-5, atol=1e-6)
            assert f.submit(x).result(10) is not None
            reply = f.submit(x)
            reply.result(10)
            assert reply.version == 2
        assert not [e for e in seen if isinstance(e, events.Compiling)]
    finally:
        f.swap(old)
    for wrong, message in (({"w": new["w"]}, "another structure"),
                           ({**new, "w": new["w"][:1]}, r"\['w'\] is float32\[1")):
        with pytest.raises(InvalidOption, match=message):
            f.swap(wrong)
    assert f.version == 3


def test_weights_are_the_endpoints_own_and_go_when_it_is_closed():
    w = aligned((16,), np.float32)
    w[:] = 1
    with ji.endpoint(lambda p, x: x + p.sum(), w, example=np.float32(0), max_batch=2) as f:
        w[:] = 2
        assert float(f(0)) == 16 and f.swap(w) == 2
        w[:] = 3
        assert float(f(0)) == 32
    assert f.params is None
    with pytest.raises(Closed):
        f.swap(w)
    with pytest.raises(InvalidOption, match="params must be a pytree of arrays"):
        ji.endpoint(lambda p, x: x, {"name": "a"}, example=np.float32(0))


def test_no_result_mixes_two_versions_and_none_is_lost():
    """Readers never lock: four threads ask while a fifth swaps."""
    constant = lambda number: {"a": np.full(64, number, np.float32), "b": np.full(64, number, np.float32)}
    call = lambda params, x: {"a": x + params["a"], "b": x + params["b"]}
    with ji.endpoint(call, constant(1), example=np.zeros(64, np.float32), max_batch=8) as f:
        f.warmup()
        wrong, count, stop = [], [0] * 4, threading.Event()

        def ask(i):
            while not stop.is_set():
                replies = [f.submit(np.zeros(64, np.float32)) for _ in range(8)]
                for reply in replies:
                    found = np.unique(np.concatenate(list(reply.result(10).values())))
                    if found.tolist() != [reply.version]:
                        wrong.append((found, reply.version))
                    count[i] += 1

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for number in range(2, 40):
            assert f.swap(constant(number)) == number
            time.sleep(0.005)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert not wrong and min(count) > 10
