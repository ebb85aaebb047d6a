"""Every kernel equals its reference, and padding is inert: fixed shapes, random data, poison wherever nothing is."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.graph import Pages, Run
from jaxinfer.kernels import attend, layer_norm, matmul, rms_norm, rope
from jaxinfer.kernels.attention import write

pytestmark = pytest.mark.usefixtures("strict")
PAGE, P, K, G, H = 16, 6, 2, 3, 16
# rows, tokens and longest row of a padded step: decode, one prompt, a mix of both
SHAPES = {"decode": (4, 4, 1), "prompt": (1, 24, 24), "mix": (4, 40, 20)}


@st.composite
def runs(draw, shape):
    """(Run, number of real tokens, written slots [pages, PAGE] before the step); pages are shared by no two rows."""
    R, T, longest = SHAPES[shape]
    rows = draw(st.integers(1, R))
    most = min(longest, T // rows)
    lens = [draw(st.integers(1, most)) for _ in range(rows)]
    ends = [draw(st.integers(n, P * PAGE)) for n in lens]
    pages = draw(st.permutations(range(R * P + 2)))
    table = np.asarray(pages[: R * P], np.int32).reshape(R, P)
    before = np.zeros((R * P + 2, PAGE), bool)
    for r in range(rows):
        for at in range(ends[r] - lens[r]):
            before[table[r, at // PAGE], at % PAGE] = True
        table[r, -(-ends[r] // PAGE):] = draw(st.integers(-(2**31), 2**31 - 1))  # junk past the row's pages
    cu_q_lens = np.full(R + 1, sum(lens), np.int32)
    cu_q_lens[: rows + 1] = np.concatenate([[0], np.cumsum(lens)])
    kv_lens_R = np.array(ends + [0] * (R - rows), np.int32)
    run = Run(np.zeros(T, np.int32), cu_q_lens, kv_lens_R, np.zeros(R, np.int32), {"g": table}, longest)
    return jax.tree.map(jnp.asarray, run), sum(lens), before


@cache
def compiled(how, window, cap):
    step = partial(attend, group="g", scale=0.25, window=window, softcap=cap, how=how)
    return jax.jit(step)


@pytest.mark.parametrize(("window", "cap", "dtype"),
                         [(None, None, "float32"), (7, 5.0, "float32"), (40, None, "bfloat16")])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", [how for how in attend.available("cpu") if how != "reference"])
@given(data=st.data())
def test_attention_equals_its_reference_whatever_the_padding_holds(how, shape, window, cap, dtype, data):
    run, real, before = data.draw(runs(shape))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    T = run.tokens_T.shape[0]
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) * 3
    q, k, v, kp, vp = draw(T, K * G, H), draw(T, K, H), draw(T, K, H), draw(26, K, PAGE, H), draw(26, K, PAGE, H)
    size = run.tables["g"].shape[0] * P + 2

    def outputs(how, poison):
        junk = lambda x: np.concatenate([x[:real], np.full_like(x[real:], poison)])
        fill = lambda page: jnp.asarray(np.where(before[:, None, :, None], page[:size], poison), dtype)
        pages = Pages(fill(kp), fill(vp))
        out, new = compiled(how, window, cap)(*(jnp.asarray(junk(x)) for x in (q, k, v)), pages, run)
        return np.asarray(out)[:real], [np.asarray(x, np.float32) for x in new]

    expected, written = outputs("reference", np.nan)
    found, also_written = outputs(how, np.nan)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == "float32" else 3e-2)
    for one, other in zip(written, also_written, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(outputs(how, 1e4)[0], found)


@given(data=st.data(), shape=st.sampled_from(sorted(SHAPES)))
def test_writing_touches_the_slots_of_real_tokens_and_no_other(data, shape):
    run, real, before = data.draw(runs(shape))
    pages = Pages(*[jnp.zeros((before.shape[0], K, PAGE, H))] * 2)
    k = jnp.ones((run.tokens_T.shape[0], K, H))
    for how in write.available("cpu"):
        new = np.asarray(write(pages, k, k, run, "g", how=how).k)
        assert new.sum() == real * K * H and set(np.unique(new)) <= {0.0, 1.0}
        assert not new.transpose(0, 2, 1, 3)[before].any()


@given(seed=st.integers(0, 2**32 - 1), rows=st.sampled_from([1, 2, 5]))
def test_matmul_takes_one_row_as_it_takes_many(seed, rows):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(rows, 64)).astype(np.float32), rng.normal(size=(48, 64)).astype(np.float32)
    for how in matmul.available("cpu"):
        np.testing.assert_allclose(matmul(jnp.asarray(x), jnp.asarray(w), how=how), x @ w.T, atol=1e-4)
        half = matmul(jnp.asarray(x), jnp.asarray(w, jnp.bfloat16), how=how)
        assert half.dtype == jnp.float32 and half.shape == (rows, 48)
        rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w)]
        np.testing.assert_allclose(half, rounded[0] @ rounded[1].T, atol=1e-4)


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_norms_equal_float64(seed, scale):
    rng = np.random.default_rng(seed)
    x, w, b = rng.normal(size=(5, 32)) * scale, rng.normal(size=32), rng.normal(size=32)
    f = lambda a: jnp.asarray(a, jnp.float32)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + w)
    np.testing.assert_allclose(rms_norm(f(x), f(w), 1e-5, 1.0), rms, rtol=2e-4, atol=2e-4)
    centred = x - x.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b
    np.testing.assert_allclose(layer_norm(f(x), f(w), f(b), 1e-5), layer, rtol=2e-4, atol=2e-4)


@given(seed=st.integers(0, 2**32 - 1), width=st.sampled_from([8, 16]))
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
