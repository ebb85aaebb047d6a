"""TreeEnsemble of ai.onnx.ml: all rows walk down all trees together, one level a step."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value

LEQ, LT, GTE, GT, EQ, NEQ, MEMBER = range(7)  # nodes_modes
SUM, AVERAGE, MIN, MAX = 1, 0, 2, 3  # aggregate_function


@op("TreeEnsemble", domain="ai.onnx.ml", since=5)
def tree_ensemble(
    node: Node, x: Value, *, leaf_targetids: list[int], leaf_weights: np.ndarray, nodes_falseleafs: list[int],
    nodes_falsenodeids: list[int], nodes_featureids: list[int], nodes_modes: np.ndarray, nodes_splits: np.ndarray,
    nodes_trueleafs: list[int], nodes_truenodeids: list[int], tree_roots: list[int],
    aggregate_function: int = SUM, membership_values: np.ndarray | None = None, n_targets: int = 1,
    nodes_hitrates: np.ndarray | None = None, nodes_missing_value_tracks_true: list[int] | None = None,
    post_transform: int = 0,
) -> Value:  # fmt: skip
    """[N, targets]. Leaves are numbered behind the inner nodes."""
    if post_transform:
        raise node.error(f"post_transform {post_transform} is not supported, only 0 (none)")
    inner, leaves = len(nodes_modes), len(leaf_targetids)
    child = lambda ids, leaf: np.array(ids) + inner * np.array(leaf)
    stay = np.arange(inner, inner + leaves)
    yes = np.concatenate([child(nodes_truenodeids, nodes_trueleafs), stay])
    no = np.concatenate([child(nodes_falsenodeids, nodes_falseleafs), stay])
    fill = lambda values, dtype: np.concatenate([np.asarray(values, dtype), np.zeros(leaves, dtype)])
    feature, split, mode = fill(nodes_featureids, int), fill(nodes_splits, x.dtype), fill(nodes_modes, int)
    missing = fill(nodes_missing_value_tracks_true or [0] * inner, bool)
    members = _members(membership_values, nodes_modes, leaves)
    row = np.arange(x.shape[0])[:, None]
    x = jnp.asarray(x)

    def step(_, at_NT: Value) -> Value:
        value, threshold = x[row, jnp.asarray(feature)[at_NT]], jnp.asarray(split)[at_NT]
        how = jnp.asarray(mode)[at_NT]
        tests = [value <= threshold, value < threshold, value >= threshold, value > threshold, value == threshold,
                 value != threshold, (value[..., None] == jnp.asarray(members)[at_NT]).any(-1)]
        taken = jnp.select([how == number for number in range(len(tests))], tests)
        taken = taken | (jnp.isnan(value) & jnp.asarray(missing)[at_NT])
        return jnp.where(taken, jnp.asarray(yes)[at_NT], jnp.asarray(no)[at_NT])

    start = jnp.broadcast_to(jnp.asarray(tree_roots), (x.shape[0], len(tree_roots)))
    leaf_NT = lax.fori_loop(0, _depth(tree_roots, yes, no, inner), step, start) - inner
    weights = np.asarray(leaf_weights, x.dtype)
    return _aggregated(leaf_NT, np.array(leaf_targetids), weights, n_targets, aggregate_function)


def _depth(roots: list[int], yes: np.ndarray, no: np.ndarray, inner: int) -> int:
    depth, level = 0, set(roots)
    while level := {int(child) for at in level if at < inner for child in (yes[at], no[at])}:
        depth += 1
    return max(depth, 1)


def _members(values: np.ndarray | None, modes: np.ndarray, leaves: int) -> np.ndarray:
    """[nodes, most]: the set that each MEMBER node tests for. The file lists them one after another, NaN between."""
    sets: list[list[float]] = [[]]
    for value in [] if values is None else values.tolist():
        if np.isnan(value):
            sets.append([])
        else:
            sets[-1].append(value)
    most, queue = max(map(len, sets)) or 1, iter(sets)
    table = np.full((len(modes) + leaves, most), np.nan)
    for place in np.flatnonzero(np.asarray(modes) == MEMBER):
        found = next(queue)
        table[place, : len(found)] = found
    return table


def _aggregated(leaf_NT: Value, targets: np.ndarray, weights: np.ndarray, count: int, how: int) -> Value:
    value, hit = jnp.asarray(weights)[leaf_NT][..., None], jnp.asarray(targets)[leaf_NT][..., None] == np.arange(count)
    if how in (MIN, MAX):
        limit, pick = (jnp.inf, jnp.min) if how == MIN else (-jnp.inf, jnp.max)
        return pick(jnp.where(hit, value, limit), 1).astype(weights.dtype)
    total = jnp.where(hit, value, 0).sum(1)
    return total / leaf_NT.shape[1] if how == AVERAGE else total
