"""How long one call of an op takes on a TPU that is not here, by the cost model of its compiler."""

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import SingleDeviceSharding

from bench.support.ops import Case
from jaxinfer import kernels
from jaxinfer.compiler.hardware import compiling_for

NOT_COUNTED = ("tpu_custom_call", " while(")  # Pallas kernels count as nothing, the body of a loop once


def seconds(case: Case, device: jax.Device) -> tuple[float | None, str]:
    """Of one call (None: not all of it is counted), and the implementation that it takes."""
    where = SingleDeviceSharding(device)
    with kernels.tracing("tpu") as traced, compiling_for(device, None):
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                                jax.eval_shape(case.make))
        x, own, state, shared = abstract
        # A fresh partial: JAX would share its trace with another platform's.
        program = jax.jit(partial(case.call), donate_argnums=2).lower(x, own, state, shared).compile()
    how, text = next(iter(traced.chosen.values()), ""), program.as_text()
    took = program.cost_analysis()["optimal_seconds"]  # a call that the model cannot estimate counts as -1 s
    return (None if took <= 0 or any(word in text for word in NOT_COUNTED) else took), how
