"""A decoder-only transformer, driven by data: rotary positions, grouped-query attention, gated feed-forward layers,
some or all of which may be routed to experts.

One `Config` says what sets its families apart: where the norms stand, which layers look through a window, how
positions turn, what is scaled, capped or biased. To try something of your own, copy this file and edit it.

Axes: T tokens, R rows, D model width, F feed-forward width, E experts, N query heads, K key-value heads, H head width,
V vocabulary. Weights are [out, in]; the residual stream is float32 whatever the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxinfer.graph import Block, Graph, Leaf, Pages, Params, Run, StateGroup
from jaxinfer.graphs.rope import Rope, turns
from jaxinfer.kernels import attend, embed_rows, gated, matmul, project, rms_norm, rope, route, routed_ffn, split

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer: a token sees the last `window` tokens, itself included (None: all of
    them); `rope` is an index into `Config.ropes` (None: this layer's heads know no positions); the feed-forward layer
    is one for all tokens, or `routed` to experts."""

    window: int | None = None
    rope: int | None = 0
    routed: bool = False

    @property
    def group(self) -> str:
        return "full" if self.window is None else f"window_{self.window}"


@dataclass(frozen=True)
class Config:
    """Everything that sets one such decoder apart from another; hashable, so that it can be a static argument."""

    vocab: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    max_context: int
    attention_scale: float  # on the scores, usually head_width ** -0.5
    activation: str = "silu"  # a key of ACTIVATIONS
    norm: str = "pre"  # before each sublayer, after it ("post"), or "both"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # 1.0 where norms are stored as their distance from one
    qk_norm: str | None = None  # of queries and keys: each "head" by itself, or all heads as one vector ("full")
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # on what a sublayer adds to the stream
    logit_scale: float = 1.0
    attention_cap: float | None = None  # cap * tanh(scores / cap)
    logit_cap: float | None = None
    tied: bool = False  # the head reads the embedding
    experts: int = 0  # of each routed layer
    experts_per_token: int = 0
    expert_ffn: int = 0  # the width of one
    renormalise: bool = True  # the weights of a token's experts sum to one


def build(config: Config) -> Graph:
    """The Graph of a decoder. Layers that see as far share a state group; layers that also turn alike, a kind."""
    members = [layer.group for layer in config.layers]
    windows = {layer.group: layer.window for layer in config.layers}
    groups = tuple(
        StateGroup(name, members.count(name), config.kv_heads, config.head_width, window)
        for name, window in windows.items()
    )
    blocks = {
        layer: Block(f"{layer.group}/rope_{layer.rope}" + "/routed" * layer.routed, layer.group,
                     partial(block, config, layer))
        for layer in config.layers
    }
    spec = {
        "embed": Leaf((config.vocab, config.width), ("vocab", "embed"), "model.embed_tokens.weight"),
        "blocks": [
            jax.tree.map(lambda leaf, i=i: leaf.under(f"model.layers.{i}."), block_spec(config, layer))
            for i, layer in enumerate(config.layers)
        ],
        "norm": Leaf((config.width,), ("embed",), "model.norm.weight", exact=True),
    }
    if not config.tied:
        spec["head"] = Leaf((config.vocab, config.width), ("vocab", "embed"), "lm_head.weight")
    return Graph(
        name="decoder",
        spec=spec,
        groups=groups,
        embed=partial(embed, config),
        blocks=tuple(blocks[layer] for layer in config.layers),
        final=partial(final, config),
        head=partial(head, config),
        vocab=config.vocab,
        max_context=config.max_context,
        ignore=("*.rotary_emb.inv_freq", *(["lm_head.weight"] if config.tied else [])),
    )


def block_spec(config: Config, layer: Layer) -> Params:
    """The leaves of one layer. Projections that read the same input are one leaf: one matmul instead of three."""
    D, H = config.width, config.head_width
    q, kv = config.heads * H, config.kv_heads * H
    vector = partial(Leaf, exact=True)
    spec = {
        "qkv": Leaf((q + 2 * kv, D), ("heads", "embed"),
                    "self_attn.q_proj.weight + self_attn.k_proj.weight + self_attn.v_proj.weight",
                    "self_attn.qkv_proj.weight", parts=(q, kv, kv)),
        "out": Leaf((D, q), ("embed", "heads"), "self_attn.o_proj.weight"),
        **(experts_spec(config) if layer.routed else ffn_spec(config)),
    }
    if config.norm in ("pre", "both"):
        before_ffn = "post_attention_layernorm" if config.norm == "pre" else "pre_feedforward_layernorm"
        spec["before_attention"] = vector((D,), ("embed",), "input_layernorm.weight")
        spec["before_ffn"] = vector((D,), ("embed",), f"{before_ffn}.weight")
    if config.norm in ("post", "both"):
        spec["after_attention"] = vector((D,), ("embed",), "post_attention_layernorm.weight")
        spec["after_ffn"] = vector((D,), ("embed",), "post_feedforward_layernorm.weight")
    if config.qk_norm:
        full = config.qk_norm == "full"
        spec["q_norm"] = vector((q if full else H,), ("heads" if full else None,), "self_attn.q_norm.weight")
        spec["k_norm"] = vector((kv if full else H,), ("heads" if full else None,), "self_attn.k_norm.weight")
    if config.qkv_bias:
        spec["qkv_bias"] = vector((q + 2 * kv,), ("heads",),
                                  "self_attn.q_proj.bias + self_attn.k_proj.bias + self_attn.v_proj.bias",
                                  parts=(q, kv, kv))
    if config.out_bias:
        spec["out_bias"] = vector((D,), ("embed",), "self_attn.o_proj.bias")
    return spec


def ffn_spec(config: Config) -> Params:
    """The leaves of a feed-forward layer for all tokens."""
    D, F = config.width, config.ffn
    spec = {
        "gate_up": Leaf((2 * F, D), ("ffn", "embed"),
                        "mlp.gate_proj.weight + mlp.up_proj.weight", "mlp.gate_up_proj.weight", parts=(F, F)),
        "down": Leaf((D, F), ("embed", "ffn"), "mlp.down_proj.weight"),
    }
    if config.ffn_bias:
        spec["gate_up_bias"] = Leaf((2 * F,), ("ffn",), "mlp.gate_proj.bias + mlp.up_proj.bias", exact=True,
                                    parts=(F, F))
        spec["down_bias"] = Leaf((D,), ("embed",), "mlp.down_proj.bias", exact=True)
    return spec


def experts_spec(config: Config) -> Params:
    """The leaves of a routed layer. The router is exact: rounding that takes another expert is no rounding."""
    D, F, E = config.width, config.expert_ffn, config.experts
    of_each = lambda *parts: " + ".join(part.format(e) for e in range(E) for part in parts)
    return {
        "router": Leaf((E, D), ("expert", "embed"), "mlp.gate.weight", "block_sparse_moe.gate.weight", exact=True),
        "gate_up": Leaf((E, 2 * F, D), ("expert", "ffn", "embed"),
                        of_each("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
                        of_each("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
                        parts=(F, F)),
        "down": Leaf((E, D, F), ("expert", "embed", "ffn"),
                     of_each("mlp.experts.{}.down_proj.weight"), of_each("block_sparse_moe.experts.{}.w2.weight")),
    }


def embed(config: Config, params: Params, run: Run) -> jax.Array:
    """Token ids to x_TD."""
    return embed_rows(params["embed"], run.tokens_T) * config.embed_scale


def block(config: Config, layer: Layer, params: Params, pages: Pages, x_TD: jax.Array, run: Run):
    """One layer: attention, then the feed-forward layer, each added to the stream. Returns (x_TD, pages)."""
    y_TD = norm(config, params, "before_attention", x_TD)
    y_TD, pages = attention(config, layer, params, pages, y_TD, run)
    x_TD = x_TD + norm(config, params, "after_attention", y_TD) * config.residual_scale
    y_TD = (experts if layer.routed else ffn)(config, params, norm(config, params, "before_ffn", x_TD), run)
    return x_TD + norm(config, params, "after_ffn", y_TD) * config.residual_scale, pages


def attention(config: Config, layer: Layer, params: Params, pages: Pages, x_TD: jax.Array, run: Run):
    """Attention of each token to itself and the tokens before it in its row. Returns (y_TD, pages)."""
    T, N, K, H = x_TD.shape[0], config.heads, config.kv_heads, config.head_width
    q, k, v = split(linear(params, "qkv", x_TD), (N * H, K * H, K * H), "heads")
    if config.qk_norm == "full":
        q, k = norm(config, params, "q_norm", q), norm(config, params, "k_norm", k)
    q_TNH, k_TKH, v_TKH = q.reshape(T, N, H), k.reshape(T, K, H), v.reshape(T, K, H)
    if config.qk_norm == "head":
        q_TNH, k_TKH = norm(config, params, "q_norm", q_TNH), norm(config, params, "k_norm", k_TKH)
    if layer.rope is not None:
        cos_TH, sin_TH = turns(config.ropes[layer.rope], run.position_T)
        q_TNH, k_TKH = rope(q_TNH, cos_TH, sin_TH), rope(k_TKH, cos_TH, sin_TH)
    y_TNH, pages = attend(q_TNH, k_TKH, v_TKH, pages, run, group=layer.group, scale=config.attention_scale,
                          window=layer.window, softcap=config.attention_cap)
    return linear(params, "out", y_TNH.reshape(T, N * H)), pages


def ffn(config: Config, params: Params, x_TD: jax.Array, run: Run) -> jax.Array:
    """The gated feed-forward layer: down(activation(gate) * up)."""
    y_TF = gated(x_TD, params["gate_up"], ACTIVATIONS[config.activation], params.get("gate_up_bias"))
    return linear(params, "down", y_TF)


def experts(config: Config, params: Params, x_TD: jax.Array, run: Run) -> jax.Array:
    """The routed feed-forward layer: of many such layers a few, which the token's router chooses and weighs."""
    expert_TA, weight_TA = route(x_TD, params["router"], run.valid_T, count=config.experts_per_token,
                                 renormalise=config.renormalise)
    return routed_ffn(x_TD, expert_TA, weight_TA, params["gate_up"], params["down"],
                      activation=ACTIVATIONS[config.activation])


def final(config: Config, params: Params, x_TD: jax.Array) -> jax.Array:
    """The stream to hidden states."""
    return norm(config, params, "norm", x_TD)


def head(config: Config, params: Params, x_RD: jax.Array) -> jax.Array:
    """The hidden state of each row's last token to float32 logits_RV."""
    logits_RV = matmul(x_RD, params["embed" if config.tied else "head"]) * config.logit_scale
    return logits_RV if config.logit_cap is None else jnp.tanh(logits_RV / config.logit_cap) * config.logit_cap


def norm(config: Config, params: Params, name: str, x: jax.Array) -> jax.Array:
    """RMS norm over the last axis, where this decoder has a norm of that name."""
    return rms_norm(x, params[name], config.norm_eps, config.norm_offset) if name in params else x


def linear(params: Params, name: str, x_TI: jax.Array) -> jax.Array:
    """A matmul and, where this decoder has one, its bias."""
    y_TO = project(x_TI, params[name])
    return y_TO + params[f"{name}_bias"][None] if f"{name}_bias" in params else y_TO
