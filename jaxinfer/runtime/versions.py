"""Weights that take the place of others: a version is replaced as one, and only by what fits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.errors import InvalidOption


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


def check_like(params: Any, wanted: Any) -> None:
    """Raises InvalidOption unless `params` has the structure, shapes and dtypes of `wanted`; names what differs."""
    if jax.tree.structure(params) != jax.tree.structure(wanted):
        raise InvalidOption(f"the new weights have another structure: {jax.tree.structure(params)}; it must be "
                            f"{jax.tree.structure(wanted)}")
    wrong = []
    for (path, new), old in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(wanted), strict=True):
        shape, dtype = np.shape(new), new.dtype if hasattr(new, "dtype") else np.asarray(new).dtype
        dtype = dtype if isinstance(new, jax.Array) else jax.dtypes.canonicalize_dtype(dtype)
        if shape != old.shape or dtype != old.dtype:
            wrong.append(f"{jax.tree_util.keystr(path)} is {dtype}{list(shape)} and must be {old.dtype}"
                         f"{list(old.shape)}")
    if wrong:
        raise InvalidOption(f"the new weights do not match: {'; '.join(wrong)}")
