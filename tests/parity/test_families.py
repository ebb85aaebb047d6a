"""Every family says what transformers says, whole, in chunks and token by token; and no config key goes unheeded."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer.errors import CheckpointMismatch, InvalidOption, UnsupportedModel
from jaxinfer.frontend.architectures import DECODERS, GPT2_HARMLESS, architecture
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.keys import HARMLESS
from jaxinfer.frontend.weights import load_params
from jaxinfer.kernels import tracing
from tests.parity.families import FAMILIES, MAX_CONTEXT, fix_rope, greedy, logits, make
from tests.parity.harness import Rows, continue_greedily, read_in_chunks, read_whole

pytestmark = pytest.mark.parity
COUNT = 64
PROMPTS = [np.random.default_rng(i).integers(0, 96, size).tolist() for i, size in enumerate((93, 7, 41))]


@functools.cache
def checkpoint(family: str):
    """The transformers model, held still at MAX_CONTEXT, its config.json, and its tensors."""
    with tempfile.TemporaryDirectory() as directory:  # the tensors stay mapped when it is gone
        model = make(family, Path(directory))
        opened = open_checkpoint(directory)
    fix_rope(model, MAX_CONTEXT)
    return model, opened.config, opened.tensors


def load(config: dict, tensors, max_context: int = MAX_CONTEXT):
    graph = architecture(config, max_context=max_context).graph()
    return graph, load_params(graph, tensors, dtype="float32", source="tiny")


@pytest.mark.parametrize("read", [read_whole, read_in_chunks])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_says_what_transformers_says(family, read):
    model, _, _ = checkpoint(family)
    graph, params = ours(family)
    rows = Rows(graph, params, len(PROMPTS), MAX_CONTEXT)
    tokens, said = continue_greedily(rows, read(rows, PROMPTS), COUNT)
    for r, prompt in enumerate(PROMPTS):
        expected = logits(model, prompt + tokens[:-1, r].tolist())[len(prompt) - 1 :].numpy()
        assert expected.std() >= 1, "flat logits prove nothing"
        np.testing.assert_allclose(said[:, r], expected, atol=1e-4, rtol=0)
        assert tokens[:, r].tolist() == expected.argmax(1).tolist()
    assert len(np.unique(tokens)) >= 10, "a model that repeats itself proves little"
    if read is read_whole:
        assert tokens[:, 2].tolist() == greedy(model, PROMPTS[2], COUNT)


@functools.cache
def ours(family: str):
    _, config, tensors = checkpoint(family)
    return load(config, tensors)


# Keys that another key of the same config makes idle: they are flipped in a config that lacks the other one.
SHADOWED = {"max_window_layers": "layer_types", "no_rope_layer_interval": "no_rope_layers",
            "sliding_window_pattern": "layer_types"}
LIMIT = "the model's own limit, which is above what is served"
IDLE = {  # keys that change nothing in one family's config, and why; each is heard in another one's
    **{(family, "max_position_embeddings"): LIMIT for family in FAMILIES
       if family not in ("llama-dynamic", "phi3-longrope")},
    **{(family, f"rope_parameters.beta_{end}"): "both values round to the same pair; llama-yarn-scaled does not round"
       for family in ("llama-yarn", "llama-yarn-mscale") for end in ("fast", "slow")},
    ("qwen3-moe-renormalised", "mlp_only_layers"): "an empty list",
    ("phi3", "original_max_position_embeddings"): "nothing is scaled",
    ("phi3-longrope", "rope_parameters.original_max_position_embeddings"): "the outer key has precedence",
    ("phi3-longrope", "rope_parameters.short_factor"): "the context is long",
    ("phi3-longrope-scaled", "original_max_position_embeddings"): "the context stays short, the factor is given",
    ("phi3-longrope-scaled", "rope_parameters.original_max_position_embeddings"): "the outer key has precedence",
    ("phi3-longrope-scaled", "rope_parameters.long_factor"): "the context is short",
}
OTHER = {"silu": "gelu", "gelu": "relu", "gelu_new": "silu", "gelu_pytorch_tanh": "silu", "relu": "silu",
         "default": "linear", "full_attention": "sliding_attention", "sliding_attention": "full_attention"}


def flipped(value: Any) -> Any:
    """Another value of the same kind."""
    match value:
        case bool(): return not value
        case int(): return value * 2 if value > 1 else 1 - value
        case float(): return value * 1.5
        case str(): return OTHER.get(value, "default")
        case list(): return [flipped(entry) for entry in value]
        case None: return 16


def paths(config: dict) -> list[tuple[str, ...]]:
    """Where every key of a config stands that is not harmless, inner ones included."""
    kind = config["model_type"]
    harmless = HARMLESS | (GPT2_HARMLESS if kind == "gpt2" else DECODERS[kind].harmless)
    walk = lambda at, value: [path for key in value for path in walk((*at, key), value[key])] if isinstance(
        value, dict) else [at]
    return [path for key in sorted(config.keys() - harmless) for path in walk((key,), config[key])]


def with_flipped(config: dict, path: tuple[str, ...]) -> dict:
    changed = without = {key: value for key, value in config.items() if key != SHADOWED.get(path[-1])}
    for key in path[:-1]:
        without[key] = without = dict(without[key])
    without[path[-1]] = flipped(without[path[-1]])
    return changed


FLIPS = [(family, ".".join(path)) for family, make_config in FAMILIES.items()
         for path in paths(json.loads(make_config().to_json_string()))]


def error(model, graph, params) -> float:
    """How far our logits for the first prompt are from transformers', at most."""
    ways = {"attend": "reference", "routed_ffn": "reference"}
    with tracing("cpu", ways), jax.disable_jit():  # op by op: no compile for each of 250 models
        said = Rows(graph, params, 1, MAX_CONTEXT).step(PROMPTS[:1])
    return np.abs(said[0] - logits(model, PROMPTS[0])[-1].numpy()).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_no_key_flipped_the_measure_of_the_next_test_finds_nothing(family):
    assert error(checkpoint(family)[0], *ours(family)) < 1e-4


@pytest.mark.parametrize(("family", "key"), [flip for flip in FLIPS if flip not in IDLE])
def test_a_key_that_alters_the_mathematics_is_heeded(family, key):
    model, config, tensors = checkpoint(family)
    try:
        graph, params = load(with_flipped(config, tuple(key.split("."))), tensors)
    except (UnsupportedModel, CheckpointMismatch, InvalidOption):
        return
    assert error(model, graph, params) > 1e-3


@pytest.mark.parametrize(("family", "key"), [flip for flip in FLIPS if flip in IDLE])
def test_an_idle_key_changes_nothing_but_the_limit(family, key):
    _, config, _ = checkpoint(family)
    changed = architecture(with_flipped(config, tuple(key.split("."))), max_context=MAX_CONTEXT)
    assert changed == architecture(config, max_context=MAX_CONTEXT)


@pytest.mark.parametrize(("family", "key"), [(f, key) for f, key in FLIPS if key in SHADOWED])
def test_a_list_of_layers_and_the_number_that_stands_for_it_say_the_same(family, key):
    _, config, _ = checkpoint(family)
    without = {name: value for name, value in config.items() if name != SHADOWED[key]}
    assert architecture(without, max_context=MAX_CONTEXT) == architecture(config, max_context=MAX_CONTEXT)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope", "phi3-longrope-scaled"])
def test_at_its_full_context_a_fixed_scaling_is_the_one_that_transformers_reaches(family, tmp_path):
    model = make(family, tmp_path)  # left free to rescale as it goes
    prompt = np.random.default_rng(9).integers(0, 96, 160).tolist()
    opened = open_checkpoint(tmp_path)
    graph, params = load(opened.config, opened.tensors, 160)
    rows = Rows(graph, params, 1, 160)
    np.testing.assert_allclose(read_in_chunks(rows, [prompt])[0], logits(model, prompt)[-1].numpy(), atol=1e-4, rtol=0)
