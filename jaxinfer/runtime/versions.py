"""Weights that take the place of others: a version is replaced as one, and only by what fits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import InvalidOption
from jaxinfer.kernels.quantised import Quantised, finite, quantise


class Version(NamedTuple):
    """What a batch is computed with."""

    number: int
    params: Any


def copied(params: Any) -> Any:
    """The weights in memory of their own: who wrote numpy arrays may go on writing to them."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, params)


def own(params: Any, device: jax.Device) -> Any:
    """The weights on a device, in memory of their own. Raises InvalidOption for what is no array."""
    try:
        return jax.device_put(copied(params), device)
    except TypeError as error:
        raise InvalidOption(f"params must be a pytree of arrays: {error}") from error


def fit(params: Any, wanted: Any) -> Any:
    """`params`, if they have the structure, shapes and dtypes of `wanted`; floats of a quantised weight's shape are
    quantised as that is. Raises InvalidOption that names what differs."""
    tree = jax.tree.structure(wanted, is_leaf=_is_quantised)
    if jax.tree.structure(params, is_leaf=_is_quantised) != tree:
        raise InvalidOption(f"the new weights have another structure: {jax.tree.structure(params)}; it must be "
                            f"{jax.tree.structure(wanted)}")
    named = jax.tree.leaves_with_path(params, is_leaf=_is_quantised)
    pairs = [(path, new, old) for (path, new), old in zip(named, tree.flatten_up_to(wanted), strict=True)]
    wrong = [f"{jax.tree_util.keystr(path)} is {_said(new)} and must be {_said(old)}"
             + " or floats of that shape" * _is_quantised(old)
             for path, new, old in pairs if _said(new) != _said(old) and not _quantisable(new, old)]
    if wrong:
        raise InvalidOption(f"the new weights do not match: {'; '.join(wrong)}")
    fitted = []
    for path, new, old in pairs:
        weight = quantise(new, old) if _quantisable(new, old) else new
        if weight is not new and not finite(weight):
            raise InvalidOption(f"the new weights do not match: {jax.tree_util.keystr(path)} holds NaN, or numbers too "
                                f"large for {_said(old)}")
        fitted.append(weight)
    return jax.tree.unflatten(tree, fitted)


def _is_quantised(weight: Any) -> bool:
    return isinstance(weight, Quantised)


def _quantisable(new: Any, old: Any) -> bool:
    """Whether `new` is floats in the place of a quantised weight."""
    return (_is_quantised(old) and not _is_quantised(new) and np.shape(new) == old.shape
            and jnp.issubdtype(_dtype(new), jnp.floating))


def _said(weight: Any) -> str:
    """Shape and dtype of a weight: what two that match have in common."""
    if _is_quantised(weight):
        return f"Quantised({', '.join(map(_said, jax.tree.leaves(weight)))}) for {weight.dtype}"
    return f"{_dtype(weight)}{list(np.shape(weight))}"


def _dtype(array: Any) -> Any:
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    return dtype if isinstance(array, jax.Array) else jax.dtypes.canonicalize_dtype(dtype)
