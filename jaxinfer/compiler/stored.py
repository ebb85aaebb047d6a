"""A compiled program's way to the disk and back: found by a key for which nothing is traced."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxinfer import kernels
from jaxinfer.compiler.cache import cpu_features
from jaxinfer.compiler.fingerprint import environment, fingerprint
from jaxinfer.compiler.placement import Placement
from jaxinfer.compiler.store import Store
from jaxinfer.errors import CorruptFile, InvalidOption
from jaxinfer.home import cache_dir

LIMIT = "JAXINFER_CACHE_GB"  # of stored programs; 0 stores none
DEFAULT_LIMIT = 8.0
TARGETS = re.compile(r'custom_call @([\w$.]+)|call_target_name = "([^"]+)"')
# What XLA compiles itself. Any other custom call is a function of some library, whose address this process must have
# been told before the program is loaded; tracing does that, and we do not trace.
NATIVE = re.compile(r"Sharding|SPMD\w+|annotate_device_placement|xla\.sdy\.\w+|(mhlo\.)?topk|TopK|tpu_custom_call"
                    r"|__gpu\$xla\.gpu\.triton|__cublas\$\w+|__cudnn\$\w+")
LIBRARIES = "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cudnn-cu12", "nvidia-cublas-cu12", "libtpu"


def store() -> Store | None:
    """Where programs are kept: `programs` in `cache_dir()`. None if $JAXINFER_CACHE_GB is 0."""
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    try:
        limit = int(float(text) * 1e9)
    except ValueError:
        limit = -1
    if limit < 0:
        raise InvalidOption(f"${LIMIT} is {text!r}; it must be a number of gigabytes >= 0")
    return Store(cache_dir() / "programs", limit) if limit else None


def key(program: Any, platform: str, place: Placement, forced: Mapping[str, str],
        machine: tuple[Any, ...] | None = None) -> str:
    """The name of a program: `program` is all that is traced for it, the rest where it is to run, on this `machine` or
    on one of which `machine_of` said so. Raises Unknown."""
    ops = [(name, op.reference, op.fast, op.cut) for name, op in sorted(kernels.OPS.items())]
    where = [(d.platform, d.id, d.device_kind) for d in place.devices]
    return fingerprint(program, platform, place.axes, place.mesh, where, machine or machine_of(place.device),
                       dict(forced), ops, environment())


def machine_of(device: jax.Device) -> tuple[Any, ...]:
    """What the compiler looks at of the machine and its driver."""
    client = device.client
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cpu_features(), cores  # XLA cuts loops for so many threads
    runtime = client.platform_version.removeprefix("PJRT C API\n")  # which a compiler without a device leaves out
    return runtime, getattr(device, "compute_capability", ""), _driver(), _libraries()


@cache
def _driver() -> str:
    """The version of NVIDIA's kernel module, if there is one."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return ""


@cache
def _libraries() -> tuple[str, ...]:
    """The versions of what XLA calls or compiles with, as far as it is installed by pip."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            pass
    return tuple(found)


def describe(device: jax.Device) -> dict[str, Any]:
    """What a program's name depends on beside the program: the device and its machine, and what is installed here, in
    JSON's types."""
    names = "jaxinfer's source", "Python", "jax", "jaxlib", "numpy", "JAX's options", "XLA's flags"
    return json.loads(json.dumps({"kind": device.device_kind, "machine": machine_of(device),
                                  "installed": dict(zip(names, environment(), strict=True))}))


def obstacle(lowered: jax.stages.Lowered) -> str | None:
    """Why a program cannot be loaded by a process that did not trace it, if so."""
    targets = {one or other for one, other in TARGETS.findall(lowered.as_text())}
    foreign = sorted(target for target in targets if not NATIVE.fullmatch(target))
    return f"it calls {', '.join(foreign)}, which is not XLA's own" if foreign else None


def pack(compiled: jax.stages.Compiled) -> bytes:
    """A program's bytes. Raises what JAX raises for one that has none."""
    return pickle.dumps(serialize_executable.serialize(compiled))


def unpack(payload: bytes, place: Placement, name: str) -> jax.stages.Compiled:
    """The program, ready to be called. Raises CorruptFile for bytes that this JAX does not take."""
    try:
        return serialize_executable.deserialize_and_load(
            *pickle.loads(payload), backend=place.device.client, execution_devices=place.devices)
    except Exception as error:
        raise CorruptFile(f"program {name}: cannot be loaded: {type(error).__name__}: {error}") from error
