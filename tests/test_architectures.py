"""A config is understood whole or refused whole, in either of its spellings; and ropes are what their papers say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import InvalidOption, UnsupportedModel
from jaxinfer.frontend.architectures import DECODERS, architecture
from jaxinfer.graph import Leaf
from jaxinfer.graphs import decoder, gpt2, rope

SHAPE = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
LLAMA = SHAPE | dict(model_type="llama", architectures=["LlamaForCausalLM"], rope_theta=900.0)
GEMMA3 = SHAPE | dict(model_type="gemma3_text", head_dim=16, sliding_window=24)
MIXTRAL, QWEN3_MOE = SHAPE | dict(model_type="mixtral"), SHAPE | dict(model_type="qwen3_moe")
GPT2 = dict(model_type="gpt2", vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=256)


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_family_builds_a_graph_whose_groups_hold_all_its_layers(kind):
    graph = architecture(SHAPE | dict(model_type=kind, head_dim=16), max_context=100).graph()
    assert graph.max_context == 100 and len(graph.blocks) == len(graph.spec["blocks"]) == 4
    assert sum(group.layers for group in graph.groups) == 4
    for group in graph.groups:
        assert sum(block.group == group.name for block in graph.blocks) == group.layers
        assert (group.window is None) == (group.name == "full")


def test_all_problems_of_a_config_are_in_one_error():
    bad = LLAMA | dict(hidden_size=48.5, rms_norm_eps=-1, mlp_bias="no", hidden_act="mish", qk_clip=3, use_mrope=True,
                       num_hidden_layers=None, rope_scaling={"type": "linear", "factr": 2.0}, num_key_value_heads=3,
                       architectures=["LlamaForSequenceClassification"], quantization_config={"bits": 4})
    with pytest.raises(UnsupportedModel) as caught:
        architecture(bad, source="tiny/config.json")
    heading, *problems = str(caught.value).splitlines()
    assert heading == "tiny/config.json: 12 problems, nothing was loaded:"
    assert [problem.split(":")[0].strip() for problem in problems] == [
        "architectures", "hidden_act", "hidden_size", "mlp_bias", "num_hidden_layers", "num_key_value_heads",
        "qk_clip", "quantization_config", "rms_norm_eps", "rope_scaling.factor", "rope_scaling.factr", "use_mrope"]
    assert "hidden_act: 'mish' is not one of gelu, gelu_fast, gelu_new" in str(caught.value)


def test_a_problem_that_follows_from_another_is_not_reported_twice():
    with pytest.raises(UnsupportedModel, match=r"1 problem, (.|\n)*num_attention_heads: missing"):
        architecture(without(LLAMA, "num_attention_heads"))


@pytest.mark.parametrize(("bad", "key"), [
    (dict(rope_scaling={"rope_type": "su", "factor": 2.0}), "rope_scaling.rope_type: 'su' is not one of default"),
    (dict(rope_scaling={"type": "linear"}), "rope_scaling.factor: missing"),
    (dict(rope_scaling=[1]), "rope_scaling: .1. is not an object"),
    (dict(rope_scaling={"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}), "not above"),
    (dict(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 6}), "list of 6 positive"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor: 0.5 is not supported here"),
    (dict(rope_scaling={"type": "linear", "factor": 2, "partial_rotary_factor": 0.1}), "1 of 12 channels would turn"),
    (dict(num_attention_heads=5, num_key_value_heads=5), "head_dim: missing, and num_attention_heads, 5"),
    (dict(num_key_value_heads=3), "3 does not divide num_attention_heads, 4"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings: 1 is not true or false"),
    (dict(vocab_size=True), "vocab_size: True is not an integer of at least 1"),
    (dict(sliding_window=4096), "sliding_window: unknown key"),
])
def test_a_value_that_llama_does_not_know_is_refused(bad, key):
    with pytest.raises(UnsupportedModel, match=key):
        architecture(LLAMA | bad)


@pytest.mark.parametrize(("config", "key"), [
    (GEMMA3 | dict(attn_logit_softcapping=50.0), "attn_logit_softcapping: 50.0 is not supported, only None is"),
    (GEMMA3 | dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    (GEMMA3 | dict(layer_types=["full_attention"]), "layer_types: .* is not a list of 4"),
    (GEMMA3 | dict(layer_types=["chunked_attention"] * 4), "layer_types"),
    (GEMMA3 | dict(sliding_window=None), "sliding_attention wants a sliding_window"),
    (GEMMA3 | dict(rope_parameters={"chunked": {}}), "rope_parameters.chunked: unknown key"),
    (SHAPE | dict(model_type="qwen2", layer_types=["sliding_attention"] * 4), "wants a sliding_window"),
    (SHAPE | dict(model_type="smollm3", no_rope_layers=[1, 0]), "no_rope_layers: .* is not a list of 4"),
    (SHAPE | dict(model_type="phi3", attention_bias=True), "attention_bias: True is not supported, only False is"),
    (MIXTRAL | dict(num_experts_per_tok=9), "num_experts_per_tok: 9 is more than there are experts, 8"),
    (QWEN3_MOE | dict(mlp_only_layers=[4]), r"mlp_only_layers: \[4\] is not a list of layers from 0 to 3"),
    (QWEN3_MOE | dict(mlp_only_layers=1), "mlp_only_layers: 1 is not a list"),
    (QWEN3_MOE | dict(norm_topk_prob=1), "norm_topk_prob: 1 is not true or false"),
    (QWEN3_MOE | dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size: unknown key"),
    (GPT2 | dict(add_cross_attention=True), "add_cross_attention"),
    (GPT2 | dict(n_head=5), "n_head: 5 does not divide n_embd, 48"),
])
def test_a_value_that_its_family_does_not_know_is_refused(config, key):
    with pytest.raises(UnsupportedModel, match=key):
        architecture(config)


@pytest.mark.parametrize("kind", ["mamba", None])
def test_an_unknown_architecture_is_told_the_known_ones(kind):
    with pytest.raises(UnsupportedModel, match=rf"model_type {kind!r} .* gemma2, gemma3_text, gpt2, granite, llama"):
        architecture({"model_type": kind})


@pytest.mark.parametrize("asked", [0, -1, 257])
def test_a_context_out_of_range_is_refused(asked):
    with pytest.raises(InvalidOption, match="max_context"):
        architecture(LLAMA, max_context=asked)


@pytest.mark.parametrize(("scaling", "limit"), [
    (None, 256),
    ({"type": "linear", "factor": 4.0}, 1024),
    ({"type": "dynamic", "factor": 2.0}, 512),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64}, 256),
])
def test_without_a_wish_the_context_is_the_models_own_limit(scaling, limit):
    assert architecture(LLAMA | dict(rope_scaling=scaling)).config.max_context == limit


def test_the_classic_spelling_of_a_rope_means_the_same_as_the_new_one():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    new = without(LLAMA, "rope_theta") | dict(rope_parameters=yarn | {"rope_theta": 900.0})
    old = LLAMA | dict(rope_scaling={"type" if key == "rope_type" else key: value for key, value in yarn.items()})
    assert architecture(old) == architecture(new)
    assert architecture(LLAMA | dict(rope_scaling=None)) == architecture(
        without(LLAMA, "rope_theta") | dict(rope_parameters={"rope_theta": 900.0, "rope_type": "default"}))


def test_gemma_3_has_the_same_two_ropes_and_windows_in_both_spellings():
    old = GEMMA3 | dict(rope_theta=5000.0, rope_local_base_freq=300.0, sliding_window_pattern=2,
                        rope_scaling={"rope_type": "linear", "factor": 3.0})
    new = GEMMA3 | dict(layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}})
    assert architecture(old) == architecture(new)
    config = architecture(old).config
    assert config.layers[:2] == (decoder.Layer(24, 1), decoder.Layer(None, 0))
    assert architecture(old).graph().blocks[0].kind != architecture(old).graph().blocks[1].kind


def test_which_layers_are_routed_and_how_many_experts_goes_by_two_names():
    routed = lambda config: [layer.routed for layer in architecture(config).config.layers]
    assert routed(MIXTRAL) == routed(QWEN3_MOE) == routed(QWEN3_MOE | dict(mlp_only_layers=None)) == [True] * 4
    assert routed(QWEN3_MOE | dict(decoder_sparse_step=2, mlp_only_layers=[0, 1])) == [False, False, False, True]
    for name in ("num_experts", "num_local_experts"):
        assert architecture(QWEN3_MOE | {name: 16}).config.experts == 16
    config = architecture(QWEN3_MOE | dict(mlp_only_layers=[1])).config
    dense, experts = (decoder.build(config).spec["blocks"][i] for i in (1, 2))
    assert dense["down"].shape == (48, 80) and experts["down"].shape == (128, 48, 768)


def test_the_keys_of_published_configs_are_understood():
    """Keys that families' files on the hub carry beside what transformers writes today."""
    architecture(LLAMA | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {},
                          "pretraining_tp": 1, "torch_dtype": "bfloat16", "initializer_range": 0.04})
    architecture(SHAPE | dict(model_type="gemma2", hidden_act="gelu", sliding_window_size=4096,
                              cache_implementation="hybrid"))
    architecture(SHAPE | dict(model_type="qwen2", use_mrope=False, max_window_layers=21, use_sliding_window=False))
    architecture(SHAPE | dict(model_type="phi3", full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
                              mlp_bias=False, attention_bias=False, partial_rotary_factor=0.5, embd_pdrop=0.0))
    architecture(QWEN3_MOE | dict(num_experts=128, max_window_layers=48, sliding_window=None, router_aux_loss_coef=0.1,
                                  output_router_logits=False, use_sliding_window=False, rope_scaling=None))
    architecture(GPT2 | dict(n_ctx=256, task_specific_params={}, summary_type="cls_index", resid_pdrop=0.1))


def test_a_null_window_is_no_window_and_an_absent_one_is_mistrals_default():
    mistral = SHAPE | dict(model_type="mistral")
    assert architecture(mistral).config.layers[0].window == 4096
    assert architecture(mistral | dict(sliding_window=None)).config.layers[0].window is None


def test_reading_a_config_leaves_it_as_it_was():
    config = GEMMA3 | dict(rope_parameters={"full_attention": {"rope_theta": 5000.0}})
    architecture(config)
    assert config == GEMMA3 | dict(rope_parameters={"full_attention": {"rope_theta": 5000.0}})


def test_length_dependent_scalings_are_fixed_by_the_context_to_serve():
    dynamic = LLAMA | dict(rope_scaling={"type": "dynamic", "factor": 4.0})
    ropes = lambda config, context: architecture(config, max_context=context).config.ropes
    assert ropes(dynamic, 256) == ropes(LLAMA, 256) == ropes(dynamic, 100)
    assert ropes(dynamic, 600) != ropes(dynamic, 700)
    phi = SHAPE | dict(model_type="phi3", original_max_position_embeddings=64, rope_scaling={
        "type": "su", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6})
    assert ropes(phi, 65) == ropes(phi, 256) != ropes(phi, 64)


@pytest.mark.parametrize("build", [
    lambda: architecture(LLAMA | dict(attention_bias=True, mlp_bias=True)).graph(),
    lambda: architecture(SHAPE | dict(model_type="olmo2")).graph(),
    lambda: architecture(GPT2).graph(),
])
def test_every_weight_has_an_axis_name_per_dimension_and_norms_and_biases_are_exact(build):
    for leaf in jax.tree.leaves(build().spec):
        assert isinstance(leaf, Leaf) and len(leaf.axes) == len(leaf.shape)
        assert leaf.exact == (len(leaf.shape) == 1)


def test_configs_are_hashable_so_that_they_can_be_static_arguments():
    assert hash(architecture(LLAMA).config) == hash(architecture(dict(LLAMA)).config)
    assert isinstance(architecture(GPT2).config, gpt2.Config) and hash(architecture(GPT2).config)


def test_a_plain_rope_turns_its_first_pair_by_one_radian_a_token():
    cos_TH, sin_TH = rope.turns(rope.plain(8, 10_000.0), jnp.arange(4))
    np.testing.assert_allclose(cos_TH[:, 0], np.cos(np.arange(4)), rtol=1e-6)
    np.testing.assert_allclose(sin_TH[:, 4 + 3], np.sin(np.arange(4) * 10_000 ** (-6 / 8)), rtol=1e-6)


def test_llama3_keeps_fast_pairs_and_slows_the_slow_ones():
    scaled = rope.llama3(64, 5e5, factor=8.0, low=1.0, high=4.0, trained=8192)
    ratios = np.divide(rope.plain(64, 5e5).inv_freq, scaled.inv_freq)
    assert ratios[0] == 1 and math.isclose(ratios[-1], 8, rel_tol=1e-6) and (np.diff(ratios) >= -1e-5).all()


def test_yarn_keeps_fast_pairs_slows_the_slow_ones_and_sharpens_attention():
    plain, scaled = rope.plain(64, 1e4), rope.yarn(64, 1e4, factor=4.0, trained=4096)
    ratios = np.divide(plain.inv_freq, scaled.inv_freq)
    assert ratios[0] == 1 and math.isclose(ratios[-1], 4, rel_tol=1e-6) and (np.diff(ratios) >= -1e-5).all()
    assert math.isclose(scaled.scale, 0.1 * math.log(4) + 1)
