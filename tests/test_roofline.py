"""What bench/roofline.py says that an op must compute, beside what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from bench.support import ops
from bench.support.shapes import TINY
from jaxinfer import kernels
from jaxinfer.compiler.placement import Placement
from jaxinfer.compiler.roofline import Roofline
from jaxinfer.frontend.architectures import architecture
from jaxinfer.kernels.quantised import FORCED, INT8
from jaxinfer.runtime import memory as planning
from tests import tiny

CONFIG = architecture(TINY).config
CASES = [
    ops.attention(CONFIG, "float32", "two rows", 2, 1, 128), ops.attention(CONFIG, "float32", "last token", 1, 1, 256),
    ops.ffn(CONFIG, "float32", 4), ops.matmul(CONFIG, "float32", "float32", 3),
    ops.matmul(CONFIG, "float32", "float32", 3, INT8), ops.routed(CONFIG, "float32", 5, 3, 3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.of}")
def test_an_op_computes_what_the_roofline_says(case):
    """Of tokens that see whole pages and ask all experts, the references multiply no more than their definitions ask
    for; XLA also counts softmaxes, conversions and the like."""
    arrays = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, case.make()))
    with kernels.tracing("none"):
        cost = jax.jit(case.call).lower(*arrays).cost_analysis()
    assert case.operations <= cost["flops"] < 1.3 * case.operations


@pytest.mark.parametrize(("platform", "scheme", "times", "dtype"), [
    ("cpu", "int8", 2, "int8"), ("cpu", "w8a8", 1, "int8"), ("gpu", "int8", 1, "bfloat16"),
    ("gpu", "fp8", 1, "bfloat16")])
def test_quantised_experts_multiply_as_often_as_their_way_does(platform, scheme, times, dtype):
    graph = architecture(tiny.ROUTED, max_context=128).graph()
    floats, held = (planning.abstract_params(graph, "bfloat16", quantize) for quantize in (None, scheme))
    with kernels.tracing(platform, FORCED.get(scheme)):
        each = [Roofline(graph, params, {}, Placement(jax.devices()[0]), 2) for params in (floats, held)]
        leaf = graph.spec["blocks"][1]["down"]
        plain, quantised = (one._leaf(leaf, one.params["blocks"][1]["down"], 8) for one in each)
    assert quantised.operations == times * plain.operations and quantised.dtype == dtype


def test_a_chunk_of_a_prompt_sees_what_is_before_it_and_half_of_itself():
    case, H = ops.attention(CONFIG, "float32", "a chunk", 1, 3, 10), CONFIG.head_width
    assert case.operations == 4 * CONFIG.heads * H * (8 + 9 + 10)
