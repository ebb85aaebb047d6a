"""An op: a reference that defines it, and faster implementations by platform.

The choice is made while an Executable is traced: by name if forced, else the platform's own, else the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass
class Tracing:
    """Where the step being traced will run, and which implementations it chose (for the ledger)."""

    platform: str
    forced: Mapping[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


_tracing: ContextVar[Tracing | None] = ContextVar("tracing", default=None)


@contextmanager
def tracing(platform: str, forced: Mapping[str, str] | None = None) -> Iterator[Tracing]:
    """Trace for `platform` ("cpu", "gpu", "tpu") inside the `with` block, and see what was chosen.

    `forced` maps an op's name to the implementation it must take.
    """
    token = _tracing.set(Tracing(platform, forced or {}))
    try:
        yield _tracing.get()  # type: ignore[misc]
    finally:
        _tracing.reset(token)


@dataclass(frozen=True)
class Op:
    """`reference` says what is computed; each of `fast` computes the same on the platforms named.

    `fast` maps an implementation's name to (platforms, function).
    """

    name: str
    reference: Callable[..., Any]
    fast: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]] = field(default_factory=dict)

    def available(self, platform: str = "cpu") -> list[str]:
        """The implementations that `platform` can run, best first; the reference runs everywhere."""
        return [name for name, (platforms, _) in self.fast.items() if platform in platforms] + ["reference"]

    def choice(self, platform: str | None = None, how: str | None = None) -> str:
        """The implementation that a call takes: `how`, else the one forced by `tracing`, else the platform's best.

        Raises ValueError where there is none of that name.
        """
        now = _tracing.get() or Tracing(platform or jax.default_backend())
        how = how or now.forced.get(self.name) or self.available(platform or now.platform)[0]
        if how not in (*self.fast, "reference"):
            raise ValueError(f"{self.name} has no implementation {how!r}; it has {[*self.fast, 'reference']}")
        return how

    def __call__(self, *args: Any, how: str | None = None, **kwargs: Any) -> Any:
        how, now = self.choice(how=how), _tracing.get()
        if now:
            now.chosen[self.name] = how
        return (self.reference if how == "reference" else self.fast[how][1])(*args, **kwargs)


def platform() -> str:
    """Where the step being traced will run."""
    now = _tracing.get()
    return now.platform if now else jax.default_backend()
