"""Every reference equals plain float64 numpy, every kernel its reference, and padding is inert: fixed shapes, random
data, poison wherever nothing is. Axes as in `kernels.attention`."""

from copy import deepcopy
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.graph import Pages
from jaxinfer.kernels import OPS, Op, attend, copy, layer_norm, matmul_dense, rms_norm, rope, tracing, write
from jaxinfer.kernels.attention import chunks
from jaxinfer.kernels.attention_gpu import attend_triton
from jaxinfer.testing import (
    DECODE,
    GROUP,
    MIXED,
    MIXED_SINGLES,
    PROMPT,
    SEEDS,
    AttendCase,
    Numbers,
    attend_cases,
    call,
    check_op,
    matmul_cases,
    norm_cases,
    ragged_runs,
)

pytestmark = pytest.mark.usefixtures("strict")
H = 8
JUNK = (-(2**31), 2**31 - 1)  # what tables hold where nobody may look

CASES = {
    "decode": dict(shape=DECODE, heads=(6, 2)),
    "decode in a window": dict(shape=DECODE, heads=(4, 4), window=6, dtype="bfloat16"),
    "decode with sinks": dict(shape=DECODE, heads=(4, 2), sinks=True),
    "decode over fp8": dict(shape=DECODE, heads=(4, 2), kv_cache_dtype="fp8", softcap=4.0, sinks=True, window=6),
    "decode over int8": dict(shape=DECODE, heads=(6, 2), kv_cache_dtype="int8", dtype="bfloat16", window=6),
    "prompt": dict(shape=PROMPT, heads=(4, 2), softcap=3.0, dtype="bfloat16"),
    "prompt in a window": dict(shape=PROMPT, heads=(3, 1), window=1),
    "prompt over fp8": dict(shape=PROMPT, heads=(3, 1), kv_cache_dtype="fp8"),
    "mixed": dict(shape=MIXED, heads=(4, 2), dtype="bfloat16"),
    "mixed in a window": dict(shape=MIXED, heads=(6, 2), window=7, softcap=5.0),
    "mixed over int8": dict(shape=MIXED, heads=(4, 2), kv_cache_dtype="int8", sinks=True),
    "mixed over fp8": dict(shape=MIXED, heads=(6, 2), kv_cache_dtype="fp8", dtype="bfloat16", window=7, softcap=5.0,
                           sinks=True),
    "a prompt beside decode rows": dict(shape=MIXED_SINGLES, heads=(4, 2)),
    "a prompt beside decode rows in a window": dict(shape=MIXED_SINGLES, heads=(6, 2), window=5, dtype="bfloat16",
                                                    sinks=True),
}


def attended(case: AttendCase) -> np.ndarray:
    """Softmax attention in float64, token by token over all that its row has read."""
    ragged, numbers = case.ragged, case.numbers
    window, cap, scale = (case.options[name] for name in ("window", "softcap", "scale"))
    S, (T, N, _), K = ragged.shape.S, numbers.q.shape, numbers.k.shape[1]
    k_PSKH, v_PSKH = (page.swapaxes(1, 2).astype(np.float64) for page in numbers.written(ragged))
    sinks_N = np.asarray(case.arrays.get("sinks_N", np.full(N, -np.inf)), np.float64)
    out = np.empty((T, N, H))
    for t, (table, at) in enumerate(ragged.tokens):
        seen = np.arange(0 if window is None else max(0, at - window + 1), at + 1)
        slots = np.array(table)[seen // S], seen % S
        k_SNH, v_SNH = np.repeat(k_PSKH[slots], N // K, 1), np.repeat(v_PSKH[slots], N // K, 1)
        scores = np.einsum("nh,snh->ns", numbers.q[t], k_SNH) * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        top = np.maximum(scores.max(1), sinks_N)[:, None]
        weights = np.exp(scores - top)
        out[t] = np.einsum("ns,snh->nh", weights / (weights.sum(1, keepdims=True) + np.exp(sinks_N[:, None] - top)),
                           v_SNH)
    return out


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_attention_sees_what_its_row_has_read_and_nothing_else(name, data):
    case = data.draw(attend_cases(**CASES[name]))
    out, pages = call(attend.reference, case)
    np.testing.assert_allclose(case.real((out, pages)), attended(case), atol=case.atol)
    for found, page in zip(held(pages), case.numbers.written(case.ragged), strict=True):
        np.testing.assert_array_equal(found, page)  # NaN where nobody has written
    check_op(attend, case, batch_invariant=("by_page",))


def held(pages) -> list[np.ndarray]:
    """Keys and values of all pages."""
    return [np.asarray(x, np.float32) for x in jax.tree.map(jnp.asarray, pages).read(np.arange(len(pages.k)))]


def attend_for_gpus(*args, **options):
    """In Pallas' interpreter, since there is no GPU here."""
    return attend_triton(*args, **options)


@pytest.mark.parametrize("name", ["decode in a window", "decode with sinks", "prompt", "mixed in a window",
                                  "decode over int8", "decode over fp8", "mixed over int8", "mixed over fp8"])
@given(data=st.data())
def test_the_kernels_for_gpus_attend_as_the_reference_does(name, data):
    check_op(attend_for_gpus, data.draw(attend_cases(**CASES[name])), reference=attend.reference)


@pytest.mark.parametrize(("slots", "width", "taken"), [
    (64, 128, True), (16, 96, True), (24, 64, False), (8, 64, False)])
def test_pages_that_triton_cannot_read_are_left_to_others(slots, width, taken):
    page = jnp.zeros((2, 1, slots, width))
    x = jnp.zeros((1, 1, width))
    for options in ({}, {"sinks_N": jnp.zeros(1), "window": 5, "softcap": 3.0}):
        assert attend.takes("triton", x, x, x, Pages(page, page), None, **options) is taken


def visits_summed_by_product(*args, **options):
    with tracing("cpu", {"attend": "visits", "sum_by_row": "reference"}):
        return attend(*args, **options)


SHARED = ("decode in a window", "decode with sinks", "mixed in a window", "a prompt beside decode rows",
          "mixed over fp8")
WAYS = [attend.reference, *(way for platforms, way, *_ in attend.fast.values() if "cpu" in platforms),
        visits_summed_by_product]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", SHARED)
@given(data=st.data())
def test_a_rows_nan_stays_in_that_row(name, way, data):
    case, shape = data.draw(attend_cases(**CASES[name])), CASES[name]["shape"]
    ragged, numbers = case.ragged, case.numbers
    r = data.draw(st.integers(0, len(ragged.lens) - 1), label="row")
    broken = data.draw(st.sets(st.sampled_from(["q", "k", "v", "cached k", "cached v"]), min_size=1), label="broken")
    own = set(ragged.tables[r]).difference(*(table for i, table in enumerate(ragged.tables) if i != r))
    mine = ragged.mine(r)
    dirty = deepcopy(numbers)
    for what in broken:
        if what in ("q", "k", "v"):
            getattr(dirty, what)[mine] = np.nan
        else:
            dirty.pages["kv".index(what[-1])][sorted(own)] = np.nan
    outputs = [call(way, case, (*n.padded(shape, np.nan), ragged.run(0)))[0] for n in (numbers, dirty)]
    others = np.setdiff1d(np.arange(ragged.ends[-1]), np.arange(mine.start, mine.stop))
    np.testing.assert_array_equal(*(out[others] for out in outputs))
    assert np.isfinite(outputs[0][:ragged.ends[-1]]).all()
    if broken & {"q", "k", "v"}:
        assert np.isnan(outputs[1][mine]).all(), "a NaN that the row sees is lost"


@pytest.mark.parametrize("how", write.available("cpu"))
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8", "fp8"])
@given(data=st.data())
def test_writing_touches_the_slots_of_real_tokens_and_no_other(how, kv_cache_dtype, data):
    ragged = data.draw(ragged_runs(MIXED))
    numbers = Numbers.of(ragged, (2, 2), "float32", kv_cache_dtype=kv_cache_dtype)
    _, k, v, pages = numbers.padded(MIXED, 4096.0)
    after = jitted_write(pages, k, v, ragged.run(JUNK[data.draw(st.integers(0, 1))]), how)
    for found, page in zip(held(after), numbers.written(ragged), strict=True):
        np.testing.assert_array_equal(found, np.where(np.isnan(page), 4096.0, page))


@partial(jax.jit, static_argnames="how")
def jitted_write(pages, k, v, run, how):
    return write(pages, k, v, run, GROUP, how=how)


@pytest.mark.parametrize("how", copy.available("cpu"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
def test_copied_pages_hold_what_their_sources_held_before(how, dtype, data):
    """Padding anywhere; a page may be read, then written; it is never written, then read."""
    rng = np.random.default_rng(data.draw(SEEDS))
    before = [np.asarray(jnp.asarray(rng.normal(size=(10, 2, 4, H)), dtype), np.float32) for _ in "kv"]
    to = data.draw(st.lists(st.integers(0, 9), unique=True, max_size=6), label="to")
    pairs = [(data.draw(st.sampled_from(sorted(set(range(10)) - set(to[:i])))), new) for i, new in enumerate(to)]
    expected = [page.copy() for page in before]
    for old, new in pairs:
        for page, was in zip(expected, before, strict=True):
            page[new] = was[old]
    for _ in range(6 - len(pairs)):
        padding = data.draw(st.integers(0, 9)), data.draw(st.integers(10, 99))
        pairs.insert(data.draw(st.integers(0, len(pairs))), padding)
    after = jitted_copy(how)(Pages(*(jnp.asarray(page, dtype) for page in before)), *np.array(pairs, np.int32).T)
    for found, page in zip(after, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), page)


@cache
def jitted_copy(how):
    return jax.jit(partial(copy, how=how), donate_argnums=0)


def test_copying_a_page_copies_no_pool():
    page = jax.ShapeDtypeStruct((4096, 2, 16, 16), jnp.bfloat16)
    pair = jax.ShapeDtypeStruct((4,), jnp.int32)
    memory = jitted_copy("loop").lower(Pages(page, page), pair, pair).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * page.size * 2 and memory.temp_size_in_bytes < page.size // 8


def test_what_attends_says_what_a_step_may_mix():
    assert [chunks(platform) for platform in ("cpu", "gpu", "tpu")] == [0, None, 1]
    for how in ("by_page", "reference"):
        with tracing("cpu", {"attend": how}):
            assert chunks("cpu") is None
    with tracing("cpu"):
        assert chunks("gpu") is None, "the platform asked for decides, not the one being traced"
    assert [attend.available(platform)[0] for platform in ("cpu", "gpu", "tpu")] == ["visits", "triton", "ragged"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 5])
@given(data=st.data())
def test_matmul_takes_one_row_as_it_takes_many(rows, dtype, data):
    case = data.draw(matmul_cases(rows, dtype=dtype))
    x, w = (np.asarray(array.astype(dtype), np.float64) for array in case.args)
    found = call(matmul_dense.reference, case)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, x @ w.T, atol=case.atol)
    check_op(matmul_dense, case)


@given(case=norm_cases(offset=1.0))
def test_norms_equal_float64(case):
    x, w = (np.asarray(array, np.float64) for array in case.args)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + w)
    np.testing.assert_allclose(call(rms_norm, case), rms, rtol=case.rtol, atol=case.atol)
    centred = x - x.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + w[::-1]
    x, w = case.args
    np.testing.assert_allclose(layer_norm(x, w, w[::-1], 1e-5), layer, rtol=2e-4, atol=2e-4)


@given(seed=SEEDS, width=st.sampled_from([8, 16]))
def test_rope_turns_pairs_as_complex_numbers(seed, width):
    rng = np.random.default_rng(seed)
    x, angle = rng.normal(size=(3, 2, 16)), rng.normal(size=(3, width // 2))
    pairs = (x[..., : width // 2] + 1j * x[..., width // 2: width]) * np.exp(1j * angle)[:, None]
    expected = np.concatenate([pairs.real, pairs.imag, x[..., width:]], -1)
    both = np.concatenate([angle, angle], -1)
    f = lambda a: jnp.asarray(a, jnp.float32)
    np.testing.assert_allclose(rope(f(x), f(np.cos(both)), f(np.sin(both))), expected, atol=1e-5)


def test_whatever_a_model_is_made_of_can_be_replaced_by_name():
    assert set(OPS) >= {"attend", "rms_norm", "layer_norm", "rope", "gated", "matmul", "matmul_int8", "matmul_int4",
                        "matmul_fp8", "routed_ffn", "truncate", "logprobs"}
    half = lambda x, weight, eps, offset=0.0: x / 2
    rms_norm.add("half", ("cpu",), half)
    try:
        with tracing("cpu", {"rms_norm": "half"}) as traced:
            assert rms_norm(jnp.ones((1, 2)), jnp.ones(2), 0.0).tolist() == [[0.5, 0.5]]
        assert traced.chosen == {"rms_norm": "half"}
    finally:
        del rms_norm.fast["half"]


def test_an_op_refuses_an_implementation_it_does_not_have():
    with pytest.raises(ValueError, match="matmul has no implementation 'abacus'; it has"):
        matmul_dense(jnp.ones((2, 2)), jnp.ones((2, 2)), how="abacus")


def test_an_implementation_of_ones_own_is_taken_where_it_is_forced_or_the_only_one_for_a_call():
    op = Op("halve", reference=lambda x: x / 2, fast={"shift": (("cpu",), lambda x: x >> 1, lambda x: x % 2 == 0)})
    op.add("mine", ("cpu",), lambda x: x * 0.5, takes=lambda x: x > 0)
    assert (op(4), op(3), op(-3), op(4, how="mine")) == (2, 1.5, -1.5, 2.0)
    assert op.available("cpu") == ["shift", "mine", "reference"] and op.available("tpu") == ["reference"]
    with tracing("cpu", {"halve": "mine"}) as trace:
        assert type(op(4)) is float and trace.chosen == {"halve": "mine"}
        assert (op(-4), op(-3), op(2)) == (-2, -1.5, 1.0) and trace.chosen == {"halve": "mine+shift+reference"}
        with pytest.raises(ValueError, match="halve: 'mine' was asked for, and is not for a call"):
            op(-4, how="mine")
    with tracing("cpu", {"halve": "abacus"}), pytest.raises(ValueError, match="halve has no implementation 'abacus'"):
        op(4)
    with pytest.raises(ValueError, match="cannot be replaced"):
        op.add("reference", ("cpu",), abs)
