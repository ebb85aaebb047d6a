"""A BERT-like encoder (Devlin et al., 2018): norms after each sublayer, learned positions, biases everywhere.

One `Config` covers BERT, RoBERTa, DistilBERT and MPNet: what sets them apart is where positions begin, whether there
are segments or relative positions, what reads the first token, and the names in checkpoints. The run is flat: rows
stand side by side without padding, and only attention looks at them as rows.

Axes: T tokens, R rows, L tokens of the longest row, D model width, F feed-forward width, N heads, H head width,
V vocabulary, C classes. Weights are [out, in]; the residual stream is float32 whatever the weights are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Encoder, Leaf, Params, Run
from jaxinfer.graphs.decoder import ACTIVATIONS
from jaxinfer.kernels import embed_rows, layer_norm, matmul
from jaxinfer.kernels.encode import attend_rows

HEAD_ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclass(frozen=True)
class Names:
    """Where a family's checkpoints keep what they all have: a model's prefix, a layer's, and what is in a layer."""

    model: str = "bert."
    layer: str = "encoder.layer."
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    ffn_norm: str = "output.LayerNorm"


@dataclass(frozen=True)
class Head:
    """A classifier over `labels`: `activation(dense(x))`, where there is a `dense`, then `out`, by their names. It
    reads each row's first token, or every token; `problem` is as in `Encoder`."""

    labels: tuple[str, ...]
    out: str = "classifier"
    dense: str | None = None
    activation: str = "tanh"  # a key of HEAD_ACTIVATIONS
    per_token: bool = False
    problem: Literal["one", "any", "number"] = "one"


@dataclass(frozen=True)
class Config:
    """Everything that sets one such encoder apart from another; hashable, so that it can be a static argument."""

    vocab: int
    width: int
    ffn: int
    heads: int
    layers: int
    positions: int  # rows of the position table
    max_context: int
    segments: int = 0  # rows of the segment table; 0: there is none
    first_position: int = 0  # the row of the position table that a sequence begins with
    relative_buckets: int = 0  # of relative positions (T5's); 0: they are not looked at
    norm_eps: float = 1e-12
    activation: str = "gelu"  # a key of decoder.ACTIVATIONS
    head: Head | None = None
    names: Names = Names()


def build(config: Config) -> Encoder:
    """The Encoder of a BERT."""
    return Encoder(
        name="bert",
        spec=spec(config),
        hidden=partial(hidden, config),
        width=config.width,
        vocab=config.vocab,
        max_context=config.max_context,
        ignore=("*embeddings.position_ids", "*embeddings.token_type_ids", *HEADS_UNREAD),
        head=None if config.head is None else partial(head, config.head),
        head_per_token=config.head is not None and config.head.per_token,
        labels=config.head.labels if config.head else (),
        problem=config.head.problem if config.head else "one",
    )


HEADS_UNREAD = ("pooler.dense.*", "*.pooler.dense.*", "cls.*", "lm_head.*", "vocab_*")  # of pre-training, mostly


def spec(config: Config) -> Params:
    """The leaves of the whole model."""
    D, prefix = config.width, config.names.model
    anywhere = partial(_anywhere, prefix)
    tree = {
        "embed": Leaf((config.vocab, D), ("vocab", "embed"), *anywhere("embeddings.word_embeddings.weight")),
        "positions": Leaf((config.positions, D), (None, "embed"), *anywhere("embeddings.position_embeddings.weight")),
        "norm": _norm_spec(D, prefix, "embeddings.LayerNorm"),
        "blocks": [block_spec(config, i) for i in range(config.layers)],
    }
    if config.segments:
        tree["segments"] = Leaf((config.segments, D), (None, "embed"),
                                *anywhere("embeddings.token_type_embeddings.weight"))
    if config.relative_buckets:
        tree["relative"] = Leaf((config.relative_buckets, config.heads), (None, "heads"),
                                *anywhere("encoder.relative_attention_bias.weight"), exact=True)
    if config.head is not None:
        classes = len(config.head.labels)
        tree["classes"] = _linear_spec(classes, D, (None, "embed"), "", config.head.out)
        if config.head.dense is not None:
            tree["dense"] = _linear_spec(D, D, (None, "embed"), "", config.head.dense)
    return tree


def block_spec(config: Config, i: int) -> Params:
    """The leaves of layer i."""
    D, F, names = config.width, config.ffn, config.names
    layer = f"{names.layer}{i}."
    linear, norm = partial(_linear_spec, prefix=names.model), partial(_norm_spec, D, names.model)
    return {
        "qkv": linear(3 * D, D, ("heads", "embed"),
                      name=" + ".join(layer + part for part in (names.query, names.key, names.value))),
        "out": linear(D, D, ("embed", "heads"), name=layer + names.out),
        "after_attention": norm(layer + names.attention_norm),
        "up": linear(F, D, ("ffn", "embed"), name=layer + names.up),
        "down": linear(D, F, ("embed", "ffn"), name=layer + names.down),
        "after_ffn": norm(layer + names.ffn_norm),
    }


def _anywhere(prefix: str, name: str, part: str = "") -> list[str]:
    """The names of `part` of all tensors in `name` ("a + b"), in a checkpoint of the whole model and of its body."""
    return [" + ".join(f"{before}{one}{part}" for one in name.split(" + ")) for before in dict.fromkeys((prefix, ""))]


def _linear_spec(outputs: int, inputs: int, axes: tuple[str | None, str], prefix: str, name: str) -> Params:
    return {"weight": Leaf((outputs, inputs), axes, *_anywhere(prefix, name, ".weight")),
            "bias": Leaf((outputs,), axes[:1], *_anywhere(prefix, name, ".bias"), exact=True)}


def _norm_spec(width: int, prefix: str, name: str) -> Params:
    """Checkpoints that came from TensorFlow call the two gamma and beta."""
    parts = {"weight": (".weight", ".gamma"), "bias": (".bias", ".beta")}
    return {ours: Leaf((width,), ("embed",), *(n for part in theirs for n in _anywhere(prefix, name, part)), exact=True)
            for ours, theirs in parts.items()}


def hidden(config: Config, params: Params, run: Run, segment_T: jax.Array | None = None) -> jax.Array:
    """The hidden states x_TD of a run of whole rows; `segment_T` [T] says which text of a pair a token is of."""
    bias_NLL = relative_bias(config, params["relative"], run.longest) if config.relative_buckets else None
    # Layers are traced once; a fresh partial, since JAX would also share the trace with runs for other platforms.
    layer = jax.jit(partial(block, config))
    x_TD = embed(config, params, run, segment_T)
    for weights in params["blocks"]:
        x_TD = layer(weights, x_TD, run, bias_NLL)
    return x_TD


def embed(config: Config, params: Params, run: Run, segment_T: jax.Array | None = None) -> jax.Array:
    """Token, position and segment embeddings, summed and normed: x_TD."""
    x_TD = embed_rows(params["embed"], run.tokens_T)
    x_TD = x_TD + embed_rows(params["positions"], run.position_T + config.first_position)
    if config.segments:
        segment_T = jnp.zeros_like(run.tokens_T) if segment_T is None else segment_T
        x_TD = x_TD + embed_rows(params["segments"], segment_T)
    return norm(config, params["norm"], x_TD)


def block(config: Config, params: Params, x_TD: jax.Array, run: Run, bias_NLL: jax.Array | None = None) -> jax.Array:
    """One layer: attention, then the feed-forward layer, each added to the stream, which is normed again: x_TD."""
    T, N, H = x_TD.shape[0], config.heads, config.width // config.heads
    qkv = linear(params["qkv"], x_TD).astype(params["qkv"]["weight"].dtype)
    q_TNH, k_TNH, v_TNH = (part.reshape(T, N, H) for part in jnp.split(qkv, 3, axis=1))
    y_TNH = attend_rows(q_TNH, k_TNH, v_TNH, run, scale=H**-0.5, bias_NLL=bias_NLL)
    x_TD = norm(config, params["after_attention"], x_TD + linear(params["out"], y_TNH.reshape(T, N * H)))
    y_TF = ACTIVATIONS[config.activation](linear(params["up"], x_TD))
    return norm(config, params["after_ffn"], x_TD + linear(params["down"], y_TF))


def relative_bias(config: Config, table_BN: jax.Array, longest: int) -> jax.Array:
    """What a head adds to the score of token i for token j, by their distance: bias_NLL (Raffel et al., 2020).

    Of the buckets for each direction, half are for one distance each; the others widen logarithmically up to 128.
    """
    each = config.relative_buckets // 2
    exact, farthest = each // 2, 128
    ahead_LL = np.arange(longest)[None] - np.arange(longest)[:, None]
    far_LL = np.abs(ahead_LL)
    widened_LL = np.log(np.maximum(far_LL, 1).astype(np.float32) / exact) / math.log(farthest / exact)
    wide_LL = np.minimum(exact + (widened_LL * (each - exact)).astype(np.int32), each - 1)
    bucket_LL = np.where(far_LL < exact, far_LL, wide_LL) + each * (ahead_LL > 0)
    return jnp.moveaxis(table_BN[bucket_LL], 2, 0)


def head(head: Head, params: Params, x_RD: jax.Array) -> jax.Array:
    """Hidden states of first tokens, or of all, to float32 logits_RC."""
    if head.dense is not None:
        x_RD = HEAD_ACTIVATIONS[head.activation](linear(params["dense"], x_RD))
    return linear(params["classes"], x_RD)


def norm(config: Config, params: Params, x: jax.Array) -> jax.Array:
    return layer_norm(x, params["weight"], params["bias"], config.norm_eps)


def linear(params: Params, x_TI: jax.Array) -> jax.Array:
    return matmul(x_TI, params["weight"]) + params["bias"][None]
