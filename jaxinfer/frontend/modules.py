"""Flax modules, and plain functions, as a pure function of params."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxinfer.errors import InvalidOption


def as_function(fn: Any, params: Any) -> tuple[Callable, Any]:
    """`call(params, *args, **kwargs)` and the params: of an NNX module its own state, of a Linen module the variables
    that were given, of a function what was given, if anything.

    Raises InvalidOption for what is none of these, or has too many params or none.
    """
    if type(fn).__module__.partition(".")[0] != "flax" and not _is_flax(fn):
        if not callable(fn):
            raise InvalidOption(f"fn is a {type(fn).__name__}; it must be a function or a Flax module")
        if params is None:
            return (lambda params, *args, **kwargs: fn(*args, **kwargs)), ()
        return fn, params
    from flax import linen, nnx

    if isinstance(fn, linen.Module):
        if params is None:
            raise InvalidOption(f"{type(fn).__name__} is a Linen module, which has no variables of its own; give them "
                                "as params: what module.init(...) returned")
        return fn.apply, params if "params" in params else {"params": params}
    if params is not None:
        raise InvalidOption(f"{type(fn).__name__} is an NNX module, which has its own variables; params must be None")
    definition, state = nnx.split(fn)

    def call(params, *args, **kwargs):
        return nnx.merge(definition, params)(*args, **kwargs)

    return call, state


def _is_flax(fn: Any) -> bool:
    return any(base.__module__.startswith("flax.") for base in type(fn).__mro__)
