"""An op: a reference that defines it, and faster implementations by platform.

The choice is made while an Executable is traced: the one that is forced, the platform's own, the reference; the first
of them that is for the call.
Where it is traced for several devices, an op that says along which logical axes its arrays may be cut runs on each
device's own piece; what says nothing is left to XLA's partitioner.

>>> double = Op("double", reference=lambda x: x + x)
>>> double.add("shift", ("cpu",), lambda x: x << 1, takes=lambda x: isinstance(x, int))
>>> double(3, how="shift"), double(3), double(0.5), double.available("cpu")
(6, 6, 1.0, ['shift', 'reference'])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]  # logical, of an array's first dimensions; the others are not cut
LOGITS: Axes = (None, "vocab")


@dataclass
class Tracing:
    """Where the step being traced will run, and which implementations it chose (for the ledger): several of one op's
    are joined, "few+reference". Several devices are a `mesh`, and `axes` says which of its axes cuts a logical axis."""

    platform: str
    forced: Mapping[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    mesh: Mesh | None = None
    axes: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""

    def spec(self, axes: Axes) -> PartitionSpec:
        """How the mesh cuts an array of these logical axes."""
        return PartitionSpec(*(self.axes.get(axis) if axis else None for axis in axes))


_tracing: ContextVar[Tracing | None] = ContextVar("tracing", default=None)


@contextmanager
def tracing(platform: str, forced: Mapping[str, str] | None = None, mesh: Mesh | None = None,
            axes: Mapping[str, str] | None = None, kind: str = "") -> Iterator[Tracing]:
    """Trace for `platform` ("cpu", "gpu", "tpu") inside the `with` block, and see what was chosen.

    `forced` maps an op's name to the implementation that it takes wherever that one is for the call; `axes` a logical
    axis to the axis of `mesh` that cuts it; by the `kind` of device, kernels find what was measured there.
    """
    token = _tracing.set(Tracing(platform, forced or {}, mesh=mesh, axes=axes or {}, kind=kind))
    try:
        yield _tracing.get()  # type: ignore[misc]
    finally:
        _tracing.reset(token)


class Cut(NamedTuple):
    """The logical axes of an op's positional arguments and of its results, one tuple for all arrays of a pytree (of
    which one has fewer axes, the first of them); and of arrays that are given by name. Along the axis `summed` every
    device has a part of each result's sum."""

    inputs: tuple[Axes, ...]
    results: tuple[Axes, ...]
    named: Mapping[str, Axes] = {}
    summed: str | None = None


def shards(axis: str) -> int:
    """Into how many pieces the step being traced cuts a logical axis."""
    now = _tracing.get()
    return now.mesh.shape[now.axes[axis]] if now and now.mesh and axis in now.axes else 1


def devices() -> int:
    """How many devices the step being traced is for."""
    now = _tracing.get()
    return now.mesh.size if now and now.mesh else 1


def whole(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, made piece by piece along these logical axes, then gathered: all of it on every device. Whoever searches
    through it would otherwise talk at every turn, and XLA might gather what it is made of instead."""
    now = _tracing.get()
    if not (now and now.mesh):
        return x
    for spec in (now.spec(axes), PartitionSpec()):
        x = jax.lax.with_sharding_constraint(x, NamedSharding(now.mesh, spec))
    return x


OPS: WeakValueDictionary[str, Op] = WeakValueDictionary()  # by name, for whoever forces an implementation


@dataclass(frozen=True, eq=False)
class Op:
    """`reference` says what is computed; each of `fast` computes the same on the platforms named.

    `fast` maps an implementation's name to (platforms, function), or to (platforms, function, takes) if it is not for
    every call: `takes` gets the call's arguments, and says whether this one is. `cut` is for an op whose results along
    a logical axis depend on nothing but its arguments there, or are sums over it: it gets the positional ones, and says
    which axes they all have.
    """

    name: str
    reference: Callable[..., Any]
    fast: dict[str, tuple] = field(default_factory=dict)
    cut: Callable[..., Cut] | None = None

    def __post_init__(self):
        OPS[self.name] = self

    def add(self, name: str, platforms: tuple[str, ...], function: Callable[..., Any],
            takes: Callable[..., bool] | None = None) -> None:
        """Add an implementation, or replace one. It stands behind those that were there before: it runs where it is
        forced (`how=`, `tracing`, `ji.load(kernels=...)`), and where none of them is for the call."""
        if name == "reference":
            raise ValueError(f"the reference says what {self.name} is; it cannot be replaced")
        self.fast[name] = (platforms, function, takes) if takes else (platforms, function)

    def available(self, platform: str = "cpu") -> list[str]:
        """The implementations that `platform` can run, best first; the reference runs everywhere."""
        return [name for name, (platforms, *_) in self.fast.items() if platform in platforms] + ["reference"]

    def takes(self, how: str, *args: Any, **kwargs: Any) -> bool:
        """Whether the implementation of this name is for such a call."""
        _, _, *limits = self.fast.get(how, ((), None))
        return all(limit(*args, **kwargs) for limit in limits)

    def choice(self, platform: str | None = None, how: str | None = None,
               takes: Callable[[str], bool] = lambda how: True) -> str:
        """The implementation that is taken: `how`; else, of those that are for the call (`takes`), the one forced by
        `tracing`, or the platform's best.

        Raises ValueError where there is none of that name, or where `how` is not for the call.
        """
        now = _tracing.get() or Tracing(platform or jax.default_backend())
        forced = how or now.forced.get(self.name)
        if forced and forced not in (*self.fast, "reference"):
            raise ValueError(f"{self.name} has no implementation {forced!r}; it has {[*self.fast, 'reference']}")
        if how and not takes(how):
            raise ValueError(f"{self.name}: {how!r} was asked for, and is not for a call with these arguments")
        own = self.available(platform or now.platform)
        return next(filter(takes, [forced, *own] if forced else own))

    def __call__(self, *args: Any, how: str | None = None, **kwargs: Any) -> Any:
        now = _tracing.get()
        if not (now and now.mesh and self.cut):
            return self._run(how, kwargs, *args)
        cut = self.cut(*args)
        named = {name: kwargs.pop(name) for name in cut.named if kwargs.get(name) is not None}
        of = lambda arg, axes: jax.tree.map(lambda x: now.spec(axes[: jnp.ndim(x)]), arg)
        specs = [*map(of, args, cut.inputs)], {name: now.spec(cut.named[name]) for name in named}
        results = [now.spec(axes) for axes in cut.results]
        out = tuple(results) if len(results) > 1 else results[0]
        over = now.axes.get(cut.summed) if cut.summed else None

        def run(args, named):
            piece = self._run(how, kwargs | named, *args)
            return jax.lax.psum(piece, over) if over else piece

        return jax.shard_map(run, mesh=now.mesh, in_specs=specs, out_specs=out, check_vma=False)([*args], named)

    def _run(self, how: str | None, kwargs: dict[str, Any], *args: Any) -> Any:
        how, now = self.choice(how=how, takes=lambda how: self.takes(how, *args, **kwargs)), _tracing.get()
        if now:
            ways = *now.chosen.get(self.name, how).split("+"), how
            now.chosen[self.name] = "+".join(dict.fromkeys(ways))
        return (self.reference if how == "reference" else self.fast[how][1])(*args, **kwargs)


def device_kind() -> str:
    """The kind of device for which the step is traced, as JAX calls it."""
    now = _tracing.get()
    return now.kind if now else jax.devices()[0].device_kind


def platform() -> str:
    """Where the step being traced will run."""
    now = _tracing.get()
    return now.platform if now else jax.default_backend()
