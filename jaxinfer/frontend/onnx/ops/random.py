"""Random numbers. A graph is a pure function, so the same node draws the same numbers on every call: the seed is the
file's, or else made from the node's name."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.tensors import element_type
from jaxinfer.frontend.onnx.values import Value, known


def key(node: Node, seed: float | None) -> jax.Array:
    text = f"{node.name}:{node.outputs}" if seed is None else repr(float(seed))
    return jax.random.key(zlib.crc32(text.encode()))


def dtype_of(number: int | None, like: Value | None = None) -> np.dtype:
    return known(element_type(number) if number else np.float32 if like is None else like.dtype)


@op("RandomNormal", fixed=False)
def random_normal(node: Node, *, shape: list[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0,
                  seed: float | None = None) -> Value:
    return mean + scale * jax.random.normal(key(node, seed), shape, dtype_of(dtype))


@op("RandomNormalLike", fixed=False, shapes_only=True)
def random_normal_like(node: Node, x: Value, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0,
                       seed: float | None = None) -> Value:
    return mean + scale * jax.random.normal(key(node, seed), x.shape, dtype_of(dtype, x))


@op("RandomUniform", fixed=False)
def random_uniform(node: Node, *, shape: list[int], dtype: int = 1, low: float = 0.0, high: float = 1.0,
                   seed: float | None = None) -> Value:
    return jax.random.uniform(key(node, seed), shape, dtype_of(dtype), low, high)


@op("RandomUniformLike", fixed=False, shapes_only=True)
def random_uniform_like(node: Node, x: Value, *, dtype: int | None = None, low: float = 0.0, high: float = 1.0,
                        seed: float | None = None) -> Value:
    return jax.random.uniform(key(node, seed), x.shape, dtype_of(dtype, x), low, high)


@op("Bernoulli", since=15, fixed=False)
def bernoulli(node: Node, x: Value, *, dtype: int | None = None, seed: float | None = None) -> Value:
    return jax.random.bernoulli(key(node, seed), x).astype(dtype_of(dtype, x))


@op("Multinomial", since=7, fixed=False)
def multinomial(node: Node, x: Value, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Value:
    """`sample_size` draws from each row of unnormalised log-probabilities."""
    draws = jax.random.categorical(key(node, seed), jnp.asarray(x), shape=(sample_size, x.shape[0]))
    return draws.T.astype(dtype_of(dtype))
