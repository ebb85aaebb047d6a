"""Tiny random checkpoints of every family, made by transformers: the oracles of parity tests, and models for others.

Every value that alters the mathematics is set where it shows: windows and trained contexts shorter than the prompts,
an epsilon of a hundredth, soft caps that the scores reach, weights, norms and biases that are all random.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MAX_CONTEXT = 192  # what the tests serve at most; every family's own limit is at least this
SHAPE = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=0.01, pad_token_id=None,
             bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=900.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", rope_theta=900.0, factor=4.0, original_max_position_embeddings=64, beta_fast=8.0,
            beta_slow=0.5)
LONGROPE = dict(rope_type="longrope", rope_theta=900.0, short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 2.5, 4.0])


def _with(kind: type, **keys) -> Callable[[], transformers.PreTrainedConfig]:
    return lambda: kind(**deepcopy({**SHAPE, **keys}))  # a config keeps, and changes, the dicts that it is given


def _theta(theta: float, kind: str = "default", **keys) -> dict:
    return dict(rope_type=kind, rope_theta=theta, **keys)


FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama2": _with(transformers.LlamaConfig, rope_parameters=_theta(900.0)),
    "llama3": _with(transformers.LlamaConfig, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, head_dim=16,
                    hidden_act="gelu"),
    "llama-linear": _with(transformers.LlamaConfig, rope_parameters=_theta(900.0, "linear", factor=3.0)),
    "llama-dynamic": _with(transformers.LlamaConfig, rope_parameters=_theta(900.0, "dynamic", factor=4.0),
                           max_position_embeddings=64),
    "llama-yarn": _with(transformers.LlamaConfig, rope_parameters=YARN),
    "llama-yarn-scaled": _with(transformers.LlamaConfig, rope_parameters=YARN | dict(
        attention_factor=1.3, truncate=False)),
    "llama-yarn-mscale": _with(transformers.LlamaConfig, rope_parameters=YARN | dict(
        mscale=2.0, mscale_all_dim=0.5)),
    "smollm2": _with(transformers.LlamaConfig, rope_parameters=_theta(900.0), tie_word_embeddings=True),
    "mistral": _with(transformers.MistralConfig, rope_parameters=_theta(900.0), sliding_window=24, head_dim=16),
    "qwen2": _with(transformers.Qwen2Config, rope_parameters=_theta(900.0), use_sliding_window=True, sliding_window=24,
                   max_window_layers=1),
    "qwen3": _with(transformers.Qwen3Config, rope_parameters=_theta(900.0), head_dim=16, attention_bias=True,
                   use_sliding_window=True, sliding_window=24, max_window_layers=2),
    "mixtral": _with(transformers.MixtralConfig, rope_parameters=_theta(900.0), sliding_window=24, head_dim=16,
                     num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=2),
    "qwen3-moe": _with(transformers.Qwen3MoeConfig, rope_parameters=_theta(900.0), head_dim=16, num_local_experts=6,
                       num_experts_per_tok=3, moe_intermediate_size=40, mlp_only_layers=[1], use_sliding_window=True,
                       sliding_window=24, num_hidden_layers=2),
    "qwen3-moe-renormalised": _with(transformers.Qwen3MoeConfig, rope_parameters=_theta(900.0), head_dim=16,
                                    num_local_experts=6, num_experts_per_tok=2, moe_intermediate_size=40,
                                    norm_topk_prob=True, decoder_sparse_step=2, attention_bias=True,
                                    use_sliding_window=True, sliding_window=24, num_hidden_layers=2),
    "phi3": _with(transformers.Phi3Config, rope_parameters=_theta(900.0, partial_rotary_factor=0.5),
                  sliding_window=24, hidden_size=64),
    "phi3-longrope": _with(transformers.Phi3Config, rope_parameters=LONGROPE | dict(partial_rotary_factor=0.5),
                           original_max_position_embeddings=64),
    "phi3-longrope-scaled": _with(transformers.Phi3Config, original_max_position_embeddings=224,
                                  rope_parameters=LONGROPE | dict(partial_rotary_factor=0.5, attention_factor=1.25)),
    "gemma2": _with(transformers.Gemma2Config, rope_parameters=_theta(900.0), head_dim=16, query_pre_attn_scalar=9,
                    sliding_window=24, attn_logit_softcapping=10.0, final_logit_softcapping=6.0),
    "gemma3": _with(transformers.Gemma3TextConfig, head_dim=16, query_pre_attn_scalar=9, sliding_window=24,
                    num_hidden_layers=4, sliding_window_pattern=2, attention_bias=True,
                    final_logit_softcapping=6.0, rope_parameters={
                        "full_attention": _theta(5000.0, "linear", factor=3.0),
                        "sliding_attention": _theta(300.0)}),
    "smollm3": _with(transformers.SmolLM3Config, rope_parameters=_theta(900.0), no_rope_layer_interval=2,
                     num_hidden_layers=4, attention_bias=True, mlp_bias=True, use_sliding_window=True,
                     sliding_window=24),
    "olmo2": _with(transformers.Olmo2Config, rope_parameters=_theta(900.0), attention_bias=True),
    "granite": _with(transformers.GraniteConfig, rope_parameters=_theta(900.0), embedding_multiplier=3.0,
                     attention_multiplier=0.2, residual_multiplier=0.6, logits_scaling=1.5, attention_bias=True,
                     mlp_bias=True),
    "gpt2": partial(transformers.GPT2Config, vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_positions=256, n_inner=80,
                    layer_norm_epsilon=0.01, bos_token_id=1, eos_token_id=2),
    "gpt2-by-layer": partial(transformers.GPT2Config, vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_positions=256,
                             layer_norm_epsilon=0.01, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True,
                             activation_function="relu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2),
}


def make(family: str, directory: Path) -> transformers.PreTrainedModel:
    """A random model of `family` in float32, saved under `directory` as `config.json` and `model.safetensors`."""
    model = transformers.AutoModelForCausalLM.from_config(
        FAMILIES[family](), attn_implementation="eager", dtype=torch.float32)
    randomise(model)
    model.save_pretrained(directory)
    return model.eval()


def randomise(model: transformers.PreTrainedModel, seed: int = 3) -> None:
    """Random norms and biases too; weights so large that logits are far from flat and greedy continuations wander,
    so small that rounding in the last bit moves no logit by more than some 3e-5."""
    kind, width = model.config.model_type, model.config.hidden_size
    random = torch.Generator().manual_seed(seed)
    normal = lambda weight, std: torch.randn(weight.shape, generator=random) * std
    with torch.no_grad():
        for name, weight in model.named_parameters():
            inputs = weight.shape[0] if kind == "gpt2" and "lm_head" not in name else weight.shape[-1]
            if weight.ndim == 1:
                weight.copy_(normal(weight, 0.3) + name.endswith("weight"))
            elif any(part in name for part in ("embed_tokens", "wte", "wpe")):
                weight.copy_(normal(weight, 0.8 * width**-0.5 if "gemma" in kind else 0.3))
            else:
                looks = any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn"))
                weight.copy_(normal(weight, (1.2 if looks else 1.8) * inputs**-0.5))


def fix_rope(model: transformers.PreTrainedModel, max_context: int) -> None:
    """Let a scaling that depends on the length hold still at `max_context`: ours is fixed there when it is loaded."""
    turn = getattr(model.model, "rotary_emb", None) if hasattr(model, "model") else None
    if turn is not None and turn.rope_type in ("dynamic", "longrope"):
        scaling = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[turn.rope_type]
        turn.inv_freq, turn.attention_scaling = scaling(model.config, "cpu", seq_len=max_context)
        turn.rope_type = "default"


def logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """transformers' logits [len(tokens), V]."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def greedy(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """transformers' own continuation of `prompt`, one token at a time with its cache, through any stop token."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                         do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt):].tolist()
