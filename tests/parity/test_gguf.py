"""A transformers model, converted to GGUF as llama.cpp converts it and opened by us, is that same model again."""

from pathlib import Path

import numpy as np
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

from jaxinfer.frontend.checkpoint import open_checkpoint
from tests.gguf_files import write_gguf

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2)
SCALES = dict(attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=0.5)
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
CASES = {
    "llama": ("llama", {}),
    "llama, wide heads, biases, tied": (
        "llama", dict(head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "llama, llama3 rope": ("llama", dict(rope_theta=5e3, head_dim=16, max_position_embeddings=8192 * 8, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})),
    "llama, linear rope": ("llama", dict(rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "qwen2, yarn rope": ("qwen2", dict(rope_theta=1e6, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "phi3": ("phi3", dict(sliding_window=9, rope_theta=1e3)),
    "phi3, longrope": ("phi3", dict(rope_scaling=LONG, original_max_position_embeddings=16, sliding_window=None)),
    "gemma2": ("gemma2", dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=9, attn_logit_softcapping=20.0)),
    "gemma3": ("gemma3", dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=9)),
    "olmo2": ("olmo2", dict(tie_word_embeddings=False)),
    "granite": ("granite", SCALES),
    "smollm3": ("smollm3", dict(tie_word_embeddings=True)),
    "gpt2": ("gpt2", {}),
}  # fmt: skip


def model_of(family: str, changes: dict):
    """A tiny model whose every weight matters: random norms and biases too."""
    kind = {"gemma3": "gemma3_text"}.get(family, family)
    if family == "gpt2":
        sizes = dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48)
    else:
        sizes = SIZES
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return model


def converted(path: Path, family: str, model) -> Path:
    """What llama.cpp's converter would write. Names come from the `gguf` package, the rest is said here."""
    config, arch = model.config, next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    names = get_tensor_name_map(MODEL_ARCH(arch), config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        if family in ("llama", "granite", "smollm3") and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if family in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if family == "gpt2" and array.ndim == 2 and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc"):
            array = array.T
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    metadata = keys_of(config, family) | rope_of(config, rope)
    for kind in ("short", "long"):
        if f"{kind}_factor" in rope:
            tensors[f"rope_factors_{kind}.weight"] = np.float32(rope[f"{kind}_factor"])
    if rope.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = llama3_factors(config, rope)
    metadata = {f"{family}.{key}": value for key, value in metadata.items() if value is not None}
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
    return write_gguf(path, {"general.architecture": family} | ids | metadata, tensors)


def keys_of(config, family: str) -> dict:
    keys = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "attention.head_count": config.num_attention_heads,
        "feed_forward_length": config.n_inner if family == "gpt2" else config.intermediate_size,
    }  # fmt: skip
    if family == "gpt2":
        return keys | {"attention.layer_norm_epsilon": config.layer_norm_epsilon}
    keys |= {"attention.head_count_kv": config.num_key_value_heads,
             "attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    if (head_dim := getattr(config, "head_dim", None)) is not None and family != "granite":
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if family in ("llama", "granite", "smollm3"):
        keys |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim or config.hidden_size // 4}
    if family == "granite":
        keys |= {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier,
                 "residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    if family in ("gemma2", "gemma3", "phi3"):
        keys["attention.sliding_window"] = config.sliding_window or 0
    if family == "gemma2":
        keys |= {"attn_logit_softcapping": config.attn_logit_softcapping,
                 "final_logit_softcapping": config.final_logit_softcapping}
    if family == "gemma3":
        keys["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return keys


def rope_of(config, rope: dict) -> dict:
    kind = rope.get("rope_type")
    keys = {"rope.freq_base": float(rope["rope_theta"])} if rope else {}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "longrope":
        trained = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / trained
        keys["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(scale) / np.log(trained)))
    return keys


def llama3_factors(config, rope: dict) -> np.ndarray:
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / wave - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_has_its_logits_back(tmp_path, case):
    family, changes = CASES[case]
    model = model_of(family, changes)
    checkpoint = open_checkpoint(converted(tmp_path / "m.gguf", family, model))
    config = dict(checkpoint.config)
    ours = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager").eval()
    state = {name: torch.from_numpy(np.array(tensor.read())) for name, tensor in checkpoint.tensors.items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = next(iter(state.values()))  # the embedding, which the converter met first
    ours.load_state_dict(state)  # strict: every name and every shape
    tokens = torch.arange(3 * 30).reshape(3, 30) * 7 % 96
    with torch.no_grad():
        expected, actual = model(tokens).logits, ours(tokens).logits
    assert expected.std() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
