"""GPT-2 (Radford et al., 2019): layer norms before each sublayer, learned positions, biases everywhere.

Axes: T tokens, R rows, D model width, F feed-forward width, N heads, H head width, V vocabulary. Checkpoints store
these weights as [in, out]; here they are [out, in] like all others, hence `transpose`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax

from jaxinfer.graph import Block, Graph, Leaf, Pages, Params, Run, StateGroup
from jaxinfer.graphs.decoder import ACTIVATIONS
from jaxinfer.kernels import attend, embed_rows, layer_norm, matmul, project, split

GROUP = "full"


@dataclass(frozen=True)
class Config:
    """The shape of one GPT-2. `positions` is the length of its position table; `max_context` may be less."""

    vocab: int
    width: int
    ffn: int
    layers: int
    heads: int
    positions: int
    max_context: int
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    attention_scale: float | None = None  # None: head width ** -0.5
    scale_by_layer: bool = False  # layer i divides its scores by i + 1
    tied: bool = True


def build(config: Config) -> Graph:
    """The Graph of a GPT-2."""
    D, V = config.width, config.vocab
    spec = {
        "embed": Leaf((V, D), ("vocab", "embed"), *anywhere("wte.weight")),
        "positions": Leaf((config.positions, D), (None, "embed"), *anywhere("wpe.weight")),
        "blocks": [block_spec(config, i) for i in range(config.layers)],
        "norm": norm_spec(D, "ln_f"),
    }
    if not config.tied:
        spec["head"] = Leaf((V, D), ("vocab", "embed"), "lm_head.weight")
    scales = [scale(config, i) for i in range(config.layers)]
    blocks = {s: Block(f"scale_{s:g}", GROUP, partial(block, config, s)) for s in scales}
    return Graph(
        name="gpt2",
        spec=spec,
        groups=(StateGroup(GROUP, config.layers, config.heads, D // config.heads),),
        embed=embed,
        blocks=tuple(blocks[s] for s in scales),
        final=partial(final, config),
        head=partial(head, config),
        vocab=V,
        max_context=config.max_context,
        ignore=("*.attn.bias", "*.attn.masked_bias", *(["lm_head.weight"] if config.tied else [])),
    )


def anywhere(name: str) -> tuple[str, str]:
    """A tensor's names in a checkpoint of the whole model and in one of its body alone."""
    return f"transformer.{name}", name


def scale(config: Config, i: int) -> float:
    """The factor on layer i's attention scores."""
    base = (config.width // config.heads) ** -0.5 if config.attention_scale is None else config.attention_scale
    return base / (i + 1) if config.scale_by_layer else base


def norm_spec(width: int, name: str) -> Params:
    return {part: Leaf((width,), ("embed",), *anywhere(f"{name}.{part}"), exact=True) for part in ("weight", "bias")}


def linear_spec(outputs: int, inputs: int, axes: tuple[str, str], name: str, parts: tuple[int, ...] = ()) -> Params:
    return {"weight": Leaf((outputs, inputs), axes, *anywhere(f"{name}.weight"), transpose=True, parts=parts),
            "bias": Leaf((outputs,), axes[:1], *anywhere(f"{name}.bias"), exact=True, parts=parts)}


def block_spec(config: Config, i: int) -> Params:
    """The leaves of layer i."""
    D, F = config.width, config.ffn
    return {
        "before_attention": norm_spec(D, f"h.{i}.ln_1"),
        "qkv": linear_spec(3 * D, D, ("heads", "embed"), f"h.{i}.attn.c_attn", (D, D, D)),
        "out": linear_spec(D, D, ("embed", "heads"), f"h.{i}.attn.c_proj"),
        "before_ffn": norm_spec(D, f"h.{i}.ln_2"),
        "up": linear_spec(F, D, ("ffn", "embed"), f"h.{i}.mlp.c_fc"),
        "down": linear_spec(D, F, ("embed", "ffn"), f"h.{i}.mlp.c_proj"),
    }


def embed(params: Params, run: Run) -> jax.Array:
    """Token and position embeddings, summed: x_TD."""
    return embed_rows(params["embed"], run.tokens_T) + embed_rows(params["positions"], run.position_T)


def block(config: Config, scale: float, params: Params, pages: Pages, x_TD: jax.Array, run: Run):
    """One layer. Returns (x_TD, pages)."""
    T, D = x_TD.shape
    N, H = config.heads, D // config.heads
    qkv = linear(params["qkv"], norm(config, params["before_attention"], x_TD))
    q_TNH, k_TNH, v_TNH = (part.reshape(T, N, H) for part in split(qkv, (D, D, D), "heads"))
    y_TNH, pages = attend(q_TNH, k_TNH, v_TNH, pages, run, group=GROUP, scale=scale)
    x_TD = x_TD + linear(params["out"], y_TNH.reshape(T, N * H))
    y_TF = ACTIVATIONS[config.activation](linear(params["up"], norm(config, params["before_ffn"], x_TD)))
    return x_TD + linear(params["down"], y_TF), pages


def final(config: Config, params: Params, x_TD: jax.Array) -> jax.Array:
    """The stream to hidden states."""
    return norm(config, params["norm"], x_TD)


def head(config: Config, params: Params, x_RD: jax.Array) -> jax.Array:
    """The hidden state of each row's last token to float32 logits_RV."""
    return matmul(x_RD, params["embed" if config.tied else "head"])


def norm(config: Config, params: Params, x: jax.Array) -> jax.Array:
    return layer_norm(x, params["weight"], params["bias"], config.norm_eps)


def linear(params: Params, x_TI: jax.Array) -> jax.Array:
    return project(x_TI, params["weight"]) + params["bias"][None]
