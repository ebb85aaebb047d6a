"""The routed feed-forward layer: a router chooses a few experts for each token; their answers are weighed and added.

Axes: T tokens, A experts chosen for each, E experts, D model width, F an expert's width, O its gates and ups (2 F),
P pairs of a token and one of its experts (T A), B rows of a block. No expert has a capacity: whatever the router
chooses is computed. Devices that share a model each have some of every expert's width, and a part of every answer.
Experts are arrays, or `Quantised` stacks of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels.matmul import in_triton, matmul, piece
from jaxinfer.kernels.op import Cut, Op
from jaxinfer.kernels.quantised import INT4, Quantised

Weight = jax.Array | Quantised
CHUNK = 256  # tokens
TILE = 512  # inputs and outputs of an expert that the TPU multiplies at a time


def route(x_TD: jax.Array, router_ED: jax.Array, valid_T: jax.Array, *, count: int, renormalise: bool
          ) -> tuple[jax.Array, jax.Array]:
    """The `count` likeliest experts of each token, likeliest first, and the weights of their answers.

    Returns `(expert_TA, weight_TA)`. A weight is the expert's share in the softmax over all experts; with
    `renormalise` a token's weights sum to one, which is the softmax over those chosen. Padding chooses expert E,
    whom nobody asks.
    """
    weight_TA, expert_TA = lax.top_k(jax.nn.softmax(matmul(x_TD, router_ED), -1), count)
    if renormalise:
        weight_TA = weight_TA / weight_TA.sum(-1, keepdims=True)
    return jnp.where(valid_T[:, None], expert_TA, router_ED.shape[0]), weight_TA


def _expert(x_TD: jax.Array, gate_up_OD: Weight, down_DF: Weight, activation: Callable) -> jax.Array:
    """One expert's answer to each token: down(activation(gate) * up)."""
    gate_TF, up_TF = jnp.split(matmul(x_TD, gate_up_OD), 2, axis=1)
    return matmul(activation(gate_TF) * up_TF, down_DF)


def routed_ffn_reference(x_TD, expert_TA, weight_TA, gate_up_EOD, down_EDF, *, activation):
    """Asks every expert about every token, and keeps the answers of those chosen."""
    y_ETD = jax.vmap(lambda gate_up_OD, down_DF: _expert(x_TD, gate_up_OD, down_DF, activation))(gate_up_EOD, down_EDF)
    chosen_ETA = expert_TA[None] == jnp.arange(down_EDF.shape[0])[:, None, None]
    weight_ET1 = jnp.where(chosen_ETA, weight_TA[None], 0).sum(-1, keepdims=True)
    return jnp.where(chosen_ETA.any(-1, keepdims=True), y_ETD * weight_ET1, 0).sum(0)


def routed_ffn_chunks(x_TD, expert_TA, weight_TA, gate_up_EOD, down_EDF, *, activation):
    """The reference, a chunk of tokens at a time: `CHUNK` tokens ask about as much arithmetic of a GPU as reading all
    weights asks of its memory, and no more than their answers are ever held.

    It is for the calls that "triton" does not take. A prompt costs E / A times the arithmetic that it needs: the walk
    over blocks would be hundreds of small kernels one after another, gathered weights a copy of all experts, and XLA
    makes of `lax.ragged_dot` what this is, with A times the rows.
    """
    chunks = (slice(t, t + CHUNK) for t in range(0, len(x_TD), CHUNK))
    return jnp.concatenate([
        routed_ffn_reference(x_TD[chunk], expert_TA[chunk], weight_TA[chunk], gate_up_EOD, down_EDF,
                             activation=activation)
        for chunk in chunks])


def _by_expert(expert_TA: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """All pairs `t A + a` in the order of their experts, nobody's last, and how many each expert has."""
    expert_P = expert_TA.reshape(-1)
    return jnp.argsort(expert_P, stable=True), (expert_P[None] == jnp.arange(experts)[:, None]).sum(1)


def block_rows(tokens: int, pairs: int, experts: int) -> int:
    """Of a block: as many as an expert has on average, as a power of two. At least 8, since up to there a matmul waits
    for the weights; at most 128, which hide their reading; never more than there are, as no expert has a token twice.
    """
    mean = -(-pairs // experts)
    return min(tokens, max(8, min(128, 1 << (mean - 1).bit_length())))


def routed_ffn_blocks(x_TD, expert_TA, weight_TA, gate_up_EOD, down_EDF, *, activation):
    """Walks over blocks of B tokens that chose one expert, as many as there are: an expert that nobody chose is not
    read, and no more than one expert's weights are ever copied. (XLA's CPU backend copies a slice: a third of the time
    of a block of 8 in float32, a sixth in bfloat16. Up to JAX 0.10 it converts a bfloat16 stack whole.)

    A token's answers are added in the order of its experts, and a matmul of B rows does not mix them: what shares its
    blocks changes no bit.
    """
    (T, A), E = expert_TA.shape, down_EDF.shape[0]
    B = block_rows(T, T * A, E)
    (pair_P, count_E), weight_P = _by_expert(expert_TA, E), weight_TA.reshape(-1)
    first_E, blocks_E = jnp.cumsum(count_E) - count_E, -(-count_E // B)
    ends_E = jnp.cumsum(blocks_E)

    def ask(i, y_TD):
        e = (ends_E <= i).sum()
        nth_B = (i - ends_E[e] + blocks_E[e]) * B + jnp.arange(B)
        pair_B = pair_P[jnp.minimum(first_E[e] + nth_B, T * A - 1)]
        token_B = pair_B // A
        own = lambda stack: piece(stack, i, lambda part: lax.dynamic_index_in_dim(part, e, keepdims=False))
        y_BD = _expert(x_TD[token_B], own(gate_up_EOD), own(down_EDF), activation) * weight_P[pair_B][:, None]
        return y_TD.at[jnp.where(nth_B < count_E[e], token_B, T)].add(y_BD, mode="drop")

    return lax.fori_loop(0, ends_E[-1], ask, jnp.zeros_like(x_TD, jnp.float32))


def routed_ffn_grouped(x_TD, expert_TA, weight_TA, gate_up_EOD, down_EDF, *, activation):
    """JAX's grouped matmul for TPUs (megablox): tiles of tokens by expert, which read the weights of experts chosen.
    XLA's own `lax.ragged_dot` multiplies every row with every expert there (E times the FLOPs for a v5e)."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # Pallas takes a while to import

    (T, A), E = expert_TA.shape, down_EDF.shape[0]
    pair_P, count_E = _by_expert(expert_TA, E)
    rows = min(128, -(-T * A // 16) * 16)
    padded_P = jnp.pad(pair_P, (0, -(T * A) % rows))

    def by_expert(x_PI, w_EOI):
        tiles = rows, min(TILE, w_EOI.shape[2]), min(TILE, w_EOI.shape[1])
        return gmm(x_PI.astype(w_EOI.dtype), w_EOI, count_E, jnp.float32, tiles, transpose_rhs=True)

    gate_PF, up_PF = jnp.split(by_expert(x_TD[padded_P // A], gate_up_EOD), 2, axis=1)
    y_PD = by_expert(activation(gate_PF) * up_PF, down_EDF)
    y_TAD = y_PD[jnp.argsort(pair_P)].reshape(T, A, -1)
    return jnp.where((expert_TA < E)[..., None], y_TAD * weight_TA[..., None], 0).sum(1)


def takes_grouped(x_TD: Any, expert_TA: Any, weight_TA: Any, gate_up_EOD: Weight, *_: Any, **__: Any) -> bool:
    """Arrays."""
    return not isinstance(gate_up_EOD, Quantised)


def takes_triton(x_TD: Any, expert_TA: Any, weight_TA: Any, *stacks: Weight, activation: Callable, **_: Any) -> bool:
    """With an activation that Pallas has in Triton; quantised, what it can widen."""
    return in_triton(activation) and all(widened(stack) for stack in stacks if isinstance(stack, Quantised))


def widened(stack: Quantised) -> bool:
    """Whether our kernel widens these weights in its registers: in the place of numbers of two bytes, int4 in whole
    128s."""
    return stack.dtype.itemsize == 2 and (stack.format != INT4.name or stack.shape[-1] % 128 == 0)


def routed_ffn_triton(*args, **options):
    from jaxinfer.kernels import moe_gpu  # Pallas takes a while to import

    return moe_gpu.routed_ffn_triton(*args, **options)


def cut_ffn(x_TD, expert_TA, weight_TA, gate_up_EOD, down_EDF) -> Cut:
    """An expert's answer is a sum over its width: each device makes its part of every answer, by the way that is best
    on one."""
    return Cut(((), (), (), (None, "ffn"), (None, None, "ffn")), ((),), summed="ffn")


routed_ffn = Op("routed_ffn", reference=routed_ffn_reference,
                fast={"triton": (("gpu",), routed_ffn_triton, takes_triton),
                      "grouped": (("tpu",), routed_ffn_grouped, takes_grouped),
                      "blocks": (("cpu", "tpu"), routed_ffn_blocks), "chunks": (("gpu",), routed_ffn_chunks)},
                cut=cut_ffn)
