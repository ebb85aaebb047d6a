"""Every kernel equals plain float64 numpy, and padding is inert: fixed shapes, random data, poison wherever nothing
is. Axes as in `kernels.attention`."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.graph import Pages
from jaxinfer.kernels import attend, layer_norm, matmul, matmul_dense, rms_norm, rope, tracing
from jaxinfer.kernels.attention import chunks, copy, write
from tests.strategies import DECODE, GROUP, MIXED, MIXED_SINGLES, PROMPT, SEEDS, RaggedRun, RunShape, ragged_runs

pytestmark = pytest.mark.usefixtures("strict")
H, SCALE = 8, 0.4
JUNK = (-(2**31), 2**31 - 1)  # what tables hold where nobody may look


@dataclass(frozen=True)
class Case:
    """What is compiled: a shape, N query heads on K KV heads, and how scores are masked and capped."""

    shape: RunShape
    heads: tuple[int, int]
    window: int | None = None
    cap: float | None = None
    dtype: str = "float32"

    @cache  # noqa: B019, one compile per case and implementation
    def forced(self, ways: tuple[tuple[str, str], ...]):
        def step(*args):
            with tracing("cpu", dict(ways)):
                return attend(*args, group=GROUP, scale=SCALE, window=self.window, softcap=self.cap)

        return jax.jit(step)


CASES = {
    "decode": Case(DECODE, (6, 2)),
    "decode in a window": Case(DECODE, (4, 4), window=6, dtype="bfloat16"),
    "prompt": Case(PROMPT, (4, 2), cap=3.0, dtype="bfloat16"),
    "prompt in a window": Case(PROMPT, (3, 1), window=1),
    "mixed": Case(MIXED, (4, 2), dtype="bfloat16"),
    "mixed in a window": Case(MIXED, (6, 2), window=7, cap=5.0),
    "a prompt beside decode rows": Case(MIXED_SINGLES, (4, 2)),
    "a prompt beside decode rows in a window": Case(MIXED_SINGLES, (6, 2), window=5, dtype="bfloat16"),
}


@dataclass(frozen=True)
class Numbers:
    """Random operands of a run, rounded to the pages' dtype: q, k and v of its real tokens, and what its rows have
    read before, in pages [pages, K, S, H] with NaN in every slot that nobody has written."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, ragged: RaggedRun, heads: tuple[int, int], dtype: str) -> "Numbers":
        rng, shape, (N, K) = np.random.default_rng(ragged.seed), ragged.shape, heads
        draw = lambda *of: np.asarray(jnp.asarray(rng.normal(size=of) * 2, dtype), np.float32)
        written = np.zeros((shape.pages, shape.S), bool)
        for cached, first, table in zip(ragged.cached, ragged.first, ragged.tables, strict=True):
            for at in range(first * shape.S, cached):
                written[table[at // shape.S], at % shape.S] = True
        pages = (np.where(written[:, None, :, None], draw(shape.pages, K, shape.S, H), np.nan) for _ in "kv")
        T = ragged.ends[-1]
        return cls(draw(T, N, H), draw(T, K, H), draw(T, K, H), tuple(pages))

    def padded(self, shape: RunShape, poison: float, dtype: str) -> tuple:
        """q, k, v and Pages for the op, with `poison` in padded tokens and in unwritten slots."""
        pad = lambda x: np.concatenate([x, np.full((shape.tokens - len(x), *x.shape[1:]), poison, np.float32)])
        fill = lambda page: jnp.asarray(np.where(np.isnan(page), poison, page), dtype)
        return (*(jnp.asarray(pad(x)) for x in (self.q, self.k, self.v)), Pages(*map(fill, self.pages)))

    def written(self, ragged: RaggedRun) -> list[np.ndarray]:
        """The pages after the run, keys and values."""
        pages = [page.copy() for page in self.pages]
        for t, (table, at) in enumerate(ragged.tokens):
            for page, new in zip(pages, (self.k, self.v), strict=True):
                page[table[at // ragged.shape.S], :, at % ragged.shape.S] = new[t]
        return pages

    def attended(self, ragged: RaggedRun, case: Case) -> np.ndarray:
        """Softmax attention in float64, token by token over all that its row has read."""
        (N, K), S, out = case.heads, ragged.shape.S, np.empty((ragged.ends[-1], case.heads[0], H))
        k_PSKH, v_PSKH = (page.swapaxes(1, 2).astype(np.float64) for page in self.written(ragged))
        for t, (table, at) in enumerate(ragged.tokens):
            seen = np.arange(0 if case.window is None else max(0, at - case.window + 1), at + 1)
            slots = np.array(table)[seen // S], seen % S
            k_SNH, v_SNH = np.repeat(k_PSKH[slots], N // K, 1), np.repeat(v_PSKH[slots], N // K, 1)
            scores = np.einsum("nh,snh->ns", self.q[t], k_SNH) * SCALE
            scores = scores if case.cap is None else case.cap * np.tanh(scores / case.cap)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[t] = np.einsum("ns,snh->nh", weights / weights.sum(1, keepdims=True), v_SNH)
        return out


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_attention_sees_what_its_row_has_read_and_nothing_else(name, data):
    case = CASES[name]
    ragged = data.draw(ragged_runs(case.shape, case.window))
    numbers = Numbers.of(ragged, case.heads, case.dtype)
    expected, real = numbers.attended(ragged, case), ragged.ends[-1]
    for how in attend.available("cpu"):
        outputs = []
        for poison, junk in zip((np.nan, 4096.0), JUNK, strict=True):
            q, k, v, pages = numbers.padded(case.shape, poison, case.dtype)
            out, after = case.forced((("attend", how),))(q, k, v, pages, ragged.run(junk))
            outputs.append(np.asarray(out)[:real])
            for found, page in zip(after, numbers.written(ragged), strict=True):
                np.testing.assert_array_equal(np.asarray(found, np.float32), np.where(np.isnan(page), poison, page))
        np.testing.assert_array_equal(*outputs, err_msg="padding is not inert")
        np.testing.assert_allclose(outputs[0], expected, atol=2e-5 if case.dtype == "float32" else 6e-2)


SHARED = [name for name, case in CASES.items() if case.shape.rows > 1]
WAYS = [*({"attend": how} for how in attend.available("cpu")), {"attend": "visits", "sum_by_row": "reference"}]


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: "+".join(ways.values()))
@pytest.mark.parametrize("name", SHARED)
@given(data=st.data())
def test_a_rows_nan_stays_in_that_row(name, ways, data):
    case = CASES[name]
    ragged = data.draw(ragged_runs(case.shape, case.window))
    numbers = Numbers.of(ragged, case.heads, case.dtype)
    r = data.draw(st.integers(0, len(ragged.lens) - 1), label="row")
    broken = data.draw(st.sets(st.sampled_from(["q", "k", "v", "cached k", "cached v"]), min_size=1), label="broken")
    own = set(ragged.tables[r]).difference(*(table for i, table in enumerate(ragged.tables) if i != r))
    mine = slice(ragged.ends[r] - ragged.lens[r], ragged.ends[r])
    dirty = deepcopy(numbers)
    for what in broken:
        if what in ("q", "k", "v"):
            getattr(dirty, what)[mine] = np.nan
        else:
            dirty.pages["kv".index(what[-1])][sorted(own)] = np.nan
    step = case.forced(tuple(ways.items()))
    outputs = [np.asarray(step(*n.padded(case.shape, np.nan, case.dtype), ragged.run(0))[0]) for n in (numbers, dirty)]
    others = np.setdiff1d(np.arange(ragged.ends[-1]), np.arange(mine.start, mine.stop))
    np.testing.assert_array_equal(*(out[others] for out in outputs))
    assert np.isfinite(outputs[0][:ragged.ends[-1]]).all()
    if broken & {"q", "k", "v"}:
        assert np.isnan(outputs[1][mine]).all(), "a NaN that the row sees is lost"


@pytest.mark.parametrize("how", write.available("cpu"))
@given(data=st.data())
def test_writing_touches_the_slots_of_real_tokens_and_no_other(how, data):
    ragged = data.draw(ragged_runs(MIXED))
    numbers = Numbers.of(ragged, (2, 2), "float32")
    _, k, v, pages = numbers.padded(MIXED, 4096.0, "float32")
    after = jitted_write(pages, k, v, ragged.run(JUNK[data.draw(st.integers(0, 1))]), how)
    for found, page in zip(after, numbers.written(ragged), strict=True):
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
    assert [chunks(platform) for platform in ("cpu", "gpu", "tpu")] == [0, 1, 1]
    for how in ("by_page", "reference"):
        with tracing("cpu", {"attend": how}):
            assert chunks("cpu") is None
    with tracing("cpu"):
        assert chunks("gpu") == 1, "the platform asked for decides, not the one being traced"
    assert {attend.available(platform)[0] for platform in ("cpu", "gpu", "tpu")} == {"visits"}


@given(seed=SEEDS, rows=st.sampled_from([1, 2, 5]))
def test_matmul_takes_one_row_as_it_takes_many(seed, rows):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(rows, 64)).astype(np.float32), rng.normal(size=(48, 64)).astype(np.float32)
    for how in matmul_dense.available("cpu"):
        np.testing.assert_allclose(matmul(jnp.asarray(x), jnp.asarray(w), how=how), x @ w.T, atol=1e-4)
        half = matmul(jnp.asarray(x), jnp.asarray(w, jnp.bfloat16), how=how)
        assert half.dtype == jnp.float32 and half.shape == (rows, 48)
        rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w)]
        np.testing.assert_allclose(half, rounded[0] @ rounded[1].T, atol=1e-4)


@given(seed=SEEDS, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_norms_equal_float64(seed, scale):
    rng = np.random.default_rng(seed)
    x, w, b = rng.normal(size=(5, 32)) * scale, rng.normal(size=32), rng.normal(size=32)
    f = lambda a: jnp.asarray(a, jnp.float32)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + w)
    np.testing.assert_allclose(rms_norm(f(x), f(w), 1e-5, 1.0), rms, rtol=2e-4, atol=2e-4)
    centred = x - x.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b
    np.testing.assert_allclose(layer_norm(f(x), f(w), f(b), 1e-5), layer, rtol=2e-4, atol=2e-4)


@given(seed=SEEDS, width=st.sampled_from([8, 16]))
def test_rope_turns_pairs_as_complex_numbers(seed, width):
    rng = np.random.default_rng(seed)
    x, angle = rng.normal(size=(3, 2, 16)), rng.normal(size=(3, width // 2))
    pairs = (x[..., : width // 2] + 1j * x[..., width // 2: width]) * np.exp(1j * angle)[:, None]
    expected = np.concatenate([pairs.real, pairs.imag, x[..., width:]], -1)
    both = np.concatenate([angle, angle], -1)
    f = lambda a: jnp.asarray(a, jnp.float32)
    np.testing.assert_allclose(rope(f(x), f(np.cos(both)), f(np.sin(both))), expected, atol=1e-5)


def test_an_op_refuses_an_implementation_it_does_not_have():
    with pytest.raises(ValueError, match="matmul has no implementation 'abacus'; it has"):
        matmul(jnp.ones((2, 2)), jnp.ones((2, 2)), how="abacus")
