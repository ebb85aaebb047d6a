"""Steps of a model for a device that is not here: from abstract shapes, lowered and compiled."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import kernels
from jaxinfer.compiler import Executables, Key, default_ladder
from jaxinfer.compiler.hardware import compiling_for
from jaxinfer.compiler.placement import Placement, spread
from jaxinfer.frontend.architectures import architecture
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime import memory as planning


def programs(config: dict, where: jax.Device | Mesh, quantize: str | None = None, kv_cache_dtype: str | None = None
             ) -> Executables:
    """The steps of up to eight rows of 1,024 tokens, in bfloat16."""
    graph, dtype = architecture(config, max_context=1024).graph(), jnp.dtype(jnp.bfloat16)
    place = spread(graph, where, quantize) if isinstance(where, Mesh) else Placement(where)
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
    tracing = kernels.tracing(executables.platform, executables.forced, *here)
    with tracing as traced, compiling_for(place.device, place.mesh):
        return executables.lower(key).compile(), traced.chosen
