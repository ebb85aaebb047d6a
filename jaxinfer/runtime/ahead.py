"""Programs compiled before they are needed, for a device of this machine or for one that is elsewhere."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxinfer import compiler
from jaxinfer.compiler import Executables, Ledger
from jaxinfer.compiler.hardware import HARDWARE, compiling_for, cuda_device, described, tpu_topology
from jaxinfer.compiler.placement import Placement
from jaxinfer.compiler.stored import LIMIT, describe, store
from jaxinfer.errors import CorruptFile, InvalidOption
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.files import read_json
from jaxinfer.graph import Graph
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime.load import MAX_ROWS, load
from jaxinfer.runtime.origin import MAX_CONTEXT, dtype_of, model_of, scheme_of
from jaxinfer.runtime.shapes import shapes_of


def compile_ahead(source: str, topology: str | None = None, machine: str | os.PathLike | None = None, **options: Any
                  ) -> Ledger:
    """Compile and store every program that `load(source, **options)` may use, but those that score, embed, or run a
    user's function.

    `topology`: a TPU by its name, such as "v5e:1x1", for whose first chip a language model is compiled from its config
    alone. Where it will run, Python's minor version, JAX and libtpu must be those of this machine.
    `machine`: a file in which `jaxinfer cache machine` has described a machine with a GPU, for which XLA's CUDA plugin
    compiles here. A GPU that is there tries several ways of each matmul; without it, XLA takes the one that it expects
    to be fast.
    With either, `memory` must be given, here and to `load`: it decides how many pages there are.

    Raises InvalidOption, and what `load` raises.
    """
    if store() is None:
        raise InvalidOption(f"${LIMIT} is 0: no programs are stored")
    elsewhere = [name for name, given in (("topology", topology), ("machine", machine)) if given is not None]
    if not elsewhere:
        with load(source, **options) as model:
            model.warmup()
            return model.ledger
    if len(elsewhere) > 1 or options.pop("device", None) is not None or options.get("memory") is None:
        raise InvalidOption(f"{elsewhere[0]}: memory must be given, and device and another target must not, as the "
                            "device is not here to be asked")
    device, told = (tpu_topology(topology)[0], None) if topology is not None else _gpu_of(Path(machine or ""))
    executables = _for_device(source, device, told, **options)
    try:
        executables.warmup()
    finally:
        executables.close()
    return executables.ledger


def _gpu_of(file: Path) -> tuple[jax.Device, tuple[Any, ...]]:
    """The GPU of a machine that is described in a file, and what a program's name says of that machine."""
    if not file.is_file():
        raise InvalidOption(f"machine: there is no file {file}; `jaxinfer cache machine` writes one, where the GPU is")
    told = read_json(file)
    try:
        kind, (runtime, capability, driver, libraries), there = told["kind"], told["machine"], told["installed"]
        here = describe(jax.local_devices(backend="cpu")[0])["installed"]
        differ = [name for name, value in here.items() if there[name] != value]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{file}: is no description of a machine with a GPU: {error!r}") from error
    if differ:
        raise InvalidOption(f"machine: {', '.join(differ)} there and here are not the same: nothing that is compiled "
                            "here would be found there")
    if (hardware := described(kind)) is None:
        raise InvalidOption(f"machine: {kind} is not known; XLA can be told of "
                            f"{', '.join(device.kind for device in HARDWARE.values() if device.platform == 'gpu')}")
    if (device := cuda_device(hardware)) is None:
        raise InvalidOption("machine: XLA's CUDA plugin is not here: pip install jax-cuda13-pjrt, of jaxlib's version, "
                            "nvidia-cuda-nvcc and nvidia-nvvm")
    return device, (runtime, capability, driver, tuple(libraries))


def _for_device(source: str, device: jax.Device, machine: tuple[Any, ...] | None, *, memory: int | str,
                dtype: str | None = None, quantize: str | None = None, kv_cache_dtype: str | None = None,
                max_context: int | None = None, max_rows: int = MAX_ROWS) -> Executables:
    compiler.enable()
    checkpoint = open_checkpoint(resolve(source))
    quantize = scheme_of(checkpoint, quantize)
    _, model = model_of(checkpoint, None, max_context)
    if not isinstance(model, Graph):
        raise InvalidOption(f"{source} is an encoder; only language models are compiled for a device that is not here")
    programs = partial(_Elsewhere, machine=machine)
    shapes = shapes_of(model, [Placement(device)], dtype_of(checkpoint, dtype),
                       max_context=max_context or min(MAX_CONTEXT, model.max_context), max_rows=max_rows,
                       quantize=quantize, kv_cache_dtype=kv_cache_dtype, batch_invariant=False, memory=memory,
                       forced=FORCED.get(quantize, {}), programs=programs)
    return programs(model, shapes.ladder, device=device, **shapes.given)


class _Elsewhere(Executables):
    """Programs of a device that is not here: they are not loaded."""

    def __init__(self, *what: Any, machine: tuple[Any, ...] | None, **how: Any):
        super().__init__(*what, **how)
        self.machine = machine

    def lower(self, key: Any) -> jax.stages.Lowered:
        with compiling_for(self.place.device, None):
            return super().lower(key)

    def _load(self, stored_as: str | None, entry: Any) -> None:
        return None
