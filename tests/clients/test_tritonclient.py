"""Triton's own clients, unmodified, against a server on loopback."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinfer as ji

pytest.importorskip("tritonclient")
import tritonclient.grpc as over_grpc
import tritonclient.grpc.aio as over_grpc_aio
import tritonclient.http as over_http
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from jaxinfer.serving.inference.regions import HOME
from jaxinfer.serving.inference.schema import CLASSES
from jaxinfer.serving.server import Server
from jaxinfer.serving.settings import Settings
from tests.clients.conftest import KEY, NAME

KINDS = [np.bool_, np.uint8, np.uint16, np.uint32, np.int8, np.int16, np.int32, np.float16, np.float32]


@pytest.fixture(scope="module")
def server():
    registry = ji.Registry()
    for kind in KINDS:
        registry.load(np.dtype(kind).name, lambda kind=kind: ji.endpoint(
            lambda x: {"same": x, "turned": x[..., ::-1]}, example={"x": np.zeros((2, 3), kind)}, max_batch=8))
    with Server(registry, Settings(port=0, grpc_port=0, shared_memory=True)) as server:
        yield server
    registry.close()


@pytest.fixture(scope="module")
def http(server):
    client = over_http.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8)
    yield client
    client.close()


@pytest.fixture(scope="module")
def grpc(server):
    with over_grpc.InferenceServerClient(server.grpc_address) as client:
        yield client


def inputs(module, array, **how):
    one = module.InferInput("x", array.shape, np_to_triton_dtype(array.dtype))
    one.set_data_from_numpy(array, **how)
    return [one]


@st.composite
def arrays(draw):
    dtype, rows = np.dtype(draw(st.sampled_from(KINDS))), draw(st.integers(1, 3))
    size = rows * 6 * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (raw & 1 if dtype == np.bool_ else raw).view(dtype).reshape(rows, 2, 3).copy()
    if dtype.kind == "f":
        array[~np.isfinite(array)] = 1
    return array


@settings(max_examples=30)
@given(arrays())
def test_every_datatype_comes_back_to_the_bit_whatever_way_it_takes(http, grpc, array):
    name = array.dtype.name
    results = [http.infer(name, inputs(over_http, array)), grpc.infer(name, inputs(over_grpc, array))]
    for binary in (False, True):
        if array.dtype != np.float16:  # which the client sends as bytes only
            wanted = [over_http.InferRequestedOutput(n, binary_data=binary) for n in ("turned", "same")]
            results.append(http.infer(name, inputs(over_http, array, binary_data=not binary), outputs=wanted))
    for result in results:
        assert result.as_numpy("same").tobytes() == array.tobytes()
        assert np.array_equal(result.as_numpy("turned"), array[..., ::-1])
        assert result.as_numpy("same").dtype == array.dtype and result.as_numpy("same").shape == array.shape


def test_health_and_metadata(http, grpc):
    for client in (http, grpc):
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("float32")
        assert client.is_model_ready("float32", "1")
    said = http.get_model_metadata("float32", "stable")
    assert said["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]}]
    assert grpc.get_model_metadata("float32", as_json=True)["outputs"] == [
        {"name": "same", "datatype": "FP32", "shape": ["-1", "2", "3"]},
        {"name": "turned", "datatype": "FP32", "shape": ["-1", "2", "3"]}]
    assert http.get_server_metadata()["name"] == grpc.get_server_metadata().name == "jaxinfer"


@pytest.mark.parametrize("name, shape", [("none", (1, 2, 3)), ("float32", (2, 3)), ("float32", (1, 2, 4))])
def test_what_is_wrong_is_an_exception_of_the_clients(http, grpc, name, shape):
    array = np.zeros(shape, np.float32)
    for client, module, status in ((http, over_http, "40"), (grpc, over_grpc, "StatusCode.")):
        with pytest.raises(InferenceServerException) as caught:
            client.infer(name, inputs(module, array))
        assert caught.value.status().startswith(status) and caught.value.message()


def test_many_requests_at_once_share_batches(http, grpc, server):
    model = server.registry["float32"].version.model
    array = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float32)
    batches, requests = model.stats.batches, model.stats.requests
    waiting = [http.async_infer("float32", inputs(over_http, array)) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: grpc.infer("float32", inputs(over_grpc, array)), range(40)))
    results += [one.get_result() for one in waiting]
    assert all(np.array_equal(result.as_numpy("same"), array) for result in results)
    assert model.stats.requests - requests == 80 and model.stats.batches - batches < 80

    async def ask():
        async with over_grpc_aio.InferenceServerClient(server.grpc_address) as client:
            return await asyncio.gather(*(client.infer("float32", inputs(over_grpc_aio, array)) for _ in range(20)))

    assert all(np.array_equal(result.as_numpy("same"), array) for result in asyncio.run(ask()))


def test_a_stream_of_requests(grpc):
    found = []
    grpc.start_stream(lambda result, error: found.append((result, error)))
    array = np.ones((1, 2, 3), np.float32)
    for name in ("float32", "none"):
        grpc.async_stream_infer(name, inputs(over_grpc, array))
    grpc.stop_stream()
    assert np.array_equal(found[0][0].as_numpy("same"), array) and found[0][1] is None
    assert "no model" in found[1][1].message()


@pytest.mark.skipif(not HOME.is_dir(), reason="no /dev/shm")
def test_shared_memory(http, grpc):
    key = f"jaxinfer-triton-{os.getpid()}"
    array = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    (HOME / key).write_bytes(array.tobytes() + bytes(48))
    memory = np.memmap(HOME / key, np.float32, "r+")
    try:
        for client, module in ((http, over_http), (grpc, over_grpc)):
            client.register_system_shared_memory("r", f"/{key}", 96)
            status = client.get_system_shared_memory_status()
            assert (status.regions["r"].byte_size if client is grpc else status[0]["byte_size"]) == 96
            given = module.InferInput("x", array.shape, "FP32")
            given.set_shared_memory("r", 48)
            wanted = module.InferRequestedOutput("turned")
            wanted.set_shared_memory("r", 48, offset=48)
            memory[12:] = 0
            client.infer("float32", [given], outputs=[wanted])
            assert np.array_equal(memory[12:].reshape(2, 2, 3), array[..., ::-1])
            client.unregister_system_shared_memory("r")
    finally:
        (HOME / key).unlink()


def test_a_server_with_smollm2_embeds_by_an_encoder_beside_it(served, encoder):
    """With a key, over both; the vectors are those that OpenAI's client gets."""
    texts = ["A cat sleeps.", "Bond prices fell."]
    key = {"authorization": f"Bearer {KEY}"}  # each call gets a copy: the client over HTTP adds to it
    expected = [one.embedding for one in served.client.embeddings.create(model=encoder, input=texts).data]
    array = np.array([text.encode() for text in texts], object)
    with (over_http.InferenceServerClient(served.url.removeprefix("http://")) as http,
          over_grpc.InferenceServerClient(served.grpc) as grpc):
        for client, module in ((http, over_http), (grpc, over_grpc)):
            assert client.is_model_ready(NAME, headers=dict(key))
            text = module.InferInput("text", array.shape, "BYTES")
            text.set_data_from_numpy(array)
            found = client.infer(encoder, [text], headers=dict(key)).as_numpy("vector")
            np.testing.assert_allclose(found, expected, atol=1e-4)
            with pytest.raises(InferenceServerException):
                client.infer(encoder, [text])


def test_messages_have_the_published_names_and_numbers():
    """As the client has them, which were generated from the published file."""
    for name, ours in CLASSES.items():
        theirs = service_pb2
        for part in name.split("."):
            theirs = getattr(theirs, part)
        published = {field.name: field for field in theirs.DESCRIPTOR.fields}
        for field in ours.DESCRIPTOR.fields:
            other = published[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), name
            if field.message_type is not None:
                assert field.message_type.full_name == other.message_type.full_name, (name, field.name)
        missing = published.keys() - {field.name for field in ours.DESCRIPTOR.fields}
        assert not missing, f"{name} lacks {missing}"
