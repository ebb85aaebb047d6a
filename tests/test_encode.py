"""What encoders are made of equals plain float64 numpy, row by row, whatever padding holds. Axes as in
`kernels.encode`."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.kernels import tracing
from jaxinfer.kernels.encode import POOLS, attend_rows, first_R, normalise, pool
from jaxinfer.testing import SEEDS
from tests.encoding import Bucket, pack

pytestmark = pytest.mark.usefixtures("strict")
N, H, SCALE = 3, 8, 0.4
BUCKETS = {"rows": Bucket(24, 5, 11), "one row": Bucket(16, 1, 16), "room to spare": Bucket(12, 3, 32)}


@st.composite
def lengths(draw, bucket: Bucket) -> list[int]:
    """Rows of any length that the bucket holds; those of no tokens stand for padded rows in between."""
    lens: list[int] = []
    for _ in range(draw(st.integers(1, bucket.rows))):
        lens.append(draw(st.integers(0, min(bucket.longest, bucket.tokens - sum(lens)))))
    return lens


def run_of(lens: list[int], bucket: Bucket):
    return pack([[0] * n for n in lens], bucket)


def padded(x, bucket: Bucket, poison: float, dtype: str = "float32"):
    """The rows of `x`, side by side, with `poison` in the padding."""
    rest = np.full((bucket.tokens - len(x), *x.shape[1:]), poison)
    return jnp.asarray(np.concatenate([x, rest]), dtype)


@cache
def jitted(how: str, biased: bool):
    def step(q_TNH, k_TNH, v_TNH, run, bias_NLL):
        with tracing("cpu", {"attend_rows": how}):
            return attend_rows(q_TNH, k_TNH, v_TNH, run, scale=SCALE, bias_NLL=bias_NLL if biased else None)

    return jax.jit(step)


def attended(q_LNH, k_LNH, v_LNH, bias_NLL) -> np.ndarray:
    """Softmax attention in float64, of one row by itself."""
    scores_NLL = np.einsum("qnh,snh->nqs", q_LNH, k_LNH) * SCALE + bias_NLL[:, : len(q_LNH), : len(q_LNH)]
    weights_NLL = np.exp(scores_NLL - scores_NLL.max(2, keepdims=True))
    return np.einsum("nqs,snh->qnh", weights_NLL / weights_NLL.sum(2, keepdims=True), v_LNH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", BUCKETS)
@given(data=st.data())
def test_a_token_sees_all_of_its_row_and_nothing_else(name, biased, dtype, data):
    bucket, rng = BUCKETS[name], np.random.default_rng(data.draw(SEEDS))
    lens = data.draw(lengths(bucket), label="lens")
    total = sum(lens)
    q, k, v = (np.asarray(jnp.asarray(rng.normal(size=(total, N, H)) * 2, dtype), np.float64) for _ in "qkv")
    bias_NLL = rng.normal(size=(N, bucket.longest, bucket.longest)) * biased
    cuts = np.cumsum(lens)[:-1]
    expected = np.concatenate([attended(*row, bias_NLL) if len(row[0]) else row[0]
                               for row in zip(*(np.split(x, cuts) for x in (q, k, v)), strict=True)])
    for how in attend_rows.available("cpu"):
        outputs = []
        for poison in (np.nan, 4096.0):
            args = (padded(x, bucket, poison, dtype) for x in (q, k, v))
            out = jitted(how, biased)(*args, run_of(lens, bucket), jnp.asarray(bias_NLL, jnp.float32))
            outputs.append(np.asarray(out)[:total])
        np.testing.assert_array_equal(*outputs, err_msg="padding is not inert")
        np.testing.assert_allclose(outputs[0], expected, atol=2e-5 if dtype == "float32" else 6e-2)


@pytest.mark.parametrize("how", attend_rows.available("cpu"))
@given(data=st.data())
def test_a_rows_nan_stays_in_that_row(how, data):
    bucket, rng = BUCKETS["rows"], np.random.default_rng(data.draw(SEEDS))
    lens = data.draw(lengths(bucket).filter(lambda lens: sum(n > 0 for n in lens) > 1), label="lens")
    row = data.draw(st.sampled_from([r for r, n in enumerate(lens) if n]), label="row")
    mine = slice(sum(lens[:row]), sum(lens[: row + 1]))
    q, k, v = (rng.normal(size=(sum(lens), N, H)) for _ in "qkv")
    broken = data.draw(st.sampled_from("qkv"), label="broken")
    dirty = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
    dirty[broken][mine] = np.nan
    step, run = partial(jitted(how, False), bias_NLL=jnp.zeros((N, 11, 11))), run_of(lens, bucket)
    read = lambda xs: np.asarray(step(*(padded(x, bucket, np.nan) for x in xs), run))
    clean, spoilt = read((q, k, v)), read(dirty.values())
    others = np.setdiff1d(np.arange(sum(lens)), np.arange(mine.start, mine.stop))
    np.testing.assert_array_equal(clean[others], spoilt[others])
    assert np.isnan(spoilt[mine]).all(), "a NaN that the row sees is lost"


PLAIN = {
    "mean": lambda x: x.mean(0),
    "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
    "weightedmean": lambda x: np.average(x, 0, np.arange(len(x)) + 1),
    "max": lambda x: x.max(0),
    "cls": lambda x: x[0],
    "lasttoken": lambda x: x[-1],
}


@pytest.mark.parametrize("how", POOLS)
@given(data=st.data())
def test_a_rows_vector_comes_from_its_own_tokens(how, data):
    bucket, rng = BUCKETS["rows"], np.random.default_rng(data.draw(SEEDS))
    lens = data.draw(lengths(bucket), label="lens")
    x_TD = rng.normal(size=(sum(lens), 4))
    expected = [PLAIN[how](x) if len(x) else np.zeros(4) for x in np.split(x_TD, np.cumsum(lens)[:-1])]
    for poison in (np.nan, 4096.0):
        found_RD = np.asarray(pooled(how)(padded(x_TD, bucket, poison), run_of(lens, bucket)))
        np.testing.assert_allclose(found_RD[: len(lens)], expected, atol=1e-5)
        assert np.isfinite(found_RD).all(), "a padded row's vector is not finite"


@cache
def pooled(how: str):
    return jax.jit(partial(pool, how=how))


def test_the_first_tokens_are_where_rows_begin_and_padded_rows_stay_in_bounds():
    assert first_R(run_of([4, 0, 8], BUCKETS["room to spare"])).tolist() == [0, 4, 4]
    assert first_R(run_of([7, 9, 8], BUCKETS["rows"])).tolist() == [0, 7, 16, 23, 23]


def test_a_normalised_vector_has_length_one_unless_it_is_zero():
    x_RD = normalise(jnp.asarray([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(x_RD, [[0.6, 0.8], [0, 0]], atol=1e-7)
