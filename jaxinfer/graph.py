"""What a model is: its weights (Leaf), the state it needs (StateGroup), and pure functions over a run of tokens.

Axes: T tokens, R rows, P pages per row, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Params = Any  # a pytree of arrays in the shape of Graph.spec
State = dict[str, list["Pages"]]  # state group -> one entry per layer of that group


@dataclass(frozen=True, init=False)
class Leaf:
    """One weight, said once: shape, logical axes, names in checkpoints, and the fix-up from file to array.

    `names` are alternatives, tried in order; "a + b" concatenates a and b along axis 0. A leaf of three axes may be
    joined of matrices: in the file its first two axes are then one. `transpose` swaps the two axes of a tensor that
    the file stores as `[in, out]`. A leaf with `exact=True` keeps float32 in every dtype (norms and biases: they are
    tiny, and rounding them costs accuracy for nothing). `parts` are the sizes, along the axis of its outputs, of what
    the leaf joins, if whoever reads it takes them apart by `kernels.split`: several devices then share each part, not
    one of them having the first.

    >>> Leaf((96, 64), ("ffn", "embed"), "mlp.up_proj.weight").alternatives
    (('mlp.up_proj.weight',),)
    >>> Leaf((3, 4), ("qkv", "embed"), "q + k + v", "qkv").alternatives
    (('q', 'k', 'v'), ('qkv',))
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    names: tuple[str, ...]
    transpose: bool
    exact: bool
    parts: tuple[int, ...]

    def __init__(self, shape: Sequence[int], axes: Sequence[str | None], *names: str, transpose=False, exact=False,
                 parts: Sequence[int] = ()):
        assert len(shape) == len(axes) and names, (shape, axes, names)
        assert not parts or sum(parts) == shape[max(0, len(shape) - 2)], (shape, parts)
        values = (tuple(shape), tuple(axes), names, transpose, exact, tuple(parts))
        for key, value in zip(("shape", "axes", "names", "transpose", "exact", "parts"), values, strict=True):
            object.__setattr__(self, key, value)

    @property
    def outputs(self) -> int:
        """The axis of its outputs: of a matrix, or many of them, the last but one."""
        return max(0, len(self.shape) - 2)

    @property
    def alternatives(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(name.split(" + ")) for name in self.names)

    def under(self, prefix: str) -> Leaf:
        """The same leaf with `prefix` before each of its names: a block's leaf becomes a layer's."""
        names = (" + ".join(prefix + part for part in parts) for parts in self.alternatives)
        return Leaf(self.shape, self.axes, *names, transpose=self.transpose, exact=self.exact, parts=self.parts)


@dataclass(frozen=True)
class StateGroup:
    """Layers whose state is kept alike. `window` is None for pages that grow with the context; with a window,
    pages that no later token can see return to the pool."""

    name: str
    layers: int
    kv_heads: int
    head_width: int
    window: int | None = None


class Pages(NamedTuple):
    """One layer's keys and values in pages `[pages, K, S, H]`: K KV heads, S slots, H head width.

    The attention op owns the layout (`kernels.attention`), and this is the usual one. Any other is a tuple of arrays
    with the same properties and methods: slots lie along `slot_axis` of each of its arrays, and pages along axis 0;
    `axes` are the logical ones of its first dimensions.
    """

    k: jax.Array
    v: jax.Array
    axes = None, "heads"
    slot_axis = 2

    @property
    def shape(self) -> tuple[int, ...]:
        """(pages, K, S, H), in every layout."""
        return self.k.shape

    @property
    def dtype(self) -> Any:
        """What queries and softmax weights are rounded to before they meet keys and values."""
        return self.k.dtype

    @classmethod
    def entries(cls, k_TKH: jax.Array, v_TKH: jax.Array) -> Pages:
        """What each token puts into its slot of each array."""
        return cls(k_TKH, v_TKH)

    def read(self, page: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The pages of these numbers, which must be in bounds: keys and values, both [..., K, S, H]."""
        take = lambda pages: pages.at[page].get(mode="promise_in_bounds")
        return take(self.k), take(self.v)


@partial(jax.tree_util.register_dataclass,
         data_fields=["tokens_T", "cu_q_lens", "kv_lens_R", "slot_R", "tables"], meta_fields=["longest", "singles"])
@dataclass(frozen=True)
class Run:
    """A generation step's input: T tokens, flat, that belong to R rows. All arrays are int32.

    `cu_q_lens` [R+1]: row r owns tokens `cu_q_lens[r]:cu_q_lens[r+1]`; tokens from `cu_q_lens[R]` on are padding.
    `kv_lens_R`: tokens that the row has after this step, cached ones included; 0 for a padded row.
    `slot_R`: the row's stable index, by which the device finds its last sampled token.
    `tables`: page table [R, P] per state group; entries past a row's pages may hold anything.
    `longest` (static): no row has more tokens than this. Decode is `longest == 1`, where token r is row r.
    `singles` (static): the first `singles` rows have one token each, or none where they are padding. An op may then
    spare them the width of the others; 0 says nothing.
    """

    tokens_T: Any
    cu_q_lens: Any
    kv_lens_R: Any
    slot_R: Any
    tables: dict[str, Any]
    longest: int = field(metadata={"static": True})
    singles: int = field(default=0, metadata={"static": True})

    @property
    def valid_T(self) -> jax.Array:
        return jnp.arange(self.tokens_T.shape[0]) < self.cu_q_lens[-1]

    @property
    def row_T(self) -> jax.Array:
        """The row of each token; padding belongs to the last row."""
        T = jnp.arange(self.tokens_T.shape[0])
        ends_R = self.cu_q_lens[1:]
        return jnp.minimum((ends_R[None, :] <= T[:, None]).sum(1, dtype=jnp.int32), ends_R.shape[0] - 1)

    @property
    def position_T(self) -> jax.Array:
        """Each token's position in its sequence, from 0. Padding gets 0."""
        T = jnp.arange(self.tokens_T.shape[0], dtype=jnp.int32)
        position_T = self.kv_lens_R[self.row_T] - self.cu_q_lens[1:][self.row_T] + T
        return jnp.where(self.valid_T, position_T, 0)

    @property
    def last_R(self) -> jax.Array:
        """The flat index of each row's last token; 0 for a padded row."""
        return jnp.maximum(self.cu_q_lens[1:] - 1, 0)


@dataclass(frozen=True)
class Block:
    """One layer. `apply(params, pages, x_TD, run) -> x_TD, pages`. Blocks of one `kind` share code and shapes, and
    those that share the very function are traced once."""

    kind: str
    group: str
    apply: Callable[[Params, Pages, jax.Array, Run], tuple[jax.Array, Pages]]


@dataclass(frozen=True)
class Graph:
    """A layered model: `embed`, one `Block` per layer, `final`, `head`, and `spec`, the tree of leaves they read.

    `spec` is `{"blocks": [one tree per layer], ...}`; `embed(params, run) -> x_TD`, `final(params, x_TD) -> x_TD`
    (what makes the stream the model's hidden states: a norm, usually) and `head(params, x_RD) -> logits_RV` (float32)
    see the whole of params, or all but its blocks where these are streamed; a block only its own tree. `ignore` are
    patterns of checkpoint tensors that may be present and are not read.
    """

    name: str
    spec: Params
    groups: tuple[StateGroup, ...]
    embed: Callable[[Params, Run], jax.Array]
    blocks: tuple[Block, ...]
    head: Callable[[Params, jax.Array], jax.Array]
    vocab: int
    max_context: int
    ignore: tuple[str, ...] = ()
    final: Callable[[Params, jax.Array], jax.Array] = lambda params, x_TD: x_TD


def forward(graph: Graph, params: Params, state: State, last_S: jax.Array, run: Run) -> tuple[State, jax.Array]:
    """One step: read the run's tokens into the state and return it with `logits_RV` of each row's last token.

    A token of -1 stands for the last token sampled in its row's slot (`last_S`), which the host need not know.
    """
    state, x_TD = _stream(graph, params, state, last_S, run)
    return state, graph.head(params, graph.final(params, x_TD[run.last_R]))


def hidden(graph: Graph, params: Params, state: State, last_S: jax.Array, run: Run) -> tuple[State, jax.Array]:
    """The same step, returning the state with the hidden states `x_TD` of all tokens: what `head` would read."""
    state, x_TD = _stream(graph, params, state, last_S, run)
    return state, graph.final(params, x_TD)


def _stream(graph: Graph, params: Params, state: State, last_S: jax.Array, run: Run) -> tuple[State, jax.Array]:
    """The state after the run, and the stream after the last block."""
    run, x_TD = begin(graph, params, last_S, run)
    pages = {group.name: iter(state[group.name]) for group in graph.groups}
    written: State = {group.name: [] for group in graph.groups}
    # Layers that share a function are traced once; a fresh partial, since JAX would also share the trace with steps
    # for other platforms.
    traced = {block.apply: jax.jit(partial(block.apply)) for block in graph.blocks}
    for block, layer in zip(graph.blocks, params["blocks"], strict=True):
        x_TD, new = traced[block.apply](layer, next(pages[block.group]), x_TD, run)
        written[block.group].append(new)
    return written, x_TD


def begin(graph: Graph, params: Params, last_S: jax.Array, run: Run) -> tuple[Run, jax.Array]:
    """The run with every token known, and the stream before the first block."""
    run = replace(run, tokens_T=jnp.where(run.tokens_T < 0, last_S[run.slot_R[run.row_T]], run.tokens_T))
    return run, graph.embed(params, run)


@dataclass(frozen=True)
class Encoder:
    """A layered model without state, which reads each row of a run once, whole: a run of it has no tables.

    `hidden(params, run, segment_T=None) -> x_TD` (float32) are the hidden states of all tokens; `segment_T` says which
    text of a pair a token is of (int32; None: the first). `head` is None, or reads the hidden states of each row's
    first token, `head(params, x_RD) -> logits_RC` (float32), or of every token where `head_per_token`; `labels` are
    the names of the C classes, of which a text has "one", or "any" number; or else each logit is a "number" that means
    itself (`problem`). `max_context` is the longest row, special tokens included.
    """

    name: str
    spec: Params
    hidden: Callable[..., jax.Array]
    width: int
    vocab: int
    max_context: int
    ignore: tuple[str, ...] = ()
    head: Callable[[Params, jax.Array], jax.Array] | None = None
    head_per_token: bool = False
    labels: tuple[str, ...] = ()
    problem: Literal["one", "any", "number"] = "one"
