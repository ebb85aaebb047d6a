"""Steps of a model for a device that is not here: from abstract shapes, lowered and compiled."""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh

from jaxinfer import kernels
from jaxinfer.compiler import Executables, Key, default_ladder
from jaxinfer.compiler.placement import Placement, spread
from jaxinfer.frontend.architectures import architecture
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime import memory as planning


def programs(config: dict, where: jax.Device | Mesh, quantize: str | None = None, kv_cache_dtype: str | None = None
             ) -> Executables:
    """The steps of up to eight rows of 1,024 tokens, in bfloat16."""
    graph, dtype = architecture(config, max_context=1024).graph(), jnp.dtype(jnp.bfloat16)
    place = spread(graph, where) if isinstance(where, Mesh) else Placement(where)
    size = dict(dtype=dtype, max_context=1024, max_rows=8, chunk=512, budget=16 << 30, why="HBM")
    with kernels.tracing(place.device.platform, mesh=place.mesh, axes=place.axes):
        groups = planning.page_groups(graph, quantize=quantize, kv_cache_dtype=kv_cache_dtype, place=place, **size)
        state = planning.abstract_state(graph, groups, dtype, kv_cache_dtype)
        ladder = default_ladder(8, 1024, chunks=kernels.chunks(place.device.platform))
    return Executables(graph, ladder, params=planning.abstract_params(graph, dtype, quantize), max_rows=8,
                       max_context=1024, device=place, state=state, table_width={g.name: 16 for g in groups},
                       forced=FORCED.get(quantize))


def compiled(executables: Executables, key: Key):
    """The program, and the implementations that it took."""
    place = executables.place
    here = place.mesh, place.axes, place.device.device_kind
    with kernels.tracing(executables.platform, executables.forced, *here) as traced, aimed(place.device, place.mesh):
        return executables.lower(key).compile(), traced.chosen


def aimed(device: jax.Device, mesh: Mesh | None = None) -> AbstractContextManager:
    """Where Pallas asks what it lowers for: the mesh."""
    if device.platform == "tpu":
        return jax.set_mesh(mesh or Mesh(np.array([device]), ("x",)))
    kind = AbstractDevice(device.device_kind, None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind))
