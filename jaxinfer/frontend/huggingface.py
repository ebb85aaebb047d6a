"""Params as the tensors of a Hugging Face checkpoint: what a leaf joined is cut apart again, where it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax
import numpy as np

from jaxinfer.graph import Leaf

# Of the names that a leaf may have, those with such a word in them are the family's own; else the first are.
SPELLING = {"mixtral": ("block_sparse_moe",), "phi3": ("qkv_proj", "gate_up_proj")}


@dataclass(frozen=True, eq=False)
class Cut:
    """Rows of an array of params, read or unread, as a checkpoint has them: `x[...]` reads them, and no others. An
    array of three axes is joined of matrices, one after another, of each of which it has rows."""

    array: Any
    rows: slice
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.rows.stop - self.rows.start, *self.array.shape[1:][-1:])
        return shape[::-1] if self.transpose else shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        if len(self.array.shape) == 3:
            matrix, first = divmod(self.rows.start, self.array.shape[1])
            found = self.array[matrix : matrix + 1, first : first + self.rows.stop - self.rows.start][0]
        else:
            found = self.array[self.rows]
        return np.asarray(found.T if self.transpose else found)


def named(spec: Any, params: Any, model_type: str | None) -> dict[str, Any]:
    """The tensors of a checkpoint by their names, in order: the inverse of what `load_params` does."""
    leaves, tree = jax.tree.flatten(spec)
    found = {}
    for leaf, array in zip(leaves, tree.flatten_up_to(params), strict=True):
        names = _names(leaf, SPELLING.get(model_type or "", ()))
        if len(names) == 1 and not leaf.transpose:
            found[names[0]] = array
            continue
        rows = math.prod(leaf.shape[: max(1, len(leaf.shape) - 1)])
        sizes = leaf.parts if len(leaf.parts) == len(names) else (rows // len(names),) * len(names)
        for name, size, end in zip(names, sizes, accumulate(sizes), strict=True):
            found[name] = Cut(array, slice(end - size, end), leaf.transpose)
    return found


def _names(leaf: Leaf, words: tuple[str, ...]) -> tuple[str, ...]:
    own = (names for names in leaf.alternatives if any(word in names[0] for word in words))
    return next(own, leaf.alternatives[0])
