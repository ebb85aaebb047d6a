"""A call of an op at random, and what has to be true of whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels import Op

Pick = Callable[[Any], Any]  # some arrays of an output


class Alone(NamedTuple):
    """The call with one row alone in the same shape: what `by_itself` picks out of that output, `in_company` picks out
    of the whole call's."""

    args: tuple
    in_company: Pick
    by_itself: Pick


@dataclass(frozen=True, eq=False)
class Case:
    """A call: `args` and `arrays` (by name) are traced, `options` are not, and must be hashable.

    `real` picks out of an output what is promised within `atol` and `rtol`: no padding. `exact` picks what has to be
    the reference's to the bit. `twins` are `args` with something else wherever nobody may look.
    """

    args: tuple
    arrays: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    real: Pick = lambda output: output
    exact: Pick = lambda output: ()
    twins: tuple[tuple, ...] = ()
    alone: tuple[Alone, ...] = ()
    atol: float = 0.0
    rtol: float = 0.0

    def __repr__(self) -> str:
        like = lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else repr(x)
        return f"Case({jax.tree.map(like, self.args)}, {dict(self.arrays)}, {dict(self.options)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every number


def call(function: Callable[..., Any], case: Case, args: tuple | None = None) -> Any:
    """What a function makes of a case, in numpy; compiled once for all cases of the same shapes and options."""
    compiled = _compiled(function, tuple(sorted(case.options.items())))
    return jax.tree.map(np.asarray, compiled(*(case.args if args is None else args), **case.arrays))


@lru_cache(256)
def _compiled(function: Callable[..., Any], options: tuple) -> Callable[..., Any]:
    return jax.jit(partial(function, **dict(options)))


def check_op(op: Op | Callable[..., Any], case: Case, *, how: str | None = None,
             reference: Callable[..., Any] | None = None, batch_invariant: bool | Collection[str] = False) -> None:
    """Raise AssertionError, with the numbers, unless every implementation keeps what an op promises for this call.

    It equals the reference; whatever padding, unowned pages and junk in tables hold changes no bit; and, where
    `batch_invariant` is claimed (by all, or by those named), neither do other rows. Of an Op, all implementations that
    this platform has for the call are checked, or `how` alone; a function of your own needs a `reference`.
    """
    if isinstance(op, Op):
        taken = [name for name in op.available(jax.default_backend()) if op.takes(name, *case.args, **_keywords(case))]
        if how is not None and how not in taken:
            raise ValueError(f"{op.name} has no {how!r} here for this call; it has {taken}")
        ways = {name: _function(op, name) for name in ([how] if how else taken)}
        reference = op.reference
    elif reference is None or how is not None:
        raise ValueError("a function of your own needs a reference to be compared with, and has no other ways")
    else:
        ways = {getattr(op, "__name__", "the function"): op}
    expected = call(reference, case)
    for name, function in ways.items():
        found = call(function, case)
        _compare(partial(np.testing.assert_allclose, atol=case.atol, rtol=case.rtol), case.real, found, expected,
                 f"{name} differs from the reference")
        _compare(np.testing.assert_array_equal, case.exact, found, expected, f"{name} differs from the reference")
        for twin in case.twins:
            _compare(np.testing.assert_array_equal, case.real, call(function, case, twin), found,
                     f"{name} has looked where nobody may look: padding, an unowned page or junk in a table")
        claimed = batch_invariant if isinstance(batch_invariant, bool) else name in batch_invariant
        for args, in_company, by_itself in case.alone if claimed else ():
            _compare(np.testing.assert_array_equal, lambda x: x, by_itself(call(function, case, args)),
                     in_company(found), f"{name} is not batch-invariant: other rows have changed this one's bits")


def _keywords(case: Case) -> dict[str, Any]:
    return {**case.arrays, **case.options}


def _function(op: Op, how: str) -> Callable[..., Any]:
    return op.reference if how == "reference" else op.fast[how][1]


def _compare(check: Callable, pick: Pick, found: Any, expected: Any, message: str) -> None:
    found, expected = (jax.tree.leaves(pick(output)) for output in (found, expected))
    assert len(found) == len(expected), f"{message}: {len(found)} arrays, not {len(expected)}"
    kind = lambda x: "float" if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype  # some round what the next op would
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and kind(a) == kind(b), f"{message}: {a.dtype}{a.shape}, not {b.dtype}{b.shape}"
        check(np.asarray(a, np.float64), np.asarray(b, np.float64), err_msg=message)
