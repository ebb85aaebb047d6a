"""ONNX promises: shapes stay known under jit, weights are parameters, what is not understood is refused and named."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from jaxinfer.errors import CorruptFile, InvalidRequest, JaxinferError, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.onnx import Input, OnnxGraph, load_onnx
from jaxinfer.frontend.onnx.breaks import BREAKS, NEWEST
from jaxinfer.frontend.onnx.convolve import convolution
from jaxinfer.frontend.onnx.model import from_proto
from jaxinfer.frontend.onnx.registry import lookup, versions

F32, I64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node


def tensor(name: str, shape=None, kind: int = F32):
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name: str, value) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def model(nodes, inputs, outputs, weights=(), opset=21, **kwargs):
    graph = helper.make_graph(nodes, "test", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **kwargs)


def graph_of(*args, **kwargs) -> OnnxGraph:
    return from_proto(model(*args, **kwargs), Path("test.onnx"))


def run(graph: OnnxGraph, **inputs):
    """Under jit, everything traced."""
    return jax.jit(graph.apply)(graph.params, inputs)


# --- shapes ---


def flattening() -> OnnxGraph:
    """Reshape(x, concat(shape(x)[:1], [-1])), as exporters write it."""
    return graph_of(
        [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]), node("Unsqueeze", ["n", "axes"], ["n1"]),
         node("Concat", ["n1", "rest"], ["target"], axis=0), node("Reshape", ["x", "target"], ["y"])],
        [tensor("x", ["n", 2, 3])], [tensor("y", ["n", 6])],
        [weight("zero", np.int64(0)), weight("axes", [0]), weight("rest", [-1])])


def test_arithmetic_on_shapes_stays_known_under_jit():
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    assert run(flattening(), x=x)["y"].shape == (4, 6)
    jaxpr = jax.make_jaxpr(flattening().apply)({}, {"x": x})
    assert [str(equation.primitive) for equation in jaxpr.eqns] == ["reshape"]


def test_a_traced_shape_is_refused_and_the_node_the_op_and_the_input_are_named():
    graph = graph_of([node("Reshape", ["x", "s"], ["y"], name="fold")], [tensor("x", [4]), tensor("s", [2], I64)],
                     [tensor("y")])
    assert graph.inputs["s"].shaping and not graph.inputs["x"].shaping
    x, s = np.ones(4, np.float32), np.array([2, 2])
    with pytest.raises(UnsupportedModel, match=r"node 'fold' \(Reshape-21\): input 'shape' .*\(as numpy arrays\)"):
        run(graph, x=x, s=s)
    assert jax.jit(lambda x: graph.apply({}, {"x": x, "s": s}))(x)["y"].shape == (2, 2)
    assert graph.apply({}, {"x": x, "s": s})["y"].shape == (2, 2)


def test_a_float_that_decides_a_shape_is_a_constant_and_not_a_parameter():
    graph = graph_of([node("Resize", ["x", "", "scales"], ["y"])], [tensor("x", [1, 1, 2, 2])], [tensor("y")],
                     [weight("scales", np.float32([1, 1, 2, 2]))])
    assert not graph.params
    assert run(graph, x=np.ones((1, 1, 2, 2), np.float32))["y"].shape == (1, 1, 4, 4)


def test_what_depends_on_constants_alone_is_computed_once():
    graph = graph_of(
        [node("Constant", [], ["a"], value_int=3), node("Mul", ["a", "a"], ["b"]), node("Cast", ["b"], ["c"], to=F32),
         node("Mul", ["x", "c"], ["y"])], [tensor("x", [2])], [tensor("y", [2])])
    assert (graph.nodes, graph.folded) == (4, 2)
    np.testing.assert_array_equal(run(graph, x=np.ones(2, np.float32))["y"], [9, 9])


# --- parameters ---


def linear() -> OnnxGraph:
    return graph_of([node("Gemm", ["x", "w", "b"], ["y"], transB=1)], [tensor("x", ["n", 3])], [tensor("y", ["n", 2])],
                    [weight("w", np.float32([[1, 2, 3], [4, 5, 6]])), weight("b", np.float32([1, -1]))])


def test_apply_is_pure_and_can_be_mapped_and_differentiated():
    graph, x = linear(), np.float32([[1, 0, 0], [0, 1, 0]])
    assert set(graph.params) == {"w", "b"}
    np.testing.assert_array_equal(run(graph, x=x)["y"], [[2, 3], [3, 4]])
    rows = jax.vmap(lambda x: graph.apply(graph.params, {"x": x[None]})["y"][0])(x)
    np.testing.assert_array_equal(rows, [[2, 3], [3, 4]])
    slopes = jax.grad(lambda params: graph.apply(params, {"x": x})["y"].sum())(graph.params)
    np.testing.assert_array_equal(slopes["w"], [[1, 1, 0], [1, 1, 0]])
    doubled = jax.tree.map(lambda p: 2 * p, graph.params)
    np.testing.assert_array_equal(graph.apply(doubled, {"x": x})["y"], [[4, 6], [6, 8]])


def test_inputs_and_outputs_are_described():
    graph = linear()
    assert graph.inputs == {"x": Input(("n", 3), np.dtype(np.float32))}
    assert graph.outputs == {"y": Input(("n", 2), np.dtype(np.float32))}
    with pytest.raises(InvalidRequest, match="misses x"):
        graph.apply(graph.params, {})
    with pytest.raises(InvalidRequest, match="does not take z"):
        graph.apply(graph.params, {"x": np.ones((1, 3), np.float32), "z": 0})


def test_an_input_with_a_default_is_optional_and_can_be_given():
    graph = graph_of([node("Add", ["x", "b"], ["y"])], [tensor("x", [1]), tensor("b", [1])], [tensor("y", [1])],
                     [weight("b", np.float32([5]))])
    x = np.ones(1, np.float32)
    assert graph.inputs["b"].optional
    assert run(graph, x=x)["y"][0] == 6 and run(graph, x=x, b=x)["y"][0] == 2


def external(folder: Path, **changes: str) -> Path:
    """A model whose weight lies in a file beside it, at byte 64."""
    data = np.arange(6, dtype=np.float32)
    (folder / "w.bin").write_bytes(bytes(64) + data.tobytes())
    proto = TensorProto(name="w", data_type=F32, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "w.bin", "offset": "64", "length": "24"} | changes).items():
        proto.external_data.add(key=key, value=value)
    made = model([node("MatMul", ["x", "w"], ["y"])], [tensor("x", [1, 2])], [tensor("y", [1, 3])], [proto])
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    return folder / "m.onnx"


def test_external_weights_are_mapped(tmp_path):
    graph = load_onnx(external(tmp_path))
    assert isinstance(graph.params["w"].base, np.memmap) or isinstance(graph.params["w"], np.memmap)
    assert not graph.params["w"].flags.writeable
    np.testing.assert_array_equal(run(graph, x=np.float32([[1, 1]]))["y"], [[3, 5, 7]])


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"offset": "68"}, CorruptFile, "was it cut short"),
    ({"length": "20"}, CorruptFile, "takes 24 bytes, its entry says 20"),
    ({"location": "../w.bin"}, CorruptFile, "not a path inside the model's folder"),
    ({"location": "/etc/passwd"}, CorruptFile, "not a path inside the model's folder"),
    ({"location": "v.bin"}, ModelNotFound, "not beside the model"),
])
def test_a_bad_external_entry_is_refused(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load_onnx(external(tmp_path, **changes))


# --- refusals ---


def test_all_unsupported_operators_are_listed_before_anything_runs():
    nodes = [node("Fly", ["x"], ["a"], name="one"), node("Relu", ["a"], ["b"]), node("Swim", ["b"], ["c"], name="two"),
             node("Fly", ["c"], ["y"], name="three")]
    with pytest.raises(UnsupportedModel) as caught:
        graph_of(nodes, [tensor("x")], [tensor("y")])
    assert "Fly-21: nodes 'one', 'three'" in str(caught.value) and "Swim-21: nodes 'two'" in str(caught.value)


def test_an_attribute_that_is_not_understood_is_refused():
    with pytest.raises(UnsupportedModel, match="Relu-21 with the attribute 'slope'"):
        graph_of([node("Relu", ["x"], ["y"], slope=0.1)], [tensor("x")], [tensor("y")])


def test_an_operator_of_an_opset_that_we_have_not_read_is_refused():
    with pytest.raises(UnsupportedModel, match="Relu-999"):
        graph_of([node("Relu", ["x"], ["y"])], [tensor("x")], [tensor("y")], opset=999)


@pytest.mark.parametrize("damage", ["empty", "junk", "cut", "order"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    nodes = [node("Relu", ["x"], ["a"]), node("Relu", ["a"], ["y"])]
    made = model(nodes[:: -1 if damage == "order" else 1], [tensor("x", [2])], [tensor("y", [2])]).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes({"empty": b"", "junk": b"\xff" * 99, "cut": made[: len(made) - 3], "order": made}[damage])
    with pytest.raises(CorruptFile):
        load_onnx(path)


def test_a_weight_whose_bytes_do_not_fit_its_shape_is_refused():
    wrong = TensorProto(name="w", data_type=F32, dims=[3], raw_data=bytes(8))
    with pytest.raises(CorruptFile, match="'w' of shape"):
        graph_of([node("Add", ["x", "w"], ["y"])], [tensor("x")], [tensor("y")], [wrong])


# --- versions ---


def test_every_break_in_meaning_has_its_own_implementation():
    for names, since, _ in BREAKS:
        for name in names:
            assert since in versions(name), name
            assert lookup(name, "", since) is not lookup(name, "", since - 1), name


def test_the_highest_version_that_the_model_s_opset_allows_is_taken():
    x = np.float32([[1, 2], [3, 4]]).reshape(1, 2, 2)
    one_axis, flattened = (graph_of([node("Softmax", ["x"], ["y"], axis=1)], [tensor("x")], [tensor("y")], opset=o)
                           for o in (13, 12))
    assert np.allclose(run(one_axis, x=x)["y"].sum(1), 1)
    assert np.allclose(run(flattened, x=x)["y"].sum(), 1)


def test_every_operator_of_onnx_is_implemented_defined_or_excused():
    """What the newest opset has and we have not is listed here, so that a new opset cannot add to it unseen."""
    missing = set()
    for schema in onnx.defs.get_all_schemas():
        known = schema.domain != "" or schema.deprecated or schema.since_version > NEWEST[""]
        if known or schema.has_function or schema.has_context_dependent_function:
            continue
        if lookup(schema.name, "", NEWEST[""]) is None and schema.name != "Constant":
            missing.add(schema.name)
    assert missing == {"ImageDecoder"}


# --- functions and control flow ---


def test_a_function_of_the_model_runs_with_its_attributes():
    body = helper.make_function("mine", "Scaled", ["a"], ["b"], [node("Constant", [], ["k"]),
                                node("Mul", ["a", "k"], ["b"])], [helper.make_opsetid("", 21)], ["k"])
    body.node[0].attribute.add(name="value_float", ref_attr_name="k", type=onnx.AttributeProto.FLOAT)
    made = model([node("Scaled", ["x"], ["y"], domain="mine", k=3.0)], [tensor("x", [2])], [tensor("y", [2])],
                 functions=[body])
    made.opset_import.append(helper.make_opsetid("mine", 1))
    graph = from_proto(made, Path("test.onnx"))
    np.testing.assert_array_equal(run(graph, x=np.float32([1, 2]))["y"], [3, 6])


def branching() -> OnnxGraph:
    branch = lambda name, op: helper.make_graph([node(op, ["x", "x"], [name])], name, [], [tensor(name)])
    return graph_of([node("If", ["c"], ["y"], then_branch=branch("t", "Add"), else_branch=branch("e", "Mul"))],
                    [tensor("c", [], TensorProto.BOOL), tensor("x", [2])], [tensor("y", [2])])


@pytest.mark.parametrize("condition", [True, False])
def test_if_takes_its_branch_when_the_condition_is_known_and_both_when_it_is_traced(condition):
    graph, x, c = branching(), np.float32([3, 4]), np.array(condition)
    expected = x + x if condition else x * x
    np.testing.assert_array_equal(run(graph, x=x, c=c)["y"], expected)
    known = lambda x: graph.apply({}, {"x": x, "c": c})["y"]
    np.testing.assert_array_equal(jax.jit(known)(x), expected)
    names = lambda f, *args: {str(equation.primitive) for equation in jax.make_jaxpr(f)(*args).eqns}
    assert "cond" not in names(known, x) and "cond" in names(graph.apply, {}, {"x": x, "c": c})


def counting() -> OnnxGraph:
    """Doubles v while it is below 100, at most m times."""
    body = helper.make_graph(
        [node("Add", ["v", "v"], ["w"]), node("Less", ["w", "limit"], ["go"])], "body",
        [tensor("i", [], I64), tensor("c", [], TensorProto.BOOL), tensor("v", [])],
        [tensor("go", [], TensorProto.BOOL), tensor("w", [])])
    return graph_of([node("Loop", ["m", "", "x"], ["y"], body=body)], [tensor("m", [], I64), tensor("x", [])],
                    [tensor("y", [])], [weight("limit", np.float32(100))])


@pytest.mark.parametrize(("most", "expected"), [(3, 24), (50, 192)])
def test_a_loop_ends_by_its_count_or_its_condition_traced_or_not(most, expected):
    graph, x, m = counting(), np.float32(3), np.array(most)
    assert run(graph, x=x, m=m)["y"] == expected
    assert jax.jit(lambda x: graph.apply(graph.params, {"x": x, "m": m})["y"])(x) == expected
    assert graph.apply(graph.params, {"x": x, "m": m})["y"] == expected


def scanning() -> OnnxGraph:
    """Running sums, collected by a Loop whose trip count is the length of x."""
    body = helper.make_graph(
        [node("Gather", ["x", "i"], ["xi"]), node("Add", ["v", "xi"], ["w"]), node("Identity", ["w"], ["row"])], "body",
        [tensor("i", [], I64), tensor("c", [], TensorProto.BOOL), tensor("v", [])],
        [tensor("c", [], TensorProto.BOOL), tensor("w", []), tensor("row", [])])
    return graph_of([node("Size", ["x"], ["m"]), node("Loop", ["m", "", "zero"], ["last", "sums"], body=body)],
                    [tensor("x", ["n"])], [tensor("last", []), tensor("sums", ["n"])], [weight("zero", np.float32(0))])


@pytest.mark.parametrize("size", [5, 200])
def test_rows_of_a_loop_are_stacked(size):
    x = np.arange(size, dtype=np.float32)
    outputs = run(scanning(), x=x)
    np.testing.assert_allclose(outputs["sums"], np.cumsum(x))
    assert outputs["last"] == x.sum()


# --- properties ---

BINARY = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum, "Min": np.minimum,
          "Less": np.less, "Equal": np.equal}
small = st.integers(-9, 9)


@given(arrays.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), st.sampled_from(sorted(BINARY)),
       st.sampled_from([np.float32, np.int32]), st.data())
def test_elementwise_operators_broadcast_like_numpy(shapes, name, dtype, data):
    a, b = (data.draw(arrays.arrays(dtype, shape, elements=small)) for shape in shapes.input_shapes)
    graph = graph_of([node(name, ["a", "b"], ["y"])], [tensor("a"), tensor("b")], [tensor("y")])
    expected = BINARY[name](a, b)
    for y in (graph.apply({}, {"a": a, "b": b})["y"], graph.apply({}, {"a": jnp.asarray(a), "b": jnp.asarray(b)})["y"]):
        np.testing.assert_array_equal(y, expected)
        assert y.dtype == expected.dtype


@given(arrays.arrays(np.int32, st.integers(1, 20), elements=small), st.integers(1, 9), st.booleans(), st.booleans())
def test_integers_are_divided_towards_zero(a, b, negative, traced):
    b = np.int32(-b if negative else b)
    graph = graph_of([node("Div", ["a", "b"], ["y"])], [tensor("a"), tensor("b")], [tensor("y")])
    wrap = jnp.asarray if traced else np.asarray
    y = graph.apply({}, {"a": wrap(a), "b": wrap(b)})["y"]
    np.testing.assert_array_equal(y, [int(n / int(b)) for n in a])


bound = st.integers(-12, 12)


@given(arrays.arrays(np.int32, arrays.array_shapes(max_dims=3, max_side=6), elements=small), st.data())
def test_slices_known_and_traced_are_numpy_s(x, data):
    axis, step = data.draw(st.integers(-x.ndim, x.ndim - 1)), data.draw(st.sampled_from([-3, -1, 1, 2]))
    start, end = data.draw(bound), data.draw(bound)
    graph = graph_of([node("Slice", ["x", "s", "e", "a", "t"], ["y"])], [tensor("x")], [tensor("y")],
                     [weight(n, [v]) for n, v in zip("seat", (start, end, axis, step), strict=True)])
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, end, step)
    for given_x in (x, jnp.asarray(x)):
        np.testing.assert_array_equal(graph.apply({}, {"x": given_x})["y"], x[tuple(index)])


@given(arrays.arrays(np.int32, arrays.array_shapes(max_dims=3, max_side=5), elements=small), st.data())
def test_gather_known_and_traced_is_numpy_s_take(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    size = x.shape[axis]
    index = data.draw(arrays.arrays(np.int64, arrays.array_shapes(min_dims=0, max_dims=2, max_side=4),
                                    elements=st.integers(-size, size - 1)))
    graph = graph_of([node("Gather", ["x", "i"], ["y"], axis=axis)], [tensor("x"), tensor("i")], [tensor("y")])
    for given_x in (x, jnp.asarray(x)):
        for given_i in (index, jnp.asarray(index)):
            y = graph.apply({}, {"x": given_x, "i": given_i})["y"]
            np.testing.assert_array_equal(y, np.take(x, index, axis))


@given(st.permutations([2, 3, 4, 1]), st.data())
def test_reshape_known_and_traced_is_numpy_s(sizes, data):
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4, 1)
    target = list(sizes)
    target[data.draw(st.integers(0, 3))] = -1
    graph = graph_of([node("Reshape", ["x", "s"], ["y"])], [tensor("x")], [tensor("y")], [weight("s", target)])
    for given_x in (x, jnp.asarray(x)):
        np.testing.assert_array_equal(graph.apply({}, {"x": given_x})["y"], x.reshape(sizes))


@st.composite
def convolutions(draw):
    """Arguments of `convolution`: pointwise, depthwise (with one filter a channel or two) and dense, in 1 to 3 axes."""
    rank, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    each = lambda low, high: [draw(st.integers(low, high)) for _ in range(rank)]
    inputs, outputs = group * draw(st.integers(1, 2)), group * draw(st.integers(1, 2))
    kernel = draw(st.sampled_from([[1] * rank, each(1, 3)]))
    sizes, rng = each(5, 7), np.random.default_rng(0)
    x = rng.standard_normal((draw(st.integers(1, 2)), inputs, *sizes), np.float32)
    w = rng.standard_normal((outputs, inputs // group, *kernel), np.float32)
    pads = list(zip(each(0, 2), each(0, 2), strict=True)) if draw(st.booleans()) else [(0, 0)] * rank
    return x, w, each(1, 2), pads, each(1, 2), group, draw(st.sampled_from([None, [2] * rank]))


@given(convolutions(), st.sampled_from(convolution.available("cpu")))
def test_every_form_of_the_convolution_equals_xla_s_own(case, how):
    x, w, *rest = case
    compute = lambda how: convolution(jnp.asarray(x), jnp.asarray(w), *rest, how=how)
    np.testing.assert_allclose(compute(how), compute("reference"), rtol=1e-4, atol=1e-5)


@given(st.binary(max_size=200))
def test_junk_never_raises_anything_but_our_errors(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(data)
        with pytest.raises(JaxinferError):
            load_onnx(path)
