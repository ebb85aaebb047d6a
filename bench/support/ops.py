"""The ops of `jaxinfer.kernels` as calls on arrays of a real model's shapes, with what each must compute and move.

Axes: T tokens, R rows, S context, D model width, F feed-forward width, N query heads, K KV heads, H head width,
V vocabulary, E experts, A experts of a token, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import kernels
from jaxinfer.graph import Run
from jaxinfer.graphs import decoder
from jaxinfer.kernels.quantised import FP8, INT4, INT8, Format, Quantised, blank
from jaxinfer.kernels.sampling import Draws
from jaxinfer.runtime.memory import PAGE_SIZE


class Arrays(NamedTuple):
    """What one call gets: `x`, which the call before it made; `own`, its weights or logits; `state`, which it is given
    and gives back changed; and `shared`, which all calls read."""

    x: Any
    own: Any = ()
    state: Any = ()
    shared: Any = ()


@dataclass(frozen=True)
class Case:
    """`call(x, own, state, shared) -> x, state` is one call of an op, on arrays as `make()` makes them. It must compute
    `operations` in `dtype` and move `bytes`: every operand once, every result once. A chain is of `calls` calls."""

    op: str
    of: str
    call: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    make: Callable[[], Arrays]
    operations: int
    bytes: int
    dtype: str
    calls: int


@dataclass(frozen=True)
class Sizes:
    """How a model is asked: tokens of a matmul; (rows, context) of decode steps; (tokens, context) of prompt chunks;
    rows that draw; and (experts, experts of a token) of a routed layer as wide as its feed-forward layer."""

    config: decoder.Config
    tokens: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    prompts: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    experts: tuple[int, int] = (8, 2)

    @property
    def ends(self) -> tuple[int, int]:
        """The fewest tokens and the most: for ops whose time grows evenly between them."""
        return self.tokens[0], self.tokens[-1]


def cases(sizes: Sizes, dtype: str, platform: str) -> Iterator[Case]:
    """Every op at every size; `dtype` is that of weights and pages."""
    for rows, context in sizes.decode:
        yield attention(sizes.config, dtype, f"decode, {rows} x {context:,}", rows, 1, context)
    for tokens, context in sizes.prompts:
        yield attention(sizes.config, dtype, f"prompt, {tokens:,} of {context:,}", 1, tokens, context)
    for T in sizes.ends:
        yield norm(sizes.config, T)
        yield rotary(sizes.config, T)
        yield embedding(sizes.config, dtype, T)
    for T in sizes.tokens:
        yield ffn(sizes.config, dtype, T)
    for T in sizes.tokens:
        yield matmul(sizes.config, dtype, dtype, T)
    in_int8 = "bfloat16" if platform == "gpu" else "int8"
    yield from (matmul(sizes.config, dtype, in_int8, T, INT8) for T in sizes.tokens)
    if platform != "gpu":
        yield from (matmul(sizes.config, dtype, "int8", T, INT8, how="w8a8") for T in sizes.tokens)
    yield from (matmul(sizes.config, dtype, dtype, T, INT4) for T in sizes.tokens)
    yield from (matmul(sizes.config, dtype, "float8_e4m3fn" if platform == "gpu" else dtype, T, FP8)
                for T in sizes.tokens)
    for T in sizes.tokens:
        yield routed(sizes.config, dtype, T, *sizes.experts)
    for R in sizes.rows:
        yield greedy(sizes.config, R)
        yield sampling(sizes.config, R)
        yield logprobs(sizes.config, R)


def _nbytes(dtype: Any, *shape: int) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


@partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(math.prod(shape)), shape) * scale).astype(dtype)


def weight(shape: tuple[int, ...], dtype: Any, format: Format | None = None) -> jax.Array | Quantised:
    """A random matrix [O, I], which leaves the size of what it multiplies as it was."""
    scale = shape[-1] ** -0.5
    if format is None:
        return _normal(shape, dtype, scale)
    unit = {"int8": 1 / 73, "int4": 1 / 4.6, "fp8": 1.0}[format.name]  # one over the numbers' standard deviation

    def part(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
        if np.issubdtype(dtype, np.integer):
            bits = jax.random.bits(jax.random.key(0), shape, f"uint{8 * dtype.itemsize}")
            return jax.lax.bitcast_convert_type(bits, dtype)
        return _normal(shape, dtype) if dtype == format.values else jnp.full(shape, scale * unit, dtype)

    weight = blank(format, shape, dtype, part)
    return weight if weight.minimum is None else replace(weight, minimum=-7.5 * weight.scale)


def attention(config: decoder.Config, dtype: str, of: str, rows: int, tokens: int, context: int) -> Case:
    """`rows` rows of `tokens` tokens each, the last of which sees `context`."""
    N, K, H, T = config.heads, config.kv_heads, config.head_width, rows * tokens
    pages, pairs = -(-context // PAGE_SIZE), rows * tokens * (2 * context - tokens + 1) // 2

    def make() -> Arrays:
        ints = lambda *args: np.arange(*args, dtype=np.int32)
        table_RP = np.random.default_rng(0).permutation(rows * pages).reshape(rows, pages).astype(np.int32)
        run = Run(np.zeros(T, np.int32), ints(0, T + 1, tokens), np.full(rows, context, np.int32), ints(rows),
                  {"full": table_RP}, tokens, rows if tokens == 1 else 0)
        empty = kernels.init_pages(rows * pages, PAGE_SIZE, K, H, jnp.dtype(dtype))
        full = jax.tree.map(lambda page: _normal(page.shape, page.dtype), empty)
        new_TKH = _normal((T, K, H), jnp.float32)
        return Arrays(_normal((T, N, H), jnp.float32), (), full, (new_TKH, new_TKH, run))

    def call(q_TNH, _, pages, shared):
        return kernels.attend(q_TNH.astype(jnp.float32), *shared[:2], pages, shared[2], group="full", scale=H**-0.5)

    moved = _nbytes("float32", T, 2 * N + 2 * K, H) + _nbytes(dtype, rows * context, 2 * K, H)
    return Case("attend", of, call, make, 4 * N * H * pairs, moved, dtype, 8)


def norm(config: decoder.Config, T: int) -> Case:
    D = config.width
    make = lambda: Arrays(_normal((T, D), jnp.float32), jnp.ones(D))
    call = lambda x_TD, weight_D, *_: (kernels.rms_norm(x_TD, weight_D, 1e-5), ())
    return Case("rms_norm", _tokens(T), call, make, 4 * T * D, _nbytes("float32", 2 * T + 1, D), "float32", 32)


def rotary(config: decoder.Config, T: int) -> Case:
    N, H = config.heads, config.head_width
    make = lambda: Arrays(_normal((T, N, H), jnp.float32), shared=(jnp.ones((T, H)) * 0.8, jnp.ones((T, H)) * 0.6))
    call = lambda x_TNH, _own, _state, turns: (kernels.rope(x_TNH, *turns), ())
    return Case("rope", _tokens(T), call, make, 3 * T * N * H, _nbytes("float32", T, 2 * N + 2, H), "float32", 32)


def embedding(config: decoder.Config, dtype: str, T: int) -> Case:
    """Other rows in each call, so that they come from memory."""
    D, V = config.width, config.vocab
    make = lambda: Arrays(jnp.int32(0), state=jnp.zeros((T, D)), shared=(
        jax.random.randint(jax.random.key(0), (T,), 0, V), _normal((V, D), dtype)))

    def call(nth, _own, _state, shared):
        index_T, table_VD = shared
        return nth + 1, kernels.embed_rows(table_VD, (index_T + nth * T) % V)

    moved = _nbytes(dtype, T, D) + _nbytes("float32", T, D)
    return Case("embed_rows", _tokens(T), call, make, T * D, moved, "float32", 32)


def ffn(config: decoder.Config, dtype: str, T: int) -> Case:
    """The gated feed-forward layer, added to the stream."""
    D, F = config.width, config.ffn
    make = lambda: Arrays(_normal((T, D), jnp.float32), {
        "gate_up": weight((2 * F, D), dtype), "down": weight((D, F), dtype)})
    call = lambda x_TD, weights, *_: (x_TD + decoder.ffn(config, weights, x_TD, None), ())  # it reads nothing of a run
    moved = _nbytes(dtype, 3, F, D) + _nbytes("float32", T, 2 * D)
    return Case("gated FFN", _tokens(T), call, make, 6 * T * F * D, moved, dtype, 4)


def matmul(config: decoder.Config, dtype: str, multiplies: str, T: int, format: Format | None = None,
           how: str | None = None) -> Case:
    """To the feed-forward width and back: two matmuls."""
    D, F = config.width, config.ffn

    def make() -> Arrays:
        return Arrays(_normal((T, D), jnp.float32), tuple(weight(OI, dtype, format) for OI in ((F, D), (D, F))))

    def call(x_TD, weights, *_):
        for w_OI in weights:
            x_TD = kernels.matmul(x_TD, w_OI, how=how)
        return x_TD, ()

    weights = jax.tree.leaves(jax.eval_shape(make).own)
    moved = sum(_nbytes(x.dtype, *x.shape) for x in weights) + _nbytes("float32", T, 2 * (D + F))
    name = "matmul" if format is None else f"matmul_{format.name}"
    return Case(name, _tokens(T), call, make, 4 * T * D * F, moved, multiplies, 8)


def routed(config: decoder.Config, dtype: str, T: int, E: int, A: int) -> Case:
    """Experts that nobody chose need not be read."""
    D, F, rng = config.width, config.ffn, np.random.default_rng(T)
    expert_TA = np.argsort(rng.random((T, E)))[:, :A].astype(np.int32)
    make = lambda: Arrays(_normal((T, D), jnp.float32), {
        "gate_up": weight((E, 2 * F, D), dtype), "down": weight((E, D, F), dtype)},
        shared=(jnp.asarray(expert_TA), jnp.full((T, A), 1 / A)))

    def call(x_TD, weights, _state, routes):
        pair = weights["gate_up"], weights["down"]
        return x_TD + kernels.routed_ffn(x_TD, *routes, *pair, activation=jax.nn.silu), ()

    moved = _nbytes(dtype, len(np.unique(expert_TA)), 3, F, D) + _nbytes("float32", T, 2 * D)
    return Case("routed_ffn", f"{_tokens(T)}, {A} of {E} experts", call, make, 6 * T * A * F * D, moved, dtype, 1)


def _logits(config: decoder.Config, R: int, x: Callable[[], Any], state: Any = ()) -> Callable[[], Arrays]:
    return lambda: Arrays(x(), _normal((R, config.vocab), jnp.float32, 3.0), state, jnp.arange(R))


def greedy(config: decoder.Config, R: int) -> Case:
    def call(last_S, logits_RV, _state, slot_R):
        return kernels.sample_greedy(logits_RV, last_S, slot_R)

    make = _logits(config, R, lambda: jnp.zeros(R, jnp.int32), jnp.zeros(R, jnp.int32))
    return Case("sample, greedy", _rows(R), call, make, R * config.vocab, _nbytes("float32", R, config.vocab),
                "float32", 16)


def sampling(config: decoder.Config, R: int) -> Case:
    """temperature 0.8, top_k 50, top_p 0.95."""
    def call(last_S, logits_RV, _state, slot_R):
        each = partial(jnp.full, (R,))
        draws = Draws(each(0.8), each(50), each(0.95), each(0.0), slot_R.astype(jnp.uint32), last_S)
        return kernels.sample(logits_RV, last_S, slot_R, draws)

    make = _logits(config, R, lambda: jnp.zeros(R, jnp.int32), jnp.zeros(R, jnp.int32))
    return Case("sample, temperature", _rows(R), call, make, 8 * R * config.vocab,
                _nbytes("float32", R, config.vocab), "float32", 2)


def logprobs(config: decoder.Config, R: int) -> Case:
    call = lambda tokens_R, logits_RV, _state, _shared: (tokens_R, kernels.logprobs(logits_RV, tokens_R))
    found = kernels.Logprobs(jnp.zeros(R), jnp.zeros(R, jnp.int32), jnp.zeros((R, kernels.TOP), jnp.int32),
                             jnp.zeros((R, kernels.TOP)))
    return Case("logprobs", _rows(R), call, _logits(config, R, lambda: jnp.arange(R), found), 4 * R * config.vocab,
                _nbytes("float32", R, config.vocab), "float32", 2)


def _tokens(T: int) -> str:
    return f"{T:,} token{'s' if T > 1 else ''}"


def _rows(R: int) -> str:
    return f"{R:,} row{'s' if R > 1 else ''}"
