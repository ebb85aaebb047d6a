"""What `inspect` says of a function is so: counted by hand on functions small enough to do so."""

import xml.etree.ElementTree as xml
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinfer.compiler import hlo
from jaxinfer.compiler.inspect import equations, inspect
from jaxinfer.errors import InvalidRequest

B, I, F, O = 32, 64, 128, 16


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def mlp(params, x_BI):
    h_BF = jax.nn.relu(x_BI @ params["up"] + params["bias"])
    return h_BF @ params["down"] * 1.0


PARAMS = {"up": shape(I, F), "bias": shape(F), "down": shape(F, O)}


@pytest.fixture(scope="module")
def report():
    return inspect(mlp, PARAMS, shape(B, I))


def test_the_numbers_of_an_mlp_are_those_counted_by_hand(report):
    matmuls = 2 * B * I * F + 2 * B * F * O
    assert matmuls <= report.flops <= matmuls + 4 * B * F, "a bias and a relu come on top"
    assert report.argument_bytes == 4 * (I * F + F + F * O + B * I) and report.output_bytes == 4 * B * O
    assert report.bytes_accessed >= report.argument_bytes + report.output_bytes
    assert report.peak_bytes == report.argument_bytes + report.output_bytes + report.temporary_bytes
    assert report.ops["dot"][0] == 2 and report.compile_seconds > 0
    assert (report.name, report.platform, report.nodes) == ("mlp", "cpu", None)
    assert 1 <= sum(report.kernels.values()) <= report.before


def test_a_product_with_one_and_dead_code_are_gone(report):
    assert report.ops["multiply"] == (1, 0)

    def wasteful(x):
        unused = jnp.sin(x) @ x
        return jnp.cos(x), unused.shape[0]

    found = inspect(wasteful, shape(8, 8))
    assert found.ops["cosine"][1] == 1
    assert found.ops.get("sine", (0, 0))[1] == found.ops.get("dot", (0, 0))[1] == 0


def test_operations_of_constants_are_counted_as_folded():
    def shifted(x):
        return x + jnp.sqrt(jnp.arange(4.0) * 3 + 1)  # one multiply, one add, one square root

    assert inspect(shifted, shape(4)).folded == 3
    assert inspect(lambda x: x + 1, shape(4)).folded == 0


def test_equations_are_counted_through_calls_and_into_loops():
    inner = jax.jit(lambda x: jnp.sin(x) * 2)

    def outer(x):
        return lax.scan(lambda carry, _: (inner(carry), None), inner(inner(x)), length=7)[0]

    jaxpr = jax.make_jaxpr(outer)(1.0)
    assert equations(jaxpr) == 2 + 2 + 1 + 2, "two calls, the scan, and its body once"
    found = inspect(outer, shape(3))
    assert found.equations == 7
    assert found.ops["sine"] == (3, 3) and found.ops["while"] == (1, 1)
    chosen = jax.make_jaxpr(lambda x: lax.cond(x > 0, jnp.sin, lambda x: x * 2 + 1, x))(1.0)
    assert equations(chosen) >= 5, "the comparison, the branch, and what is in each"


def test_a_fusion_is_one_kernel_and_a_loop_launches_those_of_its_body():
    chain = inspect(lambda x: jnp.exp(jnp.tanh(x) * 2 + 1) - x, shape(4096))
    assert sum(chain.kernels.values()) == 1 and "fusion" in next(iter(chain.kernels))
    assert chain.after >= 4
    loop = inspect(lambda x: lax.fori_loop(0, 5, lambda i, x: jnp.sin(x) @ x, x), shape(16, 16))
    assert loop.kernels.get("while") is None and any("dot" in k or "custom" in k or "fusion" in k for k in loop.kernels)


def test_donated_memory_is_not_counted_twice():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    found = inspect(step, shape(1024))
    assert (found.donated_bytes, found.peak_bytes) == (4096, 4096 + found.temporary_bytes)


def test_a_model_with_a_file_tells_of_its_nodes_and_its_params_are_arguments():
    params = {"w": np.ones((4, 4), np.float32)}
    model = SimpleNamespace(name="tiny.onnx", params=params, apply=lambda p, x: x @ p["w"], nodes=["a", "b"], folded=5)
    found = inspect(model, shape(2, 4))
    assert (found.name, found.nodes, found.folded) == ("tiny.onnx", 2, 5)
    assert found.argument_bytes == 4 * (16 + 8)
    assert "nodes in the file" in str(found)


def test_what_is_no_function_is_refused():
    with pytest.raises(InvalidRequest, match="got a int; expected a function"):
        inspect(3)


def test_the_table_says_the_numbers_in_a_terminal_and_in_a_notebook(report):
    text, page = str(report), report._repr_html_()
    for what, value in report.rows():
        assert what in text and value in text
        assert f"<th>{what}</th>" in page
    assert text.startswith("mlp on cpu\n") and f"{report.equations}" in text and "dot 2→" in text
    assert str(replace(report, flops=None)).count("unknown") == 1


def test_the_picture_is_an_svg_with_a_bar_for_each_operation_before_and_after(report, tmp_path):
    file = report.save(tmp_path / "mlp.svg")
    assert report.svg() == file.read_text("utf-8") and report.svg() in report._repr_html_()
    tree = xml.parse(file).getroot()
    tags = [element.tag.rpartition("}")[2] for element in tree.iter()]
    words = [element.text for element in tree.iter() if element.text]
    assert set(list(report.ops)[:5]) <= set(words) and f"2 → {report.ops['dot'][1]}" in words
    colours = [element.get("fill") for element in tree.iter() if element.tag.endswith("rect")]
    assert colours.count("#b9c4d0") == colours.count("#2b6cb0") == min(len(report.ops), 12)
    assert tags.count("circle") == 1 and any("FLOPs for each byte" in word for word in words)
    assert "circle" not in replace(report, flops=None).svg()
    assert "&lt;lambda&gt;" in replace(report, name="<lambda>").svg()


GPU = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,8]{1,0})->f32[8,8]{1,0}}

%fused_add (p.0: f32[8,8], p.1: f32[8,8]) -> f32[8,8] {
  %p.0 = f32[8,8]{1,0} parameter(0)
  %p.1 = f32[8,8]{1,0} parameter(1)
  %tanh.1 = f32[8,8]{1,0} tanh(%p.0), metadata={op_name="jit(step)/tanh(x) = y"}
  ROOT %add.1 = f32[8,8]{1,0} add(%tanh.1, %p.1)
}

%body (arg: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %arg = (s32[], /*index=1*/f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%arg), index=1
  %gemm = (f32[8,8]{1,0}, s8[4096]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config={"a":1}
  %y = f32[8,8]{1,0} get-tuple-element(%gemm), index=0
  %fusion.1 = f32[8,8]{1,0} fusion(%y, %x), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%i, %fusion.1)
}

%condition (arg.1: (s32[], f32[8,8])) -> pred[] {
  %arg.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %n = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %copy-start = (f32[8,8]{1,0}, f32[8,8]{1,0}, u32[]) copy-start(%x.1)
  %copy-done = f32[8,8]{1,0} copy-done(%copy-start)
  %start = (s32[], f32[8,8]{1,0}) tuple(%zero, %copy-done)
  %while = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,8]{1,0} get-tuple-element(%while), index=1
}
"""


def test_a_gpus_module_is_read_with_its_library_calls_loops_and_asynchronous_pairs():
    module = hlo.parse(GPU)
    assert module.entry == "main" and set(module.computations) == {"fused_add", "body", "condition", "main"}
    assert module.kernels == {"copy-start": 1, "custom-call __cublas$gemm": 1, "loop fusion": 1, "compare": 1}
    assert module.ops == {"copy-start": 1, "copy-done": 1, "while": 1, "custom-call": 1, "tanh": 1, "add": 1,
                          "compare": 1}
    assert module.computations["body"][3].operands == ("x", "x")
