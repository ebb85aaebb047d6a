"""Measured block sizes are taken on the kind of device that they were measured on, by the version that they are of."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxinfer.kernels
from bench.tune import kernels
from jaxinfer.kernels import gated, tracing
from jaxinfer.kernels.attention_gpu import Decode, Prefill
from jaxinfer.kernels.matmul_gpu import Blocks
from jaxinfer.kernels.moe_gpu import Tile
from jaxinfer.kernels.tuned import TABLE, trying, tuned

SHAPES = {"decode": Decode, "prefill": Prefill, "few": Blocks, "few_gated": Blocks, "few_int8": Blocks,
          "few_int8_gated": Blocks, "few_int4": Blocks, "few_int4_gated": Blocks,
          **{f"routed_{part}{of}": Tile for part in ("gate_up", "down") for of in ("", "_int8", "_int4", "_fp8")}}


@pytest.mark.parametrize("name", TABLE)
def test_what_was_measured_is_of_a_kernel_as_it_is_now(name):
    asked_for(name)
    kernel = name.split("/")[0]
    for numbers in TABLE[name].values():
        assert len(numbers) == len(SHAPES[kernel]._fields) and all(type(n) is int for n in numbers)
        if SHAPES[kernel] is Blocks:
            assert numbers[0] <= 64, "larger blocks are not whole ones of all that `few` takes"


def test_what_is_tuned_is_what_kernels_ask_for_in_the_shape_that_they_want():
    tuned_by_us = list(kernels())
    for name, default, candidates, calls in tuned_by_us:
        shape = SHAPES[name.split("/")[0]]
        assert isinstance(default, shape) and calls, name
        assert {len(candidate) for candidate in candidates} == {len(shape._fields)}, name
        asked_for(name)
    assert set(TABLE) <= {kernel.name for kernel in tuned_by_us}


def asked_for(name: str) -> None:
    asked = "".join(path.read_text() for path in Path(jaxinfer.kernels.__file__).parent.glob("*_gpu.py"))
    kernel, version, _ = name.split("/")
    assert re.search(rf'f"{kernel}/{version}/{{', asked), f"no kernel asks for {kernel}/{version}: measure it again"


def test_a_kind_of_device_has_its_own_numbers_and_every_other_the_default():
    name, kinds = next(of for of in TABLE.items() if of[0].startswith("decode"))
    kind, numbers = next(iter(kinds.items()))
    with tracing("gpu", kind=kind):
        assert tuned(name, Decode()) == Decode(*numbers)
        with trying({name: (8, 1, 1)}):
            assert tuned(name, Decode()) == Decode(8, 1, 1)
    for other in (f"{kind} Super", "cpu"):
        with tracing("gpu", kind=other):
            assert tuned(name, Decode()) == Decode()


def test_a_kernel_runs_with_the_numbers_it_is_given():
    x_TI, w_OI = (jax.random.normal(jax.random.key(i), (n, 256), jnp.bfloat16) for i, n in enumerate((3, 128)))
    expected = gated(x_TI, w_OI, jax.nn.silu, how="few")
    with trying({"few_gated/1/16": (32, 64, 4, 3, 96)}):
        grids = [eqn.params["grid_mapping"].grid for eqn in jax.make_jaxpr(
            lambda x, w: gated(x, w, jax.nn.silu, how="few"))(x_TI, w_OI).eqns if "grid_mapping" in eqn.params]
        assert grids == [(2, 1)], "blocks of 32 outputs"
        found = gated(x_TI, w_OI, jax.nn.silu, how="few")
    assert jnp.allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=0.1)
