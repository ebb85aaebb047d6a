"""What a Run says of its tokens, a Leaf of its names, and a step of its rows, beside plain Python."""

from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Block, Graph, Leaf, Pages, Run, StateGroup, forward, hidden
from jaxinfer.kernels import init_pages, tracing
from jaxinfer.testing import DECODE, GROUP, MIXED, MIXED_SINGLES, SEEDS, ragged_runs
from tests import tiny

NAMES = st.text("abc.", min_size=1)


@jax.jit
def properties(run):
    return run.valid_T, run.row_T, run.position_T, run.last_R


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("shape", [DECODE, MIXED, MIXED_SINGLES], ids=["decode", "mixed", "singles"])
@given(data=st.data())
def test_a_run_knows_the_row_and_the_position_of_each_token(shape, data):
    ragged = data.draw(ragged_runs(shape))
    real, rows = ragged.ends[-1], len(ragged.lens)
    valid_T, row_T, position_T, last_R = map(np.asarray, properties(ragged.run(0)))
    assert valid_T.tolist() == [t < real for t in range(shape.tokens)]
    assert row_T[:real].tolist() == [r for r, n in enumerate(ragged.lens) for _ in range(n)]
    assert position_T[:real].tolist() == [at for _, at in ragged.tokens]
    assert last_R[:rows].tolist() == [max(end - 1, 0) for end in ragged.ends]
    for padding, most in ((row_T[real:], shape.rows), (position_T[real:], 1), (last_R[rows:], shape.tokens)):
        assert all(0 <= i < most for i in padding), "padding points out of bounds"


@given(seed=SEEDS)
def test_a_step_takes_unknown_tokens_from_their_rows_slots(seed):
    """Decode and prompt in one run of blocks that add: hidden states and logits are embeddings, shifted."""
    rng = np.random.default_rng(seed)
    last_S = rng.integers(0, 50, 6).astype(np.int32)
    embedding = rng.normal(size=(50, 4)).astype(np.float32)
    tokens_T = np.array([-1, 7, 8, -1, 3, 0], np.int32)  # rows of one, three and one token, and padding
    slot_R = rng.permutation(6)[:4].astype(np.int32)
    run = Run(tokens_T, np.array([0, 1, 4, 5, 5], np.int32), np.array([9, 3, 1, 0], np.int32), slot_R,
              {GROUP: np.zeros((4, 2), np.int32)}, 3, singles=1)
    same = Block("same", GROUP, lambda params, pages, x_TD, run: (x_TD + params["add"], pages))
    graph = Graph("identity", {}, (StateGroup(GROUP, 2, 1, 1),), lambda params, run: params["embed"][run.tokens_T],
                  (same, same), lambda params, x_RD: x_RD * 10, vocab=4, max_context=8,
                  final=lambda params, x_TD: x_TD - 1)
    params = {"embed": jnp.asarray(embedding), "blocks": [{"add": jnp.float32(1)}, {"add": jnp.float32(2)}]}
    state = {GROUP: [Pages(jnp.full(1, layer), jnp.zeros(1)) for layer in range(2)]}
    read = embedding[[last_S[slot_R[0]], 7, 8, last_S[slot_R[1]], 3]] + 3 - 1
    np.testing.assert_allclose(np.asarray(hidden(graph, params, state, last_S, run)[1])[:5], read, atol=1e-5)
    state, logits_RV = forward(graph, params, state, last_S, run)
    np.testing.assert_allclose(np.asarray(logits_RV)[:3], read[[0, 3, 4]] * 10, atol=1e-4)
    assert [int(pages.k[0]) for pages in state[GROUP]] == [0, 1], "layers keep their places"


def test_a_run_is_a_pytree_whose_row_lengths_are_static():
    run = Run(1, 2, 3, 4, {GROUP: 5}, longest=6)
    assert jax.tree.leaves(run) == [1, 2, 3, 4, 5]
    assert jax.tree.map(lambda x: x, run) == run
    assert jax.tree.structure(run) != jax.tree.structure(Run(1, 2, 3, 4, {GROUP: 5}, longest=7))
    assert jax.tree.structure(run) != jax.tree.structure(Run(1, 2, 3, 4, {GROUP: 5}, longest=6, singles=1))


@given(names=st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=3), prefix=NAMES,
       transpose=st.booleans(), exact=st.booleans())
def test_a_leaf_under_a_prefix_has_it_before_each_of_its_names(names, prefix, transpose, exact):
    leaf = Leaf([3, 4], ["ffn", None], *map(" + ".join, names), transpose=transpose, exact=exact)
    assert leaf.alternatives == tuple(map(tuple, names))
    under = leaf.under(prefix)
    assert under.alternatives == tuple(tuple(prefix + part for part in parts) for parts in names)
    for same in ("shape", "axes", "transpose", "exact"):
        assert getattr(under, same) == getattr(leaf, same)
    assert under.shape == (3, 4) and under.axes == ("ffn", None)


def test_a_leaf_needs_a_name_and_an_axis_for_each_dimension():
    for wrong in (lambda: Leaf((3, 4), ("ffn",), "a"), lambda: Leaf((3,), ("ffn",))):
        with pytest.raises(AssertionError):
            wrong()


@dataclass(frozen=True, eq=False)
class Reader:
    """A random model that reads one sequence, as rows of a run whose shape never changes: T tokens, R rows. Pages
    hold S slots; a row has P of them, and there are `pages` in all, NaN where nobody has written."""

    graph: Graph
    dtype: str
    T: int
    R: int
    S: int = 4
    P: int = 6
    pages: int = 20

    @cached_property
    def params(self):
        rng = np.random.default_rng(0)
        draw = lambda leaf: rng.normal(size=leaf.shape) * (1.4 / leaf.shape[-1] ** 0.5 if len(leaf.shape) > 1 else 1)
        array = lambda leaf: jnp.asarray(draw(leaf), "float32" if leaf.exact else self.dtype)
        return jax.tree.map(array, self.graph.spec, is_leaf=lambda x: isinstance(x, Leaf))

    @cached_property
    def step(self):
        with tracing("cpu", {"attend": "by_page"}):
            run = Run(*(jnp.zeros(n, jnp.int32) for n in (self.T, self.R + 1, self.R, self.R)),
                      {g.name: jnp.zeros((self.R, self.P), jnp.int32) for g in self.graph.groups}, self.T)
            step = jax.jit(partial(forward, self.graph), donate_argnums=1)
            return step.lower(self.params, self.empty(), jnp.zeros(self.R, jnp.int32), run).compile()

    def empty(self):
        """The state, all NaN."""
        pages = lambda g: init_pages(self.pages, self.S, g.kv_heads, g.head_width, self.dtype)
        state = {g.name: [pages(g) for _ in range(g.layers)] for g in self.graph.groups}
        return jax.tree.map(lambda page: jnp.full_like(page, jnp.nan), state)

    def read(self, tokens, cuts, rng=None) -> dict[int, bytes]:
        """The logits at the end of each chunk, by position; chunks end at `cuts`. With `rng`, the sequence's pages lie
        anywhere, and each step has other rows, of any length and age, before and after: junk, on pages of junk."""
        order = np.arange(self.pages) if rng is None else rng.permutation(self.pages)
        own, others = order[:self.P], order[self.P:]
        state, found = self.empty(), {}
        for start, end in zip((0, *cuts), cuts, strict=False):
            rows = [(tokens[start:end], end, own)]
            while rng is not None and len(rows) < self.R and rng.random() < 0.8:
                room = self.T - sum(len(row) for row, _, _ in rows)
                if room == 0:
                    break
                count = int(rng.integers(1, min(room, self.S * self.P) + 1))
                age = int(rng.integers(count, self.S * self.P + 1))
                row = rng.integers(0, self.graph.vocab, count), age, rng.choice(others, self.P)
                rows.insert(int(rng.integers(0, len(rows) + 1)), row)
            mine = next(r for r, (_, _, table) in enumerate(rows) if table is own)
            state, logits_RV = self.step(self.params, state, np.zeros(self.R, np.int32), self.run(rows))
            found[end] = np.asarray(logits_RV)[mine].tobytes()
            assert np.isfinite(np.frombuffer(found[end], np.float32)).all()
        return found

    def run(self, rows) -> Run:
        pad = lambda values, most, filler=0: np.array([*values, *[filler] * (most - len(values))], np.int32)
        ends = np.cumsum([len(row) for row, _, _ in rows]).tolist()
        table_RP = np.zeros((self.R, self.P), np.int32)
        table_RP[:len(rows)] = [table for _, _, table in rows]
        return Run(pad(np.concatenate([row for row, _, _ in rows]), self.T), pad([0, *ends], self.R + 1, ends[-1]),
                   pad([age for _, age, _ in rows], self.R), np.zeros(self.R, np.int32),
                   {g.name: table_RP for g in self.graph.groups}, self.T)


WINDOWED = {**tiny.WINDOWED, "sliding_window": 7}
READERS = [Reader(architecture(config).graph(), dtype, T, R) for config, dtype, T, R in (
    (tiny.PLAIN, "float32", 16, 16), (tiny.PLAIN, "bfloat16", 24, 5), (WINDOWED, "float32", 17, 3),
    (WINDOWED, "bfloat16", 32, 32), (tiny.ROUTED, "float32", 24, 4), (tiny.ROUTED, "bfloat16", 16, 16))]


@pytest.mark.parametrize("reader", READERS, ids=lambda r: f"{r.graph.blocks[-1].kind}-{r.dtype}-T{r.T}-R{r.R}")
@given(data=st.data())
def test_in_one_fixed_shape_neighbours_and_chunks_change_no_bit(reader, data):
    """Promise 2's batch-invariant mode: what it needs is one run shape and attention by page."""
    tokens = np.random.default_rng(data.draw(SEEDS)).integers(0, reader.graph.vocab, reader.S * reader.P)
    alone = reader.read(tokens, range(1, len(tokens) + 1))
    cuts = data.draw(st.sets(st.integers(1, len(tokens)), min_size=2), label="cuts")
    cuts = sorted(cuts.union(range(reader.T, len(tokens), reader.T)))  # no chunk is longer than the run
    for rng in (None, np.random.default_rng(data.draw(SEEDS))):
        for at, logits in reader.read(tokens, cuts, rng).items():
            assert logits == alone[at], f"the logits after {at} tokens differ"
