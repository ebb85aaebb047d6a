"""Devices by name: what their memory, matmul units and links give, as data; and devices to compile for without them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh

from jaxinfer.compiler.cache import apart
from jaxinfer.errors import InvalidOption


class Work(NamedTuple):
    """What one device must do for an op, at least: `operations` in `dtype`, and `bytes` to and from memory, or between
    devices where `op` is "sum". `op` is "matmul", "routed_ffn", "attend", "sum" or "other"; `kernels` are launched.
    `shape` is what a probe must know to measure such a call."""

    op: str
    dtype: str
    operations: float
    bytes: float
    kernels: int = 1
    shape: tuple = ()


class Seconds(NamedTuple):
    """What a Work takes: until its bytes are moved, until its arithmetic is done, and on top of the longer of the two
    whatever overlaps with neither."""

    memory: float
    arithmetic: float
    beside: float = 0.0

    @property
    def all(self) -> float:
        return max(self.memory, self.arithmetic) + self.beside


@dataclass(frozen=True)
class Hardware:
    """One device. `memory` in bytes; `bandwidth` of it in bytes a second, `rates` of matmuls in operations a second by
    the dtype that is multiplied, `attention` the rate of its products (None: as a matmul); `start` are the seconds that
    a kernel takes to begin and end. A sum over devices takes `link_start` seconds and its bytes at `link` a second.
    `measured` are reached, the others published; `source` says where the figures come from. `platform` and `kind` are
    what JAX calls it."""

    name: str
    platform: str
    kind: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    link: float
    source: str
    attention: float | None = None
    start: float = 0.0
    link_start: float = 0.0
    measured: bool = False

    def seconds(self, work: Work) -> Seconds:
        """What the work takes here at least."""
        if work.op == "sum":
            return Seconds(0.0, 0.0, self.link_start + work.bytes / self.link)
        rate = self.attention if work.op == "attend" and self.attention else self.rates[work.dtype]
        return Seconds(work.bytes / self.bandwidth, work.operations / rate, work.kernels * self.start)


def _tpu(name: str, kind: str, memory: float, bandwidth: float, bfloat16: float, int8: float, link: float) -> Hardware:
    return Hardware(name, "tpu", kind, int(memory), bandwidth,
                    {"bfloat16": bfloat16, "float32": bfloat16, "int8": int8}, link,
                    "peaks that Google publishes (cloud.google.com/tpu/docs); a matmul of float32 is one of bfloat16")


def _hopper(name: str, kind: str, memory: float, bandwidth: float, source: str) -> Hardware:
    """Both have the same cores. 450 GB/s is one direction of NVLink 4; a sum of 1 MB over two took 23 us in a step."""
    return Hardware(name, "gpu", kind, int(memory), bandwidth,
                    {"bfloat16": 720e12, "float32": 362e12, "float8_e4m3fn": 1242e12, "int8": 1242e12}, 450e9, source,
                    attention=235e12, start=3e-6, link_start=20e-6, measured=True)


# The GPUs' figures are what was reached on them: a copy's bandwidth; a matmul of bfloat16 650 to 790 Tops/s by shape;
# attention of prompts 220 to 250; a kernel 3 us more than its bytes. bench/RESULTS.md has the measurements.
HARDWARE = {device.name: device for device in (
    _tpu("v5e", "TPU v5 lite", 16e9, 819e9, 197e12, 394e12, 200e9),
    _tpu("v5p", "TPU v5", 95e9, 2765e9, 459e12, 918e12, 600e9),
    _tpu("v6e", "TPU v6 lite", 32e9, 1640e9, 918e12, 1836e12, 448e9),
    _hopper("h100", "NVIDIA H100 80GB HBM3", 84_978_434_048, 2.95e12, "measured: a copy; the others as of an H200"),
    _hopper("h200", "NVIDIA H200", 150_000_000_000, 4.3e12, "measured: a copy, matmuls, attention, kernels"),
)}


def described(name: str) -> Hardware | None:
    """The device of this name ("h200"), or of what JAX calls it ("NVIDIA H200")."""
    return next((device for device in HARDWARE.values() if name in (device.name, device.kind)), None)


def tpu_topology(name: str) -> list[jax.Device]:
    """The devices of a TPU slice that is not here, "v5e:2x2" for instance, as libtpu describes them.

    Raises InvalidOption where there is no such slice, or no libtpu.
    """
    from jax.experimental import topologies

    known = ", ".join(f"{device.name}:2x2" + "x1" * (device.name == "v5p") for device in HARDWARE.values()
                      if device.platform == "tpu")
    chip, _, grid = name.partition(":") if isinstance(name, str) else ("", "", "")
    if chip not in HARDWARE or HARDWARE[chip].platform != "tpu" or not grid:
        raise InvalidOption(f"topology is {name!r}; it must be a TPU slice such as {known}")
    if find_spec("libtpu") is None:
        raise InvalidOption(f"topology is {name!r}, for which libtpu must be installed: pip install 'jaxinfer[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would ask a cloud's metadata server which TPU this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs: other processes may plan as well
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if grid == "1x1" else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices)
    except Exception as error:  # whatever the plugin raises of a grid that it does not know
        raise InvalidOption(f"topology is {name!r}; libtpu has no such slice: {str(error).splitlines()[0]}") from error


# What XLA must know of a GPU to compile for it: a Hopper, but for its name and memory.
TARGET = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 19 }} device_description_str: "{kind}" """
CORES = 132


def cuda_device(hardware: Hardware) -> jax.Device | None:
    """A GPU that is not here, for XLA to compile for; None where JAX's plugin for CUDA is not either."""
    from jax.experimental import topologies

    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        return None
    target = TARGET.format(cores=CORES, kind=hardware.kind, memory=hardware.memory, bandwidth=int(hardware.bandwidth))
    grid = "1x1x1"
    try:
        return topologies.get_topology_desc(platform="cuda", topology_name=grid, topology=grid,
                                            target_config=target).devices[0]
    except NotImplementedError:  # the plugin is there and could not be set up
        return None


@contextmanager
def compiling_for(device: jax.Device, mesh: Mesh | None) -> Iterator[None]:
    """Kernels ask the mesh in which they are traced what device they are for. JAX's cache has no part in it: it would
    look for a client of such a device."""
    if device.platform == "gpu":
        kind = AbstractDevice(device.device_kind, CORES, platform="cuda")
        meant = use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kind))
    else:
        meant = jax.set_mesh(mesh or Mesh(np.array([device]), ("x",)))
    with meant, apart():
        yield
