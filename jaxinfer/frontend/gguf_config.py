"""What a GGUF file's metadata says of a model's mathematics, in the keys of Hugging Face's config.json.

One function for each architecture, `(keys, tensors) -> config`. What the file leaves unsaid is what llama.cpp assumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.files import Tensor

REQUIRED = object()
# Keys below the architecture that say nothing about the mathematics, or repeat what the tensors say.
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "use_parallel_residual", "expert_used_count"}
# Keys that would change the mathematics, with the values that do not.
ONLY = {"expert_count": (0,), "attention.causal": (True,), "rope.scaling.yarn_ext_factor": (1.0,),
        "rope.scaling.yarn_log_multiplier": (0.0,), "attention.clamp_kqv": (0.0,)}
# Tensors that belong to the config: a factor for each pair of channels that turn.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


class Metadata:
    """The metadata of one architecture; remembers which keys were read, so that `finish` can refuse the rest."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values, self.source, self.seen = values, source, set[str]()
        self.architecture = self.get("general.architecture", str)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = REQUIRED) -> Any:
        """The value of `key`, which must be of `kind`."""
        self.seen.add(key)
        value = self.values.get(key, default)
        if value is REQUIRED:
            raise CorruptFile(f"{self.source}: the metadata lacks {key}")
        if key in self.values and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise CorruptFile(f"{self.source}: {key} is {value!r:.60}, which is of the wrong type")
        return value

    def count(self, key: str, default: Any = REQUIRED, least: int = 1) -> Any:
        """An integer, `least` or more; a list that repeats one for each layer is that one."""
        value = self.get(f"{self.architecture}.{key}", (int, list), default)
        if isinstance(value, list):
            if any(type(one) is not int or one != value[0] for one in value) or not value:
                raise UnsupportedModel(f"{self.source}: {self.architecture}.{key} differs from layer to layer")
            value = value[0]
        if value is not None and value < least:
            raise CorruptFile(f"{self.source}: {self.architecture}.{key} is {value}, expected {least} or more")
        return value

    def real(self, key: str, default: Any = REQUIRED) -> Any:
        """A number; what was rounded to float32 is given as the shortest decimal that rounds to it."""
        value = self.get(f"{self.architecture}.{key}", (int, float), default)
        with np.errstate(over="ignore"):
            rounded = isinstance(value, float) and np.float32(value) == value
        return float(str(np.float32(value))) if rounded else value

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        return self.get(f"{self.architecture}.{key}", str, default)

    def finish(self) -> None:
        """Raises UnsupportedModel if a key of the architecture was not understood."""
        problems = []
        for key in sorted(self.values.keys() - self.seen):
            name = key.removeprefix(f"{self.architecture}.")
            if name == key or name in HARMLESS or self.values[key] in ONLY.get(name, ()):
                continue
            right = f", only {ONLY[name][0]!r} is supported" if name in ONLY else ""
            problems.append(f"{key} is {self.values[key]!r:.60}{right or ', an unknown key'}")
        if problems:
            raise UnsupportedModel(f"{self.source}: {len(problems)} metadata keys would change the model in ways that "
                                   "are not understood; nothing was loaded:\n  " + "\n  ".join(problems))


def _decoder(keys: Metadata, tensors: Mapping[str, Tensor], bias: tuple[str, ...] = ()) -> dict[str, Any]:
    """What all families but GPT-2 have. `bias`: the flags among attention_bias and mlp_bias that the family has."""
    width, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", width // heads)
    if (values := keys.count("attention.value_length", head_dim)) != head_dim:
        raise UnsupportedModel(f"{keys.source}: keys have {head_dim} channels and values {values}; expected as many")
    turning = keys.count("rope.dimension_count", head_dim)
    config = {
        "hidden_size": width, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "num_hidden_layers": keys.count("block_count"),
        "intermediate_size": keys.count("feed_forward_length"),
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10_000.0),
    }  # fmt: skip
    if turning != head_dim:
        config["partial_rotary_factor"] = turning / head_dim
    has = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    config |= {flag: True for flag in bias if has[flag] in tensors}
    if scaling := _rope_scaling(keys, tensors, turning, config["max_position_embeddings"]):
        config["rope_scaling"] = scaling
    return config


def _rope_scaling(keys: Metadata, tensors: Mapping[str, Tensor], turning: int, context: int) -> dict[str, Any]:
    kind, factor = keys.text("rope.scaling.type", "none"), keys.real("rope.scaling.factor", None)
    trained = keys.count("rope.scaling.original_context_length", context)
    attention = keys.real("rope.scaling.attn_factor", None) or keys.real("rope.scaling.yarn_attn_factor", None)
    scale = {} if attention is None else {"attention_factor": attention}
    freqs, short, long = (_rope_factors(keys, tensors, name, turning) for name in ROPE_FACTORS)
    if freqs and kind == "none":
        # The converter has worked llama3's four numbers into one factor for each pair; longrope can say just that.
        return {"rope_type": "longrope", "short_factor": freqs, "long_factor": freqs, "factor": 1.0,
                "attention_factor": 1.0, "original_max_position_embeddings": context}
    if short and long and kind in ("none", "longrope"):
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **scale,
                "original_max_position_embeddings": trained}
    plain = freqs is short is long is None
    if plain and kind == "none" and attention in (None, 1.0):
        return {}
    if plain and kind == "linear" and factor and attention in (None, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if not plain or kind != "yarn" or not factor:
        raise UnsupportedModel(f"{keys.source}: RoPE scaling of type {kind!r:.40} is not understood with factor "
                               f"{factor}, attention factor {attention}, and tensors "
                               f"{[name for name in ROPE_FACTORS if name in tensors]}")
    betas = {name: keys.real(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained, **scale,
            **{name: value for name, value in betas.items() if value is not None}}


def _rope_factors(keys: Metadata, tensors: Mapping[str, Tensor], name: str, turning: int) -> list[float] | None:
    if name not in tensors:
        return None
    if tensors[name].shape != (turning // 2,):
        raise CorruptFile(f"{keys.source}: {name} has shape {tensors[name].shape}, expected {(turning // 2,)}: "
                          f"one factor for each pair of the {turning} channels that turn")
    return tensors[name].read().astype(np.float64).tolist()


def llama(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    config: dict[str, Any] = _decoder(keys, tensors, ("attention_bias", "mlp_bias")) | {"hidden_act": "silu"}
    window = keys.count("attention.sliding_window", 0, least=0)
    if keys.count("expert_count", 0, least=0):
        return config | _experts(keys) | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
                                          "sliding_window": window or None}
    if window:
        return config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return config


def _experts(keys: Metadata) -> dict[str, Any]:
    return {"num_local_experts": keys.count("expert_count"), "num_experts_per_tok": keys.count("expert_used_count")}


def qwen2(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return _decoder(keys, tensors) | {"hidden_act": "silu"}


def qwen3(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return _decoder(keys, tensors, ("attention_bias",)) | {"hidden_act": "silu"}


def qwen3moe(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which layers are routed and how experts are weighed is not stored: as in llama.cpp, all, and to a sum of one."""
    return _decoder(keys, tensors, ("attention_bias",)) | _experts(keys) | {
        "hidden_act": "silu", "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "norm_topk_prob": True}


def phi3(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    config = _decoder(keys, tensors)
    trained = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    return config | {"hidden_act": "silu", "original_max_position_embeddings": trained,
                     "sliding_window": keys.count("attention.sliding_window", 0, least=0) or None}


def _gemma(keys: Metadata, tensors: Mapping[str, Tensor], largest: int) -> dict[str, Any]:
    """The scale of the scores is not stored: as in llama.cpp, the model of `largest` layers has one of its own."""
    config = _decoder(keys, tensors)
    wide = config["num_hidden_layers"] == largest
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    return config | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}


def gemma2(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    config = _gemma(keys, tensors, largest=46)
    return config | {
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, config["num_hidden_layers"], period=2),
    }


def gemma3(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    config = _gemma(keys, tensors, largest=62)
    window = keys.count("attention.sliding_window", 0, least=0)
    cap = keys.real("final_logit_softcapping", None)
    return config | {
        "rope_local_base_freq": keys.real("rope.freq_base_swa", 10_000.0),
        "layer_types": _layer_types(keys, config["num_hidden_layers"], period=6 if window else 1),
        **({"sliding_window": window} if window else {}),
        **({"final_logit_softcapping": cap} if cap else {}),
    }


def _layer_types(keys: Metadata, layers: int, period: int) -> list[str]:
    """Every `period`-th layer sees all, the others look through the window; the file's own pattern goes first."""
    pattern = keys.get(f"{keys.architecture}.attention.sliding_window_pattern", (int, list), period)
    sliding = pattern if isinstance(pattern, list) else [(i + 1) % max(pattern, 1) != 0 for i in range(layers)]
    if len(sliding) != layers:
        raise CorruptFile(f"{keys.source}: the sliding window pattern has {len(sliding)} entries for {layers} layers")
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def olmo2(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    config: dict[str, Any] = _decoder(keys, tensors, ("attention_bias",)) | {"hidden_act": "silu"}
    if window := keys.count("attention.sliding_window", 0, least=0):  # OLMo 3 goes by its predecessor's name
        types = _layer_types(keys, config["num_hidden_layers"], period=4)
        config |= {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "sliding_window": window,
                   "layer_types": types}
    return config


def granite(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return _decoder(keys, tensors, ("attention_bias", "mlp_bias")) | {
        "hidden_act": "silu", "attention_multiplier": keys.real("attention.scale"),
        "embedding_multiplier": keys.real("embedding_scale"), "residual_multiplier": keys.real("residual_scale"),
        "logits_scaling": keys.real("logit_scale"),
    }  # fmt: skip


def smollm3(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Which layers have no rotary positions is not stored: every fourth, as in llama.cpp."""
    config: dict[str, Any] = _decoder(keys, tensors, ("attention_bias", "mlp_bias")) | {"hidden_act": "silu"}
    return config | {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]}


def gpt2(keys: Metadata, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    keys.count("attention.head_count_kv", None)
    return {
        "n_embd": keys.count("embedding_length"), "n_layer": keys.count("block_count"),
        "n_head": keys.count("attention.head_count"), "n_positions": keys.count("context_length"),
        "n_inner": keys.count("feed_forward_length"), "activation_function": "gelu_new",
        "layer_norm_epsilon": keys.real("attention.layer_norm_epsilon"),
    }  # fmt: skip
