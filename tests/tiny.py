"""Tiny random checkpoints in Hugging Face layout, made without torch: plain, with windows, with experts, GPT-2."""

import json
from pathlib import Path

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Leaf

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"
COMMON = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
          "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 1, "bos_token_id": 0,
          "hidden_act": "silu", "torch_dtype": "float32"}
PLAIN = {**COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
WINDOWED = {**COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 3,
            "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}
ROUTED = {**COMMON, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2,
          "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]}
# How tests load a model unless they are about another way: what one of them has compiled, the others read.
ALONE = dict(max_context=128, max_rows=1)  # as a user does, for one request at a time
ONE_BUCKET = dict(max_context=256, max_rows=4, batch_invariant=True)  # as little to compile as can be
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}


def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level, no merges: any text is a few ids, and any ids are a text or a broken character."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<|user|>", "<|assistant|>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    made.add_tokens([f"w{i} " for i in range(60)])
    return made


def write(directory: Path, config: dict, seed: int = 0) -> Path:
    """The checkpoint of `config` with random weights whose logits are far from flat."""
    directory.mkdir(parents=True, exist_ok=True)
    rng, tensors = np.random.default_rng(seed), {}
    leaves = jax.tree.leaves(architecture(config).graph().spec, is_leaf=lambda x: isinstance(x, Leaf))
    for leaf in leaves:
        scale = 0.3 if len(leaf.shape) == 1 else 1.4 / leaf.shape[-1] ** 0.5
        whole = rng.normal(size=leaf.shape).astype(np.float32) * scale + (1 if len(leaf.shape) == 1 else 0)
        if len(leaf.shape) == 3:  # of all experts, each in tensors of its own
            whole = whole.reshape(-1, leaf.shape[2])
        sizes = _parts(leaf, config, len(whole))
        for name, part in zip(leaf.alternatives[0], np.split(whole, np.cumsum(sizes)[:-1]), strict=True):
            tensors[name] = np.ascontiguousarray(part.T if leaf.transpose else part)
    tensors[next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))] *= 3
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def _parts(leaf: Leaf, config: dict, rows: int) -> list[int]:
    if len(leaf.alternatives[0]) == 3:
        heads, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
        return [heads, kv, kv]
    return [rows // len(leaf.alternatives[0])] * len(leaf.alternatives[0])
