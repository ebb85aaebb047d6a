"""What a Run says of its tokens, a Leaf of its names, and a step of its rows, beside plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.graph import Block, Graph, Leaf, Pages, Run, StateGroup, forward
from tests.strategies import DECODE, GROUP, MIXED, MIXED_SINGLES, SEEDS, ragged_runs

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
    """Decode and prompt in one run, with an identity for a block: the logits are the last tokens' embeddings."""
    rng = np.random.default_rng(seed)
    last_S = rng.integers(0, 50, 6).astype(np.int32)
    embedding = rng.normal(size=(50, 4)).astype(np.float32)
    tokens_T = np.array([-1, 7, 8, -1, 3, 0], np.int32)  # rows of one, three and one token, and padding
    slot_R = rng.permutation(6)[:4].astype(np.int32)
    run = Run(tokens_T, np.array([0, 1, 4, 5, 5], np.int32), np.array([9, 3, 1, 0], np.int32), slot_R,
              {GROUP: np.zeros((4, 2), np.int32)}, 3, singles=1)
    same = Block("same", GROUP, lambda params, pages, x_TD, run: (x_TD + params["add"], pages))
    graph = Graph("identity", {}, (StateGroup(GROUP, 2, 1, 1),), lambda params, run: params["embed"][run.tokens_T],
                  (same, same), lambda params, x_RD: x_RD, vocab=4, max_context=8)
    params = {"embed": jnp.asarray(embedding), "blocks": [{"add": jnp.float32(1)}, {"add": jnp.float32(2)}]}
    state = {GROUP: [Pages(jnp.full(1, layer), jnp.zeros(1)) for layer in range(2)]}
    state, logits_RV = forward(graph, params, state, last_S, run)
    expected = embedding[[last_S[slot_R[0]], last_S[slot_R[1]], 3]] + 3
    np.testing.assert_allclose(np.asarray(logits_RV)[:3], expected, rtol=1e-6)
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
