"""Pages in eight bits: how near they are to what they hold, what they cost, and that a model runs on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer.errors import InvalidOption
from jaxinfer.frontend.architectures import architecture
from jaxinfer.kernels.quantised_pages import FORMATS, QuantisedPages, numbers, rounded
from jaxinfer.runtime import memory as planning
from jaxinfer.testing import SEEDS
from tests import tiny
from tests.likely import HOW, PROMPTS, apart, likeliest
from tests.running import all_free, eventually

NEAR = {"int8": (0.51 / 127, 0.0), "fp8": (2.0**-10 / 448, 2.0**-4)}  # shares of a head's largest, and of each number


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FORMATS)
@given(seed=SEEDS, size=st.sampled_from((1.0, 2.0**-60, 2.0**60)))
def test_a_number_is_as_near_as_its_head_allows_and_no_head_sees_another(kind, dtype, seed, size):
    rng = np.random.default_rng(seed)
    x_XH = rng.normal(size=(6, 8)) * size * 2.0 ** rng.integers(-20, 20, (6, 1))
    x_XH[1], x_XH[2, 3], x_XH[4, 5] = 0, np.nan, np.inf
    x_XH = np.asarray(jnp.asarray(x_XH, dtype), np.float32)
    bits, scale_X = jax.jit(rounded, static_argnums=(1, 2))(x_XH, FORMATS[kind], dtype)
    assert scale_X.dtype == dtype and bits.dtype.itemsize == 1
    with np.errstate(invalid="ignore"):  # infinity x 0
        held_XH = np.asarray(numbers(bits, jnp.float32)) * np.asarray(scale_X, np.float32)[:, None]
    assert np.isnan(held_XH[[2, 4]]).any(1).all() and not np.isfinite(np.asarray(scale_X, np.float32)[[2, 4]]).any()
    real = [0, 1, 3, 5]
    slack = 2.0**-8 if dtype == "bfloat16" else 2.0**-20  # of the largest, where its scale was rounded down
    of_largest, of_each = NEAR[kind]
    largest_X1 = np.abs(x_XH[real]).max(1, keepdims=True)
    near_XH = (of_largest + slack) * largest_X1 + of_each * np.abs(x_XH[real])
    assert (np.abs(held_XH[real] - x_XH[real]) <= near_XH).all() and not held_XH[1].any()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_memory_holds_nearly_twice_the_tokens(kind):
    graph = architecture({**tiny.PLAIN, "head_dim": 128}, max_context=1024).graph()
    size = dict(dtype=jnp.bfloat16, max_context=1024, max_rows=512, chunk=64, budget=40 << 20, why="")
    (plain,), (small,) = (planning.page_groups(graph, kv_cache_dtype=kv, **size) for kv in (None, kind))
    assert 1.9 < small.pages / plain.pages < 2
    state = planning.abstract_state(graph, (small,), jnp.bfloat16, kind)
    assert planning.held(state) == graph.groups[0].layers * 2 * small.pages * 64 * 2 * (128 + 2)


@pytest.fixture(scope="module")
def floats(tiny_path):
    with ji.load(tiny_path, **HOW) as lm:
        return likeliest(lm)


@pytest.mark.parametrize(("kind", "near"), [("bfloat16", 0.05), ("int8", 0.08), ("fp8", 0.3)])
def test_a_model_finds_nearly_the_same_likely_whatever_its_pages_hold(tiny_path, floats, kind, near):
    with ji.load(tiny_path, kv_cache_dtype=kind, **HOW) as lm:
        for found, expected in zip(likeliest(lm), floats, strict=True):
            shared, distance = apart(found, expected)
            assert shared > 15 and 0 < distance < near
        layers = lm._engine.state["full"]
        assert {isinstance(pages, QuantisedPages) for pages in layers} == {kind in FORMATS}


def test_an_answer_over_fp8_is_the_same_to_the_bit_alone_in_company_and_forked(tiny_path):
    sampling = dict(max_tokens=12, ignore_eos=True, logprobs=2)
    told = lambda output: (output.tokens, output.logprobs)
    with ji.load(tiny_path, kv_cache_dtype="fp8", **HOW) as lm:
        alone = [told(lm(prompt, reuse=False, **sampling)) for prompt in PROMPTS]
        assert alone == [told(o) for o in lm.generate(PROMPTS[::-1], reuse=False, **sampling)][::-1]
        first = [told(lm(PROMPTS[-1], temperature=0.9, seed=5 + i, reuse=False, **sampling)) for i in range(3)]
        forked = lm(PROMPTS[-1], n=3, temperature=0.9, seed=5, **sampling)
        assert [told(o) for o in forked.samples] == first and forked.samples[-1].reused == len(PROMPTS[-1]) - 1
        assert eventually(lambda: all_free(lm))


def test_each_step_in_its_own_bucket_answers_over_int8_as_well(tiny_path):
    sampling = dict(max_tokens=8, ignore_eos=True)
    with ji.load(tiny_path, kv_cache_dtype="int8", **HOW) as lm:
        wanted = lm(PROMPTS[-1], **sampling).tokens
    with ji.load(tiny_path, kv_cache_dtype="int8", max_context=256, max_rows=1) as lm:
        assert lm(PROMPTS[-1], **sampling).tokens == wanted
        assert {e.kernels["attend"] for e in lm.ledger if "attend" in e.kernels} == {"visits"}


@pytest.mark.parametrize("wrong", ["int4", "fp8_e5m2", 8, jnp.int8])
def test_a_dtype_that_pages_cannot_have_is_refused_with_those_they_can(tiny_path, wrong):
    with pytest.raises(InvalidOption, match=r"kv_cache_dtype is .*; it must be one of float32, bfloat16, int8, fp8, or "
                                            "None for the model's dtype"):
        ji.load(tiny_path, kv_cache_dtype=wrong)
