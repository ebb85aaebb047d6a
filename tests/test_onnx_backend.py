"""ONNX's own backend suite: every kind of case that needs no download, each under `jax.jit`.

Node tests: one operator, or its definition as a function. Simple, PyTorch operator and PyTorch converted: small files.
Real: AlexNet, DenseNet, Inception, ResNet, ShuffleNet, SqueezeNet, VGG and ZFNet with synthetic weights.
"""

import os
import tempfile

import pytest
from onnx.backend.test import BackendTest

from tests.onnx_backend import JaxinferBackend

os.environ["ONNX_MODELS"] = tempfile.mkdtemp()  # where the suite writes the inputs of its real models

pytestmark = pytest.mark.filterwarnings("ignore")  # the suite makes infinities on purpose

# What is left out of the suite, by category: a regular expression of test names, and the reason.
EXCLUDED = {
    "training": (r"^test_(adam|adagrad|momentum|nesterov)",
                 "optimiser steps of ai.onnx.preview.training: jax.grad and optax do this"),
    "random": (r"^test_(bernoulli|training_dropout_(default|mask|default_mask)?_?cpu)",
               "compared with the numbers that numpy's generator draws, which no other generator does"),
    "images": (r"^test_image_decoder", "decodes JPEG, PNG and others: work for the host, before the graph"),
    "rounding": (r"^test_(dft_(axis|inverse)(_opset19)?_cpu|attention_4d_causal_fp16_(expanded_)?cpu)",
                 "the last bit: zero is compared at 1e-7 with 5e-7 from float32, one float16 with its neighbour"),
    "the suite's own": (r"^test_loop16_seq_none_cpu", "the suite's comparison takes the length of a scalar"),
}
NODE_TESTS = 1851  # passed when this was written, of 1,884

suite = BackendTest(JaxinferBackend, __name__)
for pattern, _ in EXCLUDED.values():
    suite.exclude(pattern)
cases = suite.test_cases
for _case in cases.values():
    for _name in [name for name in vars(_case) if name.endswith("_cuda")]:
        delattr(_case, _name)
globals().update(cases)


def test_no_fewer_node_tests_run_than_when_this_was_written():
    """A case that fails fails by itself; this says that none has silently left."""
    node_tests = vars(cases["OnnxBackendNodeModelTest"]).items()
    run = [name for name, case in node_tests if name.startswith("test_") and not skipped(case)]
    assert len(run) >= NODE_TESTS


def skipped(case: object) -> bool:
    return getattr(case, "__unittest_skip__", False)
