"""What fits is decided before anything is loaded: by an upper estimate, and by the compiler where that decides."""

import re

import jax
import jax.numpy as jnp
import pytest

import jaxinfer as ji
from jaxinfer import events
from jaxinfer.compiler import Executables
from jaxinfer.compiler.placement import Placement
from jaxinfer.errors import OutOfMemory
from jaxinfer.frontend.architectures import architecture
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.shapes import _temporaries, shapes_of
from tests import tiny
from tests.running import all_free, seen_events
from tests.test_tiers import needs

CPU = Placement(jax.devices("cpu")[0])
HOW = tiny.ONE_BUCKET
ONE_LAYER = {"num_hidden_layers": 1}  # which leaves as many temporaries as many do
ASKED = dict(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def need():
    return needs(tiny.PLAIN, **HOW)[2]


def test_what_only_the_estimate_of_temporaries_forbids_is_loaded_if_the_compiler_needs_less(tiny_path, need):
    with ji.load(tiny_path, **HOW) as lm:
        expected = lm([5, 7, 9], **ASKED).tokens
    with ji.load(tiny_path, **HOW, memory=need.least - 1) as lm:
        assert lm([5, 7, 9], **ASKED).tokens == expected and all_free(lm)
        assert lm.nbytes < need.least


def test_what_the_compiler_forbids_is_refused_by_its_numbers(tiny_path, need):
    with pytest.raises(OutOfMemory, match=r"for temporaries \(as the compiler says\)") as refused:
        ji.load(tiny_path, **HOW, memory=need.weights + need.row)
    said = re.search(r"([\d.]+ MiB) for temporaries.*memory='(\w+)'", str(refused.value))
    assert said and planning.parse_bytes(said[1]) < need.temporaries
    with ji.load(tiny_path, **HOW, memory=said[2]) as lm:
        assert lm([5], **ASKED).tokens


def test_nothing_is_compiled_for_what_no_temporaries_could_save(tiny_path, need):
    with seen_events(events.Compiling) as seen, pytest.raises(OutOfMemory, match=r"\(an upper estimate\)"):
        ji.load(tiny_path, **HOW, memory=need.weights + need.row - 1)
    assert not seen


@pytest.mark.parametrize("config", [tiny.PLAIN | ONE_LAYER, tiny.WINDOWED,
                                    tiny.ROUTED | ONE_LAYER | {"mlp_only_layers": []}, tiny.GPT2 | {"n_layer": 1}],
                         ids=["plain", "windowed", "routed", "gpt2"])
def test_no_program_takes_more_than_the_estimate(config):
    graph, sizes = architecture(config, max_context=256).graph(), dict(max_context=256, max_rows=4)
    shapes = shapes_of(graph, [CPU], jnp.dtype("float32"), **sizes, quantize=None, kv_cache_dtype=None,
                       batch_invariant=False, memory="1GiB", forced={})
    found = _temporaries(Executables(graph, shapes.ladder, device=CPU, **shapes.given))
    assert 0 < found <= needs(config, **sizes)[2].temporaries
