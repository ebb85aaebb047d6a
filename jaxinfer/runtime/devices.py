"""Which devices a model runs on: one by its name, or a mesh of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxinfer.errors import InvalidOption

AXES = "data", "model"  # shards that serve requests apart; devices that share one model's heads, FFN and vocabulary


def find_device(device: str | jax.Device | None) -> jax.Device:
    if device is None:
        return jax.local_devices()[0]
    if isinstance(device, jax.Device):
        return device
    kind, _, index = str(device).partition(":")
    try:
        return jax.devices(kind)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError):
        present = ", ".join(sorted({f"{d.platform}:{d.id}" for d in jax.devices()} | {"cpu"}))
        raise InvalidOption(f"device is {device!r}; present here: {present}") from None


def find_meshes(mesh: Mapping[str, int] | None, device: str | jax.Device | None) -> list[jax.Device | Mesh]:
    """One entry per data shard: its device, or the mesh over its devices.

    Raises InvalidOption for axes, sizes or a number of devices that cannot be had.
    """
    if mesh is None:
        return [find_device(device)]
    data, model = mesh_sizes(mesh)
    devices = _of_kind(device, data * model, mesh)
    if jax.process_count() > 1 and (data > 1 or len({d.process_index for d in devices}) < jax.process_count()):
        raise InvalidOption(f"mesh is {dict(mesh)}; with {jax.process_count()} processes it must have 'model' alone, "
                            f"and devices of each: {{'model': {len(jax.devices(devices[0].platform))}}}")
    if model == 1:
        return list(devices)
    grid = jax.make_mesh((data, model), AXES, (AxisType.Auto,) * 2, devices=devices).devices
    return [Mesh(row, ("model",)) for row in grid]


def mesh_sizes(mesh: Mapping[str, int]) -> tuple[int, int]:
    """The sizes of a mesh's axes, "data" and "model". Raises InvalidOption for other axes or sizes."""
    wanted = "it must be a dict of sizes such as {'model': 2} or {'data': 2, 'model': 2}"
    if not isinstance(mesh, Mapping):
        raise InvalidOption(f"mesh is {mesh!r}; {wanted}")
    if unknown := [axis for axis in mesh if axis not in AXES]:
        raise InvalidOption(f"mesh has an axis {unknown[0]!r}; its axes are {' and '.join(map(repr, AXES))}")
    for axis, size in mesh.items():
        if type(size) is not int or size < 1:
            raise InvalidOption(f"mesh has {axis}={size!r}; a size must be an integer >= 1")
    return mesh.get(AXES[0], 1), mesh.get(AXES[1], 1)


def _of_kind(device: Any, count: int, mesh: Mapping[str, int]) -> list[jax.Device]:
    """The first `count` devices of a kind."""
    if not (device is None or (isinstance(device, str) and ":" not in device)):
        raise InvalidOption(f"device is {device!r}; with a mesh it must be a kind of device, such as 'gpu'")
    present = jax.devices(find_device(device).platform)
    if count > len(present):
        sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.items())
        raise InvalidOption(f"mesh asks for {sizes} = {count} devices; there are {len(present)} of kind "
                            f"{present[0].platform} here")
    return present[:count]
