"""The routed feed-forward layer equals plain float64 numpy in every implementation, whatever the router does."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.tpu import InterpretParams, force_tpu_interpret_mode
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import jaxinfer as ji
from jaxinfer.graphs.decoder import ACTIVATIONS
from jaxinfer.kernels import moe, moe_gpu, route, routed_ffn, tracing
from jaxinfer.kernels.moe_gpu import Tile, Tiling
from jaxinfer.kernels.quantised import FP8, INT4, INT8, Format, Quantised, blank, quantise
from jaxinfer.kernels.tuned import trying
from jaxinfer.testing import SEEDS
from tests import tiny

E, A, D, F, WIDE = 5, 2, 16, 24, 128
WAYS = ["blocks", "triton", "chunks", "reference"]
SHAPES = [1, 40]  # tokens: one, more than a block


@cache
def compiled(how: str, dtype: str):
    def step(*args):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            return routed_ffn(*args, activation=jax.nn.silu, how=how)

    return jax.jit(step)


@cache
def weights(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Of all experts, rounded to `dtype`."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.asarray(jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, dtype))
    return draw(E, 2 * F, D), draw(E, D, F)


@st.composite
def routings(draw, T: int) -> np.ndarray:
    """The experts of each token: any, all tokens to the same ones, or nobody (padding) from some token on."""
    rng = np.random.default_rng(draw(SEEDS))
    expert_TA = np.stack([rng.permutation(E)[:A] for _ in range(T)]).astype(np.int32)
    if draw(st.booleans()):
        expert_TA[:] = expert_TA[0]
    expert_TA[draw(st.integers(0, T)):] = E
    return expert_TA


def numbers(T: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, D)).astype(np.float32), rng.random((T, A)).astype(np.float32)


def plain(x_TD, expert_TA, weight_TA, gate_up_EOD, down_EDF, round_to=np.float32) -> np.ndarray:
    """Token by token, expert by expert, in float64."""
    y_TD = np.zeros(x_TD.shape)
    rounded = lambda a: np.asarray(jnp.asarray(a, round_to), np.float64)
    for t, a in zip(*np.nonzero(expert_TA < E), strict=True):
        gate, up = np.split(np.float64(gate_up_EOD[expert_TA[t, a]]) @ rounded(x_TD[t]), 2)
        y_TD[t] += weight_TA[t, a] * np.float64(down_EDF[expert_TA[t, a]]) @ rounded(gate / (1 + np.exp(-gate)) * up)
    return y_TD


@pytest.mark.parametrize("T", SHAPES)
@pytest.mark.parametrize("how", WAYS)
@given(data=st.data())
def test_every_way_asks_the_experts_chosen_and_no_other(how, T, data):
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    (x, weight), expert = numbers(T, data.draw(SEEDS)), data.draw(routings(T))
    x[(expert == E).all(1)] = weight[(expert == E).all(1)] = np.nan
    broken = [w.copy() for w in weights(dtype)]
    for w in broken:
        w[np.setdiff1d(np.arange(E), expert)] = np.nan
    found = np.asarray(compiled(how, dtype)(x, expert, weight, *broken))
    expected = plain(np.nan_to_num(x), expert, np.nan_to_num(weight), *weights(dtype), dtype)
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
def test_neighbours_change_no_bit_of_a_tokens_result(how, dtype, data):
    """In one shape. A token's neighbours are others, in other places, with other experts, and NaN."""
    T = 40
    (x, weight), expert = numbers(T, data.draw(SEEDS)), data.draw(routings(T))
    (others, other_weight), other_expert = numbers(T, data.draw(SEEDS)), data.draw(routings(T))
    at, to = data.draw(st.integers(0, T - 1)), data.draw(st.integers(0, T - 1))
    others[data.draw(st.integers(0, T - 1))] = np.nan
    for there, here in ((others, x), (other_weight, weight), (other_expert, expert)):
        there[to] = here[at]
    ask = compiled(how, dtype)
    alone = np.asarray(ask(x, expert, weight, *weights(dtype)))[at]
    np.testing.assert_array_equal(np.asarray(ask(others, other_expert, other_weight, *weights(dtype)))[to], alone)
    assert np.isfinite(alone).all()


@cache
def quantised(format: Format) -> tuple[Quantised, Quantised]:
    """Experts whose sizes are whole blocks of a GPU's kernels."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: quantise(rng.normal(size=shape) * shape[-1] ** -0.5, blank(format, shape, "bfloat16"))
    return draw(E, 2 * WIDE, WIDE), draw(E, WIDE, WIDE)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("format", [INT8, INT4, FP8], ids=lambda format: format.name)
@given(data=st.data())
def test_every_way_asks_quantised_experts_as_what_they_stand_for(how, format, data):
    T, rng = 40, np.random.default_rng(data.draw(SEEDS))
    x, weight = rng.normal(size=(T, WIDE)).astype(np.float32), rng.random((T, A)).astype(np.float32)
    expert = data.draw(routings(T))
    nobody = np.setdiff1d(np.arange(E), expert)
    broken = [jax.tree.map(np.copy, w) for w in quantised(format)]
    for w in broken:
        w.scale[nobody] = np.nan
    found = np.asarray(compiled(how, format.name)(x, expert, weight, *broken))
    expected = plain(x, expert, weight, *(np.asarray(w.dequantised()) for w in quantised(format)))
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize("format", [INT8, INT4, FP8], ids=lambda format: format.name)
@given(data=st.data())
def test_nor_of_one_with_quantised_experts(format, data):
    T, rng = 40, np.random.default_rng(data.draw(SEEDS))
    (x, others), (weight, other_weight) = rng.normal(size=(2, T, WIDE)).astype(np.float32), rng.random((2, T, A))
    expert, other_expert, at = data.draw(routings(T)), data.draw(routings(T)), data.draw(st.integers(0, T - 1))
    for there, here in ((others, x), (other_weight, weight), (other_expert, expert)):
        there[-1 - at] = here[at]
    ask = lambda x, expert, weight: np.asarray(compiled("blocks", format.name)(
        x, expert, weight.astype(np.float32), *quantised(format)))
    np.testing.assert_array_equal(ask(others, other_expert, other_weight)[-1 - at], ask(x, expert, weight)[at])


@settings(max_examples=settings().max_examples // 4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_grouped_matmul_of_tpus_does_in_interpret_mode_what_the_reference_does(capfd, data):
    """All memory holds NaN until it is written, and whoever races for it is told of."""
    T = 40
    (x, weight), expert = numbers(T, data.draw(SEEDS)), data.draw(routings(T))
    x[(expert == E).all(1)] = np.nan
    args = x, expert, weight, *weights("float32")
    with force_tpu_interpret_mode(InterpretParams(detect_races=True)):
        found = np.asarray(grouped()(*args))
    np.testing.assert_allclose(found, compiled("reference", "float32")(*args), atol=1e-5)
    assert "RACE DETECTED" not in capfd.readouterr().out


@cache
def grouped():
    return jax.jit(partial(moe.routed_ffn_grouped, activation=jax.nn.silu))


@cache
def in_tiles(outputs: int):
    """The kernels for GPUs, in Pallas' interpreter."""
    tile = Tile(outputs, 16, 4, 1)
    return jax.jit(partial(moe_gpu.routed_ffn_triton, activation=ACTIVATIONS["gelu_tanh"],
                           tiling=Tiling(16, tile, tile)))


@pytest.mark.parametrize("outputs", [16, 64])  # less and more than Hopper's matrix units want: the two ways to multiply
@given(seed=SEEDS, data=st.data())
def test_tiles_that_divide_nothing_hold_what_there_is(outputs, seed, data):
    T, width, ffn, rng = 40, 72, 68, np.random.default_rng(seed)
    draw = lambda *shape: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
    expert, weight_TA = data.draw(routings(T)), rng.random((T, A)).astype(np.float32)
    args = draw(T, width), expert, weight_TA, draw(E, 2 * ffn, width), draw(E, width, ffn)
    expected = moe.routed_ffn_reference(*map(jnp.asarray, args), activation=ACTIVATIONS["gelu_tanh"])
    np.testing.assert_allclose(in_tiles(outputs)(*args), expected, atol=1e-5)


@pytest.mark.parametrize("pairs", [1, 600])  # one, more than a chunk of keys
@given(data=st.data())
def test_blocks_have_each_pair_once_by_expert(pairs, data):
    rows, rng = 16, np.random.default_rng(data.draw(SEEDS))
    expert_P = rng.choice(data.draw(st.lists(st.integers(0, E), min_size=1)), pairs).astype(np.int32)
    pair_P, *blocks = map(np.asarray, cut(expert_P, rows))
    np.testing.assert_array_equal(pair_P, np.argsort(expert_P, kind="stable"))
    expected = []
    for e in range(E):
        (place,) = np.nonzero(expert_P[pair_P] == e)
        expected += [(e, first, place[-1] + 1) for first in place[::rows]]
    asked = [block for block in zip(*blocks, strict=True) if block[1] < block[2]]
    assert asked == expected == list(zip(*blocks, strict=True))[:len(expected)]


@partial(jax.jit, static_argnums=1)
def cut(expert_P, rows):
    return moe_gpu.by_blocks(expert_P, E, rows)


@pytest.mark.parametrize(("pairs", "experts", "rows"), [(2, 8, 16), (128, 8, 32), (512, 128, 16), (16384, 128, 128)])
def test_a_block_for_gpus_has_twice_an_experts_rows_within_limits_and_tiles_as_measured(pairs, experts, rows):
    default = moe_gpu.tiling_for(pairs, experts)
    with trying({f"routed_down/1/{rows}": (32, 64, 8, 2)}):
        measured = moe_gpu.tiling_for(pairs, experts)
    assert default.rows == rows and measured == default._replace(down=Tile(32, 64, 8, 2)) != default


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("name", "format"), [
    *((name, None) for name in ACTIVATIONS), *(("silu", format) for format in (INT8, INT4, FP8))],
    ids=lambda of: of if isinstance(of, str) else of and of.name)
def test_what_the_kernels_for_gpus_take_becomes_triton(name, format):
    """Without a GPU: Mixtral's shape, as far as Pallas compiles it."""
    T, E, A, D, F = 128, 8, 2, 4096, 14336
    shape, activation = jax.ShapeDtypeStruct, ACTIVATIONS[name]
    stack = lambda *of: blank(format, of, "bfloat16") if format else shape(of, "bfloat16")
    args = (shape((T, D), "float32"), shape((T, A), "int32"), shape((T, A), "float32"),
            stack(E, 2 * F, D), stack(E, D, F))
    a_gpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H200", 132, platform="cuda"))
    with tracing("gpu") as trace, use_abstract_mesh(a_gpu):
        step = jax.jit(partial(routed_ffn, activation=activation)).trace(*args).lower(lowering_platforms=("cuda",))
    kernels = step.as_text().count("__gpu$xla.gpu.triton")
    assert (trace.chosen["routed_ffn"], kernels) == (("chunks", 0) if name == "gelu" else ("triton", 3))


def test_tokens_are_all_asked_about_when_chunks_do_not_divide_them(monkeypatch):
    monkeypatch.setattr(moe, "CHUNK", 16)
    args = (*numbers(40, 0), *weights("float32"))
    expert = np.random.default_rng(0).integers(0, E - 1, (40, 1)) + np.arange(A)
    found = moe.routed_ffn_chunks(args[0], expert, args[1], *map(jnp.asarray, args[2:]), activation=jax.nn.silu)
    np.testing.assert_allclose(found, plain(args[0], expert, *args[1:]), atol=1e-5)


@pytest.mark.parametrize("renormalise", [False, True])
@given(seed=SEEDS, real=st.integers(0, 7))
def test_a_router_takes_the_likeliest_experts_and_padding_takes_none(renormalise, seed, real):
    rng = np.random.default_rng(seed)
    x, router = rng.normal(size=(7, D)).astype(np.float32), rng.normal(size=(E, D)).astype(np.float32)
    x[real:] = np.nan
    expert_TA, weight_TA = map(np.asarray, jitted_route(x, router, np.arange(7) < real, renormalise))
    logits = np.float64(x[:real]) @ router.T
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_array_equal(expert_TA[:real], np.argsort(-share, axis=1)[:, :A])
    chosen = np.take_along_axis(share, expert_TA[:real], 1)
    np.testing.assert_allclose(weight_TA[:real], chosen / chosen.sum(1, keepdims=True) if renormalise else chosen,
                               rtol=1e-4)
    assert (expert_TA[real:] == E).all()


@partial(jax.jit, static_argnums=3)
def jitted_route(x_TD, router_ED, valid_T, renormalise):
    return route(x_TD, router_ED, valid_T, count=A, renormalise=renormalise)


@pytest.mark.parametrize("format", [None, INT8, INT4, FP8], ids=lambda of: of and of.name)
def test_the_cpu_copies_one_experts_weights_and_not_all_of_them(format):
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
        ((4, 128), "float32"), ((4, 2), "int32"), ((4, 2), "float32"), ((64, 512, 128), "float32"),
        ((64, 128, 256), "float32"))]
    if format:
        args[3:] = [blank(format, stack.shape, "float32") for stack in args[3:]]
    memory = compiled("blocks", "float32").lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4 * (512 * 128 + 128 * 256)
    assert routed_ffn.choice("cpu") == "blocks"


@pytest.mark.parametrize(("tokens", "pairs", "experts", "rows"), [
    (1, 8, 128, 1), (4, 8, 8, 4), (32, 256, 128, 8), (512, 4096, 128, 32), (512, 1024, 8, 128), (2048, 4096, 8, 128)])
def test_a_block_has_the_rows_that_an_expert_has_on_average_within_limits(tokens, pairs, experts, rows):
    assert moe.block_rows(tokens, pairs, experts) == rows


def test_each_platform_has_a_way_of_its_own():
    for platform, way in (("cpu", "blocks"), ("gpu", "triton"), ("tpu", "grouped")):
        with tracing(platform):
            assert routed_ffn.choice() == way


def test_a_model_with_experts_answers_alone_as_in_company_and_its_ledger_says_how(tmp_path):
    with ji.load(tiny.write(tmp_path, tiny.ROUTED), max_context=64, max_rows=2, batch_invariant=True) as lm:
        ask = dict(max_tokens=5, ignore_eos=True, logprobs=2, reuse=False)
        together = lm.generate(["The sky is", "w1 w2 w3 w4 w5 w6 w7"], **ask)
        assert [(o.tokens, o.logprobs) for o in (lm("The sky is", **ask), together[1])] == [
            (o.tokens, o.logprobs) for o in together]
        assert {entry.kernels.get("routed_ffn") for entry in lm.ledger} == {"blocks", None}
