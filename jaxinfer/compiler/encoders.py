"""Encoder + bucket -> Executable: what reads a flat run of whole rows, and makes a vector or classes of each.

Axes: T tokens, R rows, L tokens of the longest row, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.compiler.buckets import powers
from jaxinfer.compiler.programs import Programs
from jaxinfer.graph import Encoder, Run
from jaxinfer.kernels.encode import first_R, normalise, pool

RUNGS, FILLS, MOST_TOKENS = 5, (1, 4, 16), 2048


class EncoderBucket(NamedTuple):
    """A padded shape: `tokens` in all, `rows`, and the `longest` of them."""

    longest: int
    tokens: int

    @property
    def rows(self) -> int:
        """As many rows as there can be if they are longer than half of the longest."""
        return max(1, 2 * self.tokens // self.longest)

    def __str__(self) -> str:
        return f"encode[T={self.tokens},R={self.rows},L={self.longest}]"


def encoder_ladder(max_length: int) -> dict[int, tuple[EncoderBucket, ...]]:
    """At most fifteen buckets, by their longest row: five lengths, up to `max_length`, with 1, 4 and 16 times as many
    tokens. Rows of one batch are alike, so that attention, which pads them to the longest, pads little.

    >>> [str(bucket) for bucket in encoder_ladder(256)[256]]
    ['encode[T=256,R=2,L=256]', 'encode[T=1024,R=8,L=256]', 'encode[T=2048,R=16,L=256]']
    """
    lengths = powers(max_length, least=max(1, max_length >> (RUNGS - 1)))[-RUNGS:]
    most = lambda n: max(n, MOST_TOKENS)
    return {n: tuple(EncoderBucket(n, tokens) for tokens in sorted({min(n * fill, most(n)) for fill in FILLS}))
            for n in lengths}


class Encoders(Programs):
    """The programs of an Encoder on one device: `(params, run, segment_T)` to {"vector": x_RD} and, with a head,
    {"logits": logits_RC or, for every token, logits_TC}."""

    def __init__(self, encoder: Encoder, params: Any, pooling: Sequence[str], unit: bool, device: jax.Device,
                 forced: Mapping[str, str] | None = None):
        super().__init__(device, name=encoder.name, forced=forced)
        self.encoder, self.pooling, self.unit = encoder, tuple(pooling), unit
        self.params = jax.tree.map(self._like, params)

    def traced(self, key: EncoderBucket) -> Any:
        return replace(self.encoder, spec=None), self.pooling, self.unit, self.params

    def lower(self, key: EncoderBucket) -> jax.stages.Lowered:
        T, R = key.tokens, key.rows
        run = Run(self._array(T), self._array(R + 1), self._array(R), self._array(R), {}, key.longest)
        return jax.jit(partial(encode, self.encoder, self.pooling, self.unit)).lower(self.params, run, self._array(T))


def encode(encoder: Encoder, pooling: tuple[str, ...], unit: bool, params: Any, run: Run, segment_T: jax.Array
           ) -> dict[str, jax.Array]:
    """The vector of each row, of length one if `unit`; and the head's logits, if there is one."""
    x_TD = encoder.hidden(params, run, segment_T)
    x_RD = jnp.concatenate([pool(x_TD, run, how) for how in pooling], 1)
    found = {"vector": normalise(x_RD) if unit else x_RD}
    if encoder.head is not None:
        found["logits"] = encoder.head(params, x_TD if encoder.head_per_token else x_TD[first_R(run)])
    return found
