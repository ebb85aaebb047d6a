"""Programs compiled before they are needed, for a device of this machine or for a TPU that is elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer import compiler
from jaxinfer.compiler import Executables, Ledger
from jaxinfer.compiler.placement import Placement
from jaxinfer.compiler.stored import LIMIT, store
from jaxinfer.errors import InvalidOption
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.graph import Graph
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime.load import MAX_ROWS, load
from jaxinfer.runtime.origin import MAX_CONTEXT, dtype_of, model_of, scheme_of
from jaxinfer.runtime.shapes import shapes_of


def compile_ahead(source: str, topology: str | None = None, **options: Any) -> Ledger:
    """Compile and store every program that `load(source, **options)` may use.

    `topology`: a TPU by its name, such as "v5e:1x1", for whose first chip a language model is compiled from its config
    alone. `memory` must then be given, here and to `load`: it decides how many pages there are. Where it will run, the
    versions of Python, JAX and libtpu must be those of this machine. GPUs choose their matmuls by measurement: their
    programs are compiled on one of the kind, and carried over by `jaxinfer cache export`.

    Raises InvalidOption, and what `load` raises.
    """
    if store() is None:
        raise InvalidOption(f"${LIMIT} is 0: no programs are stored")
    if topology is None:
        with load(source, **options) as model:
            model.warmup()
            return model.ledger
    if options.pop("device", None) is not None or options.get("memory") is None:
        raise InvalidOption("topology: memory must be given and device must not, as the chip is not here to be asked")
    executables = _for_chip(source, find_chip(topology), **options)
    try:
        executables.warmup()
    finally:
        executables.close()
    return executables.ledger


def find_chip(topology: str) -> jax.Device:
    """The first chip of a TPU that is not here. Raises InvalidOption."""
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices[0]
    except Exception as error:
        raise InvalidOption(f"topology is {topology!r}; it must be a TPU's, such as 'v5e:1x1', and libtpu be installed "
                            f"(pip install 'jaxinfer[tpu]'): {error}") from error


def _for_chip(source: str, chip: jax.Device, *, memory: int | str, dtype: str | None = None,
              quantize: str | None = None, kv_cache_dtype: str | None = None, max_context: int | None = None,
              max_rows: int = MAX_ROWS) -> Executables:
    compiler.enable()
    checkpoint = open_checkpoint(resolve(source))
    quantize = scheme_of(checkpoint, quantize)
    _, model = model_of(checkpoint, None, max_context)
    if not isinstance(model, Graph):
        raise InvalidOption(f"{source} is an encoder; only language models are compiled for a topology")
    shapes = shapes_of(model, [Placement(chip)], dtype_of(checkpoint, dtype),
                       max_context=max_context or min(MAX_CONTEXT, model.max_context), max_rows=max_rows,
                       quantize=quantize, kv_cache_dtype=kv_cache_dtype, batch_invariant=False, memory=memory,
                       forced=FORCED.get(quantize, {}))
    return _Elsewhere(model, shapes.ladder, device=chip, **shapes.given)


class _Elsewhere(Executables):
    """Programs of a chip that is not here: they are not loaded. Pallas asks the mesh which TPU it is for."""

    def lower(self, key: Any) -> jax.stages.Lowered:
        with jax.set_mesh(Mesh(np.array([self.place.device]), ("x",))):
            return super().lower(key)

    def _load(self, stored_as: str | None, entry: Any) -> None:
        return None
