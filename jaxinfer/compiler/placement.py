"""Where a model's arrays lie: whole on one device, or cut over the devices of a mesh along logical axes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxinfer.graph import Graph, Leaf
from jaxinfer.kernels.quantised import format_of, lane

RULES = {"heads": "model", "ffn": "model", "vocab": "model"}  # logical axis -> the mesh axis that divides it
ORDER = threading.RLock()  # programs of several devices go to all of them in one order, or they wait for each other


@dataclass(frozen=True)
class Placement:
    """`mesh` is None where `device`, the first, is the only one. `axes` are the logical axes that are cut, each by a
    mesh axis; `replicated` are those that should be and are not, and why: every device has all of them."""

    device: jax.Device
    mesh: Any = None  # a Mesh; an AbstractMesh where only shapes are placed
    axes: Mapping[str, str] = field(default_factory=dict)
    replicated: Mapping[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        return (self.device,) if self.mesh is None else tuple(self.mesh.devices.flat)

    @property
    def is_local(self) -> bool:
        """Whether all devices are this process's."""
        return all(device.process_index == jax.process_index() for device in self.devices)

    def shards(self, axis: str | None) -> int:
        """Into how many pieces a logical axis is cut."""
        name = self.axes.get(axis) if axis else None
        return self.mesh.shape[name] if self.mesh is not None and name else 1

    def along(self, *axes: str | None) -> Sharding:
        """The sharding of an array whose first dimensions are these logical axes; without any, everyone has all."""
        if self.mesh is None:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, PartitionSpec(*(self.axes.get(axis) if axis else None for axis in axes)))

    @property
    def whole(self) -> Sharding:
        return self.along()

    @property
    def logits(self) -> Sharding:
        return self.along(None, "vocab")

    def of(self, leaf: Leaf, x: Any) -> Sharding:
        """The sharding of a leaf's array, or of one beside it that has the leaf's first axes (a scale, say)."""
        axes = zip(leaf.axes, x.shape, strict=False)
        return self.along(*(axis if size % self.shards(axis) == 0 else None for axis, size in axes))

    def abstract(self, spec: Any, params: Any) -> Any:
        """The shapes of `params` with their shardings."""
        place = lambda leaf, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.of(leaf, x))
        return over_leaves(place, spec, params)

    def put(self, leaf: Leaf, x: Any) -> jax.Array:
        """An array of `leaf` on its devices, as it is stored there; of one that is read as it is cut, no more than the
        pieces of this process's devices. A leaf of several parts is stored so that each device has a piece of every
        part, not one all of the first: `kernels.split` knows."""
        sharding, order = self.of(leaf, x), self._order(leaf)
        if isinstance(x, jax.Array):
            x = jax.device_put(x, sharding)
            return x if order is None else _reorder(x, order, leaf.outputs)
        if self.mesh is None:
            return jax.device_put(x[...], sharding)

        def cut(index):
            return x[tuple(order[at] if order is not None and d == leaf.outputs else at for d, at in enumerate(index))]

        return jax.make_array_from_callback(x.shape, sharding, cut)

    def restore(self, leaf: Leaf, x: jax.Array) -> jax.Array:
        """What was `put`, in the order that the spec says; a copy where that is another one."""
        order = self._order(leaf)
        return x if order is None else _reorder(x, np.argsort(order), leaf.outputs)

    def _order(self, leaf: Leaf) -> np.ndarray | None:
        shards = self.shards(leaf.axes[leaf.outputs]) if leaf.parts else 1
        return interleaved(leaf.parts, shards) if shards > 1 else None

    def ordered(self, program: Callable) -> Callable:
        """`program`, which may not be dispatched while another one of several devices is."""
        if self.mesh is None:
            return program

        def dispatch(*args):
            with ORDER:
                return program(*args)

        return dispatch

    def __str__(self) -> str:
        if self.mesh is None:
            return f"all on {self.device}"
        size = ", ".join(f"{name}={n}" for name, n in self.mesh.shape.items())
        cut = ", ".join(f"{axis} by {name}" for axis, name in self.axes.items())
        why = "".join(f"; {axis} replicated: {why}" for axis, why in self.replicated.items())
        return f"{size}: {cut or 'nothing is cut'}{why}"


def spread(graph: Graph, mesh: Mesh | AbstractMesh, quantize: str | None = None) -> Placement:
    """The placement of `graph` on `mesh`: an axis of RULES is cut if every leaf that has it, part by part, and for
    "heads" the KV heads of every state group, can be. Of an abstract mesh it is a placement of shapes alone."""
    axes, replicated = {}, {}
    for axis, name in RULES.items():
        n, sizes = mesh.shape.get(name, 1), tuple(_sizes(graph, axis, quantize))
        wrong = next((f"{size} {what}" for size, what in sizes if size % n), None)
        if wrong:
            replicated[axis] = f"{wrong} cannot be divided by {name}={n}"
        elif sizes and n > 1:
            axes[axis] = name
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.local_devices()[0]
    return Placement(device, mesh, axes, replicated)


def _sizes(graph: Graph, axis: str, quantize: str | None) -> Iterator[tuple[int, str]]:
    """What must be divided so that a logical axis is."""
    if axis == "heads":
        yield from ((group.kv_heads, "key-value heads") for group in graph.groups)
    for leaf in jax.tree.leaves(graph.spec):
        for d, name in enumerate(leaf.axes):
            if name == axis:
                sizes = leaf.parts if d == leaf.outputs and leaf.parts else (leaf.shape[d],)
                yield from ((size, f"{'columns' if d > leaf.outputs else 'rows'} of {leaf.names[0]}") for size in sizes)
                if d == 2 and (format := format_of(leaf, quantize)) and format.group:  # each device unpacks its own
                    together = 4 * lane(leaf.shape[d])
                    yield leaf.shape[d] // together, f"times {together} columns, which int4 packs, of {leaf.names[0]}"


def interleaved(parts: Sequence[int], shards: int) -> np.ndarray:
    """The order of rows in which the first shard's piece of every part comes first, then the second's.

    >>> interleaved((4, 2), 2).tolist()
    [0, 1, 4, 2, 3, 5]
    """
    starts = np.cumsum((0, *parts))[:-1]
    return np.concatenate([start + size // shards * s + np.arange(size // shards)
                           for s in range(shards) for start, size in zip(starts, parts, strict=True)])


def _take(x: jax.Array, order: jax.Array, axis: int) -> jax.Array:
    return jnp.take(x, order, axis)


def _reorder(x: jax.Array, order: np.ndarray, axis: int) -> jax.Array:
    with ORDER:
        return jax.jit(_take, static_argnums=2, out_shardings=x.sharding)(x, order, axis)


def over_leaves(act: Callable[[Leaf, Any], Any], spec: Any, params: Any) -> Any:
    """`act(leaf, array)` for each array of params; a leaf may have several (values and their scale)."""
    return jax.tree.map(lambda leaf, value: jax.tree.map(lambda x: act(leaf, x), value), spec, params)


def held(arrays: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes, on each of the devices that share them."""
    piece = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
    return sum(math.prod(piece(x)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(arrays))
