"""What comes through an endpoint's door: bound to the example's structure, checked leaf by leaf, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxinfer.compiler.functions import LeafLike
from jaxinfer.errors import InvalidRequest


class Door:
    """Turns the arguments of a call into arrays, one for each of `leaves`, or raises InvalidRequest. `names` are the
    arguments' names if they have some, `structure` is that of (args, kwargs)."""

    def __init__(self, leaves: tuple[LeafLike, ...], structure: Any, names: tuple[str, ...], limits: Mapping[str, int]):
        self.leaves, self.structure, self.names, self.limits = leaves, structure, names, limits

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, int], int]:
        """The arrays, the size of each named axis, and the bytes that had to be copied."""
        if self.names:
            args, kwargs = (), self._bind(args, kwargs)
        try:
            values = self.structure.flatten_up_to((args, kwargs))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(f"the arguments have another structure than the example: {error}; they must be "
                                 f"{self}") from error
        sizes: dict[str, int] = {}
        arrays = [self._check(leaf, value, sizes) for leaf, value in zip(self.leaves, values, strict=True)]
        copied = sum(array.nbytes for array, value in zip(arrays, values, strict=True)
                     if array is not value and array.flags.owndata)
        return arrays, sizes, copied

    def _bind(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.names):
            raise InvalidRequest(f"{len(args)} arguments were given; there are {len(self.names)}: {self}")
        given = dict(zip(self.names, args, strict=False))
        twice, unknown = given.keys() & kwargs.keys(), kwargs.keys() - set(self.names)
        missing = [name for name in self.names if name not in given and name not in kwargs]
        for what, wrong in (("given twice", twice), ("unknown", unknown), ("missing", missing)):
            if wrong:
                raise InvalidRequest(f"arguments are {what}: {', '.join(sorted(wrong))}; there are {self}")
        return {name: given[name] if name in given else kwargs[name] for name in self.names}

    def _check(self, leaf: LeafLike, value: Any, sizes: dict[str, int]) -> np.ndarray:
        array = as_array(value, leaf)
        if array.dtype != leaf.dtype:
            array = self._cast(leaf, value, array)
        if len(array.shape) != len(leaf.shape):
            raise InvalidRequest(f"{leaf.path} is {array.dtype}{list(array.shape)}; it must be {leaf}, for one request")
        for size, dim in zip(array.shape, leaf.shape, strict=True):
            if size == dim:
                continue
            if not isinstance(dim, str):
                raise InvalidRequest(f"{leaf.path} is {array.dtype}{list(array.shape)}; it must be {leaf}")
            if sizes.setdefault(dim, size) != size:
                raise InvalidRequest(f"{leaf.path} is {size} long in its axis {dim!r}, and another array of this "
                                     f"request {sizes[dim]}; they must agree")
            if not 1 <= size <= self.limits.get(dim, size):
                wanted = f"1 to {self.limits[dim]}" if dim in self.limits else "1 at least"
                raise InvalidRequest(f"{leaf.path} is {size} long in its axis {dim!r}; it must be {wanted}")
        return array

    def _cast(self, leaf: LeafLike, value: Any, array: np.ndarray) -> np.ndarray:
        """Python's own numbers, and arrays of 64 bits where JAX has 32, become what is wanted; other arrays only if
        nothing can be lost. Integers must be the same afterwards."""
        plain = not hasattr(value, "dtype") or jax.dtypes.canonicalize_dtype(array.dtype) == leaf.dtype
        floats = array.dtype.kind == "f" and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        safe = not plain and np.can_cast(array.dtype, leaf.dtype, "safe")
        known = array.dtype.kind in "biufV" or array.dtype.kind == leaf.dtype.kind
        with np.errstate(all="ignore"):
            new = array.astype(leaf.dtype) if known else None
        if new is None or not (safe or (plain and (floats or np.array_equal(new.astype(array.dtype), array)))):
            raise InvalidRequest(f"{leaf.path} is {array.dtype}{list(array.shape)}; it must be {leaf}")
        return new

    def __str__(self) -> str:
        return ", ".join(f"{leaf.path}: {leaf}" for leaf in self.leaves)


def as_array(value: Any, leaf: LeafLike) -> np.ndarray:
    """A numpy view of whatever holds numbers, without a copy if its memory can be read from here."""
    if isinstance(value, np.ndarray):
        return value
    try:
        if hasattr(value, "__dlpack__") and not isinstance(value, jax.Array):
            return np.from_dlpack(value)
    except (TypeError, BufferError, RuntimeError):
        pass  # on another device, or of a type that numpy cannot name, as bfloat16 is
    try:
        if hasattr(value, "__dlpack__") and leaf.dtype == jax.numpy.bfloat16:
            return np.asarray(jax.dlpack.from_dlpack(value))
        array = np.asarray(value)
    except Exception as error:
        raise InvalidRequest(f"{leaf.path} is a {type(value).__name__}, which is no array: {error}; it must be "
                             f"{leaf}") from error
    if array.dtype == object:
        raise InvalidRequest(f"{leaf.path} is a {type(value).__name__}, which is no array; it must be {leaf}")
    return array
