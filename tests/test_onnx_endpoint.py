"""An ONNX file is an endpoint like any other: which of its axes is the batch, and which of its inputs are known."""

import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.errors import InvalidOption, InvalidRequest, StepFailed, UnsupportedModel

onnx = pytest.importorskip("onnx")
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
HALF = dict(kernel_shape=[2], strides=[2])
value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node


@pytest.fixture
def save(tmp_path):
    def save(nodes, inputs, outputs, weights=()):
        graph = onnx.helper.make_graph(nodes, "test", inputs, outputs, list(weights))
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
        return tmp_path / "m.onnx"
    return save


def test_an_onnx_file_is_an_endpoint(save):
    w = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    path = save([node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "y"], ["z"])],
                [value("x", FLOAT, ["n", "length", 3]), value("y", FLOAT, ["n", "length", 2])],
                [value("z", FLOAT, ["n", "length", 2])], [onnx.numpy_helper.from_array(w, "w")])
    with ji.load(path, max_rows=4) as f:
        rng = np.random.default_rng(1)
        asked = [{"x": rng.normal(size=(n, 3)).astype(np.float32), "y": rng.normal(size=(n, 2)).astype(np.float32)}
                 for n in (2, 5, 2, 2, 5)]
        for request, result in zip(asked, f.map(asked), strict=True):
            np.testing.assert_allclose(result["z"], request["x"] @ w + request["y"], rtol=1e-5, atol=1e-6)
        x = np.ones((1, 2, 3), np.float32)
        gradient = jax.grad(lambda x: f.graph.apply(f.params, {"x": x, "y": jnp.zeros((1, 2, 2))})["z"].sum())(x)
        np.testing.assert_allclose(gradient[0, 0], w.sum(1), rtol=1e-5)
        assert f.swap({"w": w * 2}) == 2 and ji.inspect(f, {"x": x, "y": x[..., :2]}).nodes == 2
        with pytest.raises(InvalidRequest, match="arguments are missing: y"):
            f(asked[0]["x"])
    for option in (dict(dtype="bfloat16"), dict(batch_invariant=True)):
        with pytest.raises(InvalidOption):
            ji.load(path, **option)


def test_company_changes_nothing_whatever_the_file_does_along_its_first_axis(save):
    x = np.array([[1, 2], [3, 5]], np.float32)
    path = save([node("Softmax", ["x"], ["y"], axis=0)], [value("x", FLOAT, ["n", 2])], [value("y", FLOAT, ["n", 2])])
    with ji.load(path) as f:
        assert all(found["y"].tolist() == [1, 1] for found in f.map([*x, *x, *x]))
    with ji.load(path, max_rows=1) as f:
        assert f.ladders == {}
        found = f(x)["y"]
        np.testing.assert_allclose(found, jax.nn.softmax(x, 0), rtol=1e-6)
        found += 1  # the caller's own


def test_sizes_without_a_name_have_nothing_to_do_with_each_other(save):
    path = save([node("Relu", ["x"], ["y"])], *([value(name, FLOAT, ["?", "?", "?"])] for name in "xy"))
    with ji.load(path) as f:
        assert f(np.ones((2, 3), np.float32))["y"].shape == (2, 3)


def test_known_inputs_are_the_same_for_all_requests(save):
    path = save([node("Tile", ["x", "times"], ["y"])], [value("x", FLOAT, ["n", 2]), value("times", INT64, [2])],
                [value("y", FLOAT, ["n", "m"])])
    with pytest.raises(UnsupportedModel, match=r"times decide shapes.*known=\{'times': ...\}"):
        ji.load(path)
    with pytest.raises(InvalidOption, match=r"known names 'rate'; the inputs of .* are x, times"):
        ji.load(path, known={"rate": 1})
    with ji.load(path, known={"times": [1, 2]}) as f:
        assert f(np.array([1, 2], np.float32))["y"].tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("length, refused", [(4, pytest.raises(InvalidOption)), ("length", nullcontext())])
def test_an_input_that_decides_a_branch_is_asked_for_by_name(save, length, refused):
    """At the load where the file tells all sizes; else by the first request, whose sizes may have made both fit."""
    branch = lambda name, *nodes: onnx.helper.make_graph(nodes, name, [], [value(name, FLOAT, None)])
    whole, half = branch("a", node("Identity", ["x"], ["a"])), branch("b", node("MaxPool", ["x"], ["b"], **HALF))
    path = save([node("If", ["fast"], ["y"], then_branch=half, else_branch=whole)],
                [value("x", FLOAT, [1, 1, length]), value("fast", onnx.TensorProto.BOOL, [])],
                [value("y", FLOAT, [1, 1, "m"])])
    x = np.arange(4, dtype=np.float32)[None, None]
    told = r"both branches must give the same.*which one is taken follows from fast: load with known=\{'fast': ...\}"
    with refused as caught, ji.load(path) as f, pytest.raises(StepFailed, match=told):
        f(x=x, fast=True)
    assert caught is None or re.search(told, str(caught.value))
    with ji.load(path, known={"fast": True}) as f:
        assert f(x)["y"].tolist() == [[[1, 3]]]


def test_an_input_of_unknown_rank_is_refused(save):
    with pytest.raises(UnsupportedModel, match="x are no arrays of numbers with a known rank"):
        ji.load(save([node("Relu", ["x"], ["y"])], [value("x", FLOAT, None)], [value("y", FLOAT, None)]))
