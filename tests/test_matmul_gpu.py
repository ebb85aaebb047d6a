"""The matmul for few tokens on GPUs computes what the reference does, here in Pallas' interpreter, and is taken where
it is for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AbstractMesh

from jaxinfer.graphs.decoder import ACTIVATIONS
from jaxinfer.kernels import gated, matmul, project, tracing
from jaxinfer.kernels.matmul import BATCH
from jaxinfer.kernels.quantised import FORCED, FP8, INT4, INT8, Quantised, blank, quantise
from jaxinfer.kernels.tuned import trying
from jaxinfer.testing import SEEDS

WEIGHTS = jax.ShapeDtypeStruct((256, 384), jnp.bfloat16)
forced = {how: jax.jit(partial(matmul, how=how)) for how in ("few", "reference")}


def arrays(seed: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    x_key, w_key = jax.random.split(jax.random.key(seed))
    return (jax.random.normal(x_key, (tokens, WEIGHTS.shape[1])),
            jax.random.normal(w_key, WEIGHTS.shape, WEIGHTS.dtype) / 16)


@pytest.mark.parametrize("tokens", [3, 16])
@given(seed=SEEDS)
def test_few_tokens_are_multiplied_as_many_are(tokens, seed):
    x_TI, w_OI = arrays(seed, tokens)
    np.testing.assert_allclose(forced["few"](x_TI, w_OI), forced["reference"](x_TI, w_OI), atol=1e-5)
    spoilt_TI = x_TI.at[tokens - 1, 5].set(jnp.nan)
    found_TO = np.asarray(forced["few"](spoilt_TI, w_OI))
    assert np.isnan(found_TO[-1]).all() and np.isfinite(found_TO[:-1]).all(), "a token's NaN is its own"


def four_bits(w_OI: np.ndarray) -> Quantised:
    return jax.tree.map(jnp.asarray, quantise(w_OI, blank(INT4, w_OI.shape, "bfloat16")))


@pytest.mark.parametrize(("tokens", "shape"), [(3, (64, 384)), (17, (128, 1024))])
@given(seed=SEEDS)
def test_weights_of_four_bits_are_multiplied_as_what_they_stand_for(tokens, shape, seed):
    rng, (O, I) = np.random.default_rng(seed), shape
    x_TI, size_O1 = rng.normal(size=(tokens, I)).astype(np.float32), 10.0 ** rng.uniform(-3, 0, (O, 1))
    x_TI[0] *= 1e5
    w_OI = four_bits((rng.normal(size=shape) + rng.normal(size=(O, 1))) * size_O1)  # few have a mean of zero
    exact_OI = np.asarray(w_OI.dequantised(), np.float64)
    found_TO = np.asarray(forced["few"](x_TI, w_OI))
    size_TO = np.abs(x_TI) @ np.abs(exact_OI).T
    assert found_TO.dtype == np.float32
    np.testing.assert_array_less(np.abs(found_TO - x_TI.astype(np.float64) @ exact_OI.T), size_TO * 2**-10)
    x_TI[1, 5] = np.nan
    spoilt_TO = np.asarray(forced["few"](x_TI, w_OI))
    assert np.isnan(spoilt_TO[1]).all() and (spoilt_TO[2:] == found_TO[2:]).all(), "a token's NaN is its own"


def test_they_are_gated_in_one_kernel():
    x_TI, w_OI = arrays(1, 5)
    w_OI = four_bits(w_OI)
    act = lambda x_TI, w_OI: gated(x_TI, w_OI, jax.nn.silu, how="few")
    found_TF, expected_TF = act(x_TI, w_OI), gated(x_TI, w_OI.dequantised(), jax.nn.silu, how="reference")
    assert found_TF.dtype == jnp.bfloat16
    np.testing.assert_allclose(found_TF.astype(jnp.float32), expected_TF, atol=2e-2, rtol=1e-2)
    assert str(jax.make_jaxpr(act)(x_TI, w_OI)).count("pallas_call") == 1


def test_blocks_of_more_inputs_than_a_weight_s_are_whole_ones_of_fewer():
    x_TI, w_OI = arrays(2, 2)
    w_OI = four_bits(w_OI[:64])
    with trying({"few_int4/1/16": (64, 512, 2, 3, 96)}):
        large_TO = matmul(x_TI, w_OI, how="few")
    with trying({"few_int4/1/16": (32, 128, 2, 3, 1)}):
        np.testing.assert_allclose(large_TO, matmul(x_TI, w_OI, how="few"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("name", "how"), [
    ("silu", "few"), ("gelu_tanh", "few"), ("silu", "rounded"), ("gelu", "rounded")])
def test_what_is_gated_on_a_gpu_is_the_references_to_the_weights_rounding(name, how):
    x_TI, w_OI = arrays(1, 5)
    found_TF = gated(x_TI, w_OI, ACTIVATIONS[name], how=how)
    expected_TF = gated(x_TI, w_OI, ACTIVATIONS[name], how="reference")
    np.testing.assert_allclose(found_TF.astype(jnp.float32), expected_TF, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("tokens", [3, 17])
@given(seed=SEEDS)
def test_weights_of_eight_bits_are_multiplied_as_what_they_stand_for(tokens, seed):
    x_TI, w_OI = (np.asarray(x, np.float32) for x in arrays(seed, tokens))
    w_OI = jax.tree.map(jnp.asarray, quantise(w_OI, blank(INT8, w_OI.shape, "bfloat16")))
    exact_OI = np.asarray(w_OI.dequantised(), np.float64)
    found_TO, size_TO = np.asarray(forced["few"](x_TI, w_OI)), np.abs(x_TI) @ np.abs(exact_OI).T
    np.testing.assert_array_less(np.abs(found_TO - x_TI.astype(np.float64) @ exact_OI.T), size_TO * 2**-10)
    found_TF = gated(x_TI, w_OI, jax.nn.silu, how="few")
    expected_TF = gated(x_TI, w_OI.dequantised(), jax.nn.silu, how="reference")
    np.testing.assert_allclose(found_TF.astype(jnp.float32), expected_TF, atol=2e-2, rtol=1e-2)


def test_what_is_added_to_a_stream_is_rounded_where_tokens_are_many():
    x_TI, w_OI = arrays(2, BATCH + 1)
    found_TO, exact_TO = (project(x_TI, w_OI, how=how) for how in ("rounded", "reference"))
    assert found_TO.dtype == jnp.float32 and (found_TO == found_TO.astype(jnp.bfloat16)).all()
    np.testing.assert_allclose(found_TO, exact_TO, rtol=2**-8, atol=1e-5)
    assert [chosen(tokens, WEIGHTS, "project") for tokens in (BATCH, BATCH + 1)] == ["reference", "rounded"]
    int8, fp8 = (blank(format, WEIGHTS.shape, jnp.bfloat16) for format in (INT8, FP8))
    assert [chosen(BATCH + 1, w, "project") for w in (int8, fp8)] == ["reference", "rounded"]


def chosen(tokens: int, w_OI, op: str = "matmul", activation="silu", bias=None, **how) -> str:
    """What is taken; a fresh partial, since of a function that it has traced JAX would not ask again."""
    act = {"matmul": matmul, "project": project,
           "gated": lambda x, w: gated(x, w, ACTIVATIONS[activation], bias_O=bias)}[op]
    with tracing("gpu", **how) as traced:
        jax.eval_shape(partial(act), jax.ShapeDtypeStruct((tokens, w_OI.shape[1]), jnp.float32), w_OI)
    return traced.chosen[op if op in traced.chosen else f"{op}_{w_OI.format}"]


def test_it_is_taken_for_few_tokens_and_whole_blocks_on_one_device():
    odd, exact = (jax.ShapeDtypeStruct(*args) for args in (((250, 384), jnp.bfloat16), ((256, 384), jnp.float32)))
    assert [chosen(tokens, WEIGHTS) for tokens in (1, BATCH, BATCH + 1)] == ["few", "few", "reference"]
    assert [chosen(8, w) for w in (odd, exact)] == ["reference"] * 2
    assert chosen(8, WEIGHTS, mesh=AbstractMesh((2,), ("model",))) == "reference"
    assert [chosen(tokens, WEIGHTS, "gated") for tokens in (8, BATCH + 1)] == ["few", "rounded"]
    assert chosen(8, WEIGHTS, "gated", bias=jnp.zeros(256)) == chosen(8, WEIGHTS, "gated", "gelu") == "rounded"
    fp8 = blank(FP8, (256, 384), jnp.bfloat16)
    assert chosen(8, fp8, "gated") == "rounded"
    assert chosen(8, fp8, "gated", forced={"matmul_fp8": "reference"}) == "reference", "which keeps activations"


@pytest.mark.parametrize("format", [INT8, INT4], ids=lambda format: format.name)
def test_for_weights_of_eight_and_four_bits_too(format):
    small = blank(format, WEIGHTS.shape, jnp.bfloat16)
    other = "weight_only" if format is INT8 else "reference"
    assert [chosen(tokens, small) for tokens in (1, BATCH, BATCH + 1)] == ["few", "few", other]
    odd = (blank(format, *args) for args in (((256, 192), jnp.bfloat16), ((256, 384), jnp.float32)))
    assert [chosen(8, w) for w in odd] == [other] * 2
    assert chosen(8, small, mesh=AbstractMesh((2,), ("model",))) == other
    assert chosen(8, small, "gated", forced=FORCED["w8a8"]) == "reference", "which rounds activations"
    assert [chosen(tokens, small, "gated") for tokens in (8, BATCH + 1)] == ["few", "reference"]
    assert chosen(8, small, "gated", bias=jnp.zeros(256)) == chosen(8, small, "gated", "gelu") == "reference"
