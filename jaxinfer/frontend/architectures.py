"""A Hugging Face config (a dict, read from config.json) becomes a Graph's Config, or is refused with every reason.

Every key is either read here, or known to be harmless, or an error: what we do not understand could change the
mathematics. A new family that fits `graphs/decoder.py` is one entry in `DECODERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxinfer.errors import InvalidOption, UnsupportedModel
from jaxinfer.frontend.encoders import ENCODERS, encoder_config
from jaxinfer.frontend.keys import Keys, short
from jaxinfer.frontend.rotary import one_rope, part_rope, two_ropes
from jaxinfer.graph import Encoder, Graph
from jaxinfer.graphs import bert, decoder, gpt2
from jaxinfer.graphs.decoder import Layer
from jaxinfer.graphs.rope import Rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


class Architecture(NamedTuple):
    """A model's Config, and the function that builds its Graph from it."""

    config: Any
    build: Callable[[Any], Graph | Encoder]

    def graph(self) -> Graph | Encoder:
        return self.build(self.config)


def architecture(config: Mapping[str, Any], *, max_context: int | None = None,
                 source: str = "config.json") -> Architecture:
    """The Config of the model that a Hugging Face `config` describes, and the `build` of its Graph.

    `max_context` is the longest context to serve, in tokens; None is the model's own limit.
    Raises UnsupportedModel with every problem of the config, InvalidOption for a `max_context` out of range.
    """
    kind = config.get("model_type")
    if kind in ENCODERS:
        return Architecture(encoder_config(config, max_context=max_context, source=source), bert.build)
    if kind not in DECODERS and kind != "gpt2":
        known = ", ".join(sorted([*DECODERS, *ENCODERS, "gpt2"]))
        raise UnsupportedModel(f"{source}: model_type {kind!r} is not supported; expected one of {known}. "
                               "A Graph of your own runs as well: load(source, graph=my_graph)")
    if max_context is not None and max_context < 1:
        raise InvalidOption(f"max_context is {max_context}; expected at least 1 token")
    keys = Keys({**(DECODERS[kind].defaults if kind in DECODERS else {}), **config}, source)
    for name in keys.get("architectures", ()):
        if not name.endswith(("ForCausalLM", "LMHeadModel")):
            keys.problem("architectures", f"{name} is not a language model's; expected one ending in ForCausalLM")
    read, limit = _gpt2(keys) if kind == "gpt2" else _decoder(keys, DECODERS[kind], max_context)
    keys.finish(GPT2_HARMLESS if kind == "gpt2" else DECODERS[kind].harmless)
    if max_context is not None and max_context > limit:
        raise InvalidOption(f"{source}: max_context is {max_context}; this model's limit is {limit} tokens")
    return read(max_context=max_context or limit)


@dataclass(frozen=True)
class Family:
    """What sets one family of decoders apart: values of keys that its configs may leave out, Config fields that it
    implies, how its own keys become Config fields, its layers and its ropes, and keys that are harmless in it."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    implies: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[Callable[[Keys], dict[str, Any]], ...] = ()
    layers: Callable[[Keys, int], tuple[Layer, ...]] = lambda keys, count: (Layer(),) * count
    ropes: Callable[[Keys, int, int | None], tuple[tuple[Rope, ...], int]] = one_rope
    harmless: frozenset[str] = frozenset()


def _decoder(keys: Keys, family: Family, max_context: int | None) -> tuple[Callable[..., Architecture], int]:
    """What is left to call with `max_context` once all keys proved good, and the limit of that context."""
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    count, kv_heads = keys.integer("num_hidden_layers"), keys.integer("num_key_value_heads", heads)
    head_width = keys.integer("head_dim", max(width // heads, 1))
    if heads % kv_heads:
        keys.problem("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads, {heads}",
                     "num_attention_heads", "num_key_value_heads")
    if keys.get("head_dim") is None and width % heads:
        keys.problem("head_dim", f"missing, and num_attention_heads, {heads}, does not divide hidden_size, {width}",
                     "num_attention_heads", "hidden_size")
    ropes, limit = family.ropes(keys, head_width, max_context)
    fields = dict(
        vocab=keys.integer("vocab_size"), width=width, ffn=keys.integer("intermediate_size"), heads=heads,
        kv_heads=kv_heads, head_width=head_width, layers=family.layers(keys, count), ropes=ropes,
        attention_scale=head_width**-0.5, norm_eps=keys.number("rms_norm_eps", 1e-6),
        tied=keys.flag("tie_word_embeddings", False), **family.implies,
    )
    for read in family.reads:
        fields.update(read(keys))
    if "activation" not in fields:
        fields["activation"] = keys.choice("hidden_act", ACTIVATIONS, "silu")
    return lambda max_context: Architecture(decoder.Config(**fields, max_context=max_context), decoder.build), limit


def _gpt2(keys: Keys) -> tuple[Callable[..., Architecture], int]:
    width, heads, positions = keys.integer("n_embd"), keys.integer("n_head"), keys.integer("n_positions")
    if width % heads:
        keys.problem("n_head", f"{heads} does not divide n_embd, {width}", "n_embd", "n_head")
    fields = dict(
        vocab=keys.integer("vocab_size"), width=width, ffn=keys.integer("n_inner", 4 * width),
        layers=keys.integer("n_layer"), heads=heads, positions=positions,
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.choice("activation_function", ACTIVATIONS, "gelu_new"),
        attention_scale=None if keys.flag("scale_attn_weights", True) else 1.0,
        scale_by_layer=keys.flag("scale_attn_by_inverse_layer_idx", False),
        tied=keys.flag("tie_word_embeddings", True),
    )
    return lambda max_context: Architecture(gpt2.Config(**fields, max_context=max_context), gpt2.build), positions


# Layers: which of them look through a window, which have rotary positions.

def _windowed(keys: Keys, count: int) -> tuple[Layer, ...]:
    """Every layer looks through the window, where there is one."""
    return (Layer(keys.integer("sliding_window", None)),) * count


def _late_windows(keys: Keys, count: int) -> tuple[Layer, ...]:
    """Where windows are in use, the layers from `max_window_layers` on look through one."""
    window, first = _window_in_use(keys), keys.integer("max_window_layers", 28, least=0)
    return _typed(keys, count, window, lambda i: window is not None and i >= first)


def _alternating(keys: Keys, count: int) -> tuple[Layer, ...]:
    """Every other layer looks through a window, the first one included."""
    return _typed(keys, count, keys.integer("sliding_window", None), lambda i: i % 2 == 0)


def _periodic(keys: Keys, count: int) -> tuple[Layer, ...]:
    """All but every `sliding_window_pattern`-th layer look through a window, and have the second rope."""
    period = keys.integer("sliding_window_pattern", 6)
    return _typed(keys, count, keys.integer("sliding_window", None), lambda i: (i + 1) % period != 0, rope=1)


def _some_unturned(keys: Keys, count: int) -> tuple[Layer, ...]:
    """Layers whose entry in `no_rope_layers` is 0 have no rotary positions; they may look through a window."""
    period, window = keys.integer("no_rope_layer_interval", 4), _window_in_use(keys)
    turned = keys.get("no_rope_layers", [int((i + 1) % period != 0) for i in range(count)])
    if not isinstance(turned, list) or len(turned) < count or any(entry not in (0, 1) for entry in turned):
        keys.problem("no_rope_layers", f"{short(turned)} is not a list of {count} zeros (no rope) and ones (rope)")
        return ()
    layers = _typed(keys, count, window, lambda i: window is not None and not turned[i])
    return tuple(Layer(layer.window, 0 if turned[i] else None) for i, layer in enumerate(layers))


def _windowed_and_routed(keys: Keys, count: int) -> tuple[Layer, ...]:
    """Every layer looks through the window, where there is one, and is routed."""
    return (Layer(keys.integer("sliding_window", None), routed=True),) * count


def _some_routed(keys: Keys, count: int) -> tuple[Layer, ...]:
    """Every `decoder_sparse_step`-th layer is routed, but for those in `mlp_only_layers`; a window is every layer's."""
    window, step, dense = _window_in_use(keys), keys.integer("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    if not isinstance(dense, list) or any(type(i) is not int or not 0 <= i < count for i in dense):
        keys.problem("mlp_only_layers", f"{short(dense)} is not a list of layers from 0 to {count - 1}",
                     "num_hidden_layers")
        return ()
    return tuple(Layer(window, routed=i not in dense and (i + 1) % step == 0) for i in range(count))


def _window_in_use(keys: Keys) -> int | None:
    window = keys.integer("sliding_window", None)
    return window if keys.flag("use_sliding_window", False) else None


def _typed(keys: Keys, count: int, window: int | None, windowed: Callable[[int], bool], rope: int = 0):
    """Layers by `layer_types`, or by `windowed(i)` where it is absent; `rope` is that of layers with a window."""
    known = {"full_attention": Layer(), "sliding_attention": Layer(window, rope)}
    types = keys.get("layer_types", ["sliding_attention" if windowed(i) else "full_attention" for i in range(count)])
    if not isinstance(types, list) or len(types) != count or any(kind not in known for kind in types):
        keys.problem("layer_types", f"{short(types)} is not a list of {count} of {', '.join(known)}")
        return ()
    if "sliding_attention" in types and window is None:
        keys.problem("layer_types", "sliding_attention wants a sliding_window, and that it is in use")
    return tuple(known[kind] for kind in types)


# What only some families say.

def _attention_bias(keys: Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias", False)
    return {"qkv_bias": bias, "out_bias": bias}


def _ffn_bias(keys: Keys) -> dict[str, Any]:
    return {"ffn_bias": keys.flag("mlp_bias", False)}


def _no_bias(keys: Keys) -> dict[str, Any]:
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    return {}


def _plain_attention(keys: Keys) -> dict[str, Any]:
    keys.only("full_attn_mod", 1)
    keys.only("interpolate_factor", 1)
    return {}


def _multipliers(keys: Keys) -> dict[str, Any]:
    return {"embed_scale": keys.number("embedding_multiplier", 1.0),
            "residual_scale": keys.number("residual_multiplier", 1.0),
            "attention_scale": keys.number("attention_multiplier", 1.0),
            "logit_scale": 1 / keys.number("logits_scaling", 1.0)}


def _gemma(keys: Keys) -> dict[str, Any]:
    return {"embed_scale": keys.integer("hidden_size") ** 0.5,
            "attention_scale": keys.number("query_pre_attn_scalar", 256) ** -0.5,
            "activation": keys.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
            "logit_cap": keys.number("final_logit_softcapping", None)}


def _attention_cap(keys: Keys) -> dict[str, Any]:
    return {"attention_cap": keys.number("attn_logit_softcapping", None)}


def _no_attention_cap(keys: Keys) -> dict[str, Any]:
    keys.only("attn_logit_softcapping", None)
    return {}


def _experts(keys: Keys) -> dict[str, Any]:
    """How many experts a layer has goes by either of two names; families default the second."""
    experts = keys.integer("num_experts", keys.integer("num_local_experts"))
    chosen = keys.integer("num_experts_per_tok")
    if chosen > experts:
        keys.problem("num_experts_per_tok", f"{chosen} is more than there are experts, {experts}", "num_experts",
                     "num_local_experts", "num_experts_per_tok")
    return {"experts": experts, "experts_per_token": chosen}


def _wide_experts(keys: Keys) -> dict[str, Any]:
    return _experts(keys) | {"expert_ffn": keys.integer("intermediate_size")}


def _narrow_experts(keys: Keys) -> dict[str, Any]:
    return _experts(keys) | {"expert_ffn": keys.integer("moe_intermediate_size"),
                             "renormalise": keys.flag("norm_topk_prob", False)}


GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096}
GEMMA_NORMS = {"norm": "both", "norm_offset": 1.0}
ROUTER_TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
DECODERS = {
    "llama": Family(reads=(_attention_bias, _ffn_bias)),
    "mistral": Family(
        defaults={"sliding_window": 4096, "num_key_value_heads": 8}, reads=(_no_bias,), layers=_windowed),
    "qwen2": Family(defaults={"sliding_window": 4096}, implies={"qkv_bias": True}, layers=_late_windows),
    "qwen3": Family(
        defaults={"sliding_window": 4096, "head_dim": 128}, implies={"qk_norm": "head"}, reads=(_attention_bias,),
        layers=_late_windows),
    "mixtral": Family(
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "num_local_experts": 8,
                  "num_experts_per_tok": 2},
        reads=(_no_bias, _wide_experts), layers=_windowed_and_routed, harmless=ROUTER_TRAINING),
    "qwen3_moe": Family(
        defaults={"sliding_window": 4096, "num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768},
        implies={"qk_norm": "head"}, reads=(_attention_bias, _narrow_experts), layers=_some_routed,
        harmless=ROUTER_TRAINING | {"max_window_layers"}),
    "phi3": Family(
        defaults={"rms_norm_eps": 1e-5}, reads=(_no_bias, _plain_attention), layers=_windowed, ropes=part_rope),
    "gemma2": Family(
        defaults={**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, implies=GEMMA_NORMS,
        reads=(_attention_bias, _gemma, _attention_cap), layers=_alternating,
        harmless=frozenset({"hidden_act", "sliding_window_size"})),
    "gemma3_text": Family(
        defaults=GEMMA, implies={**GEMMA_NORMS, "qk_norm": "head"},
        reads=(_attention_bias, _gemma, _no_attention_cap), layers=_periodic, ropes=two_ropes,
        harmless=frozenset({"hidden_act", "_sliding_window_pattern"})),
    "smollm3": Family(
        defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "num_key_value_heads": 4},
        reads=(_attention_bias, _ffn_bias), layers=_some_unturned, harmless=frozenset({"max_window_layers"})),
    "olmo2": Family(
        defaults={"rms_norm_eps": 1e-5}, implies={"norm": "post", "qk_norm": "full"}, reads=(_attention_bias,)),
    "granite": Family(reads=(_attention_bias, _ffn_bias, _multipliers)),
}

GPT2_HARMLESS = frozenset({
    "n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "reorder_and_upcast_attn", "predict_special_tokens", "n_special",
})
