"""GGUF in Hugging Face's words: the names, layouts and numbers that llama.cpp's converter started from come back."""

from pathlib import Path

import numpy as np
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize, quantize

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.architectures import architecture
from jaxinfer.frontend.checkpoint import Checkpoint, open_checkpoint
from jaxinfer.frontend.gguf_translate import FAMILIES
from jaxinfer.frontend.weights import load_params
from tests.gguf_files import Blocks, write_gguf

D, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, VOCAB, EXPERTS = 16, 4, 2, 4, 24, 2, 32, 3
PERMUTED = {"llama", "granite", "smollm3"}  # the families whose converter derives from LlamaModel


def metadata(family: str, **changes) -> dict:
    values = {
        "block_count": LAYERS, "embedding_length": D, "attention.head_count": HEADS, "feed_forward_length": FFN,
        "attention.head_count_kv": KV_HEADS, "context_length": 64, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    if family == "gpt2":
        del values["attention.layer_norm_rms_epsilon"], values["attention.head_count_kv"]
        values["attention.layer_norm_epsilon"] = 1e-5
    if family == "granite":
        values |= {"attention.scale": 0.0078125, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 16.0}
    if family == "gemma3":
        values["attention.sliding_window"] = 8
    if family == "qwen3moe":
        values |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 8}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {"general.architecture": family} | {
        f"{family}.{key}": value for key, value in values.items() if value is not None}


def tensors(family: str) -> dict[str, np.ndarray]:
    """Random weights of the shapes that the family has, by GGUF's names."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    norms = {"olmo2": (q, kv)}.get(family, (HEAD_DIM, HEAD_DIM))
    wide = {"phi3": {"attn_qkv": (q + 2 * kv, D), "ffn_up": (2 * FFN, D)}, "gpt2": {"attn_qkv": (3 * D, D)}}
    shapes = {
        "attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, q), "ffn_gate": (FFN, D),
        "ffn_up": (FFN, D), "ffn_down": (D, FFN), "attn_q_norm": norms[:1], "attn_k_norm": norms[1:],
        "token_embd": (VOCAB, D), "position_embd": (64, D), "output": (VOCAB, D), **wide.get(family, {}),
    }  # fmt: skip
    names = [*FAMILIES[family].outer, *(f"blk.{i}.{name}" for i in range(LAYERS) for name in FAMILIES[family].block)]
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.random(shapes.get(name.rpartition(".")[2], (D,)), np.float32) for name in names}


def opened(folder: Path, meta: dict, weights: dict[str, np.ndarray]) -> Checkpoint:
    return open_checkpoint(write_gguf(folder / "m.gguf", meta, weights))


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """As the converter writes Q and K: row i and row i + h/2 of each head next to each other."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_the_ones_that_the_gguf_package_maps_back(family):
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    names, block = get_tensor_name_map(MODEL_ARCH(arch), LAYERS), FAMILIES[family]
    for gguf, hugging_face in block.outer.items():
        if (family, gguf) != ("gemma2", "output"):  # it is always tied, which the package knows
            assert names.get_name(hugging_face) == gguf
    for gguf, hugging_face in {**block.block, **block.experts}.items():
        hugging_face = hugging_face.replace(".{}", "")  # the converter has stacked them before it asks
        assert names.get_name(f"{block.layers}1.{hugging_face}") == f"blk.1.{gguf}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_config_that_we_build_a_graph_from(tmp_path, family):
    checkpoint = opened(tmp_path, metadata(family), tensors(family))
    graph = architecture(checkpoint.config).graph()
    assert (graph.vocab, graph.max_context, len(graph.blocks)) == (VOCAB, 64, LAYERS)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2", "phi3"}))
def test_q_and_k_rows_are_put_back_where_the_converter_moved_them(tmp_path, family):
    weights = tensors(family)
    read = opened(tmp_path, metadata(family), weights).tensors
    for kind, heads in (("q", HEADS), ("k", KV_HEADS)):
        stored, back = weights[f"blk.1.attn_{kind}.weight"], read[f"model.layers.1.self_attn.{kind}_proj.weight"]
        assert (back.shape, back.dtype) == (stored.shape, stored.dtype)
        np.testing.assert_array_equal(permuted(back.read(), heads) if family in PERMUTED else back.read(), stored)
        assert family not in PERMUTED or (back.read() != stored).any()


def test_biases_of_q_and_k_are_put_back_too(tmp_path):
    bias = {f"blk.{i}.attn_{kind}.bias": np.arange(size, dtype=np.float32)
            for i in range(LAYERS) for kind, size in (("q", 16), ("k", 8), ("v", 8), ("output", 16))}
    checkpoint = opened(tmp_path, metadata("llama"), tensors("llama") | bias)
    assert checkpoint.config["attention_bias"] is True
    read = checkpoint.tensors["model.layers.0.self_attn.k_proj.bias"].read()
    assert read.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_lose_the_one_that_the_converter_added_to_gemma_s(tmp_path, family):
    weights, added = tensors(family), float(family.startswith("gemma"))
    config = opened(tmp_path, metadata(family), weights).tensors
    norms = {name: name for name in weights if name.endswith("norm.weight")}
    assert norms
    hugging_face = {**{f"{gguf}.weight": name for gguf, name in FAMILIES[family].outer.items()}, **{
        f"blk.{i}.{gguf}.weight": f"{FAMILIES[family].layers}{i}.{name}"
        for i in range(LAYERS) for gguf, name in FAMILIES[family].block.items()}}
    for name in norms:
        tensor = config[f"{hugging_face[name]}.weight"]
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), weights[name] - np.float32(added))


def test_gpt2_s_projections_are_in_out_again(tmp_path):
    weights = tensors("gpt2")
    read = opened(tmp_path, metadata("gpt2"), weights).tensors
    tensor = read["transformer.h.1.attn.c_attn.weight"]
    assert tensor.shape == (D, 3 * D)
    np.testing.assert_array_equal(tensor.read(), weights["blk.1.attn_qkv.weight"].T)
    np.testing.assert_array_equal(read["transformer.wpe.weight"].read(), weights["position_embd.weight"])


def test_a_model_without_an_output_matrix_has_tied_embeddings(tmp_path):
    weights = tensors("llama")
    assert opened(tmp_path, metadata("llama"), weights).config["tie_word_embeddings"] is False
    del weights["output.weight"]
    assert opened(tmp_path, metadata("llama"), weights).config["tie_word_embeddings"] is True


def test_numbers_are_the_decimals_that_float32_rounded(tmp_path):
    config = opened(tmp_path, metadata("granite"), tensors("granite")).config
    assert (config["rms_norm_eps"], config["residual_multiplier"]) == (1e-5, 0.22)


def test_sizes_that_repeat_for_each_layer_are_one_number(tmp_path):
    config = opened(tmp_path, metadata("llama", feed_forward_length=[FFN] * LAYERS), tensors("llama")).config
    assert config["intermediate_size"] == FFN
    with pytest.raises(UnsupportedModel, match="feed_forward_length differs from layer to layer"):
        opened(tmp_path, metadata("llama", feed_forward_length=[FFN, FFN + 1]), tensors("llama"))


def test_windows_follow_the_family_s_pattern_or_the_file_s(tmp_path):
    def kinds(family: str, **changes) -> list[str]:
        config = opened(tmp_path, metadata(family, **changes), tensors(family)).config
        return [name.removesuffix("_attention") for name in config["layer_types"]]

    assert kinds("gemma2") == ["sliding", "full"]
    assert kinds("gemma3") == ["sliding", "sliding"]
    assert kinds("gemma3", attention__sliding_window_pattern=[False, True]) == ["full", "sliding"]
    assert kinds("gemma3", attention__sliding_window_pattern=2) == ["sliding", "full"]
    with pytest.raises(CorruptFile, match="3 entries for 2 layers"):
        kinds("gemma3", attention__sliding_window_pattern=[True] * 3)


def test_a_llama_with_a_window_is_a_mistral_and_an_olmo2_with_one_an_olmo3(tmp_path):
    for family, kind in (("llama", "mistral"), ("olmo2", "olmo3")):
        config = opened(tmp_path, metadata(family, attention__sliding_window=8), tensors(family)).config
        assert (config["model_type"], config["sliding_window"]) == (kind, 8)


def test_a_phi3_with_a_window_of_zero_has_none(tmp_path):
    config = opened(tmp_path, metadata("phi3", attention__sliding_window=0), tensors("phi3")).config
    assert config["sliding_window"] is None


# Experts.


def expert_tensors(ffn: int) -> dict[str, np.ndarray | Blocks]:
    """A router and stacked experts for each layer; the matrices down are in blocks."""
    rng, made = np.random.default_rng(1), {}
    for i in range(LAYERS):
        made[f"blk.{i}.ffn_gate_inp.weight"] = rng.random((EXPERTS, D), np.float32)
        for part in ("gate", "up"):
            made[f"blk.{i}.ffn_{part}_exps.weight"] = rng.random((EXPERTS, ffn, D), np.float32)
        blocks = quantize(rng.random((EXPERTS, D, ffn), np.float32), GGMLQuantizationType.Q8_0)
        made[f"blk.{i}.ffn_down_exps.weight"] = Blocks(blocks, "Q8_0")
    return made


@pytest.mark.parametrize(("family", "kind"), [("llama", "mixtral"), ("qwen3moe", "qwen3_moe")])
def test_a_stack_of_experts_is_a_leaf_of_the_graph_again(tmp_path, family, kind):
    experts = expert_tensors(ffn := 32)
    meta = metadata(family, expert_count=EXPERTS, expert_used_count=2, feed_forward_length=ffn)
    if family == "qwen3moe":
        meta["qwen3moe.expert_feed_forward_length"] = ffn
    weights = {name: tensor for name, tensor in tensors(family).items() if "ffn_" not in name or "norm" in name}
    checkpoint = opened(tmp_path, meta, weights | experts)
    assert checkpoint.config["model_type"] == kind
    model = architecture(checkpoint.config)
    assert (model.config.experts, model.config.experts_per_token, model.config.renormalise) == (EXPERTS, 2, True)
    assert all(layer.routed for layer in model.config.layers)
    layer = load_params(model.graph(), checkpoint.tensors, dtype="float32", source="here")["blocks"][1]
    stored = lambda name: experts[f"blk.1.ffn_{name}.weight"]
    np.testing.assert_array_equal(layer["router"], stored("gate_inp"))
    np.testing.assert_array_equal(layer["gate_up"], np.concatenate([stored("gate_exps"), stored("up_exps")], axis=1))
    np.testing.assert_array_equal(layer["down"], dequantize(stored("down_exps").data, GGMLQuantizationType.Q8_0))


def test_experts_that_are_not_stacked_are_corrupt(tmp_path):
    flat = {"blk.0.ffn_gate_exps.weight": np.ones((4, D), np.float32)}
    with pytest.raises(CorruptFile, match=r"ffn_gate_exps.weight' of shape \(4, 16\) is not a matrix for each expert"):
        opened(tmp_path, metadata("llama", expert_count=2, expert_used_count=1), tensors("llama") | flat)


# Rotary positions.


def test_linear_and_yarn_scaling_keep_their_numbers(tmp_path):
    linear = metadata("llama", rope__scaling__type="linear", rope__scaling__factor=8.0, rope__freq_base=5e5)
    config = opened(tmp_path, linear, tensors("llama")).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and config["rope_theta"] == 5e5
    yarn = metadata("qwen2", rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__yarn_beta_fast=24.0,
                    rope__scaling__original_context_length=16, rope__scaling__yarn_attn_factor=1.2)
    assert opened(tmp_path, yarn, tensors("qwen2")).config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2,
        "beta_fast": 24.0}  # fmt: skip


def test_factors_for_each_pair_become_longrope(tmp_path):
    factors = {f"rope_factors_{kind}.weight": np.float32([1, rate]) for kind, rate in (("short", 2), ("long", 3))}
    meta = metadata("phi3", rope__scaling__original_context_length=16, rope__scaling__attn_factor=1.5)
    config = opened(tmp_path, meta, tensors("phi3") | factors).config
    assert config["rope_scaling"] == {
        "rope_type": "longrope", "short_factor": [1, 2], "long_factor": [1, 3], "attention_factor": 1.5,
        "original_max_position_embeddings": 16}  # fmt: skip
    assert config["original_max_position_embeddings"] == 16
    with pytest.raises(CorruptFile, match=r"rope_factors_short\.weight has shape \(3,\), expected \(2,\)"):
        opened(tmp_path, meta, tensors("phi3") | factors | {"rope_factors_short.weight": np.ones(3, np.float32)})


def test_llama3_s_factors_slow_each_pair_as_its_four_numbers_would(tmp_path):
    head = 16  # channels, theta 500,000: wavelengths on both sides of the blend
    frequency = 500_000.0 ** -(np.arange(0, head, 2) / head)
    smooth = np.clip((8192 / (2 * np.pi / frequency) - 1) / (4 - 1), 0, 1)
    factors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    meta = metadata("llama", attention__head_count=1, attention__head_count_kv=1, rope__freq_base=5e5,
                    context_length=131072)
    weights = tensors("llama") | {"rope_freqs.weight": factors}
    theirs = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
    config = opened(tmp_path, meta, weights).config
    ours, wanted = (architecture(config | {"rope_scaling": scaling}).config.ropes[0]
                    for scaling in (config["rope_scaling"], theirs))
    np.testing.assert_allclose(ours.inv_freq, wanted.inv_freq, rtol=1e-6)
    assert ours.scale == wanted.scale == 1 and len(set(factors)) > 2


@pytest.mark.parametrize("changes", [
    {"rope__scaling__type": "dynamic", "rope__scaling__factor": 2.0},
    {"rope__scaling__type": "yarn"},
    {"rope__scaling__type": "longrope"},
    {"rope__scaling__attn_factor": 2.0},
])  # fmt: skip
def test_a_rope_scaling_that_is_not_understood_is_refused(tmp_path, changes):
    with pytest.raises(UnsupportedModel, match="RoPE scaling of type"):
        opened(tmp_path, metadata("llama", **changes), tensors("llama"))


# Tokens that end a text.


def test_every_token_that_ends_a_turn_ends_the_sequence(tmp_path):
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 3,
            "tokenizer.ggml.tokens": ["a", "<s>", "</s>", "<|eot_id|>", "<|im_end|>", "<|end|>"],
            "tokenizer.ggml.token_type": [1, 3, 3, 3, 3, 1]}
    generation = opened(tmp_path, metadata("llama") | ends, tensors("llama")).generation
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 3, 4]}  # 5 is no control token, but plain text
    assert opened(tmp_path, metadata("llama"), tensors("llama")).generation == {}


# Refusals.


def test_what_is_not_understood_is_named_all_at_once(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"(?s)2 metadata keys.*qwen3\.expert_count is 8.*qwen3\.strange is 1"):
        opened(tmp_path, metadata("qwen3", expert_count=8, strange=1), tensors("qwen3"))
    surplus = {"blk.0.strange.weight": np.ones(1, np.float32), "v.blk.0.weight": np.ones(1, np.float32)}
    with pytest.raises(UnsupportedModel, match=r"2 tensors have no place in llama.*blk\.0\.strange\.weight"):
        opened(tmp_path, metadata("llama"), tensors("llama") | surplus)
    with pytest.raises(UnsupportedModel, match=r"'mamba' is not one of.*llama"):
        opened(tmp_path, {"general.architecture": "mamba"}, {})


def test_a_key_of_a_harmless_value_is_harmless(tmp_path):
    opened(tmp_path, metadata("llama", expert_count=0, attention__causal=True, vocab_size=VOCAB), tensors("llama"))


@pytest.mark.parametrize(("extra", "reason"), [
    ({"general.type": "adapter"}, "holds a 'adapter', not a model"),
    ({"split.count": 3}, "one of 3 parts.*llama-gguf-split --merge"),
])  # fmt: skip
def test_a_file_that_is_not_a_whole_model_is_refused(tmp_path, extra, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        opened(tmp_path, metadata("llama") | extra, tensors("llama"))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"embedding_length": None}, "lacks llama.embedding_length"),
    ({"attention__head_count": 0}, "head_count is 0, expected 1 or more"),
    ({"context_length": "long"}, "context_length is 'long'.*wrong type"),
    ({"block_count": 1000}, "cannot make 1000 blocks"),
    ({"attention__head_count_kv": 3}, r"'blk.0.attn_k.weight' of shape \(8, 16\) cannot be split into 3 heads"),
])  # fmt: skip
def test_metadata_that_contradicts_the_tensors_is_corrupt(tmp_path, changes, reason):
    with pytest.raises(CorruptFile, match=reason):
        opened(tmp_path, metadata("llama", **changes), tensors("llama"))


def test_a_file_without_weights_is_corrupt(tmp_path):
    with pytest.raises(CorruptFile, match=r"no matrix token_embd\.weight"):
        opened(tmp_path, metadata("llama"), {})
