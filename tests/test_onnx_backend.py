"""ONNX's own backend suite: every kind of case that needs no download, each under `jax.jit`.

Node tests: one operator, or its definition as a function. Simple, PyTorch operator and PyTorch converted: small files.
Real: AlexNet, DenseNet, Inception, ResNet, ShuffleNet, SqueezeNet, VGG and ZFNet with synthetic weights.
"""

import os
import re
import tempfile

import pytest
from onnx.backend.test import BackendTest

from tests.onnx_backend import JaxinferBackend, modes

os.environ["ONNX_MODELS"] = tempfile.mkdtemp()  # where the suite writes the inputs of its real models

# The suite makes infinities on purpose.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("in_haste")]

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
# What runs, but not with every input traced, likewise.
UNTRACED = {
    "nothing to trace": (r"^test_(constant|constantofshape_\w+)_cpu", "no input, or one that is a shape"),
    "sizes": (r"^test_(range_(b?float\w*|int32)_type|(blackman|hamming|hann)window|melweightmatrix)",
              "all inputs say how long the output is"),
    "values": (r"^test_(nonmaxsuppression|nonzero|unique)_", "as many numbers come out as the values of the input say"),
    "strings": (r"^test_(\w+_string_|equal_string|regex_full_match|string_|strnorm|tfidfvectorizer|"
                r"ai_onnx_ml_label_encoder_(string|tensor))", "no compiled function has strings"),
    "structure": (r"^test_(if_(opt|seq)|loop13_seq|loop11|sequence_model[1237]|optional_has_element_empty\w*)_cpu|"
                  r"^test_ai_onnx_ml_array_feature_extractor",
                  "an input decides which values there are: of a list, of an optional, of a loop's rows"),
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


@pytest.fixture(autouse=True)
def all_that_can_be_is_traced(request):
    """A case that is traced today and is not tomorrow fails, though its numbers be right; and so does one that is
    listed as untraced, and is not any more."""
    modes.clear()
    yield
    listed = any(re.match(pattern, request.node.name) for pattern, _ in UNTRACED.values())
    assert not modes or (set(modes) == {"traced"}) != listed, f"ran {'+'.join(modes)}"


def skipped(case: object) -> bool:
    return getattr(case, "__unittest_skip__", False)
