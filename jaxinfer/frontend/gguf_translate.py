"""A GGUF file's tensors, said as Hugging Face says them: its names, its layout, beside its config.

llama.cpp's converter (conversion/*.py there) is what is undone here: names, the order of Q and K rows in the
families whose rotary positions it interleaves, gemma's norms (stored plus one), GPT-2's transposed projections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend import gguf_config
from jaxinfer.frontend.files import ALL, Tensor
from jaxinfer.frontend.gguf import unstack
from jaxinfer.frontend.gguf_config import ROPE_FACTORS, Metadata

END_OF_TURN = {"<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"}
CONTROL = 3  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class Family:
    """One architecture: its `model_type` and causal class, what `config` keys it has of its own, and its tensors:
    `outer` and `block` map GGUF's names (less `.weight`, less `blk.N.`) to Hugging Face's; so do `experts`, for which
    a name with `{}` stands for a tensor of each expert, of which GGUF makes one."""

    model_type: str
    causal: str
    block: Mapping[str, str]
    config: Callable[[Metadata, Mapping[str, Tensor]], dict[str, Any]]
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER)
    experts: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers."
    permuted: bool = False  # rows of Q and K are interleaved
    transposed: tuple[str, ...] = ()  # stored [in, out] by Hugging Face
    norm_offset: float = 0.0  # what the converter added to norms


@dataclass(frozen=True, eq=False)
class Fixed:
    """A tensor whose `fix` (to Hugging Face's layout) is applied when it is read. It moves rows within runs of
    `together`; None: anywhere."""

    stored: Tensor
    shape: tuple[int, ...]
    dtype: np.dtype
    fix: Callable[[np.ndarray], np.ndarray]
    together: int | None = 1

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def read(self) -> np.ndarray:
        stored = self.stored
        return self.fix(stored.rows(0, stored.shape[0]) if stored.shape else stored.read())

    def rows(self, start: int, stop: int, columns: slice = ALL) -> np.ndarray:
        if self.together is None:
            return self.read()[start:stop, columns]
        first = start // self.together * self.together
        runs = self.stored.rows(first, -(-stop // self.together) * self.together)
        found = self.fix(runs)[start - first : stop - first]
        return found if columns == ALL else found[:, columns]


def translate(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """`(config, tensors, generation)` in Hugging Face's words; tensors stay unread (but for RoPE's few factors).

    Raises UnsupportedModel for an architecture, a metadata key or a tensor that is not understood, CorruptFile for
    metadata that is missing or contradicts the tensors.
    """
    if metadata.get("general.type", "model") != "model":
        raise UnsupportedModel(f"{source}: holds a {metadata['general.type']!r:.40}, not a model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(f"{source}: is one of {metadata['split.count']} parts; "
                               "join them first with llama-gguf-split --merge")
    keys = Metadata(metadata, source)
    if (family := FAMILIES.get(keys.architecture)) is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"{source}: architecture {keys.architecture!r} is not one of {known}")
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise CorruptFile(f"{source}: there is no matrix token_embd.weight among the {len(tensors)} tensors")
    if (blocks := keys.count("block_count")) > len(tensors):
        raise CorruptFile(f"{source}: {len(tensors)} tensors cannot make {blocks} blocks")
    ids = _token_ids(metadata)
    config = {
        "model_type": family.model_type, "architectures": [family.causal],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **ids, **family.config(keys, tensors),
    }  # fmt: skip
    keys.finish()
    return config, _translate_tensors(family, config, tensors, source), _generation(metadata, ids)


# Tensors.


def _translate_tensors(
    family: Family, config: dict[str, Any], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        known = {**family.block, **family.experts}.get(layer[2]) if layer else family.outer.get(stem)
        if name in ROPE_FACTORS:
            continue
        if known is None or part not in ("weight", "bias"):
            unknown.append(name)
            continue
        prefix = f"{family.layers}{int(layer[1])}." if layer else ""
        if "{}" not in known:
            named[f"{prefix}{known}.{part}"] = _fixed(family, config, name, tensor, source)
            continue
        if len(tensor.shape) != 3:
            raise CorruptFile(f"{source}: tensor {name!r} of shape {tensor.shape} is not a matrix for each expert")
        for e, expert in enumerate(unstack(tensor)):
            named[f"{prefix}{known.format(e)}.{part}"] = expert
    if unknown:
        raise UnsupportedModel(f"{source}: {len(unknown)} tensors have no place in {family.model_type}; nothing was "
                               f"loaded: {', '.join(unknown[:8])}{', ...' if len(unknown) > 8 else ''}")
    return named


def _fixed(family: Family, config: dict[str, Any], name: str, tensor: Tensor, source: str) -> Tensor:
    stem, _, part = name.rpartition(".")
    kind = stem.rpartition(".")[2]
    if family.norm_offset and stem.endswith("norm") and part == "weight":
        float32, offset = np.dtype(np.float32), np.float32(family.norm_offset)
        return Fixed(tensor, tensor.shape, float32, lambda norm: norm.astype(float32) - offset)
    if family.permuted and kind in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
        if not tensor.shape or tensor.shape[0] % (2 * heads):
            raise CorruptFile(f"{source}: tensor {name!r} of shape {tensor.shape} cannot be split into {heads} heads")
        width = tensor.shape[0] // heads
        return Fixed(tensor, tensor.shape, tensor.dtype, lambda rows: _halves(rows, width), width)
    if kind in family.transposed and part == "weight":
        return Fixed(tensor, tensor.shape[::-1], tensor.dtype, np.transpose, None)
    return tensor


def _halves(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows of each head of `width` from interleaved pairs (0, h/2, 1, h/2 + 1, ...) back to two halves (0, 1, ...)."""
    pairs = rows.reshape(-1, width // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


# Token ids.


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    named = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in named.items()}
    return {name: value for name, value in found.items() if type(value) is int}


def _generation(metadata: Mapping[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """What generation_config.json would say: every token that ends a turn is an end of sequence, its own first."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, list):
        ends += [i for i, kind in enumerate(types[: len(tokens)]) if kind == CONTROL and tokens[i] in END_OF_TURN]
    unique = [end for end in dict.fromkeys(ends) if type(end) is int]
    eos = {"eos_token_id": unique[0] if len(unique) == 1 else unique} if unique else {}
    return {name: value for name, value in ids.items() if name != "eos_token_id"} | eos


OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
AFTER_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
GEMMA2 = {**LLAMA, **AFTER_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
OLMO2 = {**LLAMA, **AFTER_NORMS, **HEAD_NORMS}
del OLMO2["attn_norm"], OLMO2["ffn_norm"]
QWEN3 = {**LLAMA, **HEAD_NORMS}
ROUTED = {name: part for name, part in QWEN3.items() if name not in ("ffn_gate", "ffn_up", "ffn_down")}
MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3", "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}  # fmt: skip
QWEN3_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj", "ffn_down_exps": "mlp.experts.{}.down_proj",
}  # fmt: skip
PHI3 = {**LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
del PHI3["attn_q"], PHI3["attn_k"], PHI3["attn_v"], PHI3["ffn_gate"]
GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
GPT2_OUTER = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
              "output": "lm_head"}

FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", LLAMA, gguf_config.llama, experts=MIXTRAL_EXPERTS, permuted=True),
    "granite": Family("granite", "GraniteForCausalLM", LLAMA, gguf_config.granite, permuted=True),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", LLAMA, gguf_config.smollm3, permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", LLAMA, gguf_config.qwen2),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", QWEN3, gguf_config.qwen3),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", ROUTED, gguf_config.qwen3moe, experts=QWEN3_EXPERTS),
    "phi3": Family("phi3", "Phi3ForCausalLM", PHI3, gguf_config.phi3),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", GEMMA2, gguf_config.gemma2, norm_offset=1.0),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**GEMMA2, **HEAD_NORMS}, gguf_config.gemma3, norm_offset=1.0),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", OLMO2, gguf_config.olmo2),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", GPT2, gguf_config.gpt2, GPT2_OUTER, layers="transformer.h.",
                   transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
}
