"""The Open Inference Protocol: tensors go through it unchanged whatever way they take, rows of many clients share
batches, and what is wrong is refused at the door."""

import asyncio
import json
import os
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.alignment import is_aligned
from jaxinfer.errors import InvalidOption, InvalidRequest, ModelNotFound
from tests.running import eventually, seen_events
from tests.test_endpoint import Held
from tests.test_text_encoder import path as bert  # noqa: F401  # a fixture

grpc = pytest.importorskip("grpc")
testclient = pytest.importorskip("starlette.testclient")

from jaxinfer.serving.app import application, parts_of, private  # noqa: E402
from jaxinfer.serving.inference import proto, question, rest, routes, wire  # noqa: E402
from jaxinfer.serving.inference.datatypes import DTYPES  # noqa: E402
from jaxinfer.serving.inference.models import Tensor, face_of  # noqa: E402
from jaxinfer.serving.inference.regions import HOME, Regions  # noqa: E402
from jaxinfer.serving.inference.schema import CLASSES, SERVICE  # noqa: E402
from jaxinfer.serving.settings import Settings  # noqa: E402
from jaxinfer.serving.site import Loading, Site  # noqa: E402
from tests.test_serving_traces import PARENT, SPAN_ID, TRACE_ID, attributes, collector, spans  # noqa: E402

pytestmark = pytest.mark.usefixtures("in_haste")

JSON_HEADER = "Inference-Header-Content-Length"
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def tensor(name, array, datatype, **fields):
    return {"name": name, "shape": list(array.shape), "datatype": datatype, **fields}


def plain(array):
    """The elements as Python's, which are exact."""
    return array.astype(np.float32 if array.dtype == jnp.bfloat16 else array.dtype).reshape(-1).tolist()


def packed(said, *arrays):
    """A body of JSON and bytes behind it, and the length of the JSON."""
    head = json.dumps(said).encode()
    return head + b"".join(array.tobytes() for array in arrays), len(head)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# Tensors.


@st.composite
def tensors(draw):
    """A datatype, and an array of it with any bits in it: NaN of one kind only, as JSON has but one."""
    name = draw(st.sampled_from(sorted(set(DTYPES) - {"BYTES"})))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    dtype = DTYPES[name]
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (raw & 1 if name == "BOOL" else raw).view(dtype).reshape(shape).copy()
    if dtype.kind in "fV":
        array[np.isnan(array)] = np.nan
    return name, array


@settings(max_examples=60)
@given(tensors())
def test_tensors_are_the_same_in_json_in_bytes_and_in_grpc(case):
    datatype, array = case
    read = lambda body, header=None: rest.read("m", "", memoryview(body), header, None).arrays["x"]
    flat = tensor("x", array, datatype, data=plain(array))
    nested = tensor("x", array, datatype, data=np.array(plain(array), object).reshape(array.shape).tolist())
    size = tensor("x", array, datatype, parameters={"binary_data_size": array.nbytes})
    assert same(read(packed({"inputs": [flat]})[0]), array)
    assert same(read(*packed({"inputs": [size]}, array)), array)
    if array.ndim:
        assert same(read(packed({"inputs": [nested]})[0]), array)
    for typed in (False, True)[: 1 + (datatype in proto.CONTENTS)]:
        message = grpc_request("m", {"x": array}, typed=typed).SerializeToString()
        assert same(proto.read(message, None).arrays["x"], array)


@settings(max_examples=40)
@given(tensors(), st.integers(1, 3))
def test_answers_are_the_same_in_json_in_bytes_and_in_grpc(case, rows):
    datatype, array = case
    whole = np.stack([array] * rows)
    for binary in (False, True):
        asked = question.Question("m", "", {}, binary=binary)
        output = question.Output(Tensor("y", datatype, whole.shape), [array] * rows, question.Wanted("y", binary))
        head, pieces, _ = rest.write(question.Answer(asked, 3, [output], 0))
        said = json.loads(head)
        found = said["outputs"][0]
        data = b"".join(pieces) if binary else np.array(found["data"], whole.dtype).tobytes()
        assert said["model_version"] == "3" and found["shape"] == list(whole.shape) and data == whole.tobytes()
        message = CLASSES["ModelInferResponse"].FromString(proto.write(question.Answer(asked, 3, [output], 0))[0])
        assert same(grpc_outputs(message)["y"], whole)


def test_texts_are_read_from_json_and_from_bytes():
    texts = ["", "a", "é\u0000z" * 9]
    raw = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
    said = {"name": "t", "shape": [3], "datatype": "BYTES"}
    for body in (packed({"inputs": [said | {"data": texts}]})[0],):
        assert rest.read("m", "", memoryview(body), None, None).arrays["t"].tolist() == [t.encode() for t in texts]
    body, header = packed({"inputs": [said | {"parameters": {"binary_data_size": len(raw)}}]})
    found = rest.read("m", "", memoryview(body + raw), header, None).arrays["t"]
    assert found.tolist() == [t.encode() for t in texts]


def test_bytes_are_read_where_they_lie():
    x, y = np.arange(6, dtype=np.float32), np.arange(4, dtype=np.int64)
    body, header = packed({"inputs": [tensor(n, a, d, parameters={"binary_data_size": a.nbytes})
                                      for n, a, d in (("x", x, "FP32"), ("y", y, "INT64"))]}, x, y)
    asked = rest.read("m", "", memoryview(body), header, None)
    whole = np.frombuffer(body, np.uint8)
    assert all(np.shares_memory(array, whole) for array in asked.arrays.values()) and asked.copied == 0
    data = grpc_request("m", {"x": x, "y": y}).SerializeToString()
    asked = proto.read(data, None)
    assert all(np.shares_memory(array, np.frombuffer(data, np.uint8)) for array in asked.arrays.values())
    assert asked.copied == 0 and same(asked.arrays["y"], y)


@settings(max_examples=60)
@given(st.binary(max_size=40), st.data())
def test_no_bytes_at_all_are_more_than_refused(junk, data):
    good = grpc_request("m", {"x": np.arange(3, dtype=np.float32)}).SerializeToString()
    at = data.draw(st.integers(0, len(good)))
    for message in (junk, good[:at], good[:at] + junk, good[:at] + junk + good[at:]):
        try:
            wire.read_request(message)
        except InvalidRequest:
            pass


@pytest.mark.parametrize("length", ["4000", "3"])
def test_a_body_in_chunks_is_what_came_whatever_length_was_said(length):
    """Memory that nothing was written into would go out with an answer."""
    pieces = iter([b"abc", b"defgh"])

    async def receive():
        return {"type": "http.request", "body": next(pieces), "more_body": pieces.__length_hint__() > 0}

    headers = [(b"content-length", length.encode()), (b"transfer-encoding", b"chunked")]
    body, _ = asyncio.run(routes._body(Request({"type": "http", "headers": headers}, receive), 0))
    assert bytes(body) == b"abcdefgh"


def test_large_rows_go_out_as_they_are_and_small_ones_together():
    small, large = b"a" * 100, memoryview(b"b" * rest.SMALL)
    groups, copied = rest.grouped([small, small, large, small])
    assert groups == [small * 2, large, small] and groups[1] is large and copied == 200


# A server.


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    registry = ji.Registry()
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    registry.load("mlp", lambda: ji.endpoint(lambda p, x, scale: {"y": x @ p * scale[:, None], "sum": x.sum(-1)}, w,
                                             max_batch=8, example={"x": X[0], "scale": np.float32(1)}))
    registry.load("a/ragged", lambda: ji.endpoint(lambda x: jnp.cumsum(x, 1), example=np.zeros(16, np.int32),
                                                  ragged={"0": {0: "length"}}, max_batch=4))
    registry.load("double", lambda: ji.endpoint(lambda x: 2 * x, example=np.zeros(2, np.float32), max_batch=4))
    yield registry
    registry.close()


@contextmanager
def client(registry, **options):
    app = application(registry, settings=Settings(**options))
    with testclient.TestClient(app, raise_server_exceptions=False) as client:
        client.site = app.state.site
        yield client


@pytest.fixture(scope="module")
def web(registry):
    with client(registry, grpc_port=0, shared_memory=True) as web:
        yield web


@pytest.fixture(scope="module")
def call(web):
    """A method of the service, by name."""
    with grpc.insecure_channel(f"127.0.0.1:{web.site.grpc_port}") as channel:
        def call(name, request=None, **options):
            request = CLASSES[f"{name}Request"]() if request is None else request
            method = channel.unary_unary(f"/{SERVICE}/{name}", request_serializer=type(request).SerializeToString,
                                         response_deserializer=CLASSES[f"{name}Response"].FromString)
            return method(request, timeout=20, **options)
        yield call


def infer(web, name, said, *arrays, version=""):
    body, header = packed(said, *arrays)
    path = f"/v2/models/{name}{version and f'/versions/{version}'}/infer"
    return web.post(path, content=body, headers={JSON_HEADER: str(header)} if arrays else {})


def grpc_request(model, arrays, typed=False, **fields):
    message = CLASSES["ModelInferRequest"](model_name=model, **fields)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, array in arrays.items():
        datatype = names[array.dtype]
        made = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            made.contents.SetInParent()
            getattr(made.contents, proto.CONTENTS[datatype]).extend(array.reshape(-1).tolist())
        else:
            message.raw_input_contents.append(array.tobytes())
    return message


def grpc_outputs(message):
    found = {}
    for i, output in enumerate(message.outputs):
        dtype = DTYPES[output.datatype]
        data = (np.frombuffer(message.raw_output_contents[i], dtype) if message.raw_output_contents else
                np.array(list(getattr(output.contents, proto.CONTENTS[output.datatype])), dtype))
        found[output.name] = data.reshape(list(output.shape))
    return found


def binary_outputs(response):
    header = int(response.headers[JSON_HEADER])
    said, rest_, found = json.loads(response.content[:header]), response.content[header:], {}
    for output in said["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = np.frombuffer(rest_[:size], DTYPES[output["datatype"]]).reshape(output["shape"])
        rest_ = rest_[size:]
    assert not rest_
    return found


SCALE = np.array([1, 2, 3], np.float32)
MLP = [tensor("x", X, "FP32", data=X.tolist()), tensor("scale", SCALE, "FP32", data=SCALE.tolist())]


def test_every_way_to_ask_gets_the_same_bits(web, call):
    first = infer(web, "mlp", {"id": "7", "inputs": MLP}).json()
    assert first["id"] == "7" and first["model_name"] == "mlp" and first["model_version"] == "1"
    wanted = {output["name"]: np.array(output["data"], np.float32).reshape(output["shape"])
              for output in first["outputs"]}
    np.testing.assert_allclose(wanted["y"], X @ np.arange(12).reshape(4, 3) * SCALE[:, None], rtol=1e-5, atol=1e-5)
    said = [tensor(one["name"], array, "FP32", parameters={"binary_data_size": array.nbytes})
            for one, array in zip(MLP, (X, SCALE), strict=True)]
    raw = infer(web, "mlp", {"inputs": said, "parameters": {"binary_data_output": True}}, X, SCALE)
    arrays = {"x": X, "scale": SCALE}
    for found in (binary_outputs(raw), grpc_outputs(call("ModelInfer", grpc_request("mlp", arrays))),
                  grpc_outputs(call("ModelInfer", grpc_request("mlp", arrays, typed=True)))):
        assert found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in wanted)


def test_outputs_are_chosen_by_name_each_in_its_own_way(web):
    said = {"inputs": MLP, "outputs": [{"name": "sum", "parameters": {"binary_data": True}}, {"name": "y"}]}
    response = infer(web, "mlp", said)
    head = json.loads(response.content[: int(response.headers[JSON_HEADER])])
    assert [output["name"] for output in head["outputs"]] == ["sum", "y"] and "data" in head["outputs"][1]
    rows = np.frombuffer(response.content[int(response.headers[JSON_HEADER]):], np.float32)
    np.testing.assert_allclose(rows, X.sum(1), rtol=1e-5)


def test_metadata_names_tensors_and_says_which_sizes_are_open(web, call):
    said = web.get("/v2/models/mlp").json()
    assert said["versions"] == ["1"] and said["platform"] == "jax"
    assert said["inputs"] == [{"name": "scale", "datatype": "FP32", "shape": [-1]},
                              {"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert said["outputs"] == [{"name": "sum", "datatype": "FP32", "shape": [-1]},
                               {"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    ragged = web.get("/v2/models/a/ragged").json()
    assert ragged["inputs"] == [{"name": "0", "datatype": "INT32", "shape": [-1, -1]}]
    assert ragged["outputs"] == [{"name": "output", "datatype": "INT32", "shape": [-1, -1]}]
    found = call("ModelMetadata", CLASSES["ModelMetadataRequest"](name="a/ragged", version="stable"))
    assert [(it.name, it.datatype, list(it.shape)) for it in found.outputs] == [("output", "INT32", [-1, -1])]
    assert web.get("/v2").json()["extensions"] == ["binary_tensor_data", "parameters", "system_shared_memory"]
    assert call("ServerMetadata").name == "jaxinfer"


def test_health_is_that_of_the_server_and_of_each_model(web, call):
    assert web.get("/v2/health/live").json() == {"live": True} and call("ServerLive").live
    assert web.get("/v2/health/ready").status_code == 200 and call("ServerReady").ready
    assert web.get("/v2/models/mlp/versions/1/ready").json() == {"name": "mlp", "ready": True}
    assert web.get("/v2/models/a/ragged/ready").json() == {"name": "a/ragged", "ready": True}
    assert web.get("/v2/models/none/ready").status_code == 404
    web.site.draining = True
    try:
        assert web.get("/v2/health/ready").status_code == 503 and not call("ServerReady").ready
        assert web.get("/v2/health/live").status_code == 200 and call("ServerLive").live
        with pytest.raises(grpc.RpcError) as caught:
            call("ModelInfer", grpc_request("mlp", {}))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        web.site.draining = False


def test_ragged_rows_keep_their_length(web):
    x = np.arange(10, dtype=np.int32).reshape(2, 5)
    found = infer(web, "a/ragged", {"inputs": [tensor("0", x, "INT32", data=x.reshape(-1).tolist())]}).json()
    assert found["outputs"][0]["shape"] == [2, 5] and found["outputs"][0]["data"] == x.cumsum(1).reshape(-1).tolist()


def test_an_onnx_file_has_its_own_names_and_datatypes(tmp_path):
    onnx = pytest.importorskip("onnx")
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    int64, float_ = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node("Add", ["ids", "one"], ["next"]), node("Shape", ["pixels"], ["size"]), node("Relu", ["pixels"], ["on"])],
        "test", [value("ids", int64, ["n"]), value("pixels", float_, ["h", 3])],
        [value("next", int64, ["n"]), value("size", int64, [2]), value("on", float_, ["h", 3])],
        [onnx.numpy_helper.from_array(np.array([1], np.int64), "one")])
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    registry = ji.Registry()
    registry.load("file", lambda: ji.load(path))
    with client(registry) as web:
        said = web.get("/v2/models/file").json()
        assert said["platform"] == "onnx" and [it["name"] for it in said["inputs"]] == ["ids", "pixels"]
        assert [(it["name"], it["datatype"], it["shape"]) for it in said["outputs"]] == [
            ("next", "INT64", [-1]), ("size", "INT64", [2]), ("on", "FP32", [-1, 3])]
        pixels, ids = np.array([[-1, 2, 3]], np.float32), np.array([5, 2**31 - 2])
        response = infer(web, "file", {"inputs": [
            tensor("pixels", pixels, "FP32", parameters={"binary_data_size": 12}),
            tensor("ids", ids, "INT64", data=ids.tolist())], "parameters": {"binary_data_output": True}}, pixels)
        found = binary_outputs(response)
        assert {name: array.tolist() for name, array in found.items()} == {
            "next": [6, 2**31 - 1], "size": [1, 3], "on": [[0, 2, 3]]} and found["next"].dtype == np.int64
        ids = np.array([2**40])
        refused = infer(web, "file", {"inputs": [tensor("pixels", pixels, "FP32", data=pixels.tolist()),
                                                 tensor("ids", ids, "INT64", data=ids.tolist())]})
        assert refused.status_code == 400 and "ids" in refused.json()["error"], "no number is lost without a word"
    registry.close()


def test_sizes_that_a_function_cannot_take_together_are_the_clients_fault():
    registry = ji.Registry()
    registry.load("pairs", lambda: ji.endpoint(lambda x: x.reshape(x.shape[0], -1, 2).sum(-1), max_batch=2,
                                               example=np.zeros(4, np.float32), ragged={"0": {0: "n"}},
                                               ladders={"n": None}))
    with client(registry) as web:
        ask = lambda n: infer(web, "pairs", {"inputs": [tensor("0", np.zeros((1, n)), "FP32", data=[0.0] * n)]})
        assert ask(6).json()["outputs"][0]["data"] == [0, 0, 0]
        refused = ask(5)
        assert refused.status_code == 400 and "does not take these sizes" in refused.json()["error"]
    registry.close()


def test_an_encoder_takes_texts(request):
    registry, encoder = ji.Registry(), ji.load(request.getfixturevalue("bert"))
    encoder.warmup = lambda background: None  # all its buckets, of which this needs one
    registry.load("texts", lambda: encoder)
    with client(registry) as web:
        said = web.get("/v2/models/texts").json()
        assert said["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        found = infer(web, "texts", {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2],
                                                 "data": ["w1 w2", "w3"]}]}).json()
        vectors = np.array(found["outputs"][0]["data"], np.float32).reshape(found["outputs"][0]["shape"])
        np.testing.assert_array_equal(vectors, registry["texts"].embed(["w1 w2", "w3"]))
        refused = infer(web, "texts", {"inputs": [tensor("text", X, "FP32", data=X.tolist())]})
        assert refused.status_code == 400 and "it must be BYTES[-1]" in refused.json()["error"]
    registry.close()


def constant(number):
    return lambda: ji.endpoint(lambda p, x: x + p, np.float32(number), example=np.zeros((), np.float32), max_batch=2)


def test_a_path_may_name_a_version_or_a_label():
    registry = ji.Registry()
    registry.load("m", constant(10))
    registry.load("m", constant(20), label="canary")
    said = {"inputs": [tensor("0", np.zeros(3), "FP32", data=[0.0] * 3)]}
    with client(registry) as web:
        found = {version: infer(web, "m", said, version=version).json()
                 for version in ("", "stable", "canary", "1", "2")}
        assert {v: (f["outputs"][0]["data"][0], f["model_version"]) for v, f in found.items()} == {
            "": (10, "1"), "stable": (10, "1"), "1": (10, "1"), "canary": (20, "2"), "2": (20, "2")}
        registry["m"].swap(np.float32(30))
        assert web.get("/v2/models/m").json()["versions"] == ["2", "3"]
        assert infer(web, "m", said).json()["model_version"] == "3"
        for version in ("1", "9", "9" * 30, "other"):
            gone = infer(web, "m", said, version=version)
            assert gone.status_code == 404 and "no version" in gone.json()["error"]
    registry.close()


def test_rows_of_one_request_are_of_one_version():
    """The weights change when the first batch of its rows has been computed, and before the second."""
    registry, changed = ji.Registry(), threading.Event()
    registry.load("m", constant(1))
    model = registry["m"].version.model
    dispatch = model._work.dispatch

    def then_change(asks):
        flight = dispatch(asks)
        if not changed.is_set():
            changed.set()
            model.swap(np.float32(2))
        return flight

    model._work.dispatch = then_change
    with client(registry) as web:
        found = infer(web, "m", {"inputs": [tensor("0", np.zeros(4), "FP32", data=[0.0] * 4)]}).json()
        assert found["outputs"][0]["data"] == [2, 2, 2, 2] and found["model_version"] == "2"
    registry.close()


def test_a_version_that_was_asked_for_by_number_is_no_other():
    registry = ji.Registry()
    registry.load("m", constant(1))
    model = registry["m"].version.model
    dispatch = model._work.dispatch
    model._work.dispatch = lambda asks: [model.swap(np.float32(2)), dispatch(asks)][1]
    with client(registry) as web:
        gone = infer(web, "m", {"inputs": [tensor("0", np.zeros(1), "FP32", data=[0.0])]}, version="1")
        assert gone.status_code == 404 and "version 1 of m was replaced" in gone.json()["error"]
    registry.close()


def test_many_clients_share_batches():
    held, registry = Held(), ji.Registry()
    registry.load("held", lambda: held.endpoint(max_delay=60, max_batch=8))
    said = lambda i: {"inputs": [tensor("0", np.zeros((1, 2)), "FP32", data=[float(i)] * 2)]}
    with client(registry, grpc_port=0) as web, ThreadPoolExecutor(9) as pool:
        first = pool.submit(infer, web, "held", said(0))
        assert held.running.wait(10)
        others = [pool.submit(infer, web, "held", said(i)) for i in range(1, 9)]
        assert eventually(lambda: registry["held"].stats.waiting + len(held.sizes) > 8 or sum(held.sizes) > 8)
        held.go.set()
        assert [one.result(20).json()["outputs"][0]["data"] for one in (first, *others)] == [[i, i] for i in range(9)]
    registry.close()
    assert sorted(held.sizes) == [1, 8]


def test_a_call_over_grpc_belongs_to_its_callers_trace(registry):
    request = grpc_request("double", {"0": np.zeros((1, 2), np.float32)})
    wrong = grpc_request("double", {"none": np.zeros((1, 2), np.float32)})
    with collector() as (address, received):
        with client(registry, grpc_port=0, otlp=address) as web, \
                grpc.insecure_channel(f"127.0.0.1:{web.site.grpc_port}") as channel:
            ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            ask(request.SerializeToString(), timeout=20, metadata=tuple(PARENT.items()))
            with pytest.raises(grpc.RpcError):
                ask(wrong.SerializeToString(), timeout=20)
            one = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
            assert len(list(one(iter([request.SerializeToString()] * 2), timeout=20))) == 2
            channel.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=20)
        found = spans(received)
    calls = [span for span in found if span.kind == span.SPAN_KIND_SERVER]
    assert [(span.name.rpartition("/")[2], attributes(span)["http.response.status_code"]) for span in calls] == [
        ("ModelInfer", 200), ("ModelInfer", 400), ("ModelStreamInfer", 200), *[("ModelStreamInfer", 200)] * 2]
    assert (calls[0].trace_id.hex(), calls[0].parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert [span for span in found if span.parent_span_id == calls[0].span_id], "what it asked of the model is below it"


def test_a_full_queue_says_when_to_come_again():
    held, registry = Held(), ji.Registry()
    registry.load("held", lambda: held.endpoint(max_waiting=2, max_batch=1, max_delay=0))
    x = np.zeros((2, 2), np.float32)
    said = {"inputs": [tensor("0", x, "FP32", data=x.tolist())]}
    with client(registry, grpc_port=0) as web, ThreadPoolExecutor(4) as pool:
        running = [pool.submit(infer, web, "held", said)]
        assert held.running.wait(10)
        running.append(pool.submit(infer, web, "held", said))
        assert eventually(lambda: registry["held"].stats.waiting >= 1)
        full = infer(web, "held", said)
        assert full.status_code == 429 and int(full.headers["Retry-After"]) >= 1 and "full" in full.json()["error"]
        with grpc.insecure_channel(f"127.0.0.1:{web.site.grpc_port}") as channel:
            ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            with pytest.raises(grpc.RpcError) as caught:
                ask(grpc_request("held", {"0": x}).SerializeToString(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        held.go.set()
        assert [one.result(20).status_code for one in running] == [200, 200]
    registry.close()


def test_a_request_has_a_timeout_in_microseconds():
    held, registry = Held(), ji.Registry()
    registry.load("held", held.endpoint)
    said = {"inputs": [tensor("0", np.zeros((1, 2)), "FP32", data=[0.0] * 2)]}
    with client(registry) as web:
        late = infer(web, "held", said | {"parameters": {"timeout": 50_000}})
        assert late.status_code == 504 and "timeout of 0.05 s is over" in late.json()["error"]
        held.go.set()
    with client(registry, request_timeout=0.05) as web:
        held.go.clear()
        assert infer(web, "held", said).status_code == 504, "the server's own patience counts too"
        held.go.set()
    registry.close()


def test_copied_bytes_are_told_for_each_request(web):
    with seen_events(events.TensorsServed) as seen:
        body, header = packed({"inputs": [tensor("0", np.zeros((1, 2)), "FP32", parameters={"binary_data_size": 8})],
                               "parameters": {"binary_data_output": True}}, np.zeros((1, 2), np.float32))
        answers = [web.post("/v2/models/double/infer", content=content, headers={JSON_HEADER: str(header)})
                   for content in (body, iter([body[:10], body[10:]]))]
    assert [(it.model, it.protocol, it.bytes_in, it.bytes_out) for it in seen] == [("double", "http", 8, 8)] * 2
    whole, pieces = (it.bytes_copied - len(answer.content) for it, answer in zip(seen, answers, strict=True))
    assert whole in (0, 8), "small answers are joined; a lone row is copied unless it lies at a boundary by chance"
    assert pieces in (len(body), len(body) + 8), "a body that comes in pieces is put together"


def test_a_body_in_pieces_is_written_to_where_its_tensors_are_aligned():
    from starlette.requests import Request

    from jaxinfer.serving.inference.routes import _body

    async def read(pieces, header, length):
        messages = iter([{"type": "http.request", "body": p, "more_body": i < len(pieces) - 1}
                         for i, p in enumerate(pieces)])

        async def receive():
            return next(messages)

        headers = [] if length is None else [(b"content-length", str(length).encode())]
        return await _body(Request({"type": "http", "headers": headers}, receive), header)

    whole = bytes(range(200))
    for pieces, copied in (([whole], 0), ([whole[:70], whole[70:]], 200)):
        body, found = asyncio.run(read(pieces, 37, 200))
        assert bytes(body) == whole and found == copied
        assert copied == 0 or is_aligned(np.frombuffer(body, np.uint8)[37:])
    assert asyncio.run(read([whole[:70], whole[70:]], 37, None)) == (whole, 200)
    assert asyncio.run(read([b""], 0, 0)) == (b"", 0)


# The door.

GOOD = {"name": "0", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}
RAW = {key: GOOD[key] for key in ("name", "shape", "datatype")}
BAD = {
    "no JSON": (b"{", "no JSON"),
    "bytes that are no text": (b"\xff\xfe\x00", "no JSON"),
    "nothing": (b"", "no JSON"),
    "deep JSON": (b"[" * 100_000, "no JSON"),
    "a number of too many digits": (b'{"inputs": ' + b"9" * 5000 + b"}", "no JSON"),
    "a list": (b"[]", "it must be an object"),
    "an unknown field": ({"input": []}, "unknown fields ['input']"),
    "inputs that are no list": ({"inputs": {}}, "inputs is {}; it must be a list"),
    "an input that is none": ({"inputs": [3]}, "an input is 3"),
    "no inputs": ({}, "inputs are missing: ['0']; there are 0: FP32[-1, 2]"),
    "a name that is no Unicode": ({"inputs": [GOOD | {"name": "\ud800", "data": 1}]}, "input \ud800 has the data 1"),
    "an unknown input": ({"inputs": [GOOD, GOOD | {"name": "z"}]}, "inputs are unknown: ['z']"),
    "one twice": ({"inputs": [GOOD, GOOD]}, "input 0 is given twice"),
    "no name": ({"inputs": [{}]}, "an input has the name None"),
    "no data": ({"inputs": [RAW]}, "must have its elements in one place"),
    "no datatype": ({"inputs": [{"name": "0", "shape": [1], "data": [1]}]}, "has the datatype None"),
    "an unknown datatype": ({"inputs": [GOOD | {"datatype": "FP8"}]}, "datatype 'FP8'; it must be one of BF16, BOOL"),
    "another datatype": ({"inputs": [GOOD | {"datatype": "INT32", "data": [1, 2]}]}, "0 is int32[2]; it must be"),
    "texts": ({"inputs": [GOOD | {"datatype": "BYTES", "data": ["a", "b"]}]}, "it must be FP32[-1, 2]"),
    "a negative axis": ({"inputs": [GOOD | {"shape": [-1, 2]}]}, "has the shape [-1, 2]; it must be"),
    "a huge axis": ({"inputs": [GOOD | {"shape": [2**70, 2]}]}, "it must be a list of at most 32 integers"),
    "a huge product": ({"inputs": [GOOD | {"shape": [2**62] * 32}]}, "has 2 elements; its shape"),
    "no elements of a huge shape": ({"inputs": [GOOD | {"shape": [0, 2**62, 2**62], "data": []}]}, "too large"),
    "a shape of floats": ({"inputs": [GOOD | {"shape": [1.0, 2]}]}, "it must be a list"),
    "a shape that is none": ({"inputs": [GOOD | {"shape": 2}]}, "has the shape 2; it must be a list"),
    "another rank": ({"inputs": [GOOD | {"shape": [2]}]}, "input 0 is FP32[2]; it must be FP32[-1, 2]"),
    "no rows": ({"inputs": [GOOD | {"shape": [0, 2], "data": []}]}, "must be 1 to 4096"),
    "too many rows": ({"inputs": [GOOD | {"shape": [5000, 2], "data": [0.0] * 10_000}]}, "must be 1 to 4096"),
    "too few elements": ({"inputs": [GOOD | {"data": [1.0]}]}, "has 1 elements; its shape [1, 2] says 2"),
    "other nesting": ({"inputs": [GOOD | {"data": [[1.0], [2.0]]}]}, "neither flat nor nested as its shape"),
    "deeper nesting": ({"inputs": [GOOD | {"data": [[[1.0], [2.0]]]}]}, "elements of the types list"),
    "a string among numbers": ({"inputs": [GOOD | {"data": [1.0, "2"]}]}, "elements of the types str"),
    "null": ({"inputs": [GOOD | {"data": [1.0, None]}]}, "elements of the types NoneType"),
    "true for a number": ({"inputs": [GOOD | {"data": [1.0, True]}]}, "elements of the types bool"),
    "a float for an integer": ({"inputs": [GOOD | {"datatype": "INT8", "data": [1, 2.5]}]}, "must be int"),
    "an integer that is too large": ({"inputs": [GOOD | {"datatype": "UINT8", "data": [1, 256]}]}, "cannot hold"),
    "a float that is too large": ({"inputs": [GOOD | {"data": [1.0, 1e39]}]}, "too large for FP32"),
    "data that is no list": ({"inputs": [GOOD | {"data": "ab"}]}, "has the data 'ab'; it must be a list"),
    "an unknown output": ({"inputs": [GOOD], "outputs": [{"name": "y"}]}, "outputs are unknown: ['y']; there are outp"),
    "an output twice": ({"inputs": [GOOD], "outputs": [{"name": "output"}] * 2}, "asked for twice"),
    "an unknown parameter": ({"inputs": [GOOD], "parameters": {"sequence_id": 1}}, "unknown: ['sequence_id']"),
    "a timeout of no meaning": ({"inputs": [GOOD], "parameters": {"timeout": -1}}, "timeout"),
    "a priority of no meaning": ({"inputs": [GOOD], "parameters": {"priority": "high"}}, "must be integers"),
    "parameters that are none": ({"inputs": [GOOD], "parameters": []}, "they must be an object"),
    "an unknown parameter of an input": ({"inputs": [GOOD | {"parameters": {"a": 1}}]}, "unknown parameters ['a']"),
    "binary_data of no meaning": ({"inputs": [GOOD], "outputs": [{"name": "output", "parameters": {"binary_data": 1}}]},
                                  "has binary_data 1; it must be a bool"),
    "an id that is no string": ({"inputs": [GOOD], "id": 3}, "id is 3"),
    "bytes that are not there": ({"inputs": [RAW | {"parameters": {"binary_data_size": 8}}]}, "0 bytes of the body"),
    "shared memory of no such name": ({"inputs": [RAW | {"parameters": {"shared_memory_region": "r"}}]}, None),
}


@pytest.mark.parametrize("what", BAD)
def test_the_door_refuses(web, what):
    said, message = BAD[what]
    content = said if isinstance(said, bytes) else json.dumps(said).encode()
    response = web.post("/v2/models/double/infer", content=content)
    assert response.status_code == (404 if message is None else 400), response.text
    assert message is None or message in response.json()["error"], response.text


def test_a_byte_that_is_no_bool_is_refused():
    body, header = packed({"inputs": [tensor("x", np.zeros(2, bool), "BOOL", parameters={"binary_data_size": 2})]})
    with pytest.raises(InvalidRequest, match="neither 0 nor 1"):
        rest.read("m", "", memoryview(body + b"\1\2"), header, None)


@pytest.mark.parametrize("size, header, data, message", [
    (8, None, b"x" * 8, "no JSON"),
    (8, "x", b"x" * 8, "it must be a number of bytes"),
    (8, "9" * 30, b"x" * 8, "it must be a number of bytes"),
    (8, "10000", b"x" * 8, "Inference-Header-Content-Length is 10000, and the body has"),
    (8, 0, b"x" * 4, "has binary_data_size 8; 4 bytes of the body are left"),
    (4, 0, b"x" * 4, "has 4 bytes of data; a tensor of FP32[1, 2] has 8"),
    (8, 0, b"x" * 9, "1 bytes follow the last tensor's data"),
    (-8, 0, b"x" * 8, "has binary_data_size -8"),
    (True, 0, b"x" * 8, "has binary_data_size True"),
    (2**80, 0, b"x" * 8, "has binary_data_size 12089"),
])
def test_lengths_that_lie_are_refused(web, size, header, data, message):
    head = json.dumps({"inputs": [RAW | {"parameters": {"binary_data_size": size}}]}).encode()
    headers = {} if header is None else {JSON_HEADER: header or str(len(head))}
    response = web.post("/v2/models/double/infer", content=head + data, headers=headers)
    assert response.status_code == 400 and message in response.json()["error"], response.text


def test_a_model_that_is_being_loaded_is_told_from_one_that_is_not_there(registry):
    with client(registry) as web:
        web.site.asked, web.site.loading["late"] = frozenset({"late"}), Loading(0.0)
        ready, asked = web.get("/v2/models/late/ready"), infer(web, "late", {"inputs": [GOOD]}, version="1")
        assert ready.status_code == asked.status_code == 503 and "being loaded" in asked.json()["error"]
        assert int(asked.headers["Retry-After"]) > 0 and web.get("/v2/health/ready").status_code == 503


def test_the_administration_lists_the_versions(registry):
    site = Site(registry, Settings(admin_port=0, admin_token="secret"))
    site.loading = {"late": Loading(0.0), "broken": Loading(0.0, ValueError("no such file"))}
    with testclient.TestClient(private(site, parts_of(site)), raise_server_exceptions=False) as admin:
        assert admin.post("/v2/repository/index").status_code == 401
        ask = lambda said: admin.post("/v2/repository/index", content=said, headers={"Authorization": "Bearer secret"})
        rows = {row["name"]: row for row in ask(b"").json()}
        assert rows["mlp"] == {"name": "mlp", "version": "1", "state": "READY", "reason": ""}
        assert rows["late"]["state"] == "LOADING" and rows["broken"]["reason"] == "no such file"
        assert {row["name"] for row in ask(b'{"ready": true}').json()} == {"mlp", "a/ragged", "double"}
        assert [ask(said).status_code for said in (b"[]", b"{")] == [400, 400]


def test_what_is_not_there_is_not_found(web):
    for path in ("none/infer", "/infer", "double/versions/7/infer", "none/versions/1/infer"):
        response = web.post(f"/v2/models/{path}", content=json.dumps({"inputs": [GOOD]}))
        assert response.status_code == 404, path
    compressed = web.post("/v2/models/double/infer", content=b"", headers={"Content-Encoding": "gzip"})
    assert compressed.status_code == 415


@settings(max_examples=30)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text("aé\u2028", max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ("inputs", "outputs", "parameters", "name", "shape", "datatype", "data", "id",
                         "binary_data_size", "shared_memory_region", "timeout")), inner, max_size=4), max_leaves=6),
       st.binary(max_size=9))
def test_no_json_at_all_is_more_than_refused(said, data):
    head = json.dumps(said).encode()
    with_input = json.dumps({"inputs": [said if isinstance(said, dict) else GOOD, RAW | {"data": said}]}).encode()
    for body, header in ((head, None), (head + data, len(head)), (with_input, None)):
        try:
            rest.read("m", "", memoryview(body), header, None)
        except InvalidRequest:
            pass


GRPC_BAD = {
    "two tensors and one of bytes": (lambda it: it.inputs.add(name="z", datatype="FP32", shape=[1]), "has no data"),
    "one of bytes too many": (lambda it: it.raw_input_contents.append(b""), "has 1 tensors more than inputs"),
    "a negative axis": (lambda it: it.inputs[0].shape.__setitem__(0, -1), "has the shape [-1, 2]"),
    "other bytes": (lambda it: it.raw_input_contents.__setitem__(0, b"abc"), "has 3 bytes of data"),
    "contents of another datatype": (lambda it: it.inputs[0].contents.int_contents.append(1), "elements must be in"),
    "one twice": (lambda it: it.inputs.add().CopyFrom(it.inputs[0]), "is given twice"),
    "an unknown parameter": (lambda it: it.parameters["sequence_id"].MergeFrom(
        CLASSES["InferParameter"](int64_param=1)), "unknown: ['sequence_id']"),
    "an unknown output": (lambda it: it.outputs.add(name="y"), "outputs are unknown"),
}


@pytest.mark.parametrize("what", GRPC_BAD)
def test_the_door_refuses_over_grpc(call, what):
    spoil, message = GRPC_BAD[what]
    request = grpc_request("double", {"0": np.zeros((1, 2), np.float32)})
    spoil(request)
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details(), caught.value.details()


def test_grpc_has_the_codes_of_its_own(call):
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelInfer", grpc_request("none", {}))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        call("ModelReady", CLASSES["ModelReadyRequest"](name="double", version="7"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_stream_goes_on_after_a_request_that_fails(web):
    good = grpc_request("double", {"0": np.ones((1, 2), np.float32)}, id="a")
    requests = [one.SerializeToString() for one in (good, grpc_request("none", {}), good)]
    with grpc.insecure_channel(f"127.0.0.1:{web.site.grpc_port}") as channel:
        ask = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer",
                                    response_deserializer=CLASSES["ModelStreamInferResponse"].FromString)
        found = list(ask(iter(requests), timeout=20))
    assert [bool(one.error_message) for one in found] == [False, True, False]
    assert grpc_outputs(found[2].infer_response)["output"].tolist() == [[2, 2]] and found[0].infer_response.id == "a"


def test_keys_are_asked_for_over_grpc_too(registry):
    with client(registry, grpc_port=0, api_keys=("secret",)) as web:
        channel = grpc.insecure_channel(f"127.0.0.1:{web.site.grpc_port}")
        with channel:
            ask = channel.unary_unary(f"/{SERVICE}/ModelReady",
                                      response_deserializer=CLASSES["ModelReadyResponse"].FromString)
            request = CLASSES["ModelReadyRequest"](name="mlp").SerializeToString()
            for metadata in ((), (("authorization", "Bearer other"),), (("authorization", "secret"),)):
                with pytest.raises(grpc.RpcError) as caught:
                    ask(request, metadata=metadata, timeout=20)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert ask(request, metadata=(("authorization", "Bearer secret"),), timeout=20).ready
            live = channel.unary_unary(f"/{SERVICE}/ServerLive")
            assert live(b"", timeout=20)
        assert web.get("/v2/models/mlp/ready").status_code == 401


def test_what_runs_over_grpc_has_no_more_grace_than_the_server_is_closed_with():
    held = Held()
    with held.endpoint() as f:
        server = ji.serve({"held": f}, port=0, grpc_port=0, grace=60)
        with grpc.insecure_channel(server.grpc_address) as channel:
            ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            running = ask.future(grpc_request("held", {"0": np.zeros((1, 2), np.float32)}).SerializeToString())
            assert held.running.wait(10)
            begun = time.monotonic()
            server.close(grace=0)
            assert time.monotonic() - begun < 20 and running.exception(20) is not None
        held.go.set()


def test_a_port_that_is_taken_is_said(registry):
    with ji.serve(registry, port=0, grpc_port=0) as server, pytest.raises(InvalidOption, match="cannot be listened on"):
        ji.serve(registry, port=0, grpc_port=int(server.grpc_address.rpartition(":")[2]))


# Shared memory.


@contextmanager
def shared(size, key=None):
    """Memory of a client's, and its key."""
    key = key or f"jaxinfer-test-{os.getpid()}"
    path = Path(HOME) / key
    path.write_bytes(bytes(size))
    try:
        yield np.memmap(path, np.uint8, "r+", shape=(size,)), key
    finally:
        path.unlink()


on_linux = pytest.mark.skipif(not HOME.is_dir(), reason="no /dev/shm")


@on_linux
def test_tensors_are_read_and_written_in_the_clients_memory(web, call):
    x = np.array([[1, 2], [3, 4]], np.float32)
    with shared(128) as (memory, key), seen_events(events.TensorsServed) as seen:
        memory[64:80] = x.view(np.uint8).reshape(-1)
        web.post("/v2/systemsharedmemory/region/r/register", json={"key": f"/{key}", "offset": 0, "byte_size": 128})
        assert web.get("/v2/systemsharedmemory/status").json() == [
            {"name": "r", "key": f"/{key}", "offset": 0, "byte_size": 128}]
        place = lambda offset, size: {"shared_memory_region": "r", "shared_memory_offset": offset,
                                      "shared_memory_byte_size": size}
        said = {"inputs": [tensor("0", x, "FP32", parameters=place(64, 16))],
                "outputs": [{"name": "output", "parameters": place(0, 64)}]}
        found = infer(web, "double", said).json()["outputs"][0]
        assert found["parameters"] == place(0, 16) and "data" not in found
        assert memory[:16].view(np.float32).tolist() == [2, 4, 6, 8] and not memory[16:64].any()
        request = CLASSES["ModelInferRequest"](model_name="double")
        one = request.inputs.add(name="0", datatype="FP32", shape=[1, 2])
        out = request.outputs.add(name="output")
        for made, values in ((one, place(64, 8)), (out, place(96, 8))):
            for name, value in values.items():
                setattr(made.parameters[name], "string_param" if isinstance(value, str) else "int64_param", value)
        response = call("ModelInfer", request)
        assert response.outputs[0].parameters["shared_memory_byte_size"].int64_param == 8
        assert list(response.raw_output_contents) == [b""] and memory[96:104].view(np.float32).tolist() == [2, 4]
        assert seen[1].bytes_copied == 8, "a lone row at a boundary is read where it lies; its result is written once"
        for spoilt, message in ((place(120, 16), "16 from 120 on are not in it"), (place(0, 200), "200 from 0 on are"),
                                (place(-8, 16), "offset is -8"), (place(0, 8), "has 8 bytes of data"),
                                (place(64, "16"), "byte size '16'"), (place(2**70, 16), "they must be integers")):
            refused = infer(web, "double", {"inputs": [tensor("0", x, "FP32", parameters=spoilt)]})
            assert refused.status_code == 400 and message in refused.json()["error"], refused.text
        tight = {"inputs": said["inputs"], "outputs": [{"name": "output", "parameters": place(0, 15)}]}
        assert "has 16 bytes, and its place in shared memory 15" in infer(web, "double", tight).json()["error"]
        os.truncate(HOME / key, 64)
        cut = infer(web, "double", said)
        assert cut.status_code == 400 and "the shared memory has 64" in cut.json()["error"]
        call("SystemSharedMemoryUnregister", CLASSES["SystemSharedMemoryUnregisterRequest"](name="r"))
        assert infer(web, "double", said).status_code == 404 and not call("SystemSharedMemoryStatus").regions


@on_linux
def test_a_region_is_a_piece_of_shared_memory_and_nothing_else(tmp_path):
    regions = Regions()
    with shared(64) as (_, key):
        regions.register("r", key, 16, 48)
        with pytest.raises(InvalidRequest, match="registered already"):
            regions.register("r", key, 0, 1)
        for key_, offset, size in ((key, 0, 65), (key, 64, 1), (key, 0, 0), (key, -1, 4), (key, 0, None), (key, 0, 1.0),
                                   ("none-such", 0, 1), ("../etc/passwd", 0, 1), ("..", 0, 1), ("", 0, 1), (None, 0, 1),
                                   ("a\0b", 0, 1), ("a" * 300, 0, 1), (key, 2**70, 1)):
            with pytest.raises(InvalidRequest):
                regions.register("s", key_, offset, size)
        link = HOME / f"{key}-link"
        link.symlink_to(tmp_path / "secret")
        (tmp_path / "secret").write_text("secret")
        try:
            with pytest.raises(InvalidRequest, match="cannot be opened"):
                regions.register("s", link.name, 0, 1)
        finally:
            link.unlink()
        assert [region.name for region in regions.status()] == ["r"]
    view = regions.view({"shared_memory_region": "r", "shared_memory_byte_size": 48})
    regions.unregister()
    assert len(view) == 48 and not any(view), "who reads it keeps it"
    with pytest.raises(ModelNotFound):
        regions.status("r")


def test_shared_memory_is_off_unless_the_operator_says_so(registry):
    with client(registry) as web:
        assert web.get("/v2/systemsharedmemory/status").status_code == 404
        assert web.get("/v2").json()["extensions"] == ["binary_tensor_data", "parameters"]
        refused = infer(web, "double", {"inputs": [RAW | {"parameters": {"shared_memory_region": "r"}}]})
        assert refused.status_code == 400 and "started without it" in refused.json()["error"]


def test_a_model_of_another_protocol_is_refused():
    with pytest.raises(InvalidRequest, match="m is a Event; the Open Inference Protocol is for endpoints, ONNX models"):
        face_of("m", threading.Event())
