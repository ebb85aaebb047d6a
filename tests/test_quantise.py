"""Quantised weights: numbers come back within half a step, every matmul computes what it says, a weight is quantised
while it is read, and a model that is loaded so answers nearly as before, in fewer bytes."""

import tracemalloc
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer as ji
from jaxinfer import kernels
from jaxinfer.errors import CheckpointMismatch, InvalidOption
from jaxinfer.frontend.dequantize import FORMATS as BLOCKS
from jaxinfer.frontend.gguf import open_gguf
from jaxinfer.frontend.gguf_translate import Fixed, _halves
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Graph, Leaf
from jaxinfer.kernels import embed_rows, matmul, matmul_int8
from jaxinfer.kernels.matmul import OPS, SLICE
from jaxinfer.kernels.quantised import FORCED, FP8, INT4, INT8, SCHEMES, blank, finite, format_of, quantise
from jaxinfer.runtime import memory as planning
from jaxinfer.testing import SEEDS, check_op, matmul_cases
from tests import tiny
from tests.gguf_files import Blocks, write_gguf
from tests.likely import HOW, PROMPTS, apart, likeliest

LEAST = 448 * np.finfo(np.float32).tiny  # a row of no larger numbers may become zeros
FORMATS = {format.name: format for format in (INT8, INT4, FP8)}


def weight(seed: int, shape: tuple[int, int], spread: float = 1.0) -> np.ndarray:
    """Rows of very different size, one of them of zeros and one of the same number everywhere."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=shape) * spread * 10.0 ** rng.uniform(-2, 2, (shape[0], 1))
    rows[0], rows[1] = 0, rows[1, 0]
    return rows.astype(np.float32)


def quantised(array: np.ndarray, format, dtype="float32"):
    return quantise(array, blank(format, array.shape, dtype))


# Numbers.


@pytest.mark.parametrize("name", FORMATS)
@given(seed=SEEDS, spread=st.sampled_from([1e-36, 1e-3, 1.0, 10.0]))
def test_numbers_come_back_within_half_a_step(name, seed, spread):
    rows = weight(seed, (40, 96), spread)
    held = quantised(rows, FORMATS[name])
    error = np.abs(held.dequantised() - rows)
    largest = np.abs(rows).max(1, keepdims=True)
    if name == "int8":
        assert (error <= largest / 254 * (1 + 1e-6) + LEAST).all()
    elif name == "fp8":  # a significand of four bits; subnormal steps of 2^-9; and float16 on the way
        assert (error <= np.maximum(np.abs(rows) / 16, largest / 448 / 2**10) * (1 + 2e-3) + LEAST).all()
    else:  # half of a fifteenth of what the group spans, and the rounding of scale and minimum to float16
        groups = rows.reshape(40, 3, 32)
        spans = np.repeat(groups.max(2) - groups.min(2), 32, 1)
        assert (error <= spans / 30 + (2 * spans + largest) * 2**-11 + 2**-20).all()
    assert finite(held) and (error[0] == 0).all()
    some = np.array([3, 1])
    np.testing.assert_array_equal(embed_rows(held, some), held.dequantised()[some])


@given(seed=SEEDS)
def test_four_bits_keep_the_blocks_of_a_q4_1_file_to_the_bit(seed):
    """A block of that format spans its sixteen levels, as a group of ours does."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 16, (5, 2, 32))
    levels[..., 0], levels[..., 7] = 0, 15
    d, m = (rng.normal(size=(5, 2, 1)).astype(np.float16).astype(np.float32) for _ in "dm")
    rows = (levels * np.abs(d) + m).astype(np.float32).reshape(5, 64)
    np.testing.assert_array_equal(quantised(rows, INT4).dequantised(), rows)


@given(seed=SEEDS)
def test_four_bits_keep_the_blocks_of_a_q4_0_file_to_the_bit(seed):
    """Whose largest number is at the first of sixteen levels, whatever its sign; the others need not reach the last."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, rng.integers(8, 17), (5, 2, 32))
    levels[..., 7] = 0
    d = rng.normal(size=(5, 2, 1)).astype(np.float16).astype(np.float32)
    rows = ((levels - 8) * d).astype(np.float32).reshape(5, 64)
    held = quantised(rows, INT4)
    np.testing.assert_array_equal(held.dequantised(), rows)
    assert finite(held)


@pytest.mark.parametrize(("inputs", "apart"), [(96, 8), (192, 16), (256, 32)])
def test_four_numbers_share_a_word_as_far_apart_as_the_inputs_allow(inputs, apart):
    levels = np.random.default_rng(inputs).integers(0, 16, (3, inputs))
    levels[:, ::32], levels[:, 1::32] = 0, 15
    held = quantised(levels.astype(np.float32), INT4)
    np.testing.assert_array_equal(held.numbers, levels)
    block = levels[:, : 4 * apart].reshape(3, 4, apart)
    np.testing.assert_array_equal(held.values[:, :apart], sum(block[:, q] << 4 * q for q in range(4)))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_shows_in_the_scales(name):
    for bad in (np.nan, np.inf, -np.inf):
        rows = weight(0, (4, 32))
        rows[2, 5] = bad
        assert not finite(quantised(rows, FORMATS[name]))


def test_which_leaves_are_quantised_is_data():
    leaf = partial(Leaf, (64, 96), ("ffn", "embed"), "w")
    assert [format_of(leaf(), scheme) for scheme in (None, *SCHEMES)] == [None, INT8, INT8, INT4, FP8]
    assert {format_of(Leaf((64, 96), ("vocab", "embed"), "w"), scheme) for scheme in SCHEMES} == {INT8}
    assert {format_of(Leaf((64, 96), (None, "embed"), "w"), scheme) for scheme in SCHEMES} == {None}
    experts = Leaf((4, 64, 96), ("expert", "ffn", "embed"), "w")
    assert [format_of(experts, scheme) for scheme in SCHEMES] == [INT8, INT8, INT4, FP8]
    assert {format_of(leaf(exact=True), scheme) for scheme in SCHEMES} == {None}
    assert format_of(Leaf((64, 40), ("ffn", "embed"), "w"), "int4") is INT8, "40 inputs are no whole groups of 32"


# Matmuls.

WAYS = [(name, how) for name in FORMATS for how in ("reference", *OPS[name].fast) if how != "few"]  # test_matmul_gpu


@cache
def forced(how: str):
    return jax.jit(partial(matmul, how=how))


def expected(x: np.ndarray, held, how: str) -> np.ndarray:
    """Float64 of what the weights stand for; with `w8a8` and `w8a16`, of what is left of the activations."""
    if how in ("w8a8", "w8a16"):
        most = np.float32(127 if held.format == "int8" else 448)
        largest = np.abs(x).max(1, keepdims=True)
        x = x * np.divide(most, largest, out=np.zeros_like(largest), where=largest > 0)
        high = np.rint(x) if most == 127 else x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        low = np.rint((x - high) * 254) if how == "w8a16" else 0
        x = (high + np.float64(low) / 254) * (largest / most)
    return x.astype(np.float64) @ np.asarray(held.dequantised(), np.float64).T


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("name", "how"), WAYS)
@given(seed=SEEDS, tokens=st.sampled_from([1, 3, 17]))
def test_every_implementation_computes_what_it_says(name, how, seed, tokens):
    held = quantised(weight(seed, (SLICE + 40, 96)), FORMATS[name])
    x = np.random.default_rng(seed).normal(size=(tokens, 96)).astype(np.float32)
    x[0, :] *= 100
    x[-1] *= tokens > 1  # a token of zeros
    found = forced(how)(jnp.asarray(x), jax.tree.map(jnp.asarray, held))
    assert found.dtype == jnp.float32
    size = np.abs(x).sum(1, keepdims=True) * np.abs(held.dequantised()).max(1)
    np.testing.assert_array_less(np.abs(found - expected(x, held, how)), size * 1e-6 + 1e-30)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("name", "how"), WAYS)
def test_in_bfloat16_activations_and_at_most_the_weights_are_rounded(name, how):
    held = quantised(weight(1, (SLICE + 40, 96)), FORMATS[name], ml_dtypes.bfloat16)
    x = np.random.default_rng(1).normal(size=(3, 96)).astype(np.float32)
    found = forced(how)(jnp.asarray(x), jax.tree.map(jnp.asarray, held))
    size = np.abs(x).sum(1, keepdims=True) * np.abs(held.dequantised()).max(1)
    assert (np.abs(found - expected(x, held, how)) <= size * 2**-7).all()


@pytest.mark.parametrize(("how", "steps"), [("w8a8", 254), ("w8a16", 254**2)])
@given(seed=SEEDS)
def test_rounding_activations_moves_a_result_by_no_more_than_half_a_step_of_each(how, steps, seed):
    held = quantised(weight(seed, (40, 96)), INT8)
    x = np.random.default_rng(seed).normal(size=(3, 96)).astype(np.float32)
    half_T1 = np.abs(x).max(1, keepdims=True) / steps
    moved = np.abs(expected(x, held, how) - expected(x, held, "reference"))
    assert (moved <= half_T1 * np.abs(held.dequantised()).sum(1) * (1 + 1e-2)).all()


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("how", ["w8a8", "w8a16"])
@given(seed=SEEDS, r=st.integers(0, 4))
def test_a_token_s_result_in_int8_is_the_same_to_the_bit_in_any_company(how, seed, r):
    rng = np.random.default_rng(seed)
    held = jax.tree.map(jnp.asarray, quantised(weight(seed, (72, 96)), INT8))
    x = rng.normal(size=(5, 96)).astype(np.float32) * 10.0 ** rng.uniform(-3, 3, (5, 1)).astype(np.float32)
    alone, among = (np.asarray(forced(how)(jnp.asarray(a), held)) for a in (x[r: r + 1], x))
    np.testing.assert_array_equal(alone[0], among[r])
    x[(r + 1) % 5, 7], x[(r + 2) % 5, 3] = np.nan, np.inf
    broken = np.asarray(forced(how)(jnp.asarray(x), held))
    np.testing.assert_array_equal(alone[0], broken[r])
    assert np.isnan(broken[[(r + 1) % 5, (r + 2) % 5], 1:]).all(), "a NaN that the token sees is lost"


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_every_implementation_for_quantised_weights_keeps_what_an_op_promises(name, data):
    check_op(OPS[name], data.draw(matmul_cases(quantize=name)), batch_invariant=("w8a8", "w8a16"))


@pytest.mark.parametrize("name", FORMATS)
def test_no_weight_is_converted_or_copied_whole_on_a_cpu(name):
    held = blank(FORMATS[name], (4096, 512), np.float32)
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.float32)
    program = jax.jit(partial(matmul, how=OPS[name].available("cpu")[0])).lower(tokens, held).compile()
    assert program.memory_analysis().temp_size_in_bytes < planning.held(held) / 2


# Reading.


@dataclass
class Lazy:
    """A float32 tensor that is made when rows of it are asked for; it counts them."""

    shape: tuple[int, int]
    asked: int = 0
    dtype, nbytes = np.dtype(np.float32), 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.asked += stop - start
        numbers = np.arange(start * self.shape[1], stop * self.shape[1], dtype=np.float32)
        return np.sin(numbers).reshape(-1, self.shape[1])

    def read(self) -> np.ndarray:
        raise AssertionError("the weight was read whole")


def one(leaf: Leaf) -> Graph:
    return Graph("test", {"w": leaf}, (), lambda *_: None, (), lambda *_: None, 1, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_quantised_while_it_is_read_and_never_held_as_floats(scheme):
    a, b = Lazy((4096, 512)), Lazy((1000, 512))
    leaf = Leaf((5096, 512), ("ffn", "embed"), "a + b")
    tracemalloc.start()
    load = partial(load_params, one(leaf), {"a": a, "b": b}, dtype="float32", source="here", quantize=scheme)
    held = load(put=lambda _, x: x[...])["w"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (a.asked, b.asked) == (4096, 1000)
    assert peak < sum(part.nbytes for part in jax.tree.leaves(held)) + (2 << 20) < 5096 * 512 * 4 / 2
    whole = quantised(np.concatenate([a.rows(0, 4096), b.rows(0, 1000)]), format_of(leaf, scheme))
    for part, wanted in zip(jax.tree.leaves(held), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(part, wanted)


def test_what_cannot_be_quantised_is_refused_with_its_name():
    tensor = Lazy((64, 32))
    tensor.rows = lambda start, stop: np.full((stop - start, 32), np.nan, np.float32)
    with pytest.raises(CheckpointMismatch, match="not finite: w holds NaN"):
        load_params(one(Leaf((64, 32), ("ffn", "embed"), "w")), {"w": tensor}, dtype="float32", source="here",
                    quantize="int8")


@given(data=st.data())
def test_rows_of_a_block_format_are_those_of_the_whole_tensor(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(sorted(BLOCKS)))
    row = BLOCKS[kind].record.itemsize * (256 // BLOCKS[kind].weights)
    blocks = np.random.default_rng(data.draw(SEEDS)).integers(0, 60, (16, row), dtype=np.uint8)  # no scale is NaN
    path = write_gguf(tmp_path_factory.mktemp("rows") / "m.gguf", {"general.architecture": "llama"},
                      {"w": Blocks(blocks, kind)})
    stored = open_gguf(path)[1]["w"]
    turned = Fixed(stored, stored.shape, stored.dtype, lambda rows: _halves(rows, 8), 8)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 15), st.integers(1, 16))))
    for tensor in (stored, turned):
        np.testing.assert_array_equal(tensor.rows(start, stop), tensor.read()[start:stop])


# Models.



@pytest.fixture(scope="module")
def floats(tiny_path):
    """What the model in float32 finds likely, and its bytes."""
    with ji.load(tiny_path, **HOW) as lm:
        return likeliest(lm), planning.held(lm.params)


@pytest.mark.parametrize(("scheme", "near", "share"), [
    ("int8", 0.7, 0.3), ("w8a8", 0.7, 0.3), ("fp8", 0.7, 0.3), ("int4", 1.4, 0.25),
])
def test_a_quantised_model_is_smaller_and_finds_the_same_likely(tiny_path, floats, scheme, near, share):
    wanted, nbytes = floats
    with ji.load(tiny_path, quantize=scheme, **HOW) as lm:
        assert planning.held(lm.params) == planning.nbytes(lm.graph.spec, jnp.float32, scheme) < share * nbytes
        for found, expected in zip(likeliest(lm), wanted, strict=True):
            shared, distance = apart(found, expected)
            assert shared > 12 and 0 < distance < near
        temporaries = max(entry.bytes for entry in lm.ledger)
        assert lm.nbytes == planning.held((lm.params, lm._engine.executables.state)) + temporaries
        chosen = {op: how for entry in lm.ledger for op, how in entry.kernels.items()}
        assert chosen["matmul_int8"] == ("w8a8" if scheme == "w8a8" else "w8a16") and "matmul" not in chosen
        assert scheme in ("int8", "w8a8") or chosen[f"matmul_{scheme}"] == "in_slices"


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A model whose experts are most of it, in float32 and its path."""
    path = tiny.write(tmp_path_factory.mktemp("routed"), {**tiny.ROUTED, "moe_intermediate_size": 128})
    with ji.load(path, **HOW) as lm:
        yield path, likeliest(lm), planning.held(lm.params)


@pytest.mark.parametrize(("scheme", "near", "share"), [("int8", 0.7, 0.3), ("int4", 1.4, 0.25), ("fp8", 0.7, 0.3)])
def test_so_does_one_with_experts(routed, scheme, near, share):
    path, wanted, nbytes = routed
    with ji.load(path, quantize=scheme, **HOW) as lm:
        assert planning.held(lm.params) == planning.nbytes(lm.graph.spec, jnp.float32, scheme) < share * nbytes
        for found, expected in zip(likeliest(lm), wanted, strict=True):
            shared, distance = apart(found, expected)
            assert shared > 12 and 0 < distance < near


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_a_quantised_answer_is_the_same_to_the_bit_in_any_company(tiny_path, scheme):
    sampling = dict(max_tokens=12, ignore_eos=True, logprobs=2, reuse=False)
    with ji.load(tiny_path, quantize=scheme, **HOW) as lm:
        alone = [lm(prompt, **sampling) for prompt in PROMPTS]
        among = lm.generate(PROMPTS[::-1], **sampling)[::-1]
        assert [(o.tokens, o.logprobs) for o in alone] == [(o.tokens, o.logprobs) for o in among]


def test_floats_that_are_swapped_in_are_quantised_as_the_weights_were(tiny_path, tmp_path):
    other, sampling = tiny.write(tmp_path, tiny.PLAIN, seed=1), dict(max_tokens=12, ignore_eos=True, logprobs=1)
    with ji.load(other, **HOW) as lm:
        floats = lm.params
    with ji.load(other, quantize="int8", **HOW) as lm:
        wanted = lm(PROMPTS[0], **sampling)
    with ji.load(tiny_path, quantize="int8", **HOW) as lm:
        old, before = lm.params, lm(PROMPTS[0], **sampling)
        assert lm.swap(floats) == 2
        found = lm(PROMPTS[0], **sampling)
        assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs) != (before.tokens, before.logprobs)
        lm.swap(old)
        assert lm(PROMPTS[0], **sampling).logprobs == before.logprobs
        for wrong, message in (
            (floats["embed"][:-1], r"\['embed'\] is float32\[319, 64\] and must be Quantised\(int8\[320, 64\], float32"
                                   r"\[320\]\) for float32 or floats of that shape"),
            (floats["embed"].astype(jnp.int32), r"\['embed'\] is int32"),
            (floats["embed"].at[3, 5].set(jnp.nan), r"\['embed'\] holds NaN"),
        ):
            with pytest.raises(InvalidOption, match=message):
                lm.swap({**floats, "embed": wrong})
        assert lm.version == 3


def test_a_scheme_that_there_is_not_is_refused_with_those_that_there_are(tiny_path):
    for wrong in ("int3", 8, True):
        with pytest.raises(InvalidOption, match=r"quantize is .*; it must be one of int8, w8a8, int4, fp8, or None"):
            ji.load(tiny_path, quantize=wrong)


def test_an_op_for_weights_of_one_kind_has_no_way_of_another():
    held = quantised(weight(0, (4, 32)), INT8)
    with pytest.raises(ValueError, match="matmul_int8 has no implementation 'in_slices'"):
        matmul(jnp.ones((2, 32)), held, how="in_slices")
    assert matmul_int8.available("gpu")[:2] == ["few", "weight_only"] and matmul_int8.available("tpu")[0] == "w8a16"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_scheme_asks_for_nothing_that_a_platform_has_not(platform):
    for ways in FORCED.values():
        assert all(how in kernels.OPS[op].available(platform) for op, how in ways.items())
